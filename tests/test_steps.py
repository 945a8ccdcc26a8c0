"""The step language: problems against the published file, the parser against cases by hand and
hostile texts.

Oracle: golden/stepgrpo_steps.jsonl, every problem string of which is rebuilt byte for byte.
"""
import dataclasses
import json
import re

import pytest
from hypothesis import given, settings, strategies as st

from hostile import HOSTILE, plain, tags_of, texts, words
from parts.steps import (BASES, IMAGE, PREFIX, PROMPTS, ROUTES, AnswerStep, RouteStep, StepError,
                         answer_problem, conversation, final_problem, gold_route, parse_step,
                         render_answer, render_route, route_problem)

# ---------------------------------------------------------------------------------------- problems


def quoted(problem):
    """The passages in an answering problem: base -> list of str."""
    text = problem.split("from table retriever:", 1)[1]
    text = text.rsplit("\n\n\n Give me the answer(", 1)[0]
    pieces = re.split(r"(?:^|\n)(ter|tir|tar)-\d+: ", text)[1:]     # label, passage, label, ...
    base_of = {prefix: base for base, prefix in PREFIX.items()}
    evidence = {}
    for label, passage in zip(pieces[::2], pieces[1::2]):
        evidence.setdefault(base_of[label], []).append(passage)
    return evidence


def rebuilt(steps, image):
    """Every problem of a published trajectory from what went before: question, sub-questions,
    evidence, answers."""
    start = re.match(r"Origin question: (.*?)\n(?:<image>)?", steps[0]["problem"], re.DOTALL)
    question, history, problems = start.group(1), [], []
    for step in steps[:-1]:
        if step["step_type"] == "ret":
            query = step["answer"]["query"]
            problems.append(route_problem(question, history, image))
        else:
            problems.append(answer_problem(query, quoted(step["problem"]), image))
            history.append((query, step["answer"]))
    return problems + [final_problem(question, history, image)]


def problems_of(path):
    """(the problems of a step file, the same rebuilt), row by row."""
    for line in path.open(encoding="utf-8"):
        row = json.loads(line)
        problems = [step["problem"] for step in row["steps"]]
        yield problems, rebuilt(row["steps"], bool(row["images"]))


def test_renderers_rebuild_the_published_problems(golden):
    rows = list(problems_of(golden / "stepgrpo_steps.jsonl"))
    assert len(rows) == 40
    for published, ours in rows:
        assert ours == published


def test_renderers_rebuild_the_worlds_problems(world):
    rows = list(problems_of(world / "steps.jsonl"))
    assert len(rows) == 39
    for published, ours in rows:
        assert ours == published


def test_a_picture_stands_where_the_marker_stood():
    assert conversation("s", "p") == [{"role": "system", "content": "s"},
                                      {"role": "user", "content": "p"}]
    shown = [{"type": "text", "text": "p<image> and"}, {"type": "image", "image": "a.jpg"}]
    for problem in ("p<image> and<image>", "p<image> and"):
        assert conversation("s", problem, "a.jpg")[1] == {"role": "user", "content": shown}


@settings(max_examples=100, deadline=None)
@given(question=words)
def test_a_question_shows_no_picture_by_its_words(question):
    """The marker is taken off once, where there is a picture; without one it is text like any
    other."""
    for text in (question, question + IMAGE):
        without = conversation("s", route_problem(text, [], False))[1]["content"]
        assert without == f"Origin question: {text}\n"
        words, shown = conversation("s", route_problem(text, [], True), "a.jpg")[1]["content"]
        assert words["text"] == without and shown["image"] == "a.jpg"


@pytest.mark.parametrize("kind, tags", [
    ("route", ("think", "sub-question", "ret")), ("answer", ("think", "answer")),
    ("final", ("think", "answer")), ("cot", ("think", "answer"))])
def test_our_prompts_ask_for_the_form_that_the_parser_reads(kind, tags):
    """The example at the end of each prompt is a step of its kind, once it names a base."""
    example = PROMPTS[kind][PROMPTS[kind].index("<think>"):]
    for tag in tags:
        assert example.count(f"<{tag}>") == example.count(f"</{tag}>") == 1
    step = parse_step(example.replace("one retriever or None", "Table Retriever"))
    assert isinstance(step, RouteStep if kind == "route" else AnswerStep)


# ------------------------------------------------------------------------------------------ parser

