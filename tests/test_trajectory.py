"""A trajectory as a row of a result file, by hand."""
from dataclasses import FrozenInstanceError

import pytest

from parts.steps import AnswerStep, RouteStep, StepError
from parts.trajectory import COSTS, Candidate, Step, Trajectory, result_row
from retrieve import Hit


def step(kind, parsed, query="q", evidence=()):
    candidate = Candidate("", (1,), (0.0,), parsed)
    return Step(kind, query, [], (1,), (candidate,), 0, dict(evidence))


def trajectory(*steps, **row):
    numbers = dict.fromkeys(COSTS, 1) | {"seconds_model": 0.12345678}
    return Trajectory({"question": "Who?", **row}, "router", steps, steps[-1].answer, **numbers)


HITS = (Hit("0", "one", 0.123456), Hit("1", "two", 0.5))


def test_a_routed_trajectory():
    steps = (step("route", RouteStep("t1", "q1", "Table Retriever")),
             step("answer", AnswerStep("t2", "a1"), evidence={"table": HITS}),
             step("route", StepError("no tags", "junk")),
             step("final", AnswerStep("t3", "a2")))
    row = result_row(trajectory(*steps, kind="k"))
    assert list(row) == ["question", "kind", "method", "plan_1", "plan_2", "llm_answer", "cost"]
    assert row["plan_1"] == {
        "thought": "t1", "query": "q1", "retriever": ["Table Retriever"], "tar": ["one", "two"],
        "tar_scores": [0.1235, 0.5], "answer": {"thought": "t2", "answer": "a1"}}
    assert row["plan_2"] == {"fault": "no tags", "text": "junk", "query": "None",
                             "retriever": ["None"]}
    assert row["llm_answer"] == {"thought": "t3", "answer": "a2"}
    assert list(row["cost"]) == list(COSTS) and row["cost"]["seconds_model"] == 0.123457


def test_a_step_that_asks_two_bases():
    """A published row lists the retrievers, and the passages of each under its label."""
    steps = (step("route", RouteStep("t1", "q1", "Table Retriever, Text Retriever")),
             step("answer", AnswerStep("t2", "a1"), evidence={"text": HITS, "table": HITS[:1]}),
             step("final", AnswerStep("t3", "a2")))
    plan = result_row(trajectory(*steps))["plan_1"]
    assert plan == {
        "thought": "t1", "query": "q1", "retriever": ["Table Retriever", "Text Retriever"],
        "ter": ["one", "two"], "ter_scores": [0.1235, 0.5], "tar": ["one"], "tar_scores": [0.1235],
        "answer": {"thought": "t2", "answer": "a1"}}


def test_methods_that_route_nothing():
    """A plan for each search; the last answer is the answer of the row alone."""
    first = step("answer", StepError("no tags", "junk"), "q1", {"text": HITS, "image": ()})
    last = step("answer", AnswerStep("t", "a"), "q2", {"text": HITS[:1]})
    row = result_row(trajectory(first, last))
    assert row["plan_1"] == {
        "query": "q1", "retriever": ["Text Retriever", "Text Image Retriever"],
        "ter": ["one", "two"], "ter_scores": [0.1235, 0.5], "tir": [], "tir_scores": [],
        "answer": {"fault": "no tags", "text": "junk", "answer": ""}}
    assert row["plan_2"] == {"query": "q2", "retriever": ["Text Retriever"], "ter": ["one"],
                             "ter_scores": [0.1235]}
    assert row["llm_answer"] == {"thought": "t", "answer": "a"}
    alone = result_row(trajectory(step("final", AnswerStep("t", "a"))))
    assert "plan_1" not in alone and alone["llm_answer"] == {"thought": "t", "answer": "a"}


def test_a_step_that_was_not_asked():
    empty = Step("route", "q", [], (1,), (), 0, {})
    assert empty.parsed == StepError("prompt too long", "")
    assert empty.route is None and empty.answer == ""
    route, answer = RouteStep("t", "q", "None"), AnswerStep("t", "a")
    assert (step("route", route).route, step("route", route).answer) == ("None", "")
    assert (step("final", answer).route, step("final", answer).answer) == (None, "a")


def test_what_happened_does_not_change():
    one = step("final", AnswerStep("t", "a"))
    for value, name in ((one.candidates[0], "text"), (one, "kind"), (trajectory(one), "answer")):
        with pytest.raises(FrozenInstanceError):
            setattr(value, name, "other")
