"""Endurance in short: three kills each of training, index building and evaluation, signals, some thousand generated
inputs, and memory over a few steps. `make soak` is the long version."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

import soak
from conftest import ROOT
from parts.steps import BASES
from parts.vision import load_picture
from retrieve import KnowledgeBase, world_bases

FEW = SimpleNamespace(seed=0, moments=3, inputs=5000, steps=12, questions=117)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soak") / "w"
    soak.must(soak.command("lab.world", "--countries", 40, "--questions", 39, "--out", folder))
    return folder


@pytest.mark.parametrize("name", ["training", "index", "evaluation"])
def test_work_that_is_killed_ends_as_if_it_had_not_been(world, tmp_path, monkeypatch, name):
    works = soak.kinds_of_work(world)
    monkeypatch.setattr(soak, "kinds_of_work", lambda _: {name: works[name]})
    report, held = soak.soak_kill(FEW, tmp_path, world)
    assert held and report[name]["moments"] == 3 and report[name]["killed"] >= 1, report


def test_what_is_compared_after_a_kill_is_all_that_counts(tmp_path):
    """By hand: times and the order of rows may differ, nothing else may."""
    def folder(name, *rows, weights=b"w"):
        (tmp_path / name / "last").mkdir(parents=True)
        (tmp_path / name / "last" / "model.safetensors").write_bytes(weights)
        (tmp_path / name / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return soak.end_of(tmp_path / name)
    one, two = {"line": 1, "cost": {"seconds_model": 1, "calls": 2}}, {"line": 2, "cost": {}}
    same = folder("a", one, two)
    assert folder("b", two, {"line": 1, "cost": {"seconds_model": 9, "calls": 2}}) == same
    assert folder("lost", one) != same and folder("doubled", one, two, two) != same
    assert folder("changed", {"line": 1, "cost": {"calls": 3}}, two) != same
    assert folder("weights", one, two, weights=b"x") != same


SIGNALS = pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])


def signalled(words, sign, number):
    """Sends a command a signal once the file `sign` holds something, or the folder is there: (stderr's lines, code)."""
    process = subprocess.Popen(list(map(str, words)), **soak.QUIET | {"stderr": subprocess.PIPE}, text=True)
    end = time.time() + 60
    while not (sign.is_dir() or sign.exists() and sign.stat().st_size) and process.poll() is None and time.time() < end:
        time.sleep(0.002)
    process.send_signal(number)
    return process.communicate()[1].splitlines(), process.returncode


@SIGNALS
def test_a_signal_ends_an_evaluation_between_rows(world, tmp_path, number, code):
    words, sign = soak.kinds_of_work(world)["evaluation"]
    file = tmp_path / sign
    errors, ended = signalled(words(tmp_path), file, number)
    assert ended == code and [line for line in errors if line] == [
        "infer.py: stopped; with --out, the same command continues"]
    rows = [json.loads(line) for line in file.read_text().split("\n")[:-1]]
    assert 0 < len(rows) < 26 and file.read_bytes().endswith(b"\n")


@SIGNALS
def test_a_signal_ends_an_index_build_and_keeps_the_finished_shards(world, tmp_path, number, code):
    """The same command goes on: what was there is not written again, and no base stood there in between."""
    words, sign = soak.kinds_of_work(world)["index"]
    errors, ended = signalled(words(tmp_path), tmp_path / sign / "progress" / "1.json", number)
    assert ended == code and errors[-1] == "retrieve.py: stopped; the same build continues"
    assert not any("Traceback" in line for line in errors) and os.listdir(tmp_path) == [sign]
    kept = {f"0000{i}.hnsw": (tmp_path / sign / f"0000{i}.hnsw").stat().st_mtime_ns for i in (0, 1)}
    soak.must(words(tmp_path))
    assert {name: (tmp_path / "kb" / name).stat().st_mtime_ns for name in kept} == kept
    assert len(KnowledgeBase.load(tmp_path / "kb")) == (world / "text.jsonl").read_text().count("\n")


@SIGNALS
def test_a_signal_while_a_world_gets_its_bases_leaves_none_or_whole_ones(world, tmp_path, number, code):
    for name in BASES:                                            # larger ones, so that the signal meets the building
        rows = [json.loads(line) for line in (world / f"{name}.jsonl").read_text().splitlines()]
        rows = [row | {"id": f"{row['id']} {i}", "image": None} for i in range(20) for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = soak.command("infer.py", "--world", tmp_path, "--method", "text", "--question", "Who?", "--threads", 1)
    errors, ended = signalled(words, tmp_path / "kb", number)
    assert ended == code and "Traceback" not in "".join(errors)
    assert set(os.listdir(tmp_path / "kb")) <= {"text", ".text.lock"}                      # nobody holds the lock
    assert len(world_bases(tmp_path, ["text"])["text"]) == 20 * (world / "text.jsonl").read_text().count("\n")


def test_generated_inputs_raise_nothing_undeclared(tmp_path):
    report, held = soak.soak_fuzz(FEW, tmp_path, None)
    assert held and sum(part["inputs"] for part in report.values() if isinstance(part, dict)) >= 5000, report["failed"]


def test_that_test_would_see_it(tmp_path, monkeypatch):
    def broken(rng, file):
        raise KeyError("x")
    monkeypatch.setattr(soak, "try_text", broken)
    report, held = soak.soak_fuzz(SimpleNamespace(seed=0, inputs=50), tmp_path, None)
    assert not held and "KeyError" in report["failed"][0] and len(report["failed"]) == 20


def test_generated_rows_are_read_as_well_as_refused(tmp_path):
    """Else the readers' insides would never be reached: of each format some files are read to their end."""
    for number, (reader, row) in enumerate(soak.FORMATS):
        read = 0
        for i in range(200):
            (tmp_path / "f").write_bytes(soak.some_line(random.Random(f"{number} {i}"), row))
            try:
                read += reader(tmp_path / "f") is not None
            except ValueError:
                pass
        assert 20 < read < 190, (number, read)


def test_generated_pictures_are_read_as_well_as_refused(tmp_path):
    read = 0
    for i in range(200):
        soak.try_picture(random.Random(i), tmp_path / "f")
        try:
            read += load_picture(tmp_path / "f") is not None
        except ValueError:
            pass
    assert 20 < read < 180, read


@pytest.mark.parametrize("seed", ["0 pictures 15007", "0 pictures 20079"])
def test_pictures_that_generated_inputs_found(seed, tmp_path):
    """A note whose fraction is a text: Pillow reads it and fails to write it (TypeError)."""
    soak.try_picture(random.Random(seed), tmp_path / "f")
    with pytest.raises(ValueError, match="not a readable picture"):
        load_picture(tmp_path / "f")


def test_the_slope_of_memory_by_hand():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.5, 2000)
    flat = soak.slope([(i, 500 + noise[i]) for i in range(2000)])
    leak = soak.slope([(i, 500 + noise[i] + 0.02 * i) for i in range(2000)])            # 20 kB each: 30 MB in all
    assert flat["flat"] and abs(flat["kb_each"]) < 0.2 and not leak["flat"] and abs(leak["kb_each"] - 20) < 1
    assert leak["work"] == 1999 and abs(leak["megabytes"] - 539) < 2


def test_the_long_run_in_short(world, tmp_path):
    report, _ = soak.soak_memory(FEW, tmp_path, world)             # too short for a verdict on the slope
    assert report["training"]["work"] >= 6 and report["routing"]["work"] >= 117
    assert all(part["megabytes"] > 50 for part in report.values())


def test_a_mistake_is_one_line_and_code_2():
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "soak" / "soak.py"), "rest"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "soak.py: rest: no such part, there are kill, fuzz, memory\n"
