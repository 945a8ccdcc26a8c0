"""Several ranks: samples, losses, weights and checkpoints are those of one."""
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import infer
import train
from conftest import ROOT
from model import VLM
from parts.chat import Processor
from parts.stepfiles import read_steps
from parts.steps import BASES
from test_train import commands, home, log_of       # noqa: F401 (home is a fixture)

CLOSE = 1e-4


def start(ranks, words, out):
    """Start train.py. The learning rate is kept, since its fall would depend on --steps."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", ranks, "--master_port", port) if ranks > 1 else ()
    words = [sys.executable, *torchrun, ROOT / "train.py", *words, "--decay", 0, "--out", out]
    return subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(*processes):
    for p in processes:
        _, err = p.communicate(timeout=120)
        assert p.returncode == 0, err


def assert_same(one, two):
    """Two run folders hold the same logs, weights and averages of AdamW within 1e-4, and weights were trained."""
    rows = [[{k: v or 0 for k, v in row.items()} for row in log_of(path)] for path in (one, two)]
    assert len(rows[0]) == 4 and sum("grad_norm" in row for row in rows[0]) >= 2
    for a, b in zip(*rows, strict=True):
        if "examples" in a:                          # padding counts as tokens; each rank's share is padded by itself
            assert a.pop("tokens") >= b.pop("tokens") > 0
        assert b == pytest.approx(a, rel=0, abs=CLOSE)
    files = sorted(path.name for path in (one / "last").glob("*.safetensors"))
    assert "trainer.safetensors" in files and len(files) == 2
    for file in files:
        a, b = load_file(one / "last" / file), load_file(two / "last" / file)
        assert a.keys() == b.keys()
        for name in a:
            assert (a[name].double() - b[name].double()).abs().max() < CLOSE, name


RUNS = {                                             # kind of test_train's commands -> ranks of each part, options
    "sft": ((2,), ()),                               # a batch without pictures leaves the vision tower alone
    "offline": ((2,), ("--prompts", 3, "--tokens", 1, "--lora-rank", 4, "--kl-coef", 0.1)),    # three micro-batches
    "online": ((1, 2), ()),                          # two ranks continue what one began; pictures on one of them alone
    "outcome": ((2, 1), ("--questions", 3)),         # and the other way round
}


@pytest.mark.parametrize("kind", RUNS)
def test_two_ranks_train_as_one(home, tmp_path, kind):                                          # noqa: F811
    """With the default learning rate: four steps move weights by 4e-4, and the difference is 1e-5 at most."""
    parts, more = RUNS[kind]
    words = (*commands(home)[kind], *more, "--steps")
    alone = start(1, (*words, 4), tmp_path / "one")
    for i, ranks in enumerate(parts):
        finish(start(ranks, (*words, 4 * (i + 1) // len(parts)), tmp_path / "two"))
    finish(alone)
    assert_same(tmp_path / "one", tmp_path / "two")


def test_a_rank_without_examples_takes_part_and_adds_nothing(home):                             # noqa: F811
    model, processor = VLM.from_config(home / "m"), Processor.from_pretrained(home / "m")
    batch, mask, too_long = train.make_batch(processor, [], 2048, "cpu")
    loss = -model.log_probs(targets_mask=mask, **batch).sum()
    loss.backward()
    assert loss == 0 and not mask.any() and too_long == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.model.parameters())


def test_a_gradient_that_is_not_finite_stops_all_ranks(home, tmp_path):                         # noqa: F811
    words = (*commands(home)["sft"], "--steps", 50, "--warmup", 0, "--learning-rate", 1e30)
    process = start(2, words, tmp_path / "r")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and "train.py: step 2: the gradient is nan" in err
    assert len(log_of(tmp_path / "r")) == 1 and not (tmp_path / "r" / "last").exists()


def test_samples_do_not_depend_on_what_they_are_batched_with(home):                             # noqa: F811
    """Each conversation alone, with its part of the noise, against all in one list, in which one stands twice."""
    path = ROOT / "weights" / "tiny-warm"
    bases = {base: None for base in BASES}
    router = infer.Router(VLM.from_pretrained(path), Processor.from_pretrained(path), bases, temperature=1.0,
                          max_new_tokens=24)
    steps = [step for row in read_steps(home / "w" / "steps.jsonl")[:3] for step in row]
    talks = [step.conversation() for step in (*steps, steps[0])]
    generator = torch.Generator().manual_seed(0)
    noise = router.noise(talks, generator, 4)
    together = router.sample(talks, None, 4, noise)
    for i, (talk, (ids, candidates)) in enumerate(zip(talks, together)):
        [(own_ids, own)] = router.sample([talk], None, 4, noise[i:i + 1])
        assert own_ids == ids and [c.token_ids for c in own] == [c.token_ids for c in candidates]
        for a, b in zip(own, candidates):
            assert a.logps == pytest.approx(b.logps, abs=CLOSE)
    assert router.sample(talks, generator.manual_seed(0), 4) == together
    assert len({c.token_ids for c in (*together[0][1], *together[-1][1])}) > 1
