"""plumbing/run.py: a run goes on as if it had not been stopped; its schedule, its optimizer, what
is kept of it."""
import json
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import ROOT, run
from model import VLM
from parts.chat import Processor
from plumbing.run import MasterAdamW, Run, RunOptions, as_json, open_run
from training import WARM, commands, log_of, rows_of, weights_of


def wait_for(condition, process):
    end = time.time() + 60
    while time.time() < end and process.poll() is None and not condition():
        time.sleep(0.005)
    assert condition()


@pytest.mark.parametrize("kind", ["sft", "online", "offline", "outcome", "trajectory"])
def test_six_steps_equal_three_a_kill_and_three_more(world, shell, tmp_path, kind):
    words = (*commands(world, shell)[kind], "--steps", 6, "--decay", 0)
    a, b = tmp_path / "a", tmp_path / "b"
    whole = run("train.py", *words, "--out", a)
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, ROOT / "train.py", *words, "--out", b]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    wait_for((b / "last").exists, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL                    # it was still at work
    done = run("train.py", *words, "--out", b)
    assert done.returncode == 0, done.stderr
    assert weights_of(a) == weights_of(b)
    state = "last/trainer.safetensors"
    assert (a / state).read_bytes() == (b / state).read_bytes()
    assert log_of(a) == log_of(b) and len(log_of(a)) == 6
    assert sum("grad_norm" in row for row in log_of(a)) >= 4    # weights were really updated
    if kind != "sft":
        samples = (a / "samples.jsonl").read_text()
        assert samples == (b / "samples.jsonl").read_text()
        check_samples(rows_of(a / "samples.jsonl"), kind)


def check_samples(rows, kind):
    """What a report shows: two groups of every second update, those that teach first."""
    assert [row["step"] for row in rows] == [2, 2, 4, 4, 6, 6]
    for row in rows:
        assert row["prompt"] and row["gold"]
        assert all("<" in output["text"] for output in row["outputs"])
        if kind in ("online", "offline"):       # else a row has the outputs of one state
            rewards = torch.tensor([output["reward"] for output in row["outputs"]])
            advantages = torch.tensor([output["advantage"] for output in row["outputs"]])
            expected = (rewards - rewards.mean()) / (rewards.std() + 0.2)
            assert torch.allclose(advantages, expected, atol=1e-3)


def test_learning_rates_are_those_of_the_schedule(world, shell, tmp_path):
    """By hand: 10 steps, peak 1, warm-up over 4, the last half falls to a tenth: 1/4, 2/4, 3/4, 1,
    1, 1, then 0.1 + 0.9 * 2 * (1 - s / 10)."""
    words = (*commands(world, shell)["sft"], "--learning-rate", 1e-3, "--warmup", 4, "--steps", 10)
    done = run("train.py", *words, "--clip-norm", 0.01, "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    rates = [row["learning_rate"] * 1e3 for row in log_of(tmp_path / "r")]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.82, 0.64, 0.46, 0.28])


def opened(options, model):
    """A run that saves nothing."""
    return open_run(options, model, save=None, load=None, validate=None, best_by="score")


def test_the_gradient_is_clipped_to_its_norm(shell, tmp_path):
    """SGD in place of AdamW shows what the optimizer is given: a step of length clip_norm."""
    model = VLM.from_config(shell, seed=1)
    o = RunOptions(out=str(tmp_path / "r"), clip_norm=0.5, learning_rate=1.0, warmup=1, decay=0.0)
    with opened(o, model) as r:
        r.optimizer.inner = torch.optim.SGD(model.parameters(), lr=1.0)
        before = [p.detach().clone() for p in model.parameters()]
        r.agree()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        norm = sum(p.numel() for p in model.parameters()) ** 0.5
        assert r.optimize(0)["grad_norm"] == pytest.approx(norm, rel=1e-4)
    squares = [((p - b) ** 2).sum() for p, b in zip(model.parameters(), before)]
    assert sum(squares).item() ** 0.5 == pytest.approx(0.5, rel=1e-3)


def test_a_run_ends_by_the_clock(tmp_path, capsys):
    """Half a minute is behind it after the third update of six, and that is all it has. The clock
    changes no learning rate: with a fall over all six, they are 1, 1 - 0.9 / 6, 1 - 0.9 / 3."""
    model = torch.nn.Linear(2, 2)
    o = RunOptions(out=str(tmp_path / "r"), steps=6, minutes=0.5, learning_rate=1.0, warmup=0,
                   decay=1.0)
    saved = []

    def save(path, model):
        path.mkdir()
        saved.append(path)

    clock, shares, rates = [0.0], [], []
    with open_run(o, model, save=save, load=None, validate=None, best_by="") as r:
        r.now, r.started = (lambda: clock[0]), 0.0
        for number in r.updates():
            shares.append(r.progress(number))
            rates.append(r.learning_rate(number))
            clock[0] += 10.0
            r.record({"step": number + 1})
    assert shares == pytest.approx([0, 1 / 3, 2 / 3]) and len(saved) == 1
    assert rates == pytest.approx([1.0, 0.85, 0.7])
    said = capsys.readouterr().err
    assert "over after update 3 of 6, where the learning rate stood at 0.7" in said
    state = json.loads((tmp_path / "r" / "last" / "trainer.json").read_text())
    assert (state["step"], state["seconds"]) == (3, 30.0)


def test_masters_hold_what_bfloat16_cannot():
    """A weight of 1 moves by 1e-4 an update, far less than its last bit (2 ** -7): after 100 of
    them it is the rounded master, 1.01, and its decay spares vectors."""
    weights = {"w": torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16)),
               "b": torch.nn.Parameter(torch.ones(2))}
    optimizer = MasterAdamW(weights.items(), 1e-4)
    for _ in range(100):
        for p in weights.values():
            p.grad = -torch.ones_like(p)
        assert optimizer.clip() == pytest.approx(6 ** 0.5)
        optimizer.step(1e-4)
        assert weights["w"].grad is None
    masters = {name: tensor for name, tensor in optimizer.stored().items() if "master" in name}
    assert list(masters) == ["master.w"] and masters["master.w"].dtype == torch.float32
    assert masters["master.w"][0, 0].item() == pytest.approx(1.01, abs=1e-5)
    assert torch.equal(weights["w"], masters["master.w"].bfloat16()) and weights["w"][0, 0] > 1
    decayed, spared = [group["weight_decay"] for group in
                       MasterAdamW(weights.items(), 1e-4, weight_decay=0.1).inner.param_groups]
    assert (decayed, spared) == (0.1, 0.0)


