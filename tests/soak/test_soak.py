"""Endurance in short: three kills each of training, index building and evaluation, signals, some
thousand generated inputs, and memory over a few steps. `make soak` is the long version."""
import json
import os
import random
import signal
import subprocess
import time
from dataclasses import replace

import numpy as np
import pytest

import soak
from conftest import command, made, run
from parts.steps import BASES
from parts.vision import load_picture
from retrieve import KnowledgeBase, world_bases

FEW = soak.SoakOptions(moments=3, inputs=5000, steps=12, questions=117)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soak") / "w"
    made("lab.world", "--countries", 40, "--questions", 39, "--out", folder)
    return folder


def rows_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ------------------------------------------------------------------------------- kills and signals

@pytest.mark.parametrize("kind", soak.KINDS)
def test_work_that_is_killed_ends_as_if_it_had_not_been(world, tmp_path, kind):
    report, held = soak.soak_kill(FEW, tmp_path, world, [kind])
    assert held and report[kind]["moments"] == 3 and report[kind]["killed"] >= 1, report


def test_what_is_compared_after_a_kill_is_all_that_counts(tmp_path):
    """By hand: times and the order of rows may differ, nothing else may."""
    def folder(name, *rows, weights=b"w"):
        (tmp_path / name / "last").mkdir(parents=True)
        (tmp_path / name / "last" / "model.safetensors").write_bytes(weights)
        write_rows(tmp_path / name / "rows.jsonl", rows)
        return soak.end_of(tmp_path / name)

    one = {"line": 1, "cost": {"seconds_model": 1, "calls": 2}}
    two = {"line": 2, "cost": {}}
    same = folder("a", one, two)
    assert folder("b", two, {"line": 1, "cost": {"seconds_model": 9, "calls": 2}}) == same
    assert folder("lost", one) != same and folder("doubled", one, two, two) != same
    assert folder("changed", {"line": 1, "cost": {"calls": 3}}, two) != same
    assert folder("weights", one, two, weights=b"x") != same


SIGNALS = pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])


def has_begun(sign):
    """Whether the folder is there, or the file holds something."""
    return sign.is_dir() or sign.exists() and sign.stat().st_size > 0


