"""Bad input, the table's machinery: a folder where a case spoils something, a command run in this process, and what must
be told of it."""
import json
import os
import shutil
import signal
import struct
import sys
import zlib
from pathlib import Path

from PIL import Image
from safetensors.torch import load_file, save_file

import infer
import model
import retrieve
import train
from lab import report, world as world_script


# name -> module, and what its messages begin with
SCRIPTS = {"infer": (infer, "infer.py"), "train": (train, "train.py"), "retrieve": (retrieve, "retrieve.py"),
           "world": (world_script, "lab.world"), "report": (report, "report.py")}


def table():
    """An empty table of cases, and the decorator that adds one to it: its name, and a function that spoils something in a
    folder of its own (`Bad`) and returns the command and what its line must say."""
    cases = {}

    def case(name):
        def add(function):
            assert name not in cases
            cases[name] = function
        return add
    return cases, case


def check(make, home, folder, capsys, monkeypatch):
    """One line with its place, exit code 2, and the disk as it was."""
    monkeypatch.chdir(folder)
    words, said = make(Bad(home, folder))
    title = SCRIPTS[words[0]][1]
    capsys.readouterr()
    before = disk(folder)
    code, lines = call(words, capsys)
    assert lines and lines[-1].startswith(f"{title}: ") and said in lines[-1], lines
    assert code == 2 and len(lines[-1]) < 2000 and not any("Traceback" in line for line in lines)
    assert all(not line.startswith(f"{title}: ") for line in lines[:-1]) and len(lines) <= 2, lines
    assert disk(folder) == before


class Bad:
    """A folder where a case spoils its files."""

    def __init__(self, home, folder):
        self.home, self.dir = home, folder
        self.m, self.w, self.out = home / "m", home / "w", folder / "out"

    def file(self, name, content):
        path = self.dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = content if isinstance(content, (bytes, str)) else json.dumps(content) + "\n"
        path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content, encoding="utf-8")
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
        return ["infer", "--model", m or self.m, "--world", w or self.w, "--method", "direct", "--question", "?",
                *words]

    def eval(self, *rows, **more):
        """Evaluate on a file of these rows (or of this text)."""
        text = rows[0] if isinstance(rows[0], (str, bytes)) else "".join(json.dumps(row) + "\n" for row in rows)
        file = self.file("d/q.jsonl", text)
        return ["infer", "--model", self.m, "--world", self.w, "--method", "direct", "--eval", file,
                *more.pop("flags", ())]

    def sft(self, *words, m=None, data=None):
        return ["train", "sft", "--model", m or self.m, "--out", self.out, "--steps", 1, "--data",
                data or self.w / "steps.jsonl", *words]

    def steps(self, *rows):
        text = rows[0] if isinstance(rows[0], (str, bytes)) else "".join(json.dumps(row) + "\n" for row in rows)
        return self.sft(data=self.file("d/steps.jsonl", text))

    def grpo(self, *words, m=None, w=None):
        return ["train", "grpo", "--model", m or self.m, "--world", w or self.w, "--out", self.out, "--steps", 1,
                "--val-every", 0, *words]

    def run(self):
        """The folder of a finished run of one step."""
        code, lines = call(self.sft("--threads", 1))
        assert code == 0, lines
        return self.out

    def picture(self, name, content):
        return self.ask("--image", self.file(name, content))


def call(words, capsys=None):
    """Runs a command here: (exit code, lines on stderr)."""
    script, *words = map(str, words)
    main, signals = SCRIPTS[script][0].main, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [(number, signal.getsignal(number)) for number in signals]
    argv, sys.argv = sys.argv, [f"{script}.py", *words]
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = argv
        for number, handler in handlers:
            signal.signal(number, handler)
    return code or 0, capsys.readouterr().err.splitlines() if capsys else []


def disk(folder):
    """What lies in a folder: names, and the contents of files."""
    return {str(path): os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
            for path in sorted(folder.rglob("*"))}


def png(width, height, more=b""):
    """The beginning of a PNG file that claims this size."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def asking(image):
    return {"question": "Who?", "answer": "x", "image": image}


def step_row(*images, problem="p", answer="a", kind="ans"):
    return {"images": list(map(str, images)), "steps": [{"step_type": kind, "problem": problem, "system": "s",
                                                         "answer": answer}]}


def build(b, text, *flags):
    return ["retrieve", "build", b.file("d/docs.jsonl", text), "--out", b.dir / "kb", *flags]


def export(b, out):
    """Export the run in out/."""
    return ["train", "export", "--run", b.out, "--which", "last", "--dtype", "float32", "--out", out]


def secret(b):
    """A good picture that lies beside the data folder d, not in it."""
    Image.new("RGB", (40, 40)).save(b.dir / "secret.png")
    (b.dir / "d").mkdir()
    return b.dir / "secret.png"