def test_bfloat16_learns_as_float32_does_because_the_masters_are_float32(world, tmp_path):
    """At this rate an update is far below what a bfloat16 weight can hold: without masters nothing
    would change."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        # the order of the examples follows from the name of their file: here one without the folder
        words = ("sft", "--model", WARM, "--data", "steps.jsonl", "--dtype", dtype,
                 "--steps", 24, "--learning-rate", 5e-5, "--warmup", 1, "--threads", 1)
        done = run("train.py", *words, "--checkpointing", "--out", tmp_path / dtype, cwd=world)
        assert done.returncode == 0, done.stderr
        rows = [row["loss"] for row in log_of(tmp_path / dtype)]
        losses[dtype] = sum(rows[:8]) / 8, sum(rows[-8:]) / 8
    (start, end), (start16, end16) = losses["float32"], losses["bfloat16"]
    assert end < 0.75 * start
    assert abs((start16 - end16) - (start - end)) < 0.15 * (start - end)
    state = load_file(tmp_path / "bfloat16" / "last" / "trainer.safetensors")
    saved = load_file(tmp_path / "bfloat16" / "last" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert saved[name].dtype == torch.bfloat16
    assert torch.equal(state["master." + name].bfloat16(), saved[name])


def test_a_policy_without_finite_probabilities_ends_with_one_line(world, shell, tmp_path):
    words = (*commands(world, shell)["online"], "--learning-rate", "1e30", "--warmup", 0)
    done = run("train.py", *words, "--steps", 3, "--save-every", 1, "--out", tmp_path / "r")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "no numbers" in done.stderr.splitlines()[-1] and (tmp_path / "r" / "last").exists()


def test_a_checkpoint_that_no_link_points_to_is_not_taken_for_this_run(world, shell, tmp_path):
    words = ("sft", "--model", shell, "--threads", 1, "--data", world / "steps.jsonl",
             "--save-every", 1, "--steps", 1)
    assert run("train.py", *words, "--seed", 7, "--out", tmp_path / "a").returncode == 0
    (tmp_path / "a" / "last").unlink()              # as after a kill between writing and linking
    (tmp_path / "a" / ".checkpoint-000001.new").mkdir()                     # and during the writing
    assert run("train.py", *words, "--seed", 8, "--out", tmp_path / "a").returncode == 0
    assert run("train.py", *words, "--seed", 8, "--out", tmp_path / "b").returncode == 0
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["checkpoint-000001", "last", "log.jsonl", "options.json"]


def test_a_signal_stops_behind_the_update_with_a_checkpoint(world, shell, tmp_path):
    words = (*commands(world, shell)["sft"], "--steps", 100000, "--out", tmp_path / "r")
    log = tmp_path / "r" / "log.jsonl"

    def lines():
        return len(log_of(tmp_path / "r")) if log.exists() else 0

    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, words)],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        before = lines()
        wait_for(lambda: lines() > before + 1, process)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code and "continues" in err
        state = json.loads((tmp_path / "r" / "last" / "trainer.json").read_text())
        assert state["step"] == log_of(tmp_path / "r")[-1]["step"]


def test_validation_chooses_the_best_checkpoint(world, shell, tmp_path):
    words = (*commands(world, shell)["sft"], "--steps", 4, "--val-world", world, "--val-every", 2)
    done = run("train.py", *words, "--val-questions", 6, "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    scores = {}
    for row in rows_of(tmp_path / "r" / "log.jsonl"):
        if "validation" in row:
            scores[row["step"]] = row["validation"]["f1_recall"]
    assert set(scores) == {2, 4}
    best = json.loads(done.stdout.splitlines()[-1])["best"]
    assert best["f1_recall"] == max(scores.values()) == scores[best["step"]]
    assert best["step"] == min(step for step in scores if scores[step] == best["f1_recall"])
    assert VLM.from_pretrained(tmp_path / "r" / "best")
    assert Processor.from_pretrained(tmp_path / "r" / "best")


def test_a_run_with_other_options_is_not_overwritten(world, shell, tmp_path):
    words = (*commands(world, shell)["sft"], "--steps", 1, "--out", tmp_path / "r")
    assert run("train.py", *words).returncode == 0
    done = run("train.py", *words, "--seed", 9)
    assert done.returncode == 2 and "--seed" in done.stderr and done.stderr.count("\n") == 1
    # an option that is younger than the run was as by default
    file = tmp_path / "r" / "options.json"
    options = json.loads(file.read_text())
    del options["warmup"]
    file.write_text(json.dumps(options))
    assert run("train.py", *words).returncode == 0
    assert run("train.py", *words, "--warmup", 7).returncode == 2


def test_an_option_may_say_what_it_was_before_there_was_one(tmp_path):
    """A run of steps whose options name no eps had 1e-6: it does not go on with 0.2."""
    options = {name: as_json(value) for name, value in vars(train.GrpoOptions()).items()}
    del options["eps"]
    (tmp_path / "options.json").write_text(json.dumps(options))
    for eps, refused in ((0.2, True), (1e-6, False)):
        folder = SimpleNamespace(path=tmp_path, o=train.GrpoOptions(eps=eps))
        with pytest.raises(ValueError, match="another --eps") if refused else nullcontext():
            Run.check_same(folder)


def test_options_that_every_run_has_are_checked():
    with pytest.raises(ValueError, match="steps is 0: give at least 1"):
        train.SftOptions(steps=0)
    with pytest.raises(ValueError, match="drop is .*: give no_picture or repeats"):
        train.GrpoOptions(drop=("all",))
