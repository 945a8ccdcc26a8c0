"""Bad flags, logs and places of lab.world and lab.report (faults.py says how)."""
import json

import pytest

import train
from faults import check, table
from lab import report


CASES, case = table()


@case("options: world --speed 9")
def _(b):
    return ["world", "--speed", 9, "--out", b.out], "unrecognized arguments: --speed 9"


@case("place: a world below a file")
def _(b):
    return ["world", "--countries", 12, "--questions", 13, "--out", b.file("taken", "") / "w"], "taken"


for words, said in ((["--questions", "0"], "--questions is 0: give at least 1"), (["--countries", "1"], "--countries is 1: give at least 2"),
                    (["--countries", "0"], "--countries is 0"), (["--practice", "0"], "--practice is 0"),
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


@case("place: a world where something else lies")
def _(b):
    b.file("out/text.jsonl", "mine")
    return ["world", "--countries", 12, "--questions", 13, "--out", b.out], "holds other files (text.jsonl) and no world"


@case("place: a world without a name")
def _(b):
    return ["world", "--countries", 12, "--questions", 13, "--out", ""], "--out is empty"


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_one_line_and_code_2_and_leaves_the_disk_alone(home, tmp_path, capsys, monkeypatch, name):
    check(CASES[name], home, tmp_path, capsys, monkeypatch)
