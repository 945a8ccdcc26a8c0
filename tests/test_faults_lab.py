"""Bad flags, logs and places of lab.world and lab.report (faults.py says how)."""
import pytest

from faults import SMALL_WORLD, check, each, table

CASES, case = table()


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_one_line_and_code_2_and_leaves_the_disk_alone(home, tmp_path, capsys,
                                                                      monkeypatch, name):
    check(CASES[name], home, tmp_path, capsys, monkeypatch)


# ----------------------------------------------------------------------------------------- flags

for words, message in (
        ("--speed 9", "unrecognized arguments: --speed 9"),
        ("--questions 0", "--questions is 0: give at least 1"),
        ("--countries 1", "--countries is 1: give at least 2"),
        ("--countries 0", "--countries is 0"), ("--practice 0", "--practice is 0"),
        ("--kinds riddle", "riddle unknown")):
    def _(b, words=words, message=message):
        return ["world", *words.split(), "--out", b.out], message
    case(f"options: world {words}")(_)

for words, message in (("{dir}", "no log.jsonl in it"), ("{dir}/none", "cannot be read"),
                       ("{dir} --cards 0", "--cards is 0")):
    def _(b, words=words, message=message):
        words = words.format(dir=b.dir).split()
        return ["report", *words, "--out", b.dir / "page.html"], message
    case(f"options: report {words}")(_)


# ------------------------------------------------------------------------------------------ logs

def log_row(b, row, message):
    """The page of a run whose log is this row."""
    b.file("run/log.jsonl", row)
    words = ["report", b.dir / "run", "--out", b.dir / "page.html"]
    return words, f"log.jsonl:1: a line of train.py's log: {message}"


each(case, "log: ", log_row, [
    ("no step", {"tokens": 5}, "missing step"),
    ("outputs that are text", {"step": 1, "outputs": "3"}, "outputs is '3'"),
    ("a step beyond all numbers", {"step": 10 ** 400, "tokens": 5}, "step is 1000"),
    ("tokens below zero", {"step": 1, "tokens": -5}, "tokens is -5"),
    ("seconds that are a list", {"step": 1, "seconds": [1]}, "seconds is [1]"),
    ("seconds that are no number", {"step": 1, "seconds": float("nan")}, "seconds is nan"),
    ("a validation that is a number", {"step": 1, "validation": 0.5}, "validation is 0.5")])


@case("log: options that are none")
def _(b):
    b.file("run/options.json", [1])
    b.file("run/log.jsonl", {"step": 1, "tokens": 5})
    words = ["report", b.dir / "run", "--out", b.dir / "page.html"]
    return words, "options.json: expected a JSON object"


# ---------------------------------------------------------------------------------------- places

@case("place: a page over its own results")
def _(b):
    file = b.file("r.jsonl", {"question": "?", "answer": "x", "llm_answer": "x"})
    return ["report", f"mine={file}", "--out", file], "r.jsonl: give a name that ends with .html"


@case("place: a page over the log of the run that it is made of by default")
def _(b):
    b.file("runs/a/log.jsonl", {"step": 1, "tokens": 5})
    return ["report", "--out", "runs/a/log.jsonl"], "log.jsonl: give a name that ends with .html"


@case("place: a world where something else lies")
def _(b):
    b.file("out/text.jsonl", "mine")
    return [*SMALL_WORLD, "--out", b.out], "holds other files (text.jsonl) and no world"


@case("place: a world below a file")
def _(b):
    return [*SMALL_WORLD, "--out", b.file("taken", "") / "w"], "taken"


@case("place: a world without a name")
def _(b):
    return [*SMALL_WORLD, "--out", ""], "--out is empty"
