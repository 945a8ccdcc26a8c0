"""Bad checkpoints, runs and flags of train.py (faults.py says how)."""
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save

from conftest import ROOT
from faults import Bad, call, check, disk, each, export, full_disk, table
from model import VLM
from plumbing.run import LOGS, Run

CASES, case = table()


# ---------------------------------------------------------------------------------------- questions

@case("questions: no hops, in training")
def _(b):
    b.copy("w")
    b.file("w/questions.jsonl", {"question": "?", "answer": "x", "hops": None})
    return b.grpo(w=b.dir / "w"), "questions.jsonl:1: no gold hops, by which steps are judged"


@case("questions: hops without answers, in training")
def _(b):
    row = {"question": "?", "answer": "x", "hops": [{"query": "q", "retriever": "text retriever"}]}
    w = b.copy("w")
    b.file("w/questions.jsonl", row)
    return b.grpo(w=w), "a hop without 'answer'"


@case("questions: hops that do not fit, where they are not needed")
def _(b):
    row = {"question": "?", "answer": "x", "hops": [{"query": "q", "retriever": "map"}]}
    return b.outcome(row), "q.jsonl:1: hops"


@case("questions: no answer, in training")
def _(b):
    return b.outcome({"question": "?"}), "q.jsonl:1: gold answer None"


@case("questions: steps in place of them")
def _(b):
    return b.outcome({"images": [], "steps": []}), "q.jsonl holds steps, on which --mode offline"


@case("validation: steps beside bases")
def _(b):
    words = ["train", "grpo", "--model", b.m, "--out", b.out, "--mode", "offline", "--data",
             b.w / "steps.jsonl", "--val", b.w / "steps.jsonl", "--kb", "text=x"]
    return words, "--kb and --val-world do nothing beside --val"


@case("own bases: beside a world")
def _(b):
    return b.grpo("--kb", "text=x"), "--world does nothing beside --kb"


@case("own bases: nothing asks them")
def _(b):
    words = ["train", "grpo", "--model", b.m, "--out", b.out, "--mode", "offline", "--data",
             b.w / "steps.jsonl", "--kb", "text=x"]
    return words, "--kb does nothing beside --mode offline, but for questions of --val"


@case("validation: never")
def _(b):
    words = b.grpo("--val", b.w / "questions.jsonl", "--val-world", b.w)
    return words, "questions.jsonl does nothing with --val-every 0"


@case("own bases: one is missing")
def _(b):
    kb = b.w / "kb"
    words = b.outcome({"question": "?", "answer": "x"}, "--kb", f"text={kb / 'text'}",
                      f"image={kb / 'image'}", world=())
    return words, "--kb: the router needs the knowledge base 'table', too: give table=DIR"


@case("validation: questions and no bases")
def _(b):
    return b.grpo("--val-every", 1, "--val", b.w / "questions.jsonl"), "--kb or --val-world"


@case("validation: steps for the router")
def _(b):
    words = b.grpo("--val-every", 1, "--val", b.w / "steps.jsonl")
    return words, "holds steps, which are judged in train.py grpo --mode offline alone"


@case("validation: no such file")
def _(b):
    return b.grpo("--val-every", 1, "--val", b.dir / "v.jsonl"), "v.jsonl: cannot be read"


# -------------------------------------------------------------------------------------- checkpoints

def gone(data):
    """Stands for a file that is deleted."""


def half(data):
    return data[:-4]


def moments(change):
    """A change of the tensors of trainer.safetensors."""
    def of_bytes(data):
        tensors = load(data)
        change(tensors)
        return save(tensors)
    return of_bytes


def without_generator(tensors):
    del tensors["generator"]


def other_shape(tensors):
    tensors["exp_avg.model.norm.weight"] = torch.ones(2)


def broken(b, file, change, message):
    """Continues a run of one step, one file of which is broken."""
    path = b.run() / file
    data = change(path.read_bytes())
    path.unlink() if data is None else path.write_bytes(data)
    return b.sft("--steps", 2), message


