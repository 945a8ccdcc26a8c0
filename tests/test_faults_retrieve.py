"""Bad corpora, indexes and bases (faults.py says how)."""
import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import infer
import model
import retrieve
from faults import Bad, build, call, check, png, secret, table
from parts.corpora import read_docs
from parts.store import text_sum
from plumbing.old import checksum


CASES, case = table()


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


@case("place: a base below a file")
def _(b):
    return build(b, {"id": "1", "text": "t"}, "--out", b.file("taken", "") / "kb"), "taken"


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


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_one_line_and_code_2_and_leaves_the_disk_alone(home, tmp_path, capsys, monkeypatch, name):
    check(CASES[name], home, tmp_path, capsys, monkeypatch)
