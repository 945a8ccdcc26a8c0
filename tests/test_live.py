"""parts/live.py: the gold hops of a question under way."""
from types import SimpleNamespace

import pytest
import torch

import train
from parts.live import Live, askable, asked_last, nearest_hops, still_open
from parts.steps import parse_step
from parts.trajectory import Candidate, Step


class Words:
    """An encoder whose vectors can be computed by hand: a dimension a word, normalised."""
    words = "capital of Bakdol seat which currency area rut mes bakdol".split()

    def encode_queries(self, texts):
        rows = []
        for text in texts:
            rows.append([float(word in text.split()) for word in self.words])
        rows = torch.tensor(rows)                                                   # (texts, dim)
        return (rows / rows.norm(dim=1, keepdim=True)).numpy()


def hop(query, answer="x", base="text"):
    return {"query": query, "retriever": f"{base} retriever", "answer": answer}


def route_step(query, base="Table"):
    """A step whose followed candidate asks for this."""
    text = f"<think> t</think><sub-question> {query}</sub-question><ret> {base} Retriever</ret>"
    return step("route", text)


def answer_step(answer):
    return step("answer", f"<think> t</think><answer> {answer}</answer>")


def step(kind, text):
    candidate = Candidate(text, (), (), parse_step(text))
    return Step(kind, "", [], (), (candidate,), 0, {})


class Question:
    """Stands for infer.Question, at the same request all the time."""

    def __init__(self, kind):
        self.request = SimpleNamespace(kind=kind, query=None)

    def send(self, reply):
        pass


def live_question(hops, answer="Mes", kind="route", only_ready=False):
    router = SimpleNamespace(open=lambda serial, row: Question(kind), prompts={})
    return Live(router, 1, 0, {"hops": hops, "answer": [answer], "kind": "k"}, only_ready)


def follow(live, one_step, match):
    """As Online does it."""
    run = SimpleNamespace(state={}, generator=None, now=lambda: 0.0)
    router = SimpleNamespace(bases={"text": SimpleNamespace(encoder=Words())})
    source = train.Online(train.GrpoOptions(match=match), run, router, [])
    source.follow([live], [one_step])


def test_a_sub_question_in_other_words_stands_for_the_nearest_open_hop():
    """By hand: 3 words of 3 in common is 1; 2 of 3 and 3 is 2 / 3; 2 of 2 and 3 is 2 / sqrt(6) =
    0.816; none is 0."""
    capital, currency = hop("capital of Bakdol"), hop("currency of Bakdol")
    asked = [("of Bakdol capital", [currency, capital]), ("seat of Bakdol", [capital]),
             ("of Bakdol", [capital]), ("which", [capital]), ("capital of Bakdol", [])]
    assert nearest_hops(asked, 0.9, Words()) == [capital, None, None, None, None]
    assert nearest_hops(asked, 0.8, Words()) == [capital, None, capital, None, None]
    assert nearest_hops(asked, 0.6, Words()) == [capital, capital, capital, None, None]
    assert nearest_hops([], 0.9, Words()) == []


def test_of_hops_that_are_as_near_the_last_counts():
    same = [hop("capital of Bakdol", "Rut"), hop("Bakdol of capital", "Mes"), hop("which")]
    assert nearest_hops([("capital of Bakdol", same)], 0.9, Words()) == [same[1]]


def test_a_hop_is_closed_by_a_right_answer_to_it_in_any_order_and_wording():
    first, second = hop("capital of Bakdol", "Rut"), hop("currency of Bakdol", "Mes")
    live = live_question([first, second])
    follow(live, route_step("of Bakdol currency"), 0.8)
    follow(live, answer_step("Rut"), 0.8)               # the second hop, with a wrong answer
    assert live.hop is second and live.open_hops == [first, second]
    follow(live, route_step("of Bakdol currency"), 0.8)
    follow(live, answer_step("Mes"), 0.8)
    assert live.open_hops == [first]
    follow(live, route_step("which seat"), 0.8)
    follow(live, answer_step("Rut"), 0.8)               # a right answer to nothing that was open
    assert live.hop is None and live.open_hops == [first]
    follow(live, route_step("capital of Bakdol"), 0.8)
    follow(live, answer_step("Rut"), 0.8)
    assert live.open_hops == []
    assert live.outputs[0].endswith("</ret>") and len(live.outputs) == 8


