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
                       ("{dir} --cards 0", "--cards 0")):
    def _(b, words=words, message=message):
        words = words.format(dir=b.dir).split()
        return ["report", *words, "--out", b.dir / "page.html"], message
    case(f"options: report {words}")(_)


# ------------------------------------------------------------------------------------------ logs

def log_row(b, row):
    """The page of a run whose log is this row."""
    b.file("run/options.json", {"mode": "online", "group": 2})
    b.file("run/log.jsonl", row)
    words = ["report", b.dir / "run", "--out", b.dir / "page.html"]
    return words, "log.jsonl:1: expected a line of train.py's log"


each(case, "log: ", log_row, [
    ("outputs that are text", {"step": 1, "tokens": 5, "outputs": "3"}),
    ("groups that are a list", {"step": 1, "tokens": 5, "groups": [1]}),
    ("a step beyond all numbers", {"step": 10 ** 400, "tokens": 5}),
    ("tokens below zero", {"step": 1, "tokens": -5}),
    ("seconds that are none", {"step": 1, "tokens": 5, "seconds": None}),
    ("seconds that are no number", {"step": 1, "tokens": 5, "seconds": float("nan")})])


@case("log: options that are none")
def _(b):
    b.file("run/options.json", {"mode": "online", "group": None})
    b.file("run/log.jsonl", {"step": 1, "tokens": 5, "groups": 2})
    words = ["report", b.dir / "run", "--out", b.dir / "page.html"]
    return words, "options.json: group is None"


# ---------------------------------------------------------------------------------------- places

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
    return [*SMALL_WORLD, "--out", b.out], "holds other files (text.jsonl) and no world"


@case("place: a world below a file")
def _(b):
    return [*SMALL_WORLD, "--out", b.file("taken", "") / "w"], "taken"


@case("place: a world without a name")
def _(b):
    return [*SMALL_WORLD, "--out", ""], "--out is empty"
