"""Short runs of train.py that several test files start, and how their folders are read."""
import json

from conftest import ROOT

WARM = ROOT / "weights" / "tiny-warm"


def commands(world, shell):
    """The words of a short run of each kind. Step-GRPO starts from the shipped weak model: a random
    one never earns a reward, and nothing would be updated."""
    rest = ("--save-every", 3, "--log-every", 2, "--threads", 1)
    grpo = ("grpo", "--model", WARM, *rest, "--val-every", 0, "--group", 4)
    steps, questions = world / "steps.jsonl", world / "questions.jsonl"
    outcome = (*grpo, "--mode", "outcome", "--questions", 4)
    own_bases = [f"{base}={world / 'kb' / base}" for base in ("text", "image", "table")]
    return {
        "sft": ("sft", "--model", shell, *rest, "--data", f"{steps}=2", world / "copy.jsonl"),
        "online": (*grpo, "--world", world, "--prompts", 6, "--open-questions", 12),
        "offline": (*grpo, "--mode", "offline", "--data", steps, "--prompts", 6),
        "outcome": (*outcome, "--world", world),
        "trajectory": (*outcome, "--world", world, "--credit", "trajectory"),
        "own": (*outcome, "--kb", *own_bases, "--data", questions, "--several", "--lower-case"),
    }


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def log_of(run):
    """Log rows of updates, without what the clock says."""
    rows = []
    for row in rows_of(run / "log.jsonl"):
        timeless = {}
        for name, value in row.items():
            if not name.endswith(("seconds", "_s")):
                timeless[name] = value
        if "validation" not in row:
            rows.append(timeless)
    return rows


def weights_of(run):
    return (run / "last" / "model.safetensors").read_bytes()