NOTHING = RouteStep("t", "None", "None")
TAGS = {RouteStep: ["<think>", "</think>", "<sub-question>", "</sub-question>", "<ret>", "</ret>"],
        AnswerStep: ["<think>", "</think>", "<answer>", "</answer>"]}
PIECES = [*TAGS[RouteStep], *TAGS[AnswerStep], "None", "Text Retriever", " ", "x", "<ret", "</"]


@pytest.mark.parametrize("text, step", [
    ("<think> t</think><sub-question> q</sub-question><ret> text retriever</ret>",
     RouteStep("t", "q", "Text Retriever")),
    ("<THINK>t</THINK>\n<sub-question>q</sub-question>\n<ret>TABLE RETRIEVER</ret>\n",
     RouteStep("t", "q", "Table Retriever")),
    ("<think>t</think><sub-question>q</sub-question><ret>Text Image Retriever</ret>",
     RouteStep("t", "q", "Text Image Retriever")),
    ("<think></think><sub-question>q</sub-question><ret>Text Retriever</ret>",
     RouteStep("", "q", "Text Retriever")),
    ("<think>t</think><sub-question>none</sub-question><ret>None</ret>", NOTHING),
    # None in one means None in both
    ("<think>t</think><sub-question>q</sub-question><ret>none</ret>", NOTHING),
    ("<think>t</think><sub-question></sub-question><ret>none</ret>", NOTHING),
    ("<think>t</think><sub-question>NONE</sub-question><ret>Text Retriever</ret>", NOTHING),
    ("<think>t</think><answer>none</answer>", AnswerStep("t", "none")),
    ("<think></think>\n<answer> a b\n</answer>", AnswerStep("", "a b")),
    ("<think>2 < 3 <b></think><answer><|im_end|></answer>", AnswerStep("2 < 3 <b>", "<|im_end|>")),
])
def test_accepted_steps(text, step):
    assert parse_step(text) == step


@pytest.mark.parametrize("text, reason", [
    ("", "no tags"),
    ("Paris", "no tags"),
    ("yes <think>t</think><answer>a</answer>", "text outside the tags"),
    ("<think>t</think><answer>a</answer> or b", "text outside the tags"),
    ("<think>t</think> so <answer>a</answer>", "text outside the tags"),
    ("<think>t</think><answer>a</answer><answer>b</answer>", "<answer> more than once"),
    ("<think>t</think><think>u</think><sub-question>q</sub-question><ret>None</ret>",
     "<think> more than once"),
    ("<think>t</think><sub-question>q</sub-question><ret>None</ret><ret>Text Retriever</ret>",
     "<ret> more than once"),
    ("<think><answer>a</answer></think>", "tags out of order"),
    ("<think>t<sub-question>q</sub-question></think><ret>None</ret>", "tags out of order"),
    ("</think>t<think><answer>a</answer>", "tags out of order"),
    ("<answer>a</answer>", "no <think>"),
    ("<think>t</think><answer>a", "no </answer>"),
    ("<think>t</think><sub-question>q</sub-question>", "no <ret>"),
    ("<think>t</think><answer>a</answer><ret>None</ret>", "<answer> in a routing step"),
    ("<think>t</think><answer> </answer>", "empty answer"),
    ("<think>t</think><sub-question></sub-question><ret>Text Retriever</ret>",
     "empty sub-question"),
    ("<think>t</think><sub-question>q</sub-question><ret></ret>", "unknown retriever ''"),
    ("<think>t</think><sub-question>q</sub-question><ret>Text Retriever, Table Retriever</ret>",
     "unknown retriever 'Text Retriever, Table Retriever'"),
    ("<think>t</think><sub-question>None</sub-question><ret>Google</ret>",
     "unknown retriever 'Google'"),
    # of a long one the first 40 letters
    (f"<think>t</think><sub-question>q</sub-question><ret>{'x' * 41}</ret>",
     f"unknown retriever {'x' * 40!r}"),
])
def test_malformed_steps_are_named(text, reason):
    assert parse_step(text) == StepError(reason, text)


