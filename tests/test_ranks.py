"""Several ranks: samples, losses, weights and checkpoints are those of one."""
import socket
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from conftest import ROOT
from plumbing import ranks as plumbing_ranks
from plumbing.ranks import in_step, mine, together, total
from training import commands, log_of

CLOSE = 1e-4


def start(ranks, words, out):
    """Starts train.py. The learning rate is kept, since its fall would depend on --steps."""
    torchrun = []
    if ranks > 1:
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", ranks, "--master_port", port]
    words = [sys.executable, *torchrun, ROOT / "train.py", *words, "--decay", 0, "--out", out]
    return subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def finish(process):
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


def assert_same(one, two):
    """Two run folders hold the same logs, weights and averages of AdamW within 1e-4, and weights
    were trained."""
    rows, others = log_of(one), log_of(two)
    assert len(rows) == 4 and sum("grad_norm" in row for row in rows) >= 2
    for a, b in zip(rows, others, strict=True):
        if "examples" in a:     # padding counts as tokens; each rank's share is padded by itself
            assert a.pop("tokens") >= b.pop("tokens") > 0
        a, b = ({name: value or 0 for name, value in row.items()} for row in (a, b))
        assert b == pytest.approx(a, rel=0, abs=CLOSE)
    files = sorted(path.name for path in (one / "last").glob("*.safetensors"))
    assert "trainer.safetensors" in files and len(files) == 2
    for file in files:
        a, b = load_file(one / "last" / file), load_file(two / "last" / file)
        assert a.keys() == b.keys()
        for name in a:
            assert (a[name].double() - b[name].double()).abs().max() < CLOSE, name


RUNS = {                                # kind of command -> ranks of each part of the run, options
    "sft": ((2,), ()),                  # a batch without pictures leaves the vision tower alone
    "offline": ((2,), ("--prompts", 3, "--tokens", 1,           # three micro-batches
                       "--lora-rank", 4, "--kl-coef", 0.1)),
    "online": ((1, 2), ()),             # two continue what one began; pictures on one of them alone
    "outcome": ((2, 1), ("--questions", 3)),                    # and the other way round
    "own": ((2,), ("--val", "QUESTIONS", "--val-questions", 3, "--val-every", 2)),
}


@pytest.mark.parametrize("kind", RUNS)
def test_two_ranks_train_as_one(world, shell, tmp_path, kind):
    """With the default learning rate: four steps move weights by 4e-4, and the difference is 1e-5
    at most."""
    parts, more = RUNS[kind]
    more = [world / "questions.jsonl" if word == "QUESTIONS" else word for word in more]
    words = (*commands(world, shell)[kind], *more, "--steps")
    alone = start(1, (*words, 4), tmp_path / "one")
    for i, ranks in enumerate(parts):
        finish(start(ranks, (*words, 4 * (i + 1) // len(parts)), tmp_path / "two"))
    finish(alone)
    assert_same(tmp_path / "one", tmp_path / "two")


def test_a_gradient_that_is_not_finite_stops_all_ranks(world, shell, tmp_path):
    words = (*commands(world, shell)["sft"], "--steps", 50, "--warmup", 0, "--learning-rate", 1e30)
    process = start(2, words, tmp_path / "r")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and "train.py: step 2: the gradient is nan" in err
    assert len(log_of(tmp_path / "r")) == 1 and not (tmp_path / "r" / "last").exists()


def test_shares_of_three_ranks_by_hand(monkeypatch):
    """What each of three ranks takes of seven items, and what comes of putting it together."""
    items = list("abcdefg")
    shares = []
    monkeypatch.setattr(plumbing_ranks, "ranks", lambda: 3)
    for number in range(3):
        monkeypatch.setattr(plumbing_ranks, "rank", lambda: number)
        shares.append(mine(items))
    assert shares == [["a", "d", "g"], ["b", "e"], ["c", "f"]]
    monkeypatch.setattr(plumbing_ranks, "gather", lambda value: shares)
    assert together(["b", "e"]) == items
    monkeypatch.setattr(plumbing_ranks, "gather", lambda value: [(1, 0.5), (2, 0.25), (3, 0)])
    assert total(2, 0.25) == [6, 0.75]
    monkeypatch.setattr(plumbing_ranks, "gather", lambda value: [1, 3, 2])
    assert list(in_step(["x"], "idle")) == [("x", 1), ("idle", 0), ("idle", 0)]


def test_one_rank_has_it_all():
    assert mine([1, 2, 3]) == together([1, 2, 3]) == [1, 2, 3] and total(1, 2.5) == [1, 2.5]
    assert list(in_step(["x", "y"], "idle")) == [("x", 1), ("y", 1)]
