"""Bad checkpoints, runs and flags of train.py (faults.py says how)."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import model
import train
from conftest import ROOT
from faults import Bad, call, check, disk, export, table
from plumbing.run import LOGS, Run


CASES, case = table()


@case("questions: no hops, in training")
def _(b):
    b.copy("w")
    b.file("w/questions.jsonl", {"question": "?", "answer": "x", "hops": None})
    return b.grpo(w=b.dir / "w"), "questions without gold hops"


@case("questions: hops without answers, in training")
def _(b):
    row = {"question": "?", "answer": "x", "hops": [{"query": "q", "retriever": "text retriever"}]}
    w = b.copy("w")
    b.file("w/questions.jsonl", row)
    return b.grpo(w=w), "a hop without 'answer'"


def checkpoint(b, file, change):
    """Continues a run of one step, one file of which went through `change` (None: it is gone)."""
    path = b.run() / file
    data = path.read_bytes()
    path.unlink() if change is None else path.write_bytes(change(data))
    return b.sft("--steps", 2)


def moments(change):
    def of_bytes(data):
        from safetensors.torch import load, save
        tensors = load(data)
        change(tensors)
        return save(tensors)
    return of_bytes


for name, file, change, said in (
        ("no counters", "last/trainer.json", None, "trainer.json: no such file"),
        ("counters cut", "last/trainer.json", lambda d: d[:5], "trainer.json: not valid JSON"),
        ("counters in words", "last/trainer.json", lambda d: b'{"step": "one"}', "no whole checkpoint"),
        ("counters below 0", "last/trainer.json", lambda d: b'{"step": -5}', "step is -5"),
        ("seconds in words", "last/trainer.json", lambda d: b'{"step": 1, "seconds": "x"}', "seconds is 'x'"),
        ("a log that is none", "log.jsonl", lambda d: b"oops\n" + d, "log.jsonl:1: no line of a run's log"),
        ("moments cut", "last/trainer.safetensors", lambda d: d[:-4], "no whole checkpoint"),
        ("no moments", "last/trainer.safetensors", None, "no whole checkpoint"),
        ("no random state", "last/trainer.safetensors", moments(lambda t: t.pop("generator")), "no whole checkpoint"),
        ("moments of another shape", "last/trainer.safetensors",
         moments(lambda t: t.update({"exp_avg.model.norm.weight": torch.ones(2)})), "shape [2] instead of [16]"),
        ("weights cut", "last/model.safetensors", lambda d: d[:-4], "not a readable safetensors file"),
        ("no options", "options.json", None, "options.json: no such file"),
        ("other options", "options.json", lambda d: d.replace(b'"seed": 0', b'"seed": 7'), "another --seed")):
    case(f"checkpoint: {name}")(lambda b, file=file, change=change, said=said: (checkpoint(b, file, change), said))


@case("checkpoint: a link to nothing")
def _(b):
    run = b.run()
    shutil.rmtree(run / os.readlink(run / "last"))
    return b.sft(), "no such file"


@case("checkpoint: those of another program, none of which is touched")
def _(b):
    """transformers' Trainer, too, names them checkpoint-N; this is what --out "$UNSET" meets, or a mistyped name."""
    b.file("out/checkpoint-500/model.safetensors", "hours of work")
    b.file("out/lock", "mine")
    return b.sft(), "out/checkpoint-500: not of a run of this program"


@case("checkpoint: the log of another program")
def _(b):
    b.file("out/log.jsonl", "mine")
    b.file("out/lock", "")
    return b.sft(), "out/log.jsonl: not of a run of this program"


for name, file in (("no counters", "last/trainer.json"), ("no options", "options.json")):
    def _(b, file=file):
        run = b.run()
        (run / file).write_text("{}")
        return ["train", "export", "--run", run, "--which", "last", "--out", b.dir / "mine"], "no whole checkpoint"
    case(f"checkpoint: {name} to export")(_)


@case("checkpoint: none to export")
def _(b):
    return ["train", "export", "--run", b.dir, "--out", b.out], "no such checkpoint"


