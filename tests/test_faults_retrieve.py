"""Bad corpora, indexes and bases (faults.py says how)."""
import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import retrieve
from faults import Bad, build, call, check, secret, table
from parts.corpora import read_docs
from parts.store import text_sum
from plumbing.files import checksum


CASES, case = table()


# ---------------------------------------------------------------------------------------- corpora

for name, text, reason in (
        ("invalid UTF-8", b'{"id": "1", "text": "\xff"}\n', "not UTF-8"),
        ("no JSON", "{oops\n", ":1: not JSON"),
        ("no id", {"text": "t"}, "docs.jsonl:1: field 'id' is missing"),
        ("no object", "[1]\n", "expected an object"),
        ("text that is a list", {"id": "1", "text": ["t"]}, "field 'text' is list"),
        ("a row of 10 MB", {"id": "1", "text": "a" * 10 ** 7},
         ":1: a row of more than 4000000 characters")):
    case(f"corpus: {name}")(lambda b, text=text, reason=reason: (build(b, text), reason))

GOOD = {"id": "1", "text": "t"}


@case("corpus: a folder without pages")
def _(b):
    b.file("wiki/readme.md", "").unlink()
    words = ["retrieve", "build", b.dir / "wiki", "--format", "wiki", "--out", b.dir / "kb"]
    return words, "holds no document"


@case("corpus: an id twice")
def _(b):
    rows = [json.dumps({"id": str(i % 3), "text": "t"}) + "\n" for i in range(4)]
    return build(b, "".join(rows)), "stands twice"


@case("corpus: a name with a line feed and an order to the terminal")
def _(b):
    words = ["retrieve", "build", b.dir / "a\n\x1b[31m", "--out", b.out]
    return words, "a \ufffd[31m: cannot be read (No such file"


@case("corpus: missing")
def _(b):
    words = ["retrieve", "build", b.dir / "none.jsonl", "--out", b.dir / "kb"]
    return words, "none.jsonl: cannot be read (No such file"


@case("corpus: a page without end")
def _(b):
    page = '<doc id="1" url="" title="T">\nT\n\nbody\n'
    return build(b, page, "--format", "wiki"), "does not end with </doc>"


@case("corpus: an encoder that nobody knows")
def _(b):
    return build(b, GOOD, "--encoder", "magic"), "unknown encoder 'magic'"


@case("table: cut in the middle")
def _(b):
    text = '[{"page_title": "a", "header": ["x"], "rows": [["1"'
    return build(b, text, "--format", "tables"), "docs.jsonl: "


@case("table: rows that are no lists")
def _(b):
    row = {"page_title": "a", "section_title": "", "caption": "", "header": ["x"], "rows": ["1"]}
    return build(b, [row], "--format", "tables"), "docs.jsonl"


def document(image):
    return {"id": "1", "text": "t", "image": image}


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


# -------------------------------------------------------------------------------- places and bases

@case("options: retrieve --speed 9")
def _(b):
    return build(b, GOOD, "--speed", 9), "unrecognized arguments: --speed 9"


@case("place: a base below a file")
def _(b):
    return build(b, GOOD, "--out", b.file("taken", "") / "kb"), "taken"


@case("index: a picture for a base of words")
def _(b):
    picture = b.w / "photos" / "none.jpg"
    return ["retrieve", "search", b.w / "kb" / "text", "--image", picture], "picture"


@case("index: a missing folder")
def _(b):
    return ["retrieve", "search", b.dir / "kb", "x"], "no knowledge base here"


@case("index: the place is taken by something else")
def _(b):
    b.file("kb/diary.txt", "mine")
    return build(b, GOOD), "is no knowledge base"


@case("index: something else lies in the base that would be replaced")
def _(b):
    shutil.copytree(b.w / "kb" / "text", b.dir / "kb")
    b.file("kb/diary.txt", "mine")
    return build(b, GOOD), "diary.txt: not of the base that would be replaced"