@pytest.mark.parametrize("query, retriever, names, bases", [
    ("q", "Text Retriever, Table Retriever", ["Text Retriever", "Table Retriever"],
     ("text", "table")),
    ("q", "table retriever ,\n TEXT RETRIEVER,text image retriever",
     ["Table Retriever", "Text Retriever", "Text Image Retriever"], ("table", "text", "image")),
    ("q", "Text Retriever", ["Text Retriever"], ("text",)),
    ("q", "Text Retriever,Text Retriever", ["Text Retriever"], ("text",)),      # once
    # what stands before a None is searched
    ("q", "Text Retriever, None", ["Text Retriever"], ("text",)),
    ("q", "Text Retriever, none, Table Retriever", ["Text Retriever"], ("text",)),
    # None at the beginning, or as sub-question, means None in both
    ("q", "None, Text Retriever", ["None"], ()),
    ("none", "Text Retriever, Table Retriever", ["None"], ()),
    ("", "none, none", ["None"], ()),
])
def test_lists_of_retrievers(query, retriever, names, bases):
    step = parse_step(render_route("t", query, retriever), several=True)
    assert (step.names, step.bases) == (names, bases)
    assert step == RouteStep("t", query if bases else "None", ", ".join(names))


@pytest.mark.parametrize("query, retriever, reason", [
    ("q", "Text Retriever,", "unknown retriever ''"),
    ("q", ", Text Retriever", "unknown retriever ''"),
    ("q", "Text Retriever Table Retriever", "unknown retriever 'Text Retriever Table Retriever'"),
    ("q", "Text Retriever; Table Retriever", "unknown retriever 'Text Retriever; Table Retriever'"),
    ("q", "Text Retriever, Google", "unknown retriever 'Google'"),
    ("q", "Text Retriever, None, Google", "unknown retriever 'Google'"),        # wherever it stands
    ("q", "None, Google", "unknown retriever 'Google'"),
    ("", "Text Retriever, Table Retriever", "empty sub-question"),
])
def test_malformed_lists_are_named(query, retriever, reason):
    text = render_route("t", query, retriever)
    assert parse_step(text, several=True) == StepError(reason, text)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*PIECES, ",", "Table Retriever"])).map("".join))
def test_the_parser_never_raises_and_accepts_only_the_two_shapes(text):
    """With lists it accepts all that it accepts without, and reads it the same."""
    step, listed = parse_step(text), parse_step(text, several=True)
    assert isinstance(step, StepError) or step == listed
    for one in (step, listed):
        assert isinstance(one, StepError) or re.findall(r"</?[a-z-]+>", text) == TAGS[type(one)]


@settings(max_examples=300, deadline=None)
@given(thought=plain, query=plain, route=st.sampled_from([*ROUTES.values(), "None"]))
def test_what_is_rendered_is_read_back(thought, query, route):
    step = RouteStep(thought, query, route)
    if "none" in (route.lower(), query.lower()):
        step = RouteStep(thought, "None", "None")
    assert parse_step(render_route(thought, query, route)) == step
    assert parse_step(render_answer(thought, query)) == AnswerStep(thought, query)


@settings(max_examples=300, deadline=None)
@given(before=texts, tag=st.sampled_from(list(filter(tags_of, HOSTILE))), after=texts, clean=plain)
def test_a_tag_inside_a_step_makes_it_no_step(before, tag, after, clean):
    """It can neither close a field nor open another: a step with a tag too many is malformed,
    whatever the tag."""
    text = before + tag + after
    outputs = [render_route(text, clean, "Text Retriever"),
               render_route(clean, text, "Text Retriever"), render_route(clean, clean, text),
               render_answer(text, clean), render_answer(clean, text)]
    for output in outputs:
        assert isinstance(parse_step(output), StepError)


@settings(max_examples=500, deadline=None)
@given(text=texts)
def test_nothing_that_is_read_from_an_output_holds_a_tag(text):
    """So what the model wrote cannot forge tags in its later prompts, nor in a step file."""
    step = parse_step(text)
    fields = [] if isinstance(step, StepError) else vars(step).values()
    for field in fields:
        assert not tags_of(field)


@pytest.mark.parametrize("query, name, expected", [
    (" Which City? ", "Text Image Retriever ", ("which city?", "text image retriever")),
    ("None", "none", ("none", "none")),
    ("none", "text retriever", ("none", "none")),
    ("which?", "None", ("none", "none")),
])
def test_gold_routes_by_hand(query, name, expected):
    assert gold_route({"query": query, "retriever": [name]}) == expected


def test_steps_do_not_change():
    for step, name in ((NOTHING, "query"), (AnswerStep("t", "a"), "answer"),
                       (StepError("no tags", ""), "reason")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(step, name, "x")
    assert tuple(ROUTES) == tuple(PREFIX) == BASES
