"""Bad questions, step files, prompts, result rows and flags of infer.py (faults.py says how)."""
import json
import os
import sys
import threading

import pytest
from PIL import Image

import infer
import model
import train
from faults import Bad, asking, call, check, png, secret, step_row, table
from parts.questions import COSTS, embedded_world
from parts.stepfiles import read_steps


CASES, case = table()


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


@case("options: a question to show that is not there")
def _(b):
    return ["train", "show", "--model", b.m, "--world", b.w, "--question", 13], "has questions 0 to 12"


@case("result file: a base that is no list")
def _(b):
    hops = [{"query": "q", "retriever": "text retriever", "answer": "x"}]
    row = {"question": "?", "answer": "x", "method": "router", "hops": hops, "llm_answer": "x",
           "plan_1": {"thought": "t", "query": "q", "retriever": "Text Retriever"}}
    return ["infer", "--score", b.file("r.jsonl", row)], "retriever 'Text Retriever' is no list"


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


def test_a_question_stands_in_a_file_once(home, tmp_path, capsys):
    """The second of two rows with one id is left out, named and counted; it does not end the run."""
    rows = [{"id": "a", "question": "Who?", "answer": "x"}, {"id": "a", "question": "Where?", "answer": "y"}]
    code, lines = call([*Bad(home, tmp_path).eval(*rows), "--max-new-tokens", 2], capsys)
    assert code == 0 and "q.jsonl:2: id 'a' stands in line 1 already" in lines[-1]


def test_a_step_file_may_hold_signs_that_python_takes_for_the_end_of_a_line(tmp_path):
    row = json.dumps(step_row(problem="a\u2028b\x85c"), ensure_ascii=False)
    (tmp_path / "s.jsonl").write_text(row + "\n" + row + "\n", encoding="utf-8")
    assert [[s.problem for s in steps] for steps in read_steps(tmp_path / "s.jsonl")] == [["a\u2028b\x85c"]] * 2


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


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_one_line_and_code_2_and_leaves_the_disk_alone(home, tmp_path, capsys, monkeypatch, name):
    check(CASES[name], home, tmp_path, capsys, monkeypatch)
