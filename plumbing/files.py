"""Files and commands: what any program has, and a reader of the paper may skip.

    text that is read      read_json, text_lines, json_object, read_jsonl
    files that are written replacing (a whole file or folder, or nothing), lock (one writer)
    a command at work      Progress (how far, how long), run_command (mistakes and signals become a
                           line and a code)

Locks are those of flock, which Linux and macOS have.
"""
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

MAX_ROW = 4_000_000         # characters of a line: a longer one is no passage and no question


# ------------------------------------------------------------------------------------------- text

def printable(text):
    """Text of a file for one line of a terminal: nothing in it starts a new line or gives the
    terminal an order."""
    words = " ".join(str(text).split())
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in words)


def utf8(text):
    """The text without halves of surrogate pairs, which JSON may hold but no file takes."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def as_text(value):
    """The bytes of a JSON value as it is written. ValueError for half of a surrogate pair."""
    return json.dumps(value, ensure_ascii=False).encode()


def read_json(path, kinds=(dict,)):
    """The object in a JSON file; kinds: dict and list, where it may hold the one or the other.
    ValueError that names the file where it is missing or holds something else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:   # no UTF-8, 5,000 digits, deep lists
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, kinds):
        expected = " or ".join("object" if kind is dict else kind.__name__ for kind in kinds)
        raise ValueError(f"{path}: expected a JSON {expected}, found {type(value).__name__}")
    return value


def text_lines(path):
    """Yields (number, line) of a UTF-8 file, its byte-order mark passed over.

    A line of more than MAX_ROW characters comes as its first MAX_ROW + 1, for `whole_line` to
    refuse. ValueError where the file cannot be read.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            number = 0
            while line := file.readline(MAX_ROW + 1):
                number += 1
                yield number, line
                while len(line) > MAX_ROW and not line.endswith("\n"):
                    line = file.readline(MAX_ROW + 1)               # the rest of it is passed over
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason}): convert the file") from None


def whole_line(line, place):
    """The line, or ValueError for one that is too long to be a row; `place` is file:line."""
    if len(line) > MAX_ROW:
        raise ValueError(f"{place}: a row of more than {MAX_ROW} characters: cut it into passages, "
                         "one object a line")
    return line


def json_object(line, place):
    """One line of a JSONL file as a dict."""
    try:
        row = json.loads(whole_line(line, place))
    except (json.JSONDecodeError, RecursionError) as error:         # lists in lists in lists
        reason = getattr(error, "msg", error)
        raise ValueError(f"{place}: not JSON ({reason}): expected one object a line") from None
    except ValueError as error:                                 # an integer beyond Python's limit
        message = str(error)
        if message.startswith(str(place)):
            raise
        raise ValueError(f"{place}: not JSON ({message}): expected one object a line") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected an object, found {type(row).__name__}")
    return row


def read_jsonl(path, check, limit=None):
    """The rows of a JSONL file, or its first `limit`: (what check(row, number) returns, faults).

    A row that is no object, or for which `check` raises ValueError, becomes a fault, a line that
    says what and where. ValueError where no row is left.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"{path}: its first {limit} rows are none: give at least 1")
    rows, faults = [], []
    for number, line in text_lines(path):
        if not line.strip():
            continue
        if limit is not None and len(rows) + len(faults) == limit:
            break
        place = f"{path}:{number}"
        try:
            row = json_object(line, place)
        except ValueError as error:
            faults.append(str(error))
            continue
        try:
            rows.append(check(row, number))
        except ValueError as error:
            faults.append(f"{place}: {error}")
    if not rows:
        raise ValueError(faults[0] if faults else f"{path}: no rows")
    return rows, faults


def whole_lines(path):
    """(lines, bytes) of a file that grows by lines: those that are complete, and how many bytes
    they take. What stands behind them is a line torn by a kill."""
    path = Path(path)
    data = path.read_bytes() if path.exists() else b""
    end = data.rfind(b"\n") + 1
    return data[:end].split(b"\n")[:-1], end


def checksum(path):
    """{"bytes", "sha256"} of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": os.path.getsize(path), "sha256": digest.hexdigest()}


def inside(path, folder):
    """Whether a file lies in a folder, links and `..` followed: where pictures that a data file
    names may lie."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


# ---------------------------------------------------------------------------------------- writing