each(case, "checkpoint: ", broken, [    # name, file of a run, what its bytes become, message
    ("no counters", "last/trainer.json", gone, "trainer.json: no such file"),
    ("counters cut", "last/trainer.json", half, "trainer.json: not valid JSON"),
    ("counters in words", "last/trainer.json", lambda data: b'{"step": "one"}',
     "trainer.json: step is 'one': expected a whole number"),
    ("counters below 0", "last/trainer.json", lambda data: b'{"step": -5}', "step is -5"),
    ("seconds in words", "last/trainer.json", lambda data: b'{"step": 1, "seconds": "x"}',
     "seconds is 'x'"),
    ("a best that is none", "last/trainer.json", lambda data: b'{"step": 1, "best": 3}',
     "best is 3"),
    ("a log that is none", "log.jsonl", lambda data: b"oops\n" + data,
     "log.jsonl:1: no line of a run's log"),
    ("moments cut", "last/trainer.safetensors", half, "no whole checkpoint"),
    ("no moments", "last/trainer.safetensors", gone, "no whole checkpoint"),
    ("no random state", "last/trainer.safetensors", moments(without_generator),
     "no whole checkpoint"),
    ("moments of another shape", "last/trainer.safetensors", moments(other_shape),
     "shape [2] instead of [16]"),
    ("weights cut", "last/model.safetensors", half, "not a readable safetensors file"),
    ("no options", "options.json", gone, "options.json: no such file"),
    ("other options", "options.json", lambda data: data.replace(b'"seed": 0', b'"seed": 7'),
     "another --seed")])


@case("checkpoint: a link to nothing")
def _(b):
    run = b.run()
    shutil.rmtree(run / os.readlink(run / "last"))
    return b.sft(), "no such file"


@case("checkpoint: those of another program, none of which is touched")
def _(b):
    """transformers' Trainer, too, names them checkpoint-N; this is what --out "$UNSET" meets, or a
    mistyped name."""
    b.file("out/checkpoint-500/model.safetensors", "hours of work")
    return b.sft(), "out/checkpoint-500: not of a run of this program"


@case("checkpoint: the log of another program")
def _(b):
    b.file("out/log.jsonl", "mine")
    return b.sft(), "out/log.jsonl: not of a run of this program"


def empty_object(b, file):
    (b.run() / file).write_text("{}")
    return export(b, b.dir / "mine"), "no whole checkpoint"


each(case, "checkpoint: ", empty_object, [
    ("no counters to export", "last/trainer.json"), ("no options to export", "options.json")])


@case("checkpoint: none to export")
def _(b):
    return export(b, b.dir / "mine"), "no such checkpoint"


@case("checkpoint: no best one to export")
def _(b):
    words = ["train", "export", "--run", b.run(), "--out", b.dir / "mine"]
    return words, "without --val-every a run has only --which last"


# ------------------------------------------------------------------------------- options and places

OPTIONS = (
    ("sft --steps 0", "--steps is 0: give at least 1"),
    ("sft --learning-rate nan", "--learning-rate is nan"),
    ("sft --learning-rate -1", "--learning-rate is -1.0"),
    ("sft --decay 2", "--decay is 2.0: give 0 to 1"),
    ("sft --beta1 1", "--beta1 is 1.0"),
    ("sft", "--data: name at least one step file"),
    ("sft --dtype int8", "invalid choice: 'int8'"),
    ("sft --speed 9", "unrecognized arguments"),
    ("sft --seed " + "9" * 30, "--seed is 9999"),
    ("sft --threads 100000", "--threads is 100000"),
    ("sft --device warp", "device 'warp' cannot be used"),
    ("sft --threads x", "invalid int"),
    ("grpo --group 0", "--group is 0"),
    ("grpo -k 0", "-k is 0: give at least 1"),
    ("grpo --k 0", "-k is 0: give at least 1"),
    ("grpo --temperature 0", "--temperature is 0.0"),
    ("grpo --mode sideways", "invalid choice"),
    ("grpo --mode offline", "--data: name"),
    ("grpo --max-new-tokens 100000", "leaves no room"),
    ("grpo --lora-rank 5000", "rank is 5000"),
    ("grpo --answer-share 1.5", "give 0 to 1"),
    ("grpo --world {dir}", "no such file"),
    ("grpo --data {dir}/s.jsonl", "s.jsonl: cannot be read"),
    ("grpo --kb text={dir}", "--kb names bases: give --data"),
    ("grpo --recipe mine", "invalid choice"),
    ("grpo --recipe released", "measures similarity with BGE-M3: name its directory"),
    ("grpo --recipe released --encoder lexical --mode online", "--mode is online, but --recipe"),
    ("grpo --recipe released --encoder lexical --learning-rate 1e-5",
     "--learning-rate is 1e-05, but --recipe released has 1e-06"),
    ("grpo --recipe released --encoder lexical --no-scale", "--scale is False, but --recipe"),
    ("grpo --recipe released --encoder lexical --clip-high 0.3", "--clip-high is 0.3, but"),
    ("grpo --mode outcome --price 0.1", "--price does nothing in --mode outcome"),
    ("grpo --credit state", "--credit does nothing but in --mode outcome"),
    ("sft --data {dir}/s.jsonl --val {dir}/v.jsonl", "cannot be read"),
    ("grpo --recipe released --encoder lexical --balance", "--balance is True, but --recipe"),
    ("show --mode offline", "--mode offline has no trajectory to show"),
    ("grpo --mode offline --world {dir}", "--world does nothing beside --mode offline"),
)
for words, message in OPTIONS:
    def _(b, words=words, message=message):
        words = words.format(dir=b.dir).split()
        return ["train", *words, "--model", b.m, "--out", b.out], message
    case(f"options: train {words}")(_)


