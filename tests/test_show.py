"""What the terminal shows: the trace of a question, the chat."""
import io
import json
import re
import sys

import pytest
from PIL import Image

from conftest import made, run
from parts.evaluate import print_table
from parts.show import ALONE, COMMANDS, FOLLOW_UPS, Chat, greeting, knows_follow_ups, print_trace
from parts.steps import final_problem, render_answer, render_route, route_problem
from parts.trajectory import result_row
from scripted import cli, scripted


COST = {"seconds_model": 1.234, "seconds_search": 0.5}


def test_a_trace_by_hand(capsys):
    row = {"question": "Who?", "image": "a.png", "kind": "k", "method": "router", "cost": COST,
           "answer": ["Vesna", "V."],
           "plan_1": {"thought": "t1", "query": "q1", "retriever": ["Text Retriever"],
                      "ter": ["p1", "p2"], "answer": {"thought": "t2", "answer": "a1"}},
           "plan_2": {"fault": "no tags", "text": "junk " * 40, "query": "None",
                      "retriever": ["None"]},
           "llm_answer": {"thought": "t3", "answer": "Vesna"}}
    print_trace(row)
    assert capsys.readouterr().out.splitlines() == [
        "Who?   [k, router]", "  picture   a.png", "  think     t1",
        "  ask       Text Retriever: q1", "  read      p1", "  think     t2", "  found     a1",
        "  malformed no tags: " + ("junk " * 20).strip(), "  ask       None", "  think     t3",
        "  answer    Vesna", "  gold      Vesna | V.", "            right",
        "  time      1.23 s model, 0.500 s search", ""]
    row["llm_answer"] = {"fault": "no tags", "text": "x", "answer": ""}
    print_trace(row)
    lines = capsys.readouterr().out.splitlines()
    assert "  answer    (none)" in lines and "            wrong" in lines
    # bases that were asked together; a question without gold
    row = {"question": "Who?", "method": "static", "cost": COST, "llm_answer": "x",
           "plan_1": {"query": "Who?", "retriever": ["Text Retriever", "Table Retriever"],
                      "ter": ["p1"], "tar": ["p2" * 100]}}
    row["llm_answer"] = {"thought": "t", "answer": "x"}
    print_trace(row)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["Who?   [question, static]",
                         "  ask       Text Retriever + Table Retriever: Who?",
                         "  read      p1", "  read      " + "p2" * 80]
    assert not any("gold" in line for line in lines)


