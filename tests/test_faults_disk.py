"""Full disks, read-only places and two writers at once: nothing is lost and nothing half-written."""
import ctypes
import os
import re
import resource
import struct
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

import infer
import retrieve
from faults import Bad, SCRIPTS, asking, build, call, disk, export, table
from lab import report


FULL = {  # the command, the largest file in bytes that fits, and what must be told
    "a checkpoint": (lambda b: b.sft(), 9000, "make room"),
    "the log of a run": (lambda b: b.sft("--steps", 1000, "--save-every", 1000), 300, "make room"),
    "result rows": (lambda b: b.eval(asking(None), flags=("--out", b.dir / "r.jsonl", "--max-new-tokens", 2)), 200,
                    "make room"),
    "a base": (lambda b: ["retrieve", "build", b.w / "text.jsonl", "--out", b.dir / "kb"], 9000, ""),
    "a world": (lambda b: ["world", "--countries", 12, "--questions", 13, "--out", b.out], 2000, ""),
    "a page": (lambda b: ["report", b.file("r.jsonl", {"question": "?", "answer": "x", "llm_answer": "x"}), "--out",
                          b.dir / "page.html"], 900, "")}


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_is_told_in_one_line_and_what_was_there_stays(home, tmp_path, capsys, name):
    """A limit on the size of a file fails a write in the middle, as a full disk does, only with another number."""
    (make, size, said), before = FULL[name], resource.getrlimit(resource.RLIMIT_FSIZE)
    words = make(Bad(home, tmp_path))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        code, lines = call(words, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2 and re.match(rf"{SCRIPTS[words[0]][1]}: .*(too large|full).*{said}", lines[-1]), lines
    left = [path.name for path in tmp_path.rglob("*")]
    assert not any(path in ("kb", "page.html") or path.startswith(("checkpoint", "last")) for path in left), left
    # there is room again
    code, lines = call([*words, "--steps", 2] if name == "the log of a run" else words, capsys)
    assert code == 0, lines


def test_what_is_renamed_into_place_is_on_the_disk_before(home, tmp_path, capsys, monkeypatch):
    """Else a crash of the machine could leave a new name for an empty file. Files are known by their number, which a
    rename keeps: those of a checkpoint are written out before `last` names it, those of a shard before its record."""
    settled, at, fsync, replace = [], {}, os.fsync, os.replace

    def noted(file):
        settled.append(os.fstat(file).st_ino)
        fsync(file)

    def watched(old, new):
        at[Path(new).name] = {path.name for path in Path(new).parent.rglob("*") if path.stat().st_ino in settled}
        at["the last before", Path(new).name] = settled[-1:]
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", watched)
    b = Bad(home, tmp_path)
    run = b.run()
    assert at["last"] >= {path.name for path in (run / "last").iterdir()} | {"checkpoint-000001", "log.jsonl"}
    assert call(["retrieve", "build", b.w / "text.jsonl", "--shard", 30, "--out", tmp_path / "kb"], capsys)[0] == 0
    for number in (0, 1):
        record = {path.stat().st_ino for path in (tmp_path / "kb").glob(f"{number:05d}.*")}
        assert len(record) == 3 and record <= set(settled)
    assert at["kb"] >= {path.name for path in (tmp_path / "kb").iterdir()}
    assert at["the last before", "kb"] == [(tmp_path / "kb").stat().st_ino]


WRITERS = {"a run": (lambda b: b.sft("--threads", 1), "out/lock"),
           "a result file": (lambda b: b.eval(asking(None), flags=("--out", b.dir / "r.jsonl", "--max-new-tokens", 2)),
                             ".r.jsonl.lock")}


@pytest.mark.parametrize("name", WRITERS)
def test_a_second_process_is_refused_and_a_dead_one_blocks_nobody(home, tmp_path, capsys, name):
    b = Bad(home, tmp_path)
    words, lock = WRITERS[name][0](b), tmp_path / WRITERS[name][1]
    lock.parent.mkdir(exist_ok=True)
    script = """import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, 2); print("held", flush=True); input()"""
    other = subprocess.Popen([sys.executable, "-c", script, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        before = disk(tmp_path)
        code, lines = call(words, capsys)
        assert code == 2 and "another process writes there" in lines[-1] and disk(tmp_path) == before
    finally:
        other.kill()
        other.wait()
    code, lines = call(words, capsys)
    assert code == 0, lines


@contextmanager
def permissions_count():
    """Root may write everywhere: inside, this thread does without that right (CAP_DAC_OVERRIDE, number 1 of man 7
    capabilities)."""
    libc, header = ctypes.CDLL(None, use_errno=True), struct.pack("Ii", 0x20080522, 0)
    data = ctypes.create_string_buffer(24)
    assert libc.capget(header, data) == 0
    before, (effective, *others) = data.raw, struct.unpack("6I", data.raw)
    assert libc.capset(header, struct.pack("6I", effective & ~2, *others)) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


READ_ONLY = {
    "a run": lambda b, place: b.sft("--out", place / "run"),
    "a run, there already": lambda b, place: b.sft("--out", place),
    "an export": lambda b, place: export(b, place / "mine"),
    "result rows": lambda b, place: b.eval(asking(None), flags=("--out", place / "r.jsonl")),
    "a base": lambda b, place: build(b, {"id": "1", "text": "t"}, "--out", place / "kb"),
    "a world": lambda b, place: ["world", "--countries", 12, "--questions", 13, "--out", place / "w"],
    "a page": lambda b, place: ["report", b.out, "--out", place / "page.html"]}


@pytest.mark.parametrize("name", READ_ONLY)
def test_a_read_only_place_is_told_in_one_line(home, tmp_path, capsys, name):
    b, place = Bad(home, tmp_path), tmp_path / "place"
    b.run()
    place.mkdir()
    words = READ_ONLY[name](b, place)
    capsys.readouterr()
    before = disk(tmp_path)
    place.chmod(0o555)
    try:
        with permissions_count():
            code, lines = call(words, capsys)
    finally:
        place.chmod(0o755)
    assert code == 2 and len(lines) == 1 and "Permission denied" in lines[0] and "place" in lines[0], lines
    assert disk(tmp_path) == before