for words, said in (
        (["sft", "--steps", "0"], "--steps is 0: give at least 1"), (["sft", "--learning-rate", "nan"], "rate is nan"),
        (["sft", "--learning-rate", "-1"], "rate is -1.0"), (["sft", "--decay", "2"], "--decay is 2.0: give 0 to 1"),
        (["sft", "--beta1", "1"], "--beta1 is 1.0"), (["sft"], "--data: name at least one step file"),
        (["sft", "--dtype", "int8"], "invalid choice: 'int8'"), (["sft", "--speed", "9"], "unrecognized arguments"),
        (["sft", "--seed", "9" * 30], "--seed is 9999"), (["sft", "--threads", "100000"], "--threads is 100000"),
        (["sft", "--device", "warp"], "device 'warp' cannot be used"), (["sft", "--threads", "x"], "invalid int"),
        (["grpo", "--group", "0"], "--group is 0"), (["grpo", "--temperature", "0"], "--temperature is 0.0"),
        (["grpo", "--mode", "sideways"], "invalid choice"), (["grpo", "--mode", "offline"], "--data: name"),
        (["grpo", "--max-new-tokens", "100000"], "leaves no room"), (["grpo", "--lora-rank", "5000"], "rank is 5000"),
        (["grpo", "--answer-share", "1.5"], "give 0 to 1"), (["grpo", "--world", "{dir}"], "no such file"),
        (["grpo", "--data", "{dir}/s.jsonl"], "--data does nothing beside --mode online"),
        (["grpo", "--mode", "offline", "--world", "{dir}"], "--world does nothing beside --mode offline")):
    def _(b, words=words, said=said):
        words = [word.format(dir=b.dir) for word in words]
        return ["train", *words, "--model", b.m, "--out", b.out], said
    case(f"options: train {' '.join(words)}")(_)


for data, said in (("{s}=0", "the share is 0"), ("{s}=nan", "the share is nan"), ("{s}=x", "--data")):
    case(f"options: train --data {data}")(
        lambda b, data=data, said=said: (b.sft(data=data.format(s=b.w / "steps.jsonl")), said))


@case("place: a model exported into a folder of something else")
def _(b):
    run = b.run()
    b.file("base/manifest.json", {})
    return ["train", "export", "--run", run, "--which", "last", "--out", b.dir / "base"], "holds other files and no model"


@case("place: a run below a file")
def _(b):
    return b.sft("--out", b.file("taken", "") / "run"), "taken"


@case("place: a run where a file lies")
def _(b):
    return b.sft("--out", b.file("taken", "")), "taken"


@case("place: an exported model below a file")
def _(b):
    return ["train", "export", "--run", b.run(), "--which", "last", "--out", b.file("taken", "") / "m"], "taken"


