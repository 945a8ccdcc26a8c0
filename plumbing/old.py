"""Small parts that are about to be merged."""
import argparse
import fcntl
import hashlib
import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import field, fields
from pathlib import Path

import torch


def read_json(path):
    """The object in a JSON file; a missing or broken file, or one with something else, raises ValueError with the
    place."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as e:   # no JSON, no UTF-8, a number of 5,000 digits, lists in lists in lists
        raise ValueError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def usable_device(device):
    """The device, if torch can compute on it here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # torch says the one of an unknown name, the other of a missing CUDA
        raise ValueError(f"device {device!r} cannot be used here: give cpu, or cuda where torch finds a GPU") from None
    return device


def write_json(path, value):
    """Write JSON beside the file, then rename: a reader never sees half of it."""
    new = Path(str(path) + ".new")
    new.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    settle(new)
    os.replace(new, path)


def settle(*paths):
    """Return when these files, and the names in these folders, are on the disk. A system writes when it likes and may
    rename first: after a crash of the machine a renamed file that was not settled can be empty."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def inside(path, folder):
    """Whether a file lies in a folder, links and `..` followed: where pictures that a data file names may lie."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))

# ------------------------------------------------------------------------------------------------------ small parts

def option_encode(default, text):
    """A dataclass field whose help text also serves the command line."""
    return field(default=default, metadata={"help": text})


def known_value(name, value, known):
    """The value, if it is one that this file implements."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}: this program knows {', '.join(map(str, known))}")
    return value


def whole(value, name, least=1, most=1_000_000):
    """The value, if it is a whole number within reach; the name says where it stands."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is {repr(value)[:40]}: expected a whole number from {least} to {most}")
    return value


def checksum(path):
    """{"bytes", "sha256"} of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": os.path.getsize(path), "sha256": digest.hexdigest()}


# ------------------------------------------------------------------------------------------------- what is encoded

def utf8(text):
    """The text without halves of surrogate pairs, which JSON may hold but no file or tokenizer takes."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
MAX_ROW = 4_000_000  # characters of a line of JSONL: a longer one is no passage or question


# --------------------------------------------------------------------------------------------------- readers of corpora

@contextmanager
def reading(path):
    """A text file, open; ValueError where it cannot be read as UTF-8. A byte-order mark at its start is passed over."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield file
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason}): convert the file") from None


def lines_of(path):
    """Numbered places and lines of a text file: ("file:3", line). A line without end is refused before it is read."""
    with reading(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_ROW + 1), ""), 1):
            if len(line) > MAX_ROW:
                raise ValueError(f"{path}:{number}: a row of more than {MAX_ROW} characters: cut it into passages, one "
                                 "object a line")
            yield f"{path}:{number}", line


def json_object(line, place):
    """One line of a JSONL file as a dict."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # no JSON, an integer beyond Python's limit, lists in lists in lists
        raise ValueError(f"{place}: not JSON ({error}): expected one object a line") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected an object, found {type(row).__name__}")
    return row


@contextmanager
def sole_writer(path, wait=True, *, check):
    """The right to write the base at `path`: one process at a time holds it, until it is done or dies (kill -9 too).
    `check(path)` raises where something else stands there.

    Where another process holds it, this one waits, or with wait=False raises ValueError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.parent / f".{path.name}.lock"
    while True:
        with open(lock, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise ValueError(f"{path}: another process builds it: wait for that, or give another place") from None
            if os.fstat(file.fileno()).st_nlink:  # 0: who held it deleted it while we waited; others may hold a new one
                try:
                    check(path)
                    yield
                finally:
                    lock.unlink(missing_ok=True)
                return


class Progress_build:
    """Says every few seconds how many documents are done and how long the rest will take."""

    def __init__(self, total, log, every=5.0):
        self.total, self.log, self.every = total, log, every
        self.done = self.encoded = 0  # of the whole corpus; of them by this run
        self.start = self.said = time.monotonic()

    def add(self, count, encoded=True):
        """`count` more documents are done; encoded=False where an earlier run had done them."""
        self.done, self.encoded, now = self.done + count, self.encoded + count * encoded, time.monotonic()
        if encoded and (now - self.said >= self.every or self.done == self.total):
            self.said, rate = now, self.encoded / max(now - self.start, 1e-9)
            left = (self.total - self.done) / rate / 60
            self.log(f"{self.done} of {self.total} documents, {rate:.0f}/s, {left:.1f} min left")


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with the flags in one line."""

    def error(self, message):
        raise ValueError(f"{message}: see {self.prog} --help")


