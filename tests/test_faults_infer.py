"""Bad questions, step files, prompts, result rows and flags of infer.py (faults.py says how)."""
import json

import pytest
from PIL import Image

from faults import Bad, asking, call, check, secret, step_row, table
from parts.stepfiles import read_steps
from parts.trajectory import COSTS

CASES, case = table()


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_one_line_and_code_2_and_leaves_the_disk_alone(home, tmp_path, capsys,
                                                                      monkeypatch, name):
    check(CASES[name], home, tmp_path, capsys, monkeypatch)


# -------------------------------------------------------------------------------------- prompts

@case("prompts: a list")
def _(b):
    return b.ask(m=b.model("prompts.json", ["a"])), "prompts.json: expected a JSON object"


@case("prompts: numbers")
def _(b):
    file = b.file("p.json", {"route": 1})
    return b.ask("--prompts", file), "p.json: 'route': expected system prompts"


@case("prompts: half a surrogate pair")
def _(b):
    file = b.file("p.json", '{"final": "\\ud800"}')
    return b.ask("--prompts", file), "p.json: 'final' is no text"


@case("prompts: numbers, in training")
def _(b):
    model = b.model("prompts.json", {"route": 1})
    return b.grpo(m=model), "prompts.json: 'route': expected system prompts"


# --------------------------------------------------------------------- pictures that files name

@case("picture of questions: ..")
def _(b):
    secret(b)
    return b.eval(asking("../secret.png")), "q.jsonl:1: picture"


@case("picture of questions: an absolute path")
def _(b):
    return b.eval(asking(str(secret(b)))), "leads out of"


def link_that_leads_out(b):
    """mine.png in the data folder is a picture that lies outside of it."""
    secret(b)
    (b.dir / "d" / "mine.png").symlink_to(b.dir / "secret.png")
    return "mine.png"


@case("picture of questions: a link that leads out")
def _(b):
    return b.eval(asking(link_that_leads_out(b))), "leads out of"


@case("picture of a step file: ..")
def _(b):
    secret(b)
    return b.steps(step_row("../secret.png")), ":1: picture"


@case("picture of a step file: an absolute path")
def _(b):
    return b.steps(step_row(str(secret(b)))), "leads out of"


@case("picture of a step file: a link that leads out")
def _(b):
    return b.steps(step_row(link_that_leads_out(b))), "leads out of"


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


@case("picture of questions: 300 times longer than wide")
def _(b):
    (b.dir / "d").mkdir()
    Image.new("RGB", (900, 3)).save(b.dir / "d" / "thin.png")
    return b.eval(asking("thin.png")), "q.jsonl:1: a picture of 900 x 3"


# ------------------------------------------------------------------------------- question files

for name, text, message in (
        ("invalid UTF-8", b'{"question": "caf\xe9"}\n', "not UTF-8"),
        ("no JSON", "{oops\n", ":1: not JSON"),
        ("no object", "[1]\n", "expected an object, found list"), ("empty", "\n\n", "no rows"),
        ("lists in lists", "[" * 100000, "q.jsonl:1: not JSON"),
        ("a row of 10 MB", '{"question": "' + "a" * 10 ** 7 + '", "answer": "x"}\n',
         "q.jsonl:1: a row of more than 4000000 characters"),
        ("a number of 5,000 digits", '{"question": "Who?", "answer": ' + "9" * 5000 + "}\n",
         "q.jsonl:1: "),
        ("half a surrogate pair", '{"question": "\\ud800", "answer": "x"}\n',
         "surrogates not allowed")):
    case(f"questions: {name}")(lambda b, text=text, message=message: (b.eval(text), message))

for name, row, message in (
        ("no words", {"question": " ", "answer": "x"}, "empty question"),
        ("a list for a question", {"question": ["Who?"], "answer": "x"}, "empty question"),
        ("no answer", {"question": "Who?"}, "gold answer None"),
        ("a range of words", {"question": "Who?", "answer": [{"range": ["a", "b"]}]},
         "gold answer {'range'"),
        ("a range beyond floating point",
         {"question": "?", "answer": [{"range": [0, 10 ** 400]}]}, "gold answer"),
        ("an unknown base",
         {"question": "?", "answer": "x", "hops": [{"query": "q", "retriever": "web"}]}, "hops"),
        ("hops that are none", {"question": "?", "answer": "x", "hops": 7}, "hops 7")):
    case(f"questions: {name}")(lambda b, row=row, message=message: (b.eval(row), message))


def test_a_question_stands_in_a_file_once(home, tmp_path, capsys):
    """The second of two rows with one id is left out, named and counted; the run goes on."""
    rows = [{"id": "a", "question": "Who?", "answer": "x"},
            {"id": "a", "question": "Where?", "answer": "y"}]
    words = Bad(home, tmp_path).eval(*rows)
    code, lines = call([*words, "--max-new-tokens", 2], capsys)
    assert code == 0 and "q.jsonl:2: id 'a' stands in line 1 already" in lines[-1]


# ----------------------------------------------------------------------------------- step files

for name, text, message in (
        ("invalid UTF-8", b"\xff\n", "not UTF-8"),
        ("no JSON", "{oops\n", "steps.jsonl:1: not JSON"),
        ("no object", "[1]\n", "steps.jsonl:1: expected an object"), ("empty", "", "no rows"),
        ("lists in lists", "[" * 99999, "steps.jsonl:1: not JSON"),
        ("a row of 10 MB", "a" * 10 ** 7, "steps.jsonl:1: a row of more than 4000000 characters")):
    case(f"step file: {name}")(lambda b, text=text, message=message: (b.steps(text), message))