def test_an_export_onto_a_full_disk_leaves_no_half_of_a_model(home, tmp_path, capsys):
    b, before = Bad(home, tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    b.run()
    there = disk(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, before[1]))
    try:
        code, lines = call(export(b, tmp_path / "mine"), capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2 and len(lines) == 1 and "too large" in lines[0] and disk(tmp_path) == there
    assert call(export(b, tmp_path / "mine"), capsys)[0] == 0 and set(os.listdir(tmp_path)) == {"out", "mine"}


def test_an_export_that_is_killed_never_mixes_two_models(home, tmp_path, capsys, monkeypatch):
    """Onto a model with a file of the user's: stopped before its n-th rename, for every n, the directory is the old
    model, the new one, or refused by name; the same command again completes it, and the user's file stays."""
    class Kill(BaseException):
        pass

    b, calls, replace = Bad(home, tmp_path), [], os.replace
    b.run()

    def counted(*names):
        calls.append(names)
        if len(calls) == stop:
            raise Kill
        replace(*names)

    monkeypatch.setattr(os, "replace", counted)
    old = load_file(home / "m" / "model.safetensors")["model.norm.weight"]
    new = load_file(b.out / "last" / "model.safetensors")["model.norm.weight"]
    stop, seen = 1, set()
    while True:
        mine = Path(shutil.copytree(home / "m", tmp_path / f"mine{stop}"))
        (mine / "README.md").write_text("mine")
        (mine / "processor_config.json").write_text("{}")             # of the old model alone
        calls.clear()
        try:
            call(export(b, mine), capsys)
            break
        except Kill:
            pass
        finally:
            n, stop = stop, 0
        try:
            weights = model.VLM.from_pretrained(mine).state_dict()["model.norm.weight"]
            seen.add("old" if torch.equal(weights, old) else "new")
            assert torch.equal(weights, old) or torch.equal(weights, new) and n == 0
        except ValueError as error:
            seen.add("refused")
            assert "config.json: no such file" in str(error)
        assert call(export(b, mine), capsys)[0] == 0
        assert torch.equal(model.VLM.from_pretrained(mine).state_dict()["model.norm.weight"], new)
        assert (mine / "README.md").read_text() == "mine" and not (mine / "processor_config.json").exists()
        stop = n + 1
    assert seen == {"old", "refused"} and n > 6 and not [p for p in os.listdir(tmp_path) if p.startswith(".")]


def test_a_line_that_a_full_disk_tore_is_no_obstacle(home, tmp_path, capsys):
    """Nor is a sign within a line of samples.jsonl that Python takes for the end of a line."""
    b = Bad(home, tmp_path)
    run = b.run()
    whole = (run / "log.jsonl").read_text()
    sample = json.dumps({"step": 1, "text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n"
    (run / "samples.jsonl").write_text(sample, encoding="utf-8")
    for name in LOGS:
        with open(run / name, "a") as f:
            f.write('{"step": 2, "lo')
    code, lines = call(b.sft("--steps", 2), capsys)
    assert code == 0, lines
    log = (run / "log.jsonl").read_text()
    assert log.startswith(whole) and [json.loads(line)["step"] for line in log.splitlines()] == [1, 2]
    assert (run / "samples.jsonl").read_text(encoding="utf-8") == sample


def test_the_lock_of_a_run_is_held_to_its_end(home, tmp_path, capsys, monkeypatch):
    """From its first update on a run cannot be joined by another."""
    b, seen = Bad(home, tmp_path), []

    def update(run, step, original=Run.update):
        if not seen:
            seen.append(subprocess.run([sys.executable, ROOT / "train.py", *map(str, b.sft()[1:])], capture_output=True,
                                       text=True))
        return original(run, step)

    monkeypatch.setattr(Run, "update", update)
    assert call(b.sft(), capsys)[0] == 0
    assert seen[0].returncode == 2 and "another process writes there" in seen[0].stderr and seen[0].stdout == ""


def test_a_screen_that_is_gone_ends_no_run(home, tmp_path):
    """As after `| head -1`: the first line is read, then nobody reads."""
    words = list(map(str, Bad(home, tmp_path).sft("--steps", 3, "--log-every", 1, "--threads", 1)[1:]))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *words], **pipes)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
    assert json.loads((tmp_path / "out" / "last" / "trainer.json").read_text())["step"] == 3


@pytest.mark.parametrize("started", ["plainly", "by nohup"])
def test_a_terminal_that_closes_stops_a_run_with_a_checkpoint(home, tmp_path, capsys, monkeypatch, started):
    """SIGHUP after the first update. nohup has it ignored, and so it stays."""
    def update(run, step, original=Run.update):
        os.kill(os.getpid(), signal.SIGHUP)
        return original(run, step)

    monkeypatch.setattr(Run, "update", update)
    b, before = Bad(home, tmp_path), signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if started == "by nohup" else signal.SIG_DFL)
        code, _ = call(b.sft("--steps", 3), capsys)
    finally:
        signal.signal(signal.SIGHUP, before)
    step = json.loads((b.out / "last" / "trainer.json").read_text())["step"]
    assert (code, step) == ((0, 3) if started == "by nohup" else (129, 1))


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_one_line_and_code_2_and_leaves_the_disk_alone(home, tmp_path, capsys, monkeypatch, name):
    check(CASES[name], home, tmp_path, capsys, monkeypatch)
