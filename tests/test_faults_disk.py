"""Full disks, read-only places and two writers at once: nothing is lost and nothing half-written.
"""
import ctypes
import os
import re
import struct
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from faults import SCRIPTS, SMALL_WORLD, Bad, asking, build, call, disk, export, full_disk

RESULT = {"question": "?", "answer": "x", "llm_answer": "x"}


def few_words(b):
    """An evaluation of one question into r.jsonl."""
    return b.eval(asking(None), flags=("--out", b.dir / "r.jsonl", "--max-new-tokens", 2))


# ------------------------------------------------------------------------------------ full disks

FULL = {  # the command, the largest file in bytes that fits, and what must be told
    "a checkpoint": (lambda b: b.sft(), 9000, "make room"),
    "the log of a run": (lambda b: b.sft("--steps", 1000, "--save-every", 1000), 300, "make room"),
    "result rows": (few_words, 200, "make room"),
    "a base": (lambda b: ["retrieve", "build", b.w / "text.jsonl", "--out", b.dir / "kb"], 9000,
               ""),
    "a world": (lambda b: [*SMALL_WORLD, "--out", b.out], 2000, ""),
    "a page": (lambda b: ["report", b.file("r.jsonl", RESULT), "--out", b.dir / "page.html"], 900,
               "")}
HALF_WRITTEN = re.compile("kb$|page.html$|checkpoint|last")


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_is_told_in_one_line_and_what_was_there_stays(home, tmp_path, capsys, name):
    make, size, message = FULL[name]
    words = make(Bad(home, tmp_path))
    with full_disk(size):
        code, lines = call(words, capsys)
    _, title = SCRIPTS[words[0]]
    assert code == 2 and re.match(rf"{title}: .*(too large|full).*{message}", lines[-1]), lines
    names = [path.name for path in tmp_path.rglob("*")]
    assert not any(HALF_WRITTEN.match(name) for name in names), names
    # there is room again
    more = ["--steps", 2] if name == "the log of a run" else []
    code, lines = call([*words, *more], capsys)
    assert code == 0, lines


def test_what_is_renamed_into_place_is_on_the_disk_before(home, tmp_path, capsys, monkeypatch):
    """Else a crash of the machine could leave a new name for an empty file. Files are known by
    their number, which a rename keeps: those of a checkpoint are written out before `last` names
    it, those of a shard before its record."""
    settled, fsync, replace = [], os.fsync, os.replace
    names_at, last_at = {}, {}      # at the rename to a name: what is settled beside it; what last

    def noted(file):
        settled.append(os.fstat(file).st_ino)
        fsync(file)

    def watched(old, new):
        new = Path(new)
        files = [path for path in new.parent.rglob("*") if path.stat().st_ino in settled]
        names_at[new.name] = {path.name for path in files}
        last_at[new.name] = settled[-1:]
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", watched)
    b, kb = Bad(home, tmp_path), tmp_path / "kb"
    run = b.run()
    checkpoint = {path.name for path in (run / "last").iterdir()}
    assert names_at["last"] >= checkpoint | {"checkpoint-000001", "log.jsonl"}
    words = ["retrieve", "build", b.w / "text.jsonl", "--shard", 30, "--out", kb]
    assert call(words, capsys)[0] == 0
    for number in (0, 1):
        record = {path.stat().st_ino for path in kb.glob(f"{number:05d}.*")}
        assert len(record) == 3 and record <= set(settled)
    assert names_at["kb"] >= {path.name for path in kb.iterdir()}
    assert last_at["kb"] == [kb.stat().st_ino]


# ----------------------------------------------------------------------------------- two writers

WRITERS = {"a run": (lambda b: b.sft("--threads", 1), ".out.lock"),
           "a result file": (few_words, ".r.jsonl.lock")}
HOLD = ("import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print('held', flush=True); input()")


@pytest.mark.parametrize("name", WRITERS)
def test_a_second_process_is_refused_and_a_dead_one_blocks_nobody(home, tmp_path, capsys, name):
    make, lock = WRITERS[name]
    words = make(Bad(home, tmp_path))
    other = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / lock],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        before = disk(tmp_path)
        code, lines = call(words, capsys)
        assert code == 2 and "another process writes there" in lines[-1]
        assert disk(tmp_path) == before
    finally:
        other.kill()
        other.wait()
    code, lines = call(words, capsys)
    assert code == 0, lines


# ------------------------------------------------------------------------------ read-only places

@contextmanager
def permissions_count():
    """Root may write everywhere: inside, this thread does without that right (CAP_DAC_OVERRIDE,
    number 1 of man 7 capabilities)."""
    libc, header = ctypes.CDLL(None, use_errno=True), struct.pack("Ii", 0x20080522, 0)
    data = ctypes.create_string_buffer(24)
    assert libc.capget(header, data) == 0
    before = data.raw
    effective, *others = struct.unpack("6I", before)
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
    "a world": lambda b, place: [*SMALL_WORLD, "--out", place / "w"],
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
    assert code == 2 and len(lines) == 1, lines
    assert "Permission denied" in lines[0] and "place" in lines[0], lines
    assert disk(tmp_path) == before