for name, row, message in (
        ("an answer of another kind of step", step_row(kind="ret"), "step_type 'ret'"),
        ("no retriever", step_row(kind="ret", answer={"query": "q"}), ":1: step_type 'ret'"),
        ("retrievers that are no list",
         step_row(kind="ret", answer={"query": "q", "retriever": 3}), ":1: step_type 'ret'"),
        ("a problem that is a number", step_row(problem=3), ":1: problem is '3'"),
        ("half a surrogate pair", step_row(problem="\ud800"), ":1: 'utf-8' codec"),
        ("answers that are numbers", step_row(answer=[3]), ":1: step_type 'ans'"),
        ("pictures that are no list", {**step_row(), "images": "x.png"}, "images is 'x.png'"),
        ("no steps", {"images": [], "steps": []}, ":1: expected")):
    case(f"step file: {name}")(lambda b, row=row, message=message: (b.steps(row), message))


@case("step file: all pictures missing")
def _(b):
    file = b.file("s.jsonl", step_row("/gone/1.jpg"))
    words = ["--mode", "offline", "--model", b.m, "--out", b.out, "--data", file]
    return ["train", "grpo", *words], "every picture is missing"


def test_a_step_file_may_hold_signs_that_python_takes_for_the_end_of_a_line(tmp_path):
    row = json.dumps(step_row(problem="a\u2028b\x85c"), ensure_ascii=False)
    (tmp_path / "s.jsonl").write_text(row + "\n" + row + "\n", encoding="utf-8")
    trajectories, faults = read_steps(tmp_path / "s.jsonl")
    assert [[s.problem for s in steps] for steps in trajectories] == [["a\u2028b\x85c"]] * 2
    assert not faults


# ---------------------------------------------------------------------------------- result rows

for name, row, message in (
        ("no answer of the model", {"question": "?", "answer": "x"}, "no llm_answer"),
        ("a list as answer", {"question": "?", "answer": "x", "llm_answer": [1]}, "no llm_answer"),
        ("costs that are none", {"answer": "x", "llm_answer": "y", "cost": [1]},
         "not those of a result row"),
        ("costs beyond floating point",
         {"answer": "x", "llm_answer": "y", "cost": dict.fromkeys(COSTS, 10 ** 400)}, "r.jsonl:1"),
        ("plans that are none",
         {"answer": "x", "llm_answer": "y", "method": "router", "plan_1": 3, "hops": []},
         "r.jsonl:1")):
    def _(b, row=row, message=message):
        return ["infer", "--score", b.file("r.jsonl", row)], message
    case(f"result rows: {name}")(_)


@case("result rows: a base that is no list")
def _(b):
    hops = [{"query": "q", "retriever": "text retriever", "answer": "x"}]
    plan = {"thought": "t", "query": "q", "retriever": "Text Retriever"}
    row = {"question": "?", "answer": "x", "method": "router", "hops": hops, "llm_answer": "x",
           "plan_1": plan}
    return ["infer", "--score", b.file("r.jsonl", row)], "retriever 'Text Retriever' is no list"


@case("result rows: two files that answer other questions at the same line")
def _(b):
    row = {"set": "s", "line": 1, "question": "?", "answer": "x", "llm_answer": "x"}
    other = b.file("other.jsonl", row | {"question": "Who?"})
    return ["infer", "--score", b.file("r.jsonl", row), other], "line 1 of set 's': A and B answer"


@case("place: results below a file")
def _(b):
    return b.eval(asking(None), flags=("--out", b.file("taken", "") / "r.jsonl")), "taken"


@case("place: results of others")
def _(b):
    file = b.file("r.jsonl", {"mine": 1})
    return b.eval(asking(None), flags=("--out", file)), "holds other rows"


# ---------------------------------------------------------------------------------------- flags

for words, message in (
        (["--method", "guess"], "unknown method 'guess'"), (["-k", "0"], "k is 0"),
        (["--limit", "0"], "at least 1"), (["--temperature", "nan"], "temperature is nan"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--max-new-tokens", "100000"], "leaves no room"),
        (["--device", "warp"], "device 'warp' cannot be used here"),
        (["--kb", "audio=x", "--question", "?"], "expected NAME=DIR"),
        (["--speed", "9"], "unrecognized arguments"),
        (["--demos", "{dir}/none.jsonl"], "cannot be read"),
        (["--threads", "100000"], "give 0 to 1024"),
        (["--question", "a\udcff"], "half of a surrogate pair"),
        (["--question", "?", "--kb", "text={w}/kb/text", "text=x"], "each once"),
        (["--question", "?", "--images", "x"], "--images does nothing beside --question"),
        (["--score", "x", "-k", "3"], "-k does nothing beside --score"),
        (["--out", "{w}/questions.jsonl"], "questions.jsonl is a file of the world"),
        (["--out", "{w}/text.jsonl"], "text.jsonl is a file of the world"),
        (["--write-steps", "{w}/steps.jsonl"], "steps.jsonl is a file of the world")):
    def _(b, words=words, message=message):
        world = [] if "--kb" in words else ["--world", b.w]
        words = [word.format(dir=b.dir, w=b.w) for word in words]
        return ["infer", "--model", b.m, *world, *words], message
    case(f"options: infer {' '.join(words)}")(_)


@case("options: a question to show that is not there")
def _(b):
    words = ["train", "show", "--model", b.m, "--world", b.w, "--question", 13]
    return words, "there are questions 0 to 12"