def settle(*paths):
    """Returns when these files, and the names in these folders, are on the disk.

    A system writes when it likes and may rename first: after a crash of the machine a renamed file
    that was not settled can be empty.
    """
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def remove(path):
    """Deletes a file, a link or a folder with all that is in it, if it is there."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def real_place(path):
    """The absolute path of what is written: of a link that of its target; the link stays."""
    path = Path(path)
    return Path(os.path.realpath(path) if path.is_symlink() else os.path.abspath(path))


def beside(path, ending):
    """A hidden place in the same folder that belongs to `path`: .NAME.new, .NAME.lock."""
    return path.with_name(f".{path.name}.{ending}")


def put_in_place(new, path):
    """Puts a finished file or folder on the disk, then renames it to `path`. A folder that stands
    there is moved aside first, and deleted when the new one is in its place."""
    settle(*(file for file in new.rglob("*") if file.is_file()), new)
    old = beside(path, "old")
    if new.is_dir() and path.exists():                          # no rename replaces a full folder
        remove(old)
        os.replace(path, old)
    os.replace(new, path)
    settle(path.parent)
    remove(old)


@contextmanager
def replacing(path):
    """A place beside `path` where the caller writes a file, or makes a folder. When the block ends
    well, it is put on the disk and renamed to `path`: a reader never sees half of it. When the
    block fails, it is deleted and what stood at `path` is untouched.
    """
    path = real_place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = beside(path, "new"), beside(path, "old")
    remove(new)                                                     # of a process that was killed
    if old.exists() and not path.exists():                          # ... between the two renames
        os.replace(old, path)
    try:
        yield new
        put_in_place(new, path)
    finally:
        remove(new)


def point(link, target):
    """Lets a link name `target`, at one moment: there is none without the link or with half of it.
    """
    new = beside(Path(link), "new")
    remove(new)
    new.symlink_to(target)
    os.replace(new, link)
    settle(new.parent)


def write_text(path, text):
    """Writes a text file whole or not at all."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path, value, indent=2):
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


@contextmanager
def lock(path, wait=True):
    """The right to write at `path`: one process holds it until the block ends or the process dies,
    by kill -9 too. Another one waits for it; with wait=False it gets a ValueError.

    What is locked is a file beside `path`, which whoever held it deletes.
    """
    path = real_place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    place = beside(path, "lock")
    while True:
        with open(place, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{path}: another process writes there: wait for it, or name "
                                 "another place") from None
            if os.fstat(file.fileno()).st_nlink == 0:
                continue            # deleted while we waited: others may hold a new one by now
            try:
                yield
            finally:
                place.unlink(missing_ok=True)
            return


# ------------------------------------------------------------------------------- a command at work

def time_left(seconds, share):
    """Seconds that the rest of a work will take, when its `share` (0 to 1) took `seconds`."""
    return seconds * (1 - share) / max(share, 1e-6)


def say(line):
    """A line for people on stderr."""
    print(line, file=sys.stderr, flush=True)


class Progress:
    """Says every few seconds how much of a long work is done and how long the rest will take."""

    def __init__(self, total, what, say=say, every=5.0):
        """what: the plural that is counted, as in "12 of 90 questions"; say: takes a line."""
        self.total, self.what, self.say, self.every = total, what, say, every
        self.done = self.earlier = 0            # all that is done; of it by a run before this one
        self.start = self.last = time.monotonic()

    def add(self, count=1, earlier=False):
        """`count` more are done; earlier=True where a run before this one had done them."""
        self.done += count
        if earlier:
            self.earlier += count
            return
        now = time.monotonic()
        if now - self.last < self.every:
            return
        self.last = now
        share = (self.done - self.earlier) / max(1, self.total - self.earlier)
        left = time_left(now - self.start, share)
        self.say(f"{self.done} of {self.total} {self.what}, {left:.0f} s left")


def stop_on_sigterm():
    """From here on SIGTERM ends a command as Ctrl-C does: what is half-written is cleared away."""
    def stop(number, frame):
        raise KeyboardInterrupt(number)
    signal.signal(signal.SIGTERM, stop)


def stop_code(stop):
    """The exit code after a KeyboardInterrupt: 130 after Ctrl-C, 143 after SIGTERM."""
    number = stop.args[0] if stop.args else signal.SIGINT
    return 128 + number


def run_command(name, command, argv=None, stopped="stopped"):
    """Runs command(argv) of a script and returns its exit code; argv None: the process's own words.

    A user's mistake (ValueError, OSError, FloatingPointError) is one line on stderr and code 2,
    Ctrl-C 130, SIGTERM 143, and 141 where nobody reads what is printed (| head). Else the code is
    what the command returned, 0 for None. stopped: what is said after Ctrl-C, and how to go on.
    """
    if argv is None:
        stop_on_sigterm()
        argv = sys.argv[1:]
    try:
        code = command(argv)
        sys.stdout.flush()
        return code or 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, FloatingPointError) as error:
        say(f"{name}: {printable(error)}")
        return 2
    except KeyboardInterrupt as stop:
        say(f"\n{name}: {stopped}")
        return stop_code(stop)
    except SystemExit as end:                               # --help, or a run that a signal ended
        return end.code or 0
