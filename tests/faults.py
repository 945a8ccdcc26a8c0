"""Bad input, the table's machinery: a folder where a case spoils something, a command run in this
process, and what must be told of it."""
import json
import os
import resource
import shutil
import signal
import struct
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from safetensors.torch import load_file, save_file

import infer
import retrieve
import train
from lab import report, world as world_script

# name -> module, and what its messages begin with
SCRIPTS = {"infer": (infer, "infer.py"), "train": (train, "train.py"),
           "retrieve": (retrieve, "retrieve.py"), "world": (world_script, "lab.world"),
           "report": (report, "lab.report")}
SMALL_WORLD = ["world", "--countries", 12, "--questions", 13]


# --------------------------------------------------------------------------------------- the table

def table():
    """An empty table of cases, and the decorator that adds one to it: its name, and a function that
    spoils something in a folder of its own (`Bad`) and returns the command and what its line must
    say."""
    cases = {}

    def case(name):
        def add(function):
            assert name not in cases
            cases[name] = function
        return add
    return cases, case


def each(case, prefix, make, rows):
    """A case for each row (name, *values) of a list, that is make(b, *values)."""
    for name, *values in rows:
        case(prefix + name)(lambda b, values=values: make(b, *values))


def check(make, home, folder, capsys, monkeypatch):
    """One line with its place, exit code 2, and the disk as it was."""
    monkeypatch.chdir(folder)
    words, message = make(Bad(home, folder))
    _, title = SCRIPTS[words[0]]
    start = f"{title}: "
    capsys.readouterr()
    before = disk(folder)
    code, lines = call(words, capsys)
    assert lines and lines[-1].startswith(start) and message in lines[-1], lines
    assert code == 2 and len(lines[-1]) < 2000
    assert not any("Traceback" in line for line in lines)
    assert len(lines) <= 2 and not any(line.startswith(start) for line in lines[:-1]), lines
    assert disk(folder) == before


# ------------------------------------------------------------------------------ files and commands

def json_lines(rows):
    """The text of a JSONL file of these rows; one row that is text or bytes is the file's own."""
    if isinstance(rows[0], (str, bytes)):
        return rows[0]
    return "".join(json.dumps(row) + "\n" for row in rows)


class Bad:
    """A folder where a case spoils its files."""

    def __init__(self, home, folder):
        self.home, self.dir = home, folder
        self.m, self.w, self.out = home / "m", home / "w", folder / "out"

    def file(self, name, content):
        """A file of these bytes, this text, or this value as JSON."""
        path = self.dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, (bytes, str)):
            content = json.dumps(content) + "\n"
        if isinstance(content, str):
            content = content.encode()
        path.write_bytes(content)
        return path

    def copy(self, name):
        """The model, the world or the adapter, to be spoilt."""
        return Path(shutil.copytree(self.home / name, self.dir / name))

    def model(self, file=None, content=None, **fields):
        """A copy of the model with one file replaced, or some fields of its config.json."""
        path = self.copy("m")
        if file:
            self.file(f"m/{file}", content)
        if fields:
            self.file("m/config.json", json.loads((path / "config.json").read_text()) | fields)
        return path

    def tensors(self, change):
        """A copy of the model whose tensors went through `change`."""
        path = self.copy("m")
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")
        return path

    def ask(self, *words, m=None, w=None):
        """Answer one question."""
        return ["infer", "--model", m or self.m, "--world", w or self.w, "--method", "direct",
                "--question", "?", *words]

    def eval(self, *rows, flags=()):
        """Evaluate on a file of these rows (or of this text)."""
        file = self.file("d/q.jsonl", json_lines(rows))
        return ["infer", "--model", self.m, "--world", self.w, "--method", "direct",
                "--eval", file, *flags]

    def sft(self, *words, m=None, data=None):
        return ["train", "sft", "--model", m or self.m, "--out", self.out, "--steps", 1,
                "--data", data or self.w / "steps.jsonl", *words]

    def steps(self, *rows):
        """Train on a file of these rows (or of this text)."""
        return self.sft(data=self.file("d/steps.jsonl", json_lines(rows)))

    def grpo(self, *words, m=None, w=None):
        return ["train", "grpo", "--model", m or self.m, "--world", w or self.w, "--out", self.out,
                "--steps", 1, "--val-every", 0, *words]

    def outcome(self, row, *words, world=None):
        """Train on the final answer of this row."""
        world = ("--world", self.w) if world is None else world
        return ["train", "grpo", "--model", self.m, "--mode", "outcome", *world, "--out", self.out,
                "--data", self.file("d/q.jsonl", json_lines([row])), "--val-every", 0, *words]

    def run(self):
        """The folder of a finished run of one step."""
        code, lines = call(self.sft("--threads", 1))
        assert code == 0, lines
        return self.out

    def picture(self, name, content):
        """Ask about a picture of these bytes."""
        return self.ask("--image", self.file(name, content))


def call(words, capsys=None):
    """Runs a command here: (exit code, lines on stderr)."""
    script, *words = map(str, words)
    module, _ = SCRIPTS[script]
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in signals}
    argv, sys.argv = sys.argv, [f"{script}.py", *words]
    try:
        code = module.main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    lines = capsys.readouterr().err.splitlines() if capsys else []
    return code or 0, lines


def disk(folder):
    """What lies in a folder: names, and the contents of files."""
    contents = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            contents[str(path)] = os.readlink(path)
        else:
            contents[str(path)] = path.read_bytes() if path.is_file() else None
    return contents


@contextmanager
def full_disk(size):
    """Inside, no file grows beyond `size` bytes: a write fails in the middle, as on a full disk,
    only with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ------------------------------------------------------------------------------ what cases write

def png(width, height, more=b""):
    """The beginning of a PNG file that claims this size."""
    def chunk(kind, data):
        size, check = struct.pack(">I", len(data)), struct.pack(">I", zlib.crc32(kind + data))
        return size + kind + data + check
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + head + more + pixels + chunk(b"IEND", b"")


def asking(image):
    return {"question": "Who?", "answer": "x", "image": image}


def step_row(*images, problem="p", answer="a", kind="ans"):
    step = {"step_type": kind, "problem": problem, "system": "s", "answer": answer}
    return {"images": list(map(str, images)), "steps": [step]}


def build(b, text, *flags):
    return ["retrieve", "build", b.file("d/docs.jsonl", text), "--out", b.dir / "kb", *flags]


def export(b, out):
    """Export the run in out/."""
    return ["train", "export", "--run", b.out, "--which", "last", "--dtype", "float32",
            "--out", out]


def secret(b):
    """A good picture that lies beside the data folder d, not in it."""
    Image.new("RGB", (40, 40)).save(b.dir / "secret.png")
    (b.dir / "d").mkdir()
    return b.dir / "secret.png"