def shared(b, share, message):
    return b.sft(data=f"{b.w / 'steps.jsonl'}={share}"), message


each(case, "options: train --data ", shared, [
    ("{s}=0", "0", "the share is 0"), ("{s}=nan", "nan", "the share is nan"),
    ("{s}=x", "x", "--data")])


@case("place: a model exported into a folder of something else")
def _(b):
    b.run()
    b.file("base/manifest.json", {})
    return export(b, b.dir / "base"), "holds other files and no model"


@case("place: a model exported into a folder of weights without their config")
def _(b):
    b.run()
    b.file("base/model.safetensors", "hours of work")
    return export(b, b.dir / "base"), "holds other files and no model"


@case("place: a run below a file")
def _(b):
    return b.sft("--out", b.file("taken", "") / "run"), "taken"


@case("place: a run where a file lies")
def _(b):
    return b.sft("--out", b.file("taken", "")), "taken"


@case("place: an exported model below a file")
def _(b):
    b.run()
    return export(b, b.file("taken", "") / "m"), "taken"


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_one_line_and_code_2_and_leaves_the_disk_alone(
        home, tmp_path, capsys, monkeypatch, name):
    check(CASES[name], home, tmp_path, capsys, monkeypatch)


# ------------------------------------------------------------------------------------------ exports

def test_an_export_onto_a_full_disk_leaves_no_half_of_a_model(home, tmp_path, capsys):
    b = Bad(home, tmp_path)
    b.run()
    before = disk(tmp_path)
    with full_disk(9000):
        code, lines = call(export(b, tmp_path / "mine"), capsys)
    assert code == 2 and len(lines) == 1 and "too large" in lines[0] and disk(tmp_path) == before
    assert call(export(b, tmp_path / "mine"), capsys)[0] == 0
    assert set(os.listdir(tmp_path)) == {"out", "mine"}


def norm_of(folder):
    return load_file(folder / "model.safetensors")["model.norm.weight"]


def test_an_export_replaces_the_model_and_keeps_what_is_none(home, tmp_path, capsys):
    b = Bad(home, tmp_path)
    run = b.run()
    mine = Path(shutil.copytree(home / "m", tmp_path / "mine"))
    b.file("mine/TRAINING.md", "how")
    b.file("mine/plots/config.json", "mine")
    (mine / "latest.md").symlink_to("TRAINING.md")
    b.file("mine/model-00001-of-00002.safetensors", "of the old model")
    b.file("mine/chat_template.json", "of the old model")
    assert call(export(b, mine), capsys)[0] == 0
    assert torch.equal(norm_of(mine), norm_of(run / "last"))
    assert (mine / "plots" / "config.json").read_text() == "mine"
    assert os.readlink(mine / "latest.md") == "TRAINING.md" and (mine / "latest.md").exists()
    ours = set(os.listdir(run / "last"))
    assert set(os.listdir(mine)) - ours == {"TRAINING.md", "plots", "latest.md"}
    assert ours - set(os.listdir(mine)) == {"trainer.json", "trainer.safetensors"}


