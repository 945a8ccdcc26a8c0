"""Bad input: every mistake and every damaged file is told in one line with its place, ends with code 2, and leaves the
disk as it was. Nothing that is read runs code, and one process at a time writes into a run.

CASES is the table: a name, and a function that spoils something in a folder of its own (`Bad`) and returns the command
and what its line must say. Commands run in this process; `disk` compares names and contents before and after.
"""
import ast
import ctypes
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import tracemalloc
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import infer
import model
import retrieve
import train
from conftest import ROOT
from lab import report, world as world_script
from parts.chat import Processor
from parts.corpora import read_docs
from parts.lora import add_lora, save_adapter
from parts.questions import COSTS, embedded_world
from parts.stepfiles import read_steps
from parts.store import text_sum
from plumbing.old import checksum
from plumbing.run import LOGS, Run
from retrieve import world_bases

SCRIPTS = {"infer": infer, "train": train, "retrieve": retrieve, "world": world_script, "report": report}
CASES = {}


def case(name):
    def add(function):
        assert name not in CASES
        CASES[name] = function
    return add


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A small world with its bases, a random model that fits it, and an adapter of that model."""
    out = tmp_path_factory.mktemp("faults")
    words = ["--countries", 12, "--questions", 13, "--out", out / "w", "--shell", out / "m", "--shape", 16, 1, 2, 1, 16]
    subprocess.run([sys.executable, "-m", "lab.world", *map(str, words)], check=True, capture_output=True)
    world_bases(out / "w")
    vlm = model.VLM.from_config(out / "m", seed=1)
    vlm.save_pretrained(out / "m")
    add_lora(vlm, 2, 4)
    save_adapter(vlm, out / "adapter")
    return out


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
    main, signals = SCRIPTS[script].main, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
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


# ------------------------------------------------------------------------------------------------------------- weights


def spoilt(value):
    return lambda tensors: tensors["model.norm.weight"].fill_(value)


@case("weights: not a number")
def _(b):
    return b.ask(m=b.tensors(spoilt(float("nan")))), "not a number: model.norm.weight"


@case("weights: infinite")
def _(b):
    return b.ask(m=b.tensors(spoilt(float("inf")))), "infinite"


@case("weights: not a number, in training")
def _(b):
    return b.sft(m=b.tensors(spoilt(float("nan")))), "not a number: model.norm.weight"


@case("weights: a tensor is missing")
def _(b):
    return b.ask(m=b.tensors(lambda t: t.pop("model.norm.weight"))), "missing: model.norm.weight"


@case("weights: a tensor too many")
def _(b):
    return b.ask(m=b.tensors(lambda t: t.update(extra=torch.ones(2)))), "unexpected: extra"


@case("weights: a tensor of another shape")
def _(b):
    return b.ask(m=b.tensors(lambda t: t.update({"model.norm.weight": torch.ones(3)}))), "shape [3] instead of [16]"


@case("weights: quantized, without their scales")
def _(b):
    change = lambda t: t.update({"model.norm.weight": torch.ones(16).to(torch.float8_e4m3fn)})
    return b.ask(m=b.tensors(change)), "of type F8_E4M3 instead of F64, F32, F16, BF16: model.norm.weight"


@case("weights: whole numbers")
def _(b):
    return b.ask(m=b.tensors(lambda t: t.update({"model.norm.weight": torch.ones(16).long()}))), "of type I64"


@case("weights: truncated")
def _(b):
    cut = (b.m / "model.safetensors").read_bytes()[:-9]
    return b.ask(m=b.model("model.safetensors", cut)), "is the download complete"


@case("weights: no safetensors at all")
def _(b):
    return b.ask(m=b.model("model.safetensors", b"\x80\x04" * 40)), "not a readable safetensors file"


@case("weights: a header of 2^64 bytes")
def _(b):
    return b.ask(m=b.model("model.safetensors", b"\xff" * 64)), "not a readable safetensors file"


@case("weights: empty file")
def _(b):
    return b.ask(m=b.model("model.safetensors", b"")), "not a readable safetensors file"


@case("weights: pickled")
def _(b):
    m = b.model("pytorch_model.bin", b"\x80\x04.")
    (m / "model.safetensors").unlink()
    return b.ask(m=m), "pickled weights are not read"


@case("weights: none")
def _(b):
    m = b.copy("m")
    (m / "model.safetensors").unlink()
    return b.ask(m=m), "no model.safetensors"


def index(b, names, split=None):
    """A copy of the model with an index that names these files; `split` says what each of them holds."""
    m = b.copy("m")
    tensors = load_file(m / "model.safetensors")
    for name, keys in (split or {}).items():
        save_file({key: tensors[key] for key in keys(list(tensors))}, m / name)
    b.file("m/model.safetensors.index.json", {"weight_map": dict(zip(tensors, names * len(tensors)))})
    return m


@case("shards: one is missing")
def _(b):
    return b.ask(m=index(b, ["model.safetensors", "gone.safetensors"])), "not there: gone.safetensors"


@case("shards: two overlap")
def _(b):
    split = {"a.safetensors": lambda k: k[:3], "b.safetensors": lambda k: k[2:]}
    return b.ask(m=index(b, ["a.safetensors", "b.safetensors"], split)), "twice: "


@case("shards: one leads out of the folder")
def _(b):
    return b.ask(m=index(b, ["../m/model.safetensors"])), "not there: ../m/model.safetensors"


@case("shards: the index is a list")
def _(b):
    return b.ask(m=b.model("model.safetensors.index.json", [])), "expected a JSON object"


@case("shards: the index has no map")
def _(b):
    return b.ask(m=b.model("model.safetensors.index.json", {"weight_map": 3})), "expected an object with a weight_map"


# ----------------------------------------------------------------------------------------- configs, tokenizers, prompts


for name, text, said in (
        ("no JSON", "{oops", "config.json: not valid JSON"), ("a list", "[]", "config.json: expected a JSON object"),
        ("no UTF-8", b"\xff\xfe", "config.json: not valid JSON"), ("lists in lists", "[" * 100000, "not valid JSON"),
        ("a number of 5,000 digits", '{"hidden_size": ' + "9" * 5000 + "}", "not valid JSON"),
        ("empty object", "{}", "model_type is None")):
    case(f"config: {name}")(lambda b, text=text, said=said: (b.ask(m=b.model("config.json", text)), said))

for name, fields, said in (
        ("another model", {"model_type": "llama"}, "model_type is 'llama'"),
        ("layers beyond reason", {"num_hidden_layers": 10 ** 6}, "num_hidden_layers is '1000000'"),
        ("a size beyond reason", {"hidden_size": 10 ** 12}, "hidden_size is '1000000000000'"),
        ("a negative size", {"intermediate_size": -1}, "intermediate_size is '-1'"),
        ("a size in words", {"num_attention_heads": "many"}, "num_attention_heads is 'many'"),
        ("a size that is a fraction", {"max_position_embeddings": 1.5}, "max_position_embeddings is '1.5'"),
        ("no rotary sections", {"rope_scaling": None, "rope_parameters": None}, "missing mrope_section"),
        ("a part of the wrong type", {"text_config": [1]}, "text_config is '[1]'"),
        ("vision of the wrong type", {"vision_config": "big"}, "vision_config is 'big'"),
        ("vision depth beyond reason", {"vision_config": {"depth": 10 ** 6}}, "depth is '1000000'"),
        ("rotary sections in words", {"rope_scaling": {"type": "mrope", "mrope_section": ["a"]}}, "mrope_section is"),
        ("epsilon not a number", {"rms_norm_eps": float("nan")}, "rms_norm_eps is 'nan'"),
        ("another picture token", {"image_token_id": 1}, "image_token_id 1")):
    case(f"config: {name}")(lambda b, fields=fields, said=said: (b.ask(m=b.model(**fields)), said))


@case("config: random weights beyond every memory")
def _(b):
    m = b.model(hidden_size=10 ** 6, vocab_size=10 ** 6, num_attention_heads=250000, num_key_value_heads=1,
                rope_scaling={"type": "mrope", "mrope_section": [1, 1, 0]})
    (m / "model.safetensors").unlink()
    return b.sft(m=m), "random weights"


@case("config: fewer words than the tokenizer")
def _(b):
    m = b.model(vocab_size=50)
    (m / "model.safetensors").unlink()
    return b.sft(m=m), "config.json a vocab_size of 50"


@case("model: no such folder")
def _(b):
    return b.ask(m=b.dir / "nowhere"), "nowhere: no such model directory"


@case("tokenizer: missing")
def _(b):
    m = b.copy("m")
    (m / "tokenizer.json").unlink()
    return b.ask(m=m), "no tokenizer.json"


@case("tokenizer: truncated")
def _(b):
    return b.ask(m=b.model("tokenizer.json", (b.m / "tokenizer.json").read_text()[:999])), "not a readable tokenizer"


@case("tokenizer: without the control tokens")
def _(b):
    text = (b.m / "tokenizer.json").read_text().replace("<|image_pad|>", "<|picture|>").replace("<|im_end|>", "<|x|>")
    return b.ask(m=b.model("tokenizer.json", text)), "lacks the control tokens <|im_end|>, <|image_pad|>"


@case("tokenizer: an end that is no token")
def _(b):
    return b.ask(m=b.model("generation_config.json", {"eos_token_id": [10 ** 9]})), "eos_token_id 1000000000 is no"


@case("tokenizer: an end below all tokens")
def _(b):
    return b.ask(m=b.model("generation_config.json", {"eos_token_id": -1})), "eos_token_id -1 is no token"


@case("tokenizer: an end in words")
def _(b):
    return b.ask(m=b.model("generation_config.json", {"eos_token_id": "end"})), "eos_token_id 'end' is no token"


for name, fields, said in (
        ("patches of no size", {"patch_size": 0}, "patch_size is '0'"),
        ("every picture larger than the memory", {"min_pixels": 10 ** 12}, "min_pixels is '1000000000000'"),
        ("no upper limit", {"max_pixels": 10 ** 15}, "max_pixels is"),
        ("division by zero", {"image_std": [0, 1, 1]}, "image_std is '[0, 1, 1]'"),
        ("colours in words", {"image_mean": "grey"}, "image_mean is 'grey'"),
        ("patches of another size than the model's", {"patch_size": 7}, "patch_size")):
    def _(b, fields=fields, said=said):
        known = json.loads((b.m / "preprocessor_config.json").read_text())
        return b.ask(m=b.model("preprocessor_config.json", known | fields)), said
    case(f"picture settings: {name}")(_)


@case("prompts: a list")
def _(b):
    return b.ask(m=b.model("prompts.json", ["a"])), "prompts.json: expected system prompts"


@case("prompts: numbers")
def _(b):
    return b.ask("--prompts", b.file("p.json", {"route": 1})), "p.json: expected system prompts"


@case("prompts: half a surrogate pair")
def _(b):
    return b.ask("--prompts", b.file("p.json", '{"final": "\\ud800"}')), "p.json: cannot be read"


@case("prompts: numbers, in training")
def _(b):
    return b.grpo(m=b.model("prompts.json", {"route": 1})), "prompts.json: expected system prompts"


# ------------------------------------------------------------------------------------------------------------- pictures


@case("picture: missing")
def _(b):
    return b.ask("--image", b.dir / "none.jpg"), "none.jpg: no such picture"


@case("picture: a web page named .jpg")
def _(b):
    return b.picture("page.jpg", "<!DOCTYPE html><html>404</html>"), "page.jpg: not a readable picture; these formats"


@case("picture: PostScript named .jpg, for which Pillow would start a program")
def _(b):
    text = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    return b.picture("script.jpg", text), "script.jpg: not a readable picture; these formats"


@case("picture: truncated JPEG")
def _(b):
    photo = next((b.w / "photos").iterdir())
    return b.picture("half.jpg", photo.read_bytes()[:300]), "half.jpg: not a readable picture"


@case("picture: a bomb of 2.5 billion pixels")
def _(b):
    return b.picture("bomb.png", png(50000, 50000)), "bomb.png: not a readable picture"


@case("picture: a bomb just below the limit at which Pillow gives an error of its own")
def _(b):
    return b.picture("bomb.png", png(12000, 12000)), "bomb.png: not a readable picture"


@case("picture: a bomb in the text of a PNG")
def _(b):
    data = b"note\0\0" + zlib.compress(bytes(100_000_000))
    text = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    return b.picture("text.png", png(9, 9, text)), "text.png: not a readable picture"


@case("picture: truncated PNG")
def _(b):
    return b.picture("short.png", png(90, 90)[:70]), "short.png: not a readable picture"


@case("picture: a note whose numbers are none")
def _(b):
    """EXIF says that the picture is turned, and that it is "x" pixels wide: Pillow raises struct.error."""
    photo, note = Image.new("RGB", (40, 40)), Image.Exif()
    note[0x0112], note[0x010e] = 6, "x"                               # orientation, description
    photo.save(b.dir / "note.png", exif=note.tobytes().replace(b"\x01\x0e", b"\x01\x00"))       # 0x0100 is the width
    return b.ask("--image", b.dir / "note.png"), "note.png: not a readable picture"


@case("picture: a folder")
def _(b):
    return b.ask("--image", b.w), "no regular file"


@case("picture: a pipe, at which opening would wait for ever")
def _(b):
    os.mkfifo(b.dir / "pipe.jpg")
    return b.ask("--image", b.dir / "pipe.jpg"), "no regular file"


@case("picture: 1 x 400")
def _(b):
    Image.new("RGB", (1, 400)).save(b.dir / "thin.png")
    return b.ask("--image", b.dir / "thin.png"), "more than 200 times"


def secret(b):
    """A good picture that lies beside the data folder d, not in it."""
    Image.new("RGB", (40, 40)).save(b.dir / "secret.png")
    (b.dir / "d").mkdir()
    return b.dir / "secret.png"


def asking(image):
    return {"question": "Who?", "answer": "x", "image": image}


def step_row(*images, problem="p", answer="a", kind="ans"):
    return {"images": list(map(str, images)), "steps": [{"step_type": kind, "problem": problem, "system": "s",
                                                         "answer": answer}]}


for name, eval_of, steps_of in (("questions", Bad.eval, None), ("step file", None, Bad.steps)):
    def dots(b, make=eval_of or steps_of, row=asking if eval_of else step_row):
        secret(b)
        return make(b, row("../secret.png")), ":1: picture" if row is asking else "line 1: picture"

    def absolute(b, make=eval_of or steps_of, row=asking if eval_of else step_row):
        return make(b, row(str(secret(b)))), "leads out of"

    def link(b, make=eval_of or steps_of, row=asking if eval_of else step_row):
        (b.dir / "d").mkdir()
        Image.new("RGB", (40, 40)).save(b.dir / "secret.png")
        (b.dir / "d" / "mine.png").symlink_to(b.dir / "secret.png")
        return make(b, row("mine.png")), "leads out of"

    case(f"picture of a {name}: ..")(dots)
    case(f"picture of a {name}: an absolute path")(absolute)
    case(f"picture of a {name}: a link that leads out")(link)


@case("picture of questions: an image_id with ..")
def _(b):
    secret(b)
    row = {"question": "Who?", "answer": "x", "image_id": "../secret"}
    return b.eval(row, flags=("--images", b.dir / "d")), "leads out of"


@case("picture of questions: a name with a zero byte")
def _(b):
    return b.eval(asking("a\0b.png")), "q.jsonl:1: "


@case("picture of questions: missing")
def _(b):
    return b.eval(asking("gone.png")), "no such picture"


# ----------------------------------------------------------------------------------- questions, step files, result rows


for name, text, said in (
        ("invalid UTF-8", b'{"question": "caf\xe9"}\n', "cannot be read"), ("no JSON", "{oops\n", ":1: not JSON"),
        ("no object", "[1]\n", "expected an object, found list"), ("empty", "\n\n", "no rows"),
        ("lists in lists", "[" * 100000, "q.jsonl:1: not JSON"),
        ("a row of 10 MB", '{"question": "' + "a" * 10 ** 7 + '", "answer": "x"}\n', "characters: 4000000 at most"),
        ("a number of 5,000 digits", '{"question": "Who?", "answer": ' + "9" * 5000 + "}\n", "q.jsonl:1: "),
        ("half a surrogate pair", '{"question": "\\ud800", "answer": "x"}\n', "surrogates not allowed")):
    case(f"questions: {name}")(lambda b, text=text, said=said: (b.eval(text), said))

for name, row, said in (
        ("no words", {"question": " ", "answer": "x"}, "empty question"),
        ("a list for a question", {"question": ["Who?"], "answer": "x"}, "empty question"),
        ("no answer", {"question": "Who?"}, "gold answer None"),
        ("a range of words", {"question": "Who?", "answer": [{"range": ["a", "b"]}]}, "gold answer {'range'"),
        ("a range beyond floating point", {"question": "?", "answer": [{"range": [0, 10 ** 400]}]}, "gold answer"),
        ("an unknown base", {"question": "?", "answer": "x", "hops": [{"query": "q", "retriever": "web"}]}, "hops"),
        ("hops that are none", {"question": "?", "answer": "x", "hops": 7}, "hops 7")):
    case(f"questions: {name}")(lambda b, row=row, said=said: (b.eval(row), said))


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


for name, text, said in (
        ("invalid UTF-8", b"\xff\n", "not readable"), ("no JSON", "{oops\n", "steps.jsonl, line 1"),
        ("no object", "[1]\n", "line 1: expected"), ("empty", "", "no rows"), ("lists in lists", "[" * 99999, "line 1"),
        ("a row of 10 MB", "a" * 10 ** 7, "a row of 10000000 characters")):
    case(f"step file: {name}")(lambda b, text=text, said=said: (b.steps(text), said))

for name, row, said in (
        ("an answer of another kind of step", step_row(kind="ret"), "step_type 'ret'"),
        ("no retriever", step_row(kind="ret", answer={"query": "q"}), "line 1: expected"),
        ("retrievers that are no list", step_row(kind="ret", answer={"query": "q", "retriever": 3}), "line 1: expect"),
        ("a problem that is a number", step_row(problem=3), "line 1: expected"),
        ("half a surrogate pair", step_row(problem="\ud800"), "line 1: 'utf-8' codec"),
        ("answers that are numbers", step_row(answer=[3]), "line 1: expected"),
        ("pictures that are no list", {**step_row(), "images": "x.png"}, "images is no list"),
        ("no steps", {"images": [], "steps": []}, "line 1: expected")):
    case(f"step file: {name}")(lambda b, row=row, said=said: (b.steps(row), said))


@case("step file: all pictures missing")
def _(b):
    words = ["--mode", "offline", "--model", b.m, "--out", b.out, "--data", b.file("s.jsonl", step_row("/gone/1.jpg"))]
    return ["train", "grpo", *words], "every picture is missing"


for name, row, said in (
        ("no answer of the model", {"question": "?", "answer": "x"}, "no llm_answer"),
        ("a list as answer", {"question": "?", "answer": "x", "llm_answer": [1]}, "no llm_answer"),
        ("costs that are none", {"answer": "x", "llm_answer": "y", "cost": [1]}, "not those of a result row"),
        ("costs beyond floating point",
         {"answer": "x", "llm_answer": "y", "cost": dict.fromkeys(COSTS, 10 ** 400)}, "r.jsonl:1"),
        ("plans that are none",
         {"answer": "x", "llm_answer": "y", "method": "router", "plan_1": 3, "hops": []}, "r.jsonl:1")):
    case(f"result rows: {name}")(lambda b, row=row, said=said: (["infer", "--score", b.file("r.jsonl", row)], said))


# ------------------------------------------------------------------------------------------------- corpora and indexes


def build(b, text, *flags):
    return ["retrieve", "build", b.file("d/docs.jsonl", text), "--out", b.dir / "kb", *flags]


for name, text, said in (
        ("invalid UTF-8", b'{"id": "1", "text": "\xff"}\n', "not UTF-8"), ("no JSON", "{oops\n", ":1: not JSON"),
        ("no id", {"text": "t"}, "docs.jsonl:1: field 'id' is missing"), ("no object", "[1]\n", "expected an object"),
        ("text that is a list", {"id": "1", "text": ["t"]}, "field 'text' is list")):
    case(f"corpus: {name}")(lambda b, text=text, said=said: (build(b, text), said))


def document(image, **more):
    return {"id": "1", "text": "t", "image": image, **more}


@case("corpus: a folder without pages")
def _(b):
    b.file("wiki/readme.md", "").unlink()
    return ["retrieve", "build", b.dir / "wiki", "--format", "wiki", "--out", b.dir / "kb"], "holds no document"


@case("corpus: an id twice")
def _(b):
    return build(b, "".join(json.dumps({"id": str(i % 3), "text": "t"}) + "\n" for i in range(4))), "stands twice"


@case("corpus: a row of 10 MB")
def _(b):
    return build(b, json.dumps({"id": "1", "text": "a" * 10 ** 7}) + "\n"), ":1: a row of more than 4000000 characters"


@case("corpus: a name with a line feed and an order to the terminal")
def _(b):
    return ["retrieve", "build", b.dir / "a\n\x1b[31m", "--out", b.out], "a \ufffd[31m: no such file"


@case("picture of a corpus: ..")
def _(b):
    secret(b)
    return build(b, document("../secret.png"), "--encoder", "pixel"), "docs.jsonl:1: picture "


@case("picture of a corpus: an absolute path")
def _(b):
    return build(b, document(str(secret(b))), "--encoder", "pixel"), "leads out of"


@case("picture of a corpus: a link that leads out")
def _(b):
    (b.dir / "d").mkdir()
    Image.new("RGB", (40, 40)).save(b.dir / "secret.png")
    (b.dir / "d" / "mine.png").symlink_to(b.dir / "secret.png")
    return build(b, document("mine.png"), "--encoder", "pixel"), "leads out of"


@case("picture of M-BEIR candidates: ..")
def _(b):
    secret(b)
    row = {"did": "1:1", "txt": "t", "img_path": "../secret.png", "modality": "image"}
    return build(b, row, "--format", "mbeir", "--encoder", "pixel"), "leads out of"


@case("options: retrieve --speed 9")
def _(b):
    return build(b, {"id": "1", "text": "t"}, "--speed", 9), "unrecognized arguments: --speed 9"


@case("options: world --speed 9")
def _(b):
    return ["world", "--speed", 9, "--out", b.out], "unrecognized arguments: --speed 9"


@case("place: a world below a file")
def _(b):
    return ["world", "--countries", 12, "--questions", 13, "--out", b.file("taken", "") / "w"], "taken"


@case("corpus: missing")
def _(b):
    return ["retrieve", "build", b.dir / "none.jsonl", "--out", b.dir / "kb"], "none.jsonl: no such file"


@case("corpus: a page without end")
def _(b):
    return build(b, '<doc id="1" url="" title="T">\nT\n\nbody\n', "--format", "wiki"), "does not end with </doc>"


@case("table: cut in the middle")
def _(b):
    return build(b, '[{"page_title": "a", "header": ["x"], "rows": [["1"', "--format", "tables"), "docs.jsonl: "


@case("table: rows that are no lists")
def _(b):
    return build(b, [{"page_title": "a", "section_title": "", "caption": "", "header": ["x"], "rows": ["1"]}],
                 "--format", "tables"), "docs.jsonl"


@case("corpus: an encoder that nobody knows")
def _(b):
    return build(b, {"id": "1", "text": "t"}, "--encoder", "magic"), "unknown encoder 'magic'"


@case("index: a picture for a base of words")
def _(b):
    return ["retrieve", "search", b.w / "kb" / "text", "--image", b.w / "photos" / "none.jpg"], "picture"


@case("index: a missing folder")
def _(b):
    return ["retrieve", "search", b.dir / "kb", "x"], "no knowledge base here"


@case("index: the place is taken by something else")
def _(b):
    b.file("kb/diary.txt", "mine")
    return build(b, {"id": "1", "text": "t"}), "is no knowledge base"


@case("index: something else lies in the base that would be replaced")
def _(b):
    shutil.copytree(b.w / "kb" / "text", b.dir / "kb")
    b.file("kb/diary.txt", "mine")
    return build(b, {"id": "1", "text": "t"}), "diary.txt: not of the base that would be replaced"


def base(b, file, change):
    """Asks a copy of the text base, one file of which went through `change` (None: it is gone)."""
    kb = Path(shutil.copytree(b.w / "kb" / "text", b.dir / "kb"))
    data = (kb / file).read_bytes()
    (kb / file).unlink() if change is None else (kb / file).write_bytes(change(data))
    return ["infer", "--model", b.m, "--kb", f"text={kb}", "--method", "text", "--question", "Who?"]


for name, file, change, said in (
        ("truncated graph", "00000.hnsw", lambda d: d[:-8], "truncated"),
        ("altered graph", "00000.hnsw", lambda d: d[:-1] + bytes([d[-1] ^ 1]), "altered"),
        ("missing graph", "00000.hnsw", None, "missing"),
        ("altered encoder", "encoder.json", lambda d: d.replace(b"1", b"2", 1), "altered"),
        ("no manifest", "manifest.json", None, "no manifest.json"),
        ("altered manifest", "manifest.json", lambda d: d.replace(b'"dim": ', b'"dim": 1'), "altered"),
        ("manifest of another format", "manifest.json", lambda d: b'{"format": 99}', "not of format"),
        ("manifest that is a list", "manifest.json", lambda d: b"[]", "manifest.json")):
    case(f"index: {name}")(lambda b, file=file, change=change, said=said: (base(b, file, change), said))


def forged(b, change, words=None):
    """Asks a copy of the text base whose manifest went through `change` and got a new checksum."""
    words = words or base(b, "manifest.json", lambda data: data)
    manifest = json.loads((b.dir / "kb" / "manifest.json").read_text())
    del manifest["sha256"]
    change(manifest)
    b.file("kb/manifest.json", {**manifest, "sha256": text_sum(manifest)})
    return words


for name, change in (("no shards", lambda m: m.pop("shards")), ("shards that are none", lambda m: m.update(shards=3)),
                     ("a shard twice", lambda m: m["shards"].append(m["shards"][0])),
                     ("an encoder without options", lambda m: m.update(encoder="lexical")),
                     ("an option that nobody knows", lambda m: m["index"].update(speed=9)),
                     ("files outside", lambda m: m["files"].update({"../x": m["files"].pop("encoder.json")}))):
    case(f"index: a forged manifest, {name}")(
        lambda b, change=change: (forged(b, change), "manifest.json: not as this program writes it"))


def other_graph(b, dim, rows):
    """Asks a copy of the text base whose graph is another, and whose manifest was made to fit."""
    words = base(b, "manifest.json", lambda data: data)
    file = b.dir / "kb" / "00000.hnsw"
    graph = retrieve.Graph.empty(dim, rows, retrieve.IndexOptions())
    graph.add(np.eye(rows, dim, dtype=np.float32))
    graph.save(file)
    forged(b, lambda m: m["shards"][0]["files"].update({file.name: checksum(file)}), words)
    return words


case("index: a forged graph of fewer rows")(lambda b: (other_graph(b, 512, 3), "00000.hnsw: 3 vectors for"))


@case("index: forged vectors of another shape")
def _(b):
    corpus = b.file("d.jsonl", {"id": "1", "text": "a word"})
    retrieve.KnowledgeBase.build(read_docs(corpus), "lexical", index="flat").save(b.dir / "kb")
    file = b.dir / "kb" / "00000.npy"
    np.save(file, np.zeros((1, 7), np.float16))
    words = ["retrieve", "search", b.dir / "kb", "word"]
    forged(b, lambda m: m["shards"][0]["files"].update({file.name: checksum(file)}), words)
    return words, "00000.npy: vectors of shape (7,), expected dimension"


# ------------------------------------------------------------------------------------------- adapters and checkpoints


def adapter(b, change=None, **fields):
    """Exports a run whose checkpoint is an adapter, one thing of which is spoilt."""
    path = b.copy("adapter")
    tensors = load_file(path / "adapter_model.safetensors")
    if change:
        change(tensors)
        save_file(tensors, path / "adapter_model.safetensors")
    b.file("adapter/adapter_config.json", json.loads((path / "adapter_config.json").read_text()) | fields)
    b.file("adapter/trainer.json", {"step": 1})
    b.file("run/options.json", {"model": str(b.m)})
    (b.dir / "run" / "last").symlink_to(path)
    return ["train", "export", "--run", b.dir / "run", "--which", "last", "--out", b.out]


def first(change):
    return lambda tensors: change(tensors, next(iter(tensors)))


for name, change, said in (
        ("not a number", first(lambda t, k: t[k].fill_(float("nan"))), "not a number"),
        ("a matrix is missing", first(lambda t, k: t.pop(k)), "missing: "),
        ("a matrix too many", lambda t: t.update(extra=torch.ones(1)), "unexpected: extra"),
        ("complex numbers", first(lambda t, k: t.update({k: t[k].to(torch.complex64)})), "of type C64"),
        ("another shape", first(lambda t, k: t.update({k: torch.ones(1, 1)})), "shape [1, 1]")):
    case(f"adapter: {name}")(lambda b, change=change, said=said: (adapter(b, change), said))

for name, fields, said in (
        ("rank beyond reason", {"r": 10 ** 9}, "rank is 1000000000"), ("rank in words", {"r": "8"}, "rank is '8'"),
        ("scale not a number", {"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ("a kind that is not computed here", {"use_dora": True}, "use_dora is True"),
        ("layers that are none", {"target_modules": ["engine"]}, "no linear layer is named engine"),
        ("targets that are no list", {"target_modules": "all"}, "expected a list of layer names")):
    case(f"adapter: {name}")(lambda b, fields=fields, said=said: (adapter(b, **fields), said))


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


# -------------------------------------------------------------------------------------------------------------- options


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

for words, said in (
        (["--method", "guess"], "unknown method 'guess'"), (["-k", "0"], "k is 0"), (["--limit", "0"], "at least 1"),
        (["--temperature", "nan"], "temperature is nan"), (["--temperature", "-1"], "temperature is -1"),
        (["--max-new-tokens", "100000"], "leaves no room"), (["--device", "warp"], "device 'warp' cannot be used here"),
        (["--kb", "audio=x", "--question", "?"], "expected NAME=DIR"), (["--speed", "9"], "unrecognized arguments"),
        (["--demos", "{dir}/none.jsonl"], "cannot be read"), (["--threads", "100000"], "give at most 1024"),
        (["--question", "a\udcff"], "half of a surrogate pair"), 
        (["--question", "?", "--kb", "text={w}/kb/text", "text=x"], "each once"),
        (["--question", "?", "--images", "x"], "--images does nothing beside --question"),
        (["--score", "x", "-k", "3"], "-k does nothing beside --score"),
        (["--jsonl", "{w}/questions.jsonl"], "questions.jsonl is a file of the world"),
        (["--csv", "{w}/text.jsonl"], "text.jsonl is a file of the world"),
        (["--write-steps", "{w}/steps.jsonl"], "steps.jsonl is a file of the world")):
    def _(b, words=words, said=said):
        known = [] if "--kb" in words else ["--world", b.w]
        return ["infer", "--model", b.m, *known, *(word.format(dir=b.dir, w=b.w) for word in words)], said
    case(f"options: infer {' '.join(words)}")(_)

for data, said in (("{s}=0", "the share is 0"), ("{s}=nan", "the share is nan"), ("{s}=x", "--data")):
    case(f"options: train --data {data}")(
        lambda b, data=data, said=said: (b.sft(data=data.format(s=b.w / "steps.jsonl")), said))

for words, said in ((["--questions", "0"], "at least 1 question"), (["--countries", "1"], "2 countries"),
                    (["--countries", "0"], "--countries 0"), (["--practice", "0"], "--practice 0"),
                    (["--kinds", "riddle"], "riddle unknown")):
    case(f"options: world {' '.join(words)}")(
        lambda b, words=words, said=said: (["world", *words, "--out", b.out], said))

for words, said in ((["{dir}"], "no log.jsonl in it"), (["{dir}/none"], "cannot be read"),
                    (["{dir}", "--cards", "0"], "--cards 0")):
    case(f"options: report {' '.join(words)}")(lambda b, words=words, said=said: (
        ["report", *(word.format(dir=b.dir) for word in words), "--out", b.dir / "page.html"], said))


for name, row in (("outputs that are text", {"step": 1, "tokens": 5, "outputs": "3"}),
                  ("groups that are a list", {"step": 1, "tokens": 5, "groups": [1]}),
                  ("a step beyond all numbers", {"step": 10 ** 400, "tokens": 5}),
                  ("tokens below zero", {"step": 1, "tokens": -5}),
                  ("seconds that are none", {"step": 1, "tokens": 5, "seconds": None}),
                  ("seconds that are no number", {"step": 1, "tokens": 5, "seconds": float("nan")})):
    def _(b, row=row):
        b.file("run/options.json", {"mode": "online", "group": 2})
        b.file("run/log.jsonl", row)
        return ["report", b.dir / "run", "--out", b.dir / "page.html"], "log.jsonl:1: expected a line of train.py's log"
    case(f"log: {name}")(_)


@case("log: options that are none")
def _(b):
    b.file("run/options.json", {"mode": "online", "group": None})
    b.file("run/log.jsonl", {"step": 1, "tokens": 5, "groups": 2})
    return ["report", b.dir / "run", "--out", b.dir / "page.html"], "options.json: group is None"


@case("place: a page over its own results")
def _(b):
    file = b.file("r.jsonl", {"question": "?", "answer": "x", "llm_answer": "x"})
    return ["report", f"mine={file}", "--out", file], "r.jsonl is what the page is made of"


@case("place: a page over the log of the run that it is made of by default")
def _(b):
    b.file("runs/a/log.jsonl", {"step": 1, "tokens": 5})
    return ["report", "--out", "runs/a/log.jsonl"], "log.jsonl is what the page is made of"


for value in ("1/255", [1], 10 ** 400, 2.0):
    case(f"picture settings: rescale_factor {str(value)[:9]}")(lambda b, value=value: (b.ask(m=b.model(
        "preprocessor_config.json", json.loads((b.m / "preprocessor_config.json").read_text())
        | {"rescale_factor": value})), "rescale_factor is"))


@case("place: a world where something else lies")
def _(b):
    b.file("out/text.jsonl", "mine")
    return ["world", "--countries", 12, "--questions", 13, "--out", b.out], "holds other files (text.jsonl) and no world"


@case("place: a world without a name")
def _(b):
    return ["world", "--countries", 12, "--questions", 13, "--out", ""], "--out is empty"


@case("place: a model exported into a folder of something else")
def _(b):
    run = b.run()
    b.file("base/manifest.json", {})
    return ["train", "export", "--run", run, "--which", "last", "--out", b.dir / "base"], "holds other files and no model"


@case("options: a question to show that is not there")
def _(b):
    return ["train", "show", "--model", b.m, "--world", b.w, "--question", 13], "has questions 0 to 12"


@case("result file: a base that is no list")
def _(b):
    hops = [{"query": "q", "retriever": "text retriever", "answer": "x"}]
    row = {"question": "?", "answer": "x", "method": "router", "hops": hops, "llm_answer": "x",
           "plan_1": {"thought": "t", "query": "q", "retriever": "Text Retriever"}}
    return ["infer", "--score", b.file("r.jsonl", row)], "retriever 'Text Retriever' is no list"


# ------------------------------------------------------------------------------------- places that cannot be written to


@case("place: a run below a file")
def _(b):
    return b.sft("--out", b.file("taken", "") / "run"), "taken"


@case("place: a run where a file lies")
def _(b):
    return b.sft("--out", b.file("taken", "")), "taken"


@case("place: results below a file")
def _(b):
    return b.eval(asking(None), flags=("--out", b.file("taken", "") / "r.jsonl")), "taken"


@case("place: results of others")
def _(b):
    return b.eval(asking(None), flags=("--out", b.file("r.jsonl", {"mine": 1}))), "holds other rows"


@case("place: a table where a folder lies")
def _(b):
    row = {"question": "?", "answer": "x", "llm_answer": "x"}
    return ["infer", "--score", b.file("r.jsonl", row), "--csv", b.w], "directory"


@case("place: an exported model below a file")
def _(b):
    return ["train", "export", "--run", b.run(), "--which", "last", "--out", b.file("taken", "") / "m"], "taken"


@case("place: a base below a file")
def _(b):
    return build(b, {"id": "1", "text": "t"}, "--out", b.file("taken", "") / "kb"), "taken"


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_one_line_and_code_2_and_leaves_the_disk_alone(home, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    words, said = CASES[name](Bad(home, tmp_path))
    capsys.readouterr()
    before = disk(tmp_path)
    code, lines = call(words, capsys)
    assert lines and lines[-1].startswith(f"{words[0]}.py: ") and said in lines[-1], lines
    assert code == 2 and len(lines[-1]) < 2000 and not any("Traceback" in line for line in lines)
    assert all(not line.startswith(f"{words[0]}.py: ") for line in lines[:-1]) and len(lines) <= 2, lines
    assert disk(tmp_path) == before


def test_there_are_enough_cases():
    assert len(CASES) >= 60


def test_a_question_stands_in_a_file_once(home, tmp_path, capsys):
    """The second of two rows with one id is left out, named and counted; it does not end the run."""
    rows = [{"id": "a", "question": "Who?", "answer": "x"}, {"id": "a", "question": "Where?", "answer": "y"}]
    code, lines = call([*Bad(home, tmp_path).eval(*rows), "--max-new-tokens", 2], capsys)
    assert code == 0 and "q.jsonl:2: id 'a' stands in line 1 already" in lines[-1]


# --------------------------------------------------------------------------------- a full disk, and two writers at once


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
    assert code == 2 and re.match(rf"{words[0]}\.py: .*(too large|full).*{said}", lines[-1]), lines
    left = [path.name for path in tmp_path.rglob("*")]
    assert not any(path in ("kb", "page.html") or path.startswith(("checkpoint", "last")) for path in left), left
    # there is room again
    code, lines = call([*words, "--steps", 2] if name == "the log of a run" else words, capsys)
    assert code == 0, lines


def export(b, out):
    """Export the run in out/."""
    return ["train", "export", "--run", b.out, "--which", "last", "--dtype", "float32", "--out", out]


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


def test_a_step_file_may_hold_signs_that_python_takes_for_the_end_of_a_line(tmp_path):
    row = json.dumps(step_row(problem="a\u2028b\x85c"), ensure_ascii=False)
    (tmp_path / "s.jsonl").write_text(row + "\n" + row + "\n", encoding="utf-8")
    assert [[s.problem for s in steps] for steps in read_steps(tmp_path / "s.jsonl")] == [["a\u2028b\x85c"]] * 2


WRITERS = {"a run": (lambda b: b.sft("--threads", 1), "out/lock"),
           "a result file": (lambda b: b.eval(asking(None), flags=("--out", b.dir / "r.jsonl", "--max-new-tokens", 2)),
                             "r.jsonl")}


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


def test_processes_that_need_the_embedded_world_at_once_write_it_once(tmp_path, monkeypatch):
    """Each of six finds it whole. Threads stand for processes: each opens the lock anew."""
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "__init__.py").touch()
    (tmp_path / "lab" / "world.py").write_text("""import os, sys, time