def test_colour_only_where_a_terminal_has_it(monkeypatch, capsys):
    row = {"question": "Who?", "method": "direct", "cost": COST, "answer": "Ortal",
           "llm_answer": {"thought": "t", "answer": "Ortal"}}

    def shown(terminal, **environment):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
        for name in ("NO_COLOR", "TERM"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        print_trace(row)
        return capsys.readouterr().out
    assert "\x1b[32mright\x1b[0m" in shown(True)
    for text in (shown(False), shown(True, NO_COLOR="1"), shown(True, TERM="dumb")):
        assert "\x1b" not in text and "right" in text


def test_a_question_or_passage_forges_no_line(bases, capsys):
    def reply(prompt, g):
        return render_answer("\x1b[2Jt", "a\n  gold      a")
    row = {"question": "Who?\n  answer    b\x07", "kind": "k\n\x1b"}
    [trajectory] = scripted(bases, reply, method="direct")[1].run([row])
    print_trace(result_row(trajectory))
    print_table([["a\nb", "1"], ["c\x1b", "2"]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Who? answer b\ufffd   [k \ufffd, direct]"
    assert lines[2] == "  answer    a gold a"
    assert "\x1b" not in "".join(lines) and lines[-3:] == ["a b  1", "c\ufffd   2", ""]


# ----------------------------------------------------------------------------------------- chat

@pytest.fixture
def chat(capsys, monkeypatch):
    """What a chat prints when it is given these lines: stdout without its beginning, and stderr."""
    def chat(make_router, *lines, method="router", follow_ups=True):
        capsys.readouterr()
        text = "\n".join(lines).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        Chat(make_router, method, None, False, "Hello.", follow_ups).run()
        out, err = capsys.readouterr()
        first = FOLLOW_UPS if follow_ups else ALONE
        beginning = f"Hello.\n{first} Commands:\n{COMMANDS}\n"
        assert out.startswith(beginning)
        return out.removeprefix(beginning).splitlines(), err.splitlines()
    return chat


def test_a_follow_up_sees_the_question_before(bases, tmp_path, chat):
    prompts = []

    def reply(prompt, g):
        prompts.append(prompt)
        system, problem = prompt.split("\n", 1)
        if system == "R":
            return render_route("t", "None", "None")
        return render_answer("t", "Ortal" if "Who" not in problem else "Vesna")

    def make_router(**options):
        return scripted(bases, reply, **options)[1]

    out, err = chat(make_router, "What is the capital?", "Who is its mayor?", ":new", "Who?")
    assert out == ["  answer    Ortal", "  answer    Vesna",
                   "  new       the question before is forgotten", "  answer    Vesna"]
    assert len(err) == 1
    before = [("What is the capital?", "Ortal")]
    expected = []
    for question, history in ((before[0][0], []), ("Who is its mayor?", before), ("Who?", [])):
        expected.append(f"R\n{route_problem(question, history, False)}")
        expected.append(f"F\n{final_problem(question, history, False)}")
    assert prompts == expected
    # a model that knows no follow-ups sees none
    prompts.clear()
    chat(make_router, "What is the capital?", "Who is its mayor?", follow_ups=False)
    assert prompts[2] == f"R\n{route_problem('Who is its mayor?', [], False)}"
    # a base that is forced is asked once, with the question before in front of the question
    prompts.clear()
    chat(make_router, ":base text", "What is the capital?", "Who is its mayor?", ":base", "Who?")
    assert [prompt[0] for prompt in prompts] == ["A", "A", "R", "F"]
    assert prompts[1].endswith("to the Question: What is the capital? Ortal Who is its mayor?")
    # a picture stays for what follows, and starts afresh
    prompts.clear()
    Image.new("RGB", (8, 8)).save(tmp_path / "a b.png")
    chat(make_router, "What?", f":image {tmp_path}/a b.png", "Who?", "Who?", ":image", "Who?")
    shown = [f"[{tmp_path}/a b.png]" in prompt for prompt in prompts]
    assert shown == [False] * 2 + [True] * 4 + [False] * 2
    follows = ["Sub-question" in prompt for prompt in prompts[::2]]
    assert follows == [False, False, True, False]


def test_mistakes_in_a_chat_take_a_line_each_and_it_goes_on(bases, chat, monkeypatch):
    def make_router(**options):
        def reply(prompt, g):
            return render_answer("a thought", "x")
        return scripted({"text": bases["text"]}, reply, **options)[1]
    lines = ["", ":image nowhere.png", ":base moon", ":base table", ":sing", "Who?", ":trace",
             "Who?", ":help", ":quit", "No?"]
    out, err = chat(make_router, *lines, method="direct")
    wanted = ["nowhere.png: no such picture", ":base moon", "knowledge base 'table'",
              ":sing: no such command"]
    assert len(err) == 4 and all(text in line for text, line in zip(wanted, err))
    assert out[:3] == ["  answer    x", "  trace     on", "Who?   [question, direct]"]
    assert "  think     a thought" in out and out[-1] == COMMANDS.splitlines()[-1]
    assert sum(line == "  answer    x" for line in out) == 2

    # Ctrl-C leaves in peace, SIGTERM ends the program
    def interrupt(prompt=""):
        raise KeyboardInterrupt(*signals)
    monkeypatch.setattr("builtins.input", interrupt)
    for signals in ((), (2,)):
        assert chat(make_router, method="direct") == ([], [""])
    signals = (15,)
    with pytest.raises(KeyboardInterrupt):
        chat(make_router, method="direct")


def test_a_greeting_forges_no_line_and_needs_no_questions(tmp_path):
    bases = {"text": "12", "table": "3"}                # whatever has a length
    assert greeting("m", bases, None) == "m over text (2 passages), table (1 passages)."
    assert greeting("m", bases, tmp_path) == greeting("m", bases, None)
    hop = {"query": "q", "retriever": "text retriever", "answer": "a"}
    row = {"question": "Who?\n> \x1b[2J", "answer": "a", "hops": [hop]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row))
    assert greeting("m", bases, tmp_path).splitlines()[1:] == ["  Who? > \ufffd[2J"]


def test_the_directory_says_whether_follow_ups_are_known(tmp_path):
    for text, known in ((None, False), ("{}", False), ('{"follow_ups": true}', True)):
        if text:
            (tmp_path / "generation_config.json").write_text(text)
        assert knows_follow_ups(tmp_path) == known


def test_every_command_is_confirmed(bases, chat, tmp_path):
    def make_router(**options):
        return scripted(bases, lambda prompt, g: render_answer("t", "x"), **options)[1]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    out, _ = chat(make_router, f":image {tmp_path}/a.png", ":image", ":base text", ":base",
                  ":trace", ":trace", ":new")
    assert [line.split(maxsplit=1) for line in out] == [
        ["image", f"{tmp_path}/a.png"], ["image", "none"], ["base", "asks text only"],
        ["base", "router again"], ["trace", "on"], ["trace", "off"],
        ["new", "the question before is forgotten"]]


def test_a_chat_greets_with_questions_that_work(tmp_path):
    """The shipped model in a world of its own: whoever types what the greeting shows gets three
    right answers. Its directory says of follow-ups nothing."""
    made("lab.world", "--seed", 8, "--countries", 40, "--questions", 26, "--out", tmp_path / "w")
    flags = ("infer.py", "--world", tmp_path / "w", "--chat")
    first, *shown = made(*flags).stdout.split("\nEach line is a question of its own")[0].split("\n")
    assert "tiny over text (160 passages), image (40 passages), table (120 passages)." in first
    done = run(*flags, input="\n".join(line.strip() for line in shown))
    questions = [line.strip() for line in shown if ":image" not in line]
    golds = {}
    for line in open(tmp_path / "w" / "questions.jsonl"):
        row = json.loads(line)
        golds.setdefault((row["question"], bool(row["image"])), row["answer"])
    answers = re.findall(r"^  answer    (.*)$", done.stdout, re.MULTILINE)
    pictures = [False, False, True]
    assert [[a] for a in answers] == [golds[pair] for pair in zip(questions, pictures)]


def test_a_chat_says_why_there_is_no_answer_and_quits(bases, chat):
    def make_router(**options):
        return scripted(bases, lambda prompt, g: "no step", 300, max_new_tokens=96, **options)[1]
    out, err = chat(make_router, "Who?", "word " * 300, ":quit now", "No?", method="direct")
    assert out == ["  answer    (none: no tags)", "  answer    (none: prompt too long)"]
    assert len(err) <= 1


def test_a_chat_through_a_pipe(noise_model, world, capsys, monkeypatch):
    photo = sorted((world / "photos").glob("*.jpg"))[0]
    flags = ["--model", noise_model, "--world", world, "--max-new-tokens", 5, "--threads", 1,
             "--chat"]
    lines = f":image {photo}\nWhich country?\n:base text\nAnd \xff?\n:oops\n"
    lines = lines.encode("latin-1")                                 # one byte is no UTF-8
    done = run("infer.py", *flags, input=lines, text=False)
    out, err = done.stdout.decode().splitlines(), done.stderr.decode().splitlines()
    assert done.returncode == 0 and out[0].startswith(f"{noise_model} over text (")
    assert [line[:8] for line in out[-4:]] == ["  image ", "  answer", "  base  ", "  answer"]
    assert len(err) == 2 and ":oops" in err[0]
    # for programs: a result row a question, and nothing else
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    code, out, err = cli(capsys, *flags, "--json")
    rows = [json.loads(line) for line in out]
    assert code == 0 and [row["image"] for row in rows] == [str(photo)] * 2
    assert [row["method"] for row in rows] == ["router", "text"]
