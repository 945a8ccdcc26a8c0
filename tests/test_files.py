"""plumbing/files.py: files are whole or untouched, whatever happens; one writer at a time; one line
for a mistake."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT
from plumbing import files
from plumbing.files import (Progress, json_object, lock, printable, read_json, read_jsonl,
                            replacing, run_command, text_lines, time_left, whole_lines, write_json,
                            write_text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def started(script, *words):
    """A process that runs these lines of Python."""
    return subprocess.Popen([sys.executable, "-c", script, *words], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_file_is_replaced_whole(tmp_path):
    write_text(tmp_path / "new" / "a.txt", "first")
    write_text(tmp_path / "new" / "a.txt", "second")
    assert (tmp_path / "new" / "a.txt").read_text() == "second"
    assert names(tmp_path / "new") == ["a.txt"]


def test_what_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(OSError, match="disk"):
        with replacing(tmp_path / "a.txt") as new:
            new.write_text("half")
            raise OSError("disk full")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_is_replaced_whole(tmp_path):
    for content in ("first", "second"):
        with replacing(tmp_path / "base") as new:
            (new / "deep").mkdir(parents=True)
            (new / "deep" / f"{content}.txt").write_text(content)
    assert names(tmp_path) == ["base"]
    assert names(tmp_path / "base" / "deep") == ["second.txt"]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path):
    with replacing(tmp_path / "base") as new:
        new.mkdir()
        (new / "a").write_text("old")
    with pytest.raises(ValueError):
        with replacing(tmp_path / "base") as new:
            new.mkdir()
            raise ValueError
    assert names(tmp_path) == ["base"] and names(tmp_path / "base") == ["a"]


def test_a_folder_that_was_moved_aside_is_not_lost(tmp_path):
    """Killed between the two renames: the old folder lies aside, and nothing in its place."""
    (tmp_path / ".base.old" / "a").mkdir(parents=True)
    with pytest.raises(ValueError):
        with replacing(tmp_path / "base") as new:
            new.mkdir()
            raise ValueError
    assert names(tmp_path) == ["base"] and names(tmp_path / "base") == ["a"]
    with replacing(tmp_path / "base") as new:
        new.mkdir()
    assert names(tmp_path) == ["base"]


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    write_text(tmp_path / "target", "old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"


def test_what_a_killed_process_left_is_no_obstacle(tmp_path):
    write_text(tmp_path / "a", "old")
    script = ("import os, sys; from plumbing.files import replacing\n"
              "with replacing(sys.argv[1]) as new:\n"
              "    new.write_text('half'); os.kill(os.getpid(), 9)")
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "a"], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_text() == "old"
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new" and names(tmp_path) == ["a"]


HOLD = ("import sys, time; from plumbing.files import lock\n"
        "with lock(sys.argv[1]):\n"
        "    print('held', flush=True); time.sleep(60)")


def test_one_process_holds_a_lock_until_it_dies(tmp_path):
    holder = started(HOLD, tmp_path / "base")
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match="another process writes there"):
        with lock(tmp_path / "base", wait=False):
            pass
    holder.kill()
    holder.wait()
    with lock(tmp_path / "base", wait=False):
        pass
    assert names(tmp_path) == []


def test_who_waits_gets_the_lock_when_it_is_free(tmp_path):
    waiter = None
    with lock(tmp_path / "base"):
        waiter = started(HOLD, tmp_path / "base")
        time.sleep(0.3)
        assert waiter.poll() is None
    assert waiter.stdout.readline() == b"held\n"
    waiter.kill()
    waiter.wait()


def test_lines_are_numbered_and_a_mark_at_the_start_is_passed_over(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfone\r\ntwo\xe2\x80\xa8still two\n")
    assert list(text_lines(tmp_path / "a")) == [(1, "one\n"), (2, "two\u2028still two\n")]


def test_a_line_without_end_is_refused_and_the_next_one_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_ROW", 10)
    (tmp_path / "a").write_text('{"a": "' + "x" * 55 + '"}\n{"a": 1}\n')
    rows, faults = read_jsonl(tmp_path / "a", lambda row, number: (row, number))
    assert rows == [({"a": 1}, 2)]
    assert len(faults) == 1 and "more than 10 characters" in faults[0]


@pytest.mark.parametrize("line, reason", [
    ("[1]", "expected an object"), ("{", "not JSON"), ("[" * 100_000, "not JSON"),
    ("9" * 5000, "not JSON"), ("", "not JSON")])
def test_a_line_that_is_no_object_is_named(line, reason):
    with pytest.raises(ValueError, match=f"a.jsonl:3: .*{reason}"):
        json_object(line, "a.jsonl:3")


def test_rows_and_faults(tmp_path):
    def check(row, number):
        if row["n"] < 0:
            raise ValueError("n is negative")
        return row["n"] * 10 + number
    path = tmp_path / "a"
    path.write_text('{"n": 1}\n\n{"n": -1}\nnonsense\n{"n": 5}\n')
    no_json = f"{path}:4: not JSON (Expecting value): expected one object a line"
    assert read_jsonl(path, check) == ([11, 55], [f"{path}:3: n is negative", no_json])
    assert read_jsonl(path, check, limit=2) == ([11], [f"{path}:3: n is negative"])
    with pytest.raises(ValueError, match="give at least 1"):
        read_jsonl(path, check, limit=0)
    path.write_text("\n")
    with pytest.raises(ValueError, match="no rows"):
        read_jsonl(path, check)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff{}", b"[" * 100_000])
def test_a_broken_json_file_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match="a.json: "):
        read_json(tmp_path / "a.json")


def test_a_json_file_may_hold_a_list_where_that_is_allowed(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[1]")             # a byte-order mark before it
    assert read_json(tmp_path / "a.json", kinds=(dict, list)) == [1]
    (tmp_path / "a.json").write_text("7")
    with pytest.raises(ValueError, match="a.json: expected a JSON object or list, found int"):
        read_json(tmp_path / "a.json", kinds=(dict, list))


def test_json_comes_back(tmp_path):
    write_json(tmp_path / "a.json", {"ä": [1, None]})
    assert read_json(tmp_path / "a.json") == {"ä": [1, None]}


def test_a_torn_line_is_told_from_whole_ones(tmp_path):
    (tmp_path / "a").write_bytes(b"one\ntwo\nthr")
    assert whole_lines(tmp_path / "a") == ([b"one", b"two"], 8)
    assert whole_lines(tmp_path / "none") == ([], 0)


def test_text_for_a_terminal_gives_it_no_orders():
    assert printable("a\x1b[31mb\n c\u202e") == "a\ufffd[31mb c\ufffd"


def test_progress_counts_only_its_own_work(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(100, "rows", lines.append)
    progress.add(40, earlier=True)
    now[0] = 10.0
    progress.add(20)                            # 20 of the 60 that are left took 10 s
    progress.add(1)                             # too soon for another line
    assert lines == ["60 of 100 rows, 20 s left"]


def test_time_left():
    assert time_left(30, 0.25) == 90
    assert time_left(30, 1) == 0


@pytest.mark.parametrize("error, code", [
    (ValueError("wrong"), 2), (OSError("disk"), 2), (FloatingPointError("nan"), 2),
    (KeyboardInterrupt(), 130), (KeyboardInterrupt(signal.SIGTERM), 143), (SystemExit(7), 7)])
def test_how_commands_end(error, code, capsys):
    def command(words):
        assert words == ["x"]
        raise error
    assert run_command("some.py", command, ["x"], stopped="the same command continues") == code
    lines = capsys.readouterr().err.strip()
    assert lines == {2: f"some.py: {error}", 130: "some.py: the same command continues",
                     143: "some.py: the same command continues", 7: ""}[code]


def test_a_command_that_is_right_ends_with_its_code():
    assert run_command("some.py", lambda words: None, []) == 0
    assert run_command("some.py", lambda words: 3, []) == 3


SLOW = ("import sys, time; from plumbing.files import run_command\n"
        "def command(words):\n"
        "    print('begun', flush=True); time.sleep(60)\n"
        "sys.exit(run_command('slow.py', command, stopped='go on'))")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_command_in_one_line(number, code):
    process = started(SLOW)
    assert process.stdout.readline() == b"begun\n"
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code and err.decode().strip() == "slow.py: go on"


def test_a_reader_that_goes_away_is_no_mistake():
    script = ("import sys; from plumbing.files import run_command\n"
              "def command(words):\n"
              "    for i in range(100_000): print(json.dumps(i))\n"
              "import json; sys.exit(run_command('loud.py', command))")
    process = started(script)
    assert json.loads(process.stdout.readline()) == 0
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(20) == 141