out = sys.argv[sys.argv.index("--out") + 1]
os.makedirs(out, exist_ok=True)
open(out + "/calls", "a").write("x")
time.sleep(0.3)
open(out + "/questions.jsonl", "w").write("whole")
""")
    monkeypatch.setattr("parts.questions.HERE", tmp_path)
    found = []
    ask = lambda: found.append((embedded_world("demo", "test", 0, 1) / "questions.jsonl").read_text())
    askers = [threading.Thread(target=ask) for _ in range(6)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert found == ["whole"] * 6 and (tmp_path / "data" / "demo" / "calls").read_text() == "x"
    assert sorted(os.listdir(tmp_path / "data")) == ["demo"]


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
    "a table": lambda b, place: ["infer", "--score", b.file("r.jsonl", {"answer": "x", "llm_answer": "x"}), "--csv",
                                 place / "t.csv"],
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


# --------------------------------------------------------------------------- a run outlives its terminal, and prompts


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


def test_a_tokenizer_file_cannot_have_prompts_cut(home, tmp_path):
    """tokenizer.json may ask for texts to be cut or padded, and files of fine-tuned models do."""
    path = Bad(home, tmp_path).copy("m")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=99)
    tokenizer.save(str(path / "tokenizer.json"))
    assert len(tokenizer.encode("What").ids) == 99                                  # else this would show nothing
    ids = [Processor.from_pretrained(p).encode("What is the capital of Bakdol?") for p in (path, home / "m")]
    assert ids[0] == ids[1] and len(ids[0]) > 4


def test_a_line_without_end_is_not_read_to_its_end(tmp_path):
    """300 MB without a line feed, as a file is that holds one JSON value: some 4 MB of it are read."""
    with open(tmp_path / "d.jsonl", "w") as file:
        file.truncate(300_000_000)
    tracemalloc.start()
    with pytest.raises(ValueError, match="d.jsonl:1: a row of more than 4000000 characters"):
        list(read_docs(tmp_path / "d.jsonl"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_what_a_search_prints_gives_the_terminal_no_orders(home, tmp_path, capsys):
    b = Bad(home, tmp_path)
    assert call(build(b, {"id": "1\x1b[2J\nx", "text": "Who?\x1b]0;owned\x07\nnext"}), capsys)[0] == 0
    code = call(["retrieve", "search", b.dir / "kb", "Who?"])[0]
    [line] = capsys.readouterr().out.splitlines()
    assert code == 0 and line.isprintable() and "\ufffd]0;owned\ufffd next" in line


# --------------------------------------------------------------------------------------- nothing that is read runs code


FORBIDDEN = {"pickle", "cPickle", "_pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle", "runpy", "code"}


def runs_code(source):
    """What of a script's source could run code that it reads: calls and imports, as text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [f"from torch import {name}" for name in names if names[-1:] == ["torch"] and name == "load"]
            found += [name for name in names if name.split(".")[0] in FORBIDDEN or name in ("eval", "exec")]
        if not isinstance(node, ast.Call):
            continue
        name, owner = ast.unparse(node.func), isinstance(node.func, ast.Name)
        options = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if owner and name in ("eval", "exec", "compile") or name.startswith("builtins."):
            found.append(name)
        if name in ("torch.load", "torch.jit.load", "os.system", "os.popen", "importlib.import_module", "yaml.load"):
            found.append(name)
        if options.get("allow_pickle", "False") != "False" or options.get("shell", "False") != "False":
            found.append(f"{name}({options})")
        if options.get("trust_remote_code", "False") != "False":
            found.append(f"{name}({options})")
    return found


@pytest.mark.parametrize("script", sorted(str(path.relative_to(ROOT)) for path in
                                          (*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py"))))
def test_no_script_unpickles_or_evaluates_what_it_reads(script):
    assert runs_code((ROOT / script).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("source", [
    "torch.load('x')", "from torch import nn, load", "import pickle", "from pickle import load",
    "import numpy, shelve", "eval(text)", "exec(c)", "builtins.eval('1')", "np.load(f, allow_pickle=True)",
    "os.system('x')", "subprocess.run(x, shell=True)"])
def test_that_test_would_see_it(source):
    assert runs_code(source) and not runs_code("model.eval(); re.compile('x'); executor.exec_(); np.load('x')")