def spoilt(b, file=None, change=None):
    """Asks a copy of the text base, one file of which went through `change` (None: it is gone)."""
    kb = Path(shutil.copytree(b.w / "kb" / "text", b.dir / "kb"))
    if file and change is None:
        (kb / file).unlink()
    elif file:
        (kb / file).write_bytes(change((kb / file).read_bytes()))
    return ["infer", "--model", b.m, "--kb", f"text={kb}", "--method", "text", "--question", "Who?"]


for name, file, change, reason in (
        ("truncated graph", "00000.hnsw", lambda d: d[:-8], "truncated"),
        ("altered graph", "00000.hnsw", lambda d: d[:-1] + bytes([d[-1] ^ 1]), "altered"),
        ("missing graph", "00000.hnsw", None, "missing"),
        ("altered encoder", "encoder.json", lambda d: d.replace(b"1", b"2", 1), "altered"),
        ("no manifest", "manifest.json", None, "no manifest.json"),
        ("altered manifest", "manifest.json", lambda d: d.replace(b'"dim": ', b'"dim": 1'),
         "altered"),
        ("manifest of another format", "manifest.json", lambda d: b'{"format": 99}',
         "not of format"),
        ("manifest that is a list", "manifest.json", lambda d: b"[]", "manifest.json")):
    case(f"index: {name}")(lambda b, file=file, change=change, reason=reason: (
        spoilt(b, file, change), reason))


def forge(b, change):
    """Changes the manifest of the base kb and gives it a new checksum."""
    manifest = json.loads((b.dir / "kb" / "manifest.json").read_text())
    del manifest["sha256"]
    change(manifest)
    b.file("kb/manifest.json", {**manifest, "sha256": text_sum(manifest)})


def forge_index(b, file):
    """Makes the manifest of the base kb fit another index."""
    forge(b, lambda manifest: manifest["shards"][0]["files"].update({file.name: checksum(file)}))


@case("index: a forged manifest with an option that cannot be")
def _(b):
    words = spoilt(b)
    forge(b, lambda manifest: manifest["index"].update(M=1))
    return words, "manifest.json: M is 1"


@case("index: a forged graph of fewer rows")
def _(b):
    words, file = spoilt(b), b.dir / "kb" / "00000.hnsw"
    graph = retrieve.Graph.empty(512, 3, retrieve.IndexOptions())
    graph.add(np.eye(3, 512, dtype=np.float32))
    graph.save(file)
    forge_index(b, file)
    return words, "00000.hnsw: 3 vectors for"


@case("index: forged vectors of another shape")
def _(b):
    corpus = b.file("d.jsonl", {"id": "1", "text": "a word"})
    retrieve.KnowledgeBase.build(read_docs(corpus), "lexical", index="flat").save(b.dir / "kb")
    file = b.dir / "kb" / "00000.npy"
    np.save(file, np.zeros((1, 7), np.float16))
    forge_index(b, file)
    words = ["retrieve", "search", b.dir / "kb", "word"]
    return words, "00000.npy: vectors of shape (7,), expected dimension"


def test_a_line_without_end_is_not_read_to_its_end(tmp_path):
    """300 MB without a line feed, as a file is that holds one JSON value: some 4 MB of it are
    read."""
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
    row = {"id": "1\x1b[2J\nx", "text": "Who?\x1b]0;owned\x07\nnext"}
    assert call(build(b, row), capsys)[0] == 0
    code = call(["retrieve", "search", b.dir / "kb", "Who?"])[0]
    [line] = capsys.readouterr().out.splitlines()
    assert code == 0 and line.isprintable() and "\ufffd]0;owned\ufffd next" in line


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_one_line_and_code_2_and_leaves_the_disk_alone(home, tmp_path, capsys,
                                                                       monkeypatch, name):
    check(CASES[name], home, tmp_path, capsys, monkeypatch)