def add_flags(parser, kind):
    """One flag for each field of an options dataclass."""
    for f in fields(kind):
        flag, text = f"--{f.name.replace('_', '-')}", f.metadata["help"]
        if type(f.default) is bool:
            parser.add_argument(flag, dest=f.name, default=f.default, action=argparse.BooleanOptionalAction, help=text)
        else:
            text = f"{text} [{f.default}]" if f.default else text
            parser.add_argument(flag, dest=f.name, default=f.default, type=type(f.default), help=text)


def stop_on_sigterm():
    """From here on SIGTERM ends a command as Ctrl-C does: what is half-written is cleared away, one line is said."""
    def stop(number, frame):
        raise KeyboardInterrupt(number)
    signal.signal(signal.SIGTERM, stop)


def code_of(stop):
    """The exit code after a KeyboardInterrupt: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + (stop.args or (signal.SIGINT,))[0]


def printable(text):
    """Text of a file for one line of a terminal: nothing in it starts a new line or gives the terminal an order."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(str(text).split()))


def write_whole(path, text):
    """Writes a file beside its place, then renames it: nobody reads half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    try:
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def read_rows(path, check, limit=None):
    """JSONL, or its first `limit` rows -> (what `check(row, number)` returns, faults); a bad row becomes a fault."""
    if limit is not None and limit < 1:
        raise ValueError(f"{path}: its first {limit} rows are none: give at least 1")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}): give a JSONL file") from None
    rows, faults = [], []
    for number, line in [(i, line) for i, line in enumerate(lines, 1) if line.strip()][:limit]:
        try:
            if len(line) > MAX_ROW:
                raise ValueError(f"a row of {len(line)} characters: {MAX_ROW} at most")
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"expected an object, found {type(row).__name__}")
            rows.append(check(row, number))
        except (json.JSONDecodeError, RecursionError) as error:  # lists in lists in lists
            faults.append(f"{path}:{number}: not JSON ({getattr(error, 'msg', error)}): expected one object a line")
        except ValueError as error:
            faults.append(f"{path}:{number}: {error}")
    if not rows:
        raise ValueError(faults[0] if faults else f"{path}: no rows")
    return rows, faults


def as_text(row):
    """The bytes of a row as it is written. ValueError for half of a surrogate pair, which is no text."""
    return json.dumps(row, ensure_ascii=False).encode()


def hold(file, path):
    """Makes this process the only writer of an open file until it closes it or ends, however it ends (kill -9 too)."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{path}: another process writes there: wait for it, or name another --out") from None


@contextmanager
def appending(path):
    """A result file, open for rows at its end and held; it goes again where none came."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "a", encoding="utf-8") as out:
            hold(out, path)
            whole = os.path.getsize(path)
            try:
                yield out
            except OSError:
                if os.path.getsize(path) > whole:  # the last row may have been written in part
                    os.truncate(path, Path(path).read_bytes().rfind(b"\n") + 1)
                raise
            finally:
                if not os.path.getsize(path):
                    os.unlink(path)
    except OSError as error:
        if error.filename or isinstance(error, BrokenPipeError):
            raise
        raise OSError(f"{path}: {error.strerror}: make room, and the same command continues behind the last whole "
                      "row") from None


class Progress:
    """Questions done and time left, a line on stderr every few seconds."""

    def __init__(self, label, total):
        self.label, self.total, self.done, self.start = label, total, 0, time.monotonic()
        self.next = self.start + 5

    def step(self):
        self.done += 1
        now = time.monotonic()
        if now >= self.next:
            left = (now - self.start) / self.done * (self.total - self.done)
            print(f"{self.label}: {self.done} of {self.total} questions, {left:.0f} s left", file=sys.stderr)
            self.next = now + 5

# -------------------------------------------------------------------------------------------------------------- options


def option_run(default, text, **more):
    """A field of an options class: its default, the sentence that --help shows, and for a number the `least` and the
    `most` that it may be, by default not below 0."""
    return field(default=default, metadata={"help": text, **more})


def parse_options(cls, words):
    """Flags -> a frozen options object. Unknown flags and wrong values end with one line and code 2."""
    p = OneLineParser(prog=f"train.py {cls.__name__.removesuffix('Options').lower()}", description=cls.__doc__,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in fields(cls):
        kind = type(f.default)
        more = {k: v for k, v in f.metadata.items() if k in ("choices", "nargs")}
        if kind is bool:
            more["action"] = argparse.BooleanOptionalAction
        else:
            more["type"] = str if kind is tuple else kind
        p.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=f.metadata["help"], **more)
    values = vars(p.parse_args(words))
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