def test_a_fact_may_lie_in_another_base():
    """The text base does not say, the table base does. Who asks the text base is right with
    "unknown", and the table is open then; who asks the table at once is done. Where neither says,
    both are to be asked."""
    usual = hop("capital of Bakdol", "unknown")
    other = hop("capital of Bakdol", "Rut", "table")
    hops = [usual, other]
    assert asked_last(hops, ["Text Retriever"]) == [other, usual]
    assert asked_last(hops, ["Table Retriever"]) == [other]
    two = [hop("capital of Bakdol", "Rut"), hop("capital of Bakdol", "Rut", "table")]
    assert asked_last(two, ["Text Retriever"]) == [two[1], two[0]]
    assert asked_last(hops, ["Text Image Retriever"]) == [other]
    assert still_open(hops, usual) == [other] and still_open(hops, other) == []
    nowhere = [usual, hop("capital of Bakdol", "unknown", "table")]
    assert still_open(nowhere, nowhere[1]) == [usual]
    live = live_question(hops)
    follow(live, route_step("capital of Bakdol", "Text"), 0.9)
    assert live.hop is usual
    follow(live, answer_step("unknown"), 0.9)
    assert live.open_hops == [other]


def test_hops_that_can_be_asked_for_by_hand():
    """The area of Rut can be asked for once Rut is found; Rutland is another name; of a circle the
    first comes first; an empty answer is no name."""
    first, second = hop("capital of Bakdol", "Rut"), hop("area of Rut?", "65")
    third = hop("area of Rutland", "65")
    assert askable([first, second, third]) == [first, third]
    assert askable([second, third]) == [second, third] and askable([]) == []
    circle = [hop("area of Rut", "Mes"), hop("area of Mes", "Rut")]
    assert askable(circle) == circle[:1]
    assert askable([hop("area of Rut", ""), second]) == [hop("area of Rut", ""), second]
    numbers = [hop("1 + 1 (sum)", 2), hop("is 2.5 + 2", "x")]
    assert askable(numbers) == numbers[:1]


@pytest.mark.parametrize("only_ready", [False, True])
def test_an_invented_name_is_paid_unless_only_ready_hops_count(only_ready):
    """The gold of the first step is the capital; the area of the capital counts as well, unless
    hops must be ready. With Words, "area of mes" has 2 words of 3 in common with "area of rut", and
    the right base: (2/3 + 1) / 2."""
    first, second = hop("capital of bakdol", "rut"), hop("area of rut", "65", "table")
    live = live_question([first, second], "65", only_ready=only_ready)

    def reward(name):
        [candidate] = route_step(f"area of {name}").candidates
        [earned] = train.rewards_of(train.GrpoOptions(), Words(), [(candidate.text, live.golds())])
        return earned.total

    expected = (1 / 3 + 0) / 2 if only_ready else (2 / 3 + 1) / 2
    assert reward("mes") == pytest.approx(expected, abs=1e-5)
    follow(live, route_step("area of rut"), 0.9)
    assert live.hop is (None if only_ready else second) and live.label() == "text retriever"
    live.open_hops.remove(first)
    assert live.label() == "table retriever" and reward("rut") == pytest.approx(1)
    live.open_hops.remove(second)
    assert live.label() == "none"
    none = {"query": "none", "retriever": ["none"]}
    assert live.golds() == [{"step_type": "ret", "answer": none}]
    assert live.key() == "k route 0"


def test_what_would_be_right_of_answers():
    """An intermediate one is right by the hop that was asked for; without one none can be judged.
    """
    live = live_question([hop("capital of Bakdol", "Rut")], kind="answer")
    assert live.golds() == [] and live.label() == "answer"
    live.hop = live.open_hops[0]
    assert live.golds() == [{"step_type": "ans", "answer": "Rut"}]
    final = live_question([hop("capital of Bakdol", "Rut")], kind="final")
    assert final.golds() == [{"step_type": "ans", "answer": ["Mes"]}] and final.label() == "answer"
