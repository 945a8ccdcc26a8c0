"""Short runs of train.py that several test files start, and how their folders are read."""
import json

from conftest import ROOT

WARM = ROOT / "weights" / "tiny-warm"


def commands(world, shell):
    """The words of a short run of each kind. Step-GRPO starts from the shipped weak model: a random
    one never earns a reward, and nothing would be updated."""
    rest = ("--save-every", 3, "--log-every", 2, "--threads", 1)
    grpo = ("grpo", "--model", WARM, *rest, "--val-every", 0, "--group", 4)
    steps = world / "steps.jsonl"
    return {
        "sft": ("sft", "--model", shell, *rest, "--data", f"{steps}=2", world / "copy.jsonl"),
        "online": (*grpo, "--world", world, "--prompts", 6, "--open-questions", 12),
        "offline": (*grpo, "--mode", "offline", "--data", steps, "--prompts", 6),
        "outcome": (*grpo, "--mode", "outcome", "--world", world, "--questions", 4),
    }


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def log_of(run):
    """Log rows of updates, without what the clock says."""
    rows = []
    for row in rows_of(run / "log.jsonl"):
        timeless = {}
        for name, value in row.items():
            if not name.endswith(("seconds", "_s")) and name != "validation":
                timeless[name] = value
        rows.append(timeless)
    return rows


def weights_of(run):
    return (run / "last" / "model.safetensors").read_bytes()