def signalled(words, sign, number):
    """Sends a command a signal once it has begun: (stderr's lines, code)."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end = time.time() + 60
    while not has_begun(sign) and process.poll() is None and time.time() < end:
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate()
    return errors.splitlines(), process.returncode


@SIGNALS
def test_a_signal_ends_an_evaluation_between_rows(world, tmp_path, number, code):
    words, file = soak.work("evaluation", world, tmp_path)
    errors, ended = signalled(words, file, number)
    assert ended == code
    assert errors[-1] == "infer.py: stopped; with --out, the same command continues"
    assert not any("Traceback" in line for line in errors)
    assert 0 < len(rows_in(file)) < 26 and file.read_bytes().endswith(b"\n")


@SIGNALS
def test_a_signal_ends_an_index_build_and_keeps_the_finished_shards(world, tmp_path, number, code):
    """The same command goes on: what was there is not written again, and no base stood there in
    between."""
    words, building = soak.work("index", world, tmp_path)
    errors, ended = signalled(words, building / "progress" / "1.json", number)
    assert ended == code and errors[-1] == "retrieve.py: stopped; the same build continues"
    assert not any("Traceback" in line for line in errors)
    assert os.listdir(tmp_path) == [building.name]
    shards = ("00000.hnsw", "00001.hnsw")
    times = [(building / name).stat().st_mtime_ns for name in shards]
    soak.finish(words)
    assert [(tmp_path / "kb" / name).stat().st_mtime_ns for name in shards] == times
    assert len(KnowledgeBase.load(tmp_path / "kb")) == len(rows_in(world / "text.jsonl"))


@SIGNALS
def test_a_signal_while_a_world_gets_its_bases_leaves_none_or_whole_ones(world, tmp_path, number,
                                                                         code):
    for name in BASES:                      # larger ones, so that the signal meets the building
        rows = rows_in(world / f"{name}.jsonl")
        many = []
        for i in range(20):
            many += [row | {"id": f"{row['id']} {i}", "image": None} for row in rows]
        write_rows(tmp_path / f"{name}.jsonl", many)
    words = command("infer.py", "--world", tmp_path, "--method", "text", "--question", "Who?",
                    "--threads", 1)
    errors, ended = signalled(words, tmp_path / "kb", number)
    assert ended == code and "Traceback" not in "".join(errors)
    assert set(os.listdir(tmp_path / "kb")) <= {"text", ".text.lock"}       # nobody holds the lock
    text = world_bases(tmp_path, ["text"])["text"]
    assert len(text) == 20 * len(rows_in(world / "text.jsonl"))


# ------------------------------------------------------------------------------- generated inputs

def test_generated_inputs_raise_nothing_undeclared(tmp_path):
    report, held = soak.soak_fuzz(FEW, tmp_path, None)
    assert held, report["failed"]
    inputs = [part["inputs"] for part in report.values() if isinstance(part, dict)]
    assert sum(inputs) >= 5000


def test_that_test_would_see_it(tmp_path, monkeypatch):
    def broken(rng, file):
        raise KeyError("x")

    monkeypatch.setattr(soak, "try_text", broken)
    report, held = soak.soak_fuzz(replace(FEW, inputs=50), tmp_path, None)
    assert not held and "KeyError" in report["failed"][0] and len(report["failed"]) == 20


@pytest.mark.parametrize("number", range(len(soak.FORMATS)))
def test_generated_rows_are_read_as_well_as_refused(tmp_path, number):
    """Else the readers' insides would never be reached: of each format some files are read to
    their end."""
    reader, row = soak.FORMATS[number]
    count = 0
    for i in range(200):
        (tmp_path / "f").write_bytes(soak.some_line(random.Random(f"{number} {i}"), row))
        try:
            soak.read_whole(reader, tmp_path / "f")
        except ValueError:
            continue
        count += 1
    assert 20 < count < 190


def test_generated_pictures_are_read_as_well_as_refused(tmp_path):
    count = 0
    for i in range(200):
        soak.try_picture(random.Random(i), tmp_path / "f")
        try:
            load_picture(tmp_path / "f")
        except ValueError:
            continue
        count += 1
    assert 20 < count < 180


@pytest.mark.parametrize("seed", ["0 pictures 15007", "0 pictures 20079"])
def test_pictures_that_generated_inputs_found(seed, tmp_path):
    """A note whose fraction is a text: Pillow reads it and fails to write it (TypeError)."""
    soak.try_picture(random.Random(seed), tmp_path / "f")
    with pytest.raises(ValueError, match="not a readable picture"):
        load_picture(tmp_path / "f")


# ----------------------------------------------------------------------------------------- memory

def test_the_slope_of_memory_by_hand():
    noise = np.random.default_rng(0).normal(0, 0.5, 2000)
    flat = soak.slope([(i, 500 + noise[i]) for i in range(2000)])
    leak = soak.slope([(i, 500 + noise[i] + 0.02 * i) for i in range(2000)])    # 20 kB each
    assert flat["flat"] and abs(flat["kb_each"]) < 0.2
    assert not leak["flat"] and abs(leak["kb_each"] - 20) < 1
    assert leak["work"] == 1999 and abs(leak["megabytes"] - 539) < 2


def test_the_long_run_in_short(world, tmp_path):
    report, _ = soak.soak_memory(FEW, tmp_path, world)      # too short for a verdict on the slope
    assert report["training"]["work"] >= 6 and report["routing"]["work"] >= 117
    assert all(part["megabytes"] > 50 for part in report.values())


def test_a_mistake_is_one_line_and_code_2():
    done = run("tests/soak/soak.py", "rest")
    assert done.returncode == 2
    assert done.stderr == "soak.py: rest: no such part, there are kill, fuzz, memory\n"