def test_an_export_that_is_killed_never_mixes_two_models(home, tmp_path, capsys, monkeypatch):
    """Onto a model with a file of the user's: stopped before its n-th rename, for every n, the
    directory is the old model, or refused by name; the same command again completes it, and the
    user's file stays."""
    class Kill(BaseException):
        pass

    b, calls, replace = Bad(home, tmp_path), [], os.replace
    run = b.run()

    def counted(*names):
        calls.append(names)
        if len(calls) == stop:
            raise Kill
        replace(*names)

    monkeypatch.setattr(os, "replace", counted)
    old, new = norm_of(home / "m"), norm_of(run / "last")
    stop, seen = 1, []
    while True:
        mine = Path(shutil.copytree(home / "m", tmp_path / f"mine{stop}"))
        (mine / "README.md").write_text("mine")
        (mine / "processor_config.json").write_text("{}")       # of the old model alone
        calls.clear()
        try:
            call(export(b, mine), capsys)
            break
        except Kill:
            pass
        finally:
            n, stop = stop, 0
        try:
            weights = VLM.from_pretrained(mine).state_dict()["model.norm.weight"]
            assert torch.equal(weights, old)
            seen.append("old")
        except ValueError as error:
            assert not mine.exists() and "no such model directory" in str(error)
            seen.append("refused")
        assert call(export(b, mine), capsys)[0] == 0
        assert torch.equal(norm_of(mine), new)
        assert (mine / "README.md").read_text() == "mine"
        assert not (mine / "processor_config.json").exists()
        stop = n + 1
    assert len(seen) > 3 and seen == ["old"] * (len(seen) - 1) + ["refused"]
    assert not [path for path in os.listdir(tmp_path) if path.startswith(".")]


# ------------------------------------------------------------------------------------ a run at work

def test_a_line_that_a_full_disk_tore_is_no_obstacle(home, tmp_path, capsys):
    """Nor is a sign within a line of samples.jsonl that Python takes for the end of a line."""
    b = Bad(home, tmp_path)
    run = b.run()
    whole = (run / "log.jsonl").read_text()
    sample = json.dumps({"step": 1, "text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n"
    (run / "samples.jsonl").write_text(sample, encoding="utf-8")
    for name in LOGS:
        with open(run / name, "a") as file:
            file.write('{"step": 2, "lo')
    code, lines = call(b.sft("--steps", 2), capsys)
    assert code == 0, lines
    log = (run / "log.jsonl").read_text()
    assert log.startswith(whole)
    assert [json.loads(line)["step"] for line in log.splitlines()] == [1, 2]
    assert (run / "samples.jsonl").read_text(encoding="utf-8") == sample


def test_the_lock_of_a_run_is_held_to_its_end(home, tmp_path, capsys, monkeypatch):
    """From its first update on a run cannot be joined by another; afterwards no lock is left."""
    b, seen = Bad(home, tmp_path), []

    def optimize(run, number, original=Run.optimize):
        if not seen:
            words = [sys.executable, ROOT / "train.py", *map(str, b.sft()[1:])]
            seen.append(subprocess.run(words, capture_output=True, text=True))
        return original(run, number)

    monkeypatch.setattr(Run, "optimize", optimize)
    assert call(b.sft(), capsys)[0] == 0
    assert seen[0].returncode == 2 and "another process writes there" in seen[0].stderr
    assert seen[0].stdout == "" and os.listdir(tmp_path) == ["out"]


def test_a_screen_that_is_gone_ends_no_run(home, tmp_path):
    """As after `| head -1`: the first line is read, then nobody reads."""
    words = Bad(home, tmp_path).sft("--steps", 3, "--log-every", 1, "--threads", 1)[1:]
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, words)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
    state = json.loads((tmp_path / "out" / "last" / "trainer.json").read_text())
    assert state["step"] == 3


@pytest.mark.parametrize("started", ["plainly", "by nohup"])
def test_a_terminal_that_closes_stops_a_run_with_a_checkpoint(
        home, tmp_path, capsys, monkeypatch, started):
    """SIGHUP after the first update. nohup has it ignored, and so it stays."""
    def optimize(run, number, original=Run.optimize):
        os.kill(os.getpid(), signal.SIGHUP)
        return original(run, number)

    monkeypatch.setattr(Run, "optimize", optimize)
    b, before = Bad(home, tmp_path), signal.getsignal(signal.SIGHUP)
    handler = signal.SIG_IGN if started == "by nohup" else signal.SIG_DFL
    try:
        signal.signal(signal.SIGHUP, handler)
        code, _ = call(b.sft("--steps", 3), capsys)
    finally:
        signal.signal(signal.SIGHUP, before)
    step = json.loads((b.out / "last" / "trainer.json").read_text())["step"]
    assert (code, step) == ((0, 3) if started == "by nohup" else (129, 1))
