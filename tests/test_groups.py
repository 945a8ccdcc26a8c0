"""parts/groups.py: how outputs are judged, which prompts get a group, what a log says of them."""
import random
from types import SimpleNamespace

import pytest
import torch

import train
from grpo import Reward, group_advantages
from parts.groups import (Group, Interest, balanced, groups_of, mean_of, nearness, outcome_reward,
                          quotas, reward_metrics)
from parts.steps import parse_step
from parts.trajectory import Candidate


def group(label="", candidates=(), parts=()):
    return Group([], (), tuple(candidates), [part.total for part in parts], list(parts), label, [])


class Prompt:
    """One of a label and a key; two of the same are equal."""

    def __init__(self, label):
        self.name = label

    def label(self):
        return self.name

    def __eq__(self, other):
        return self.name == other.name


# ------------------------------------------------------------------------------------------ judging

def test_an_output_is_judged_by_the_nearest_gold_and_then_the_larger_total():
    a, b = Reward(0.9, 1.0, 0.3, 1.0), Reward(0.3, 1.0, 0.6, 0.0)
    c, same = Reward(0.8, 1.0, 0.6, 1.0), Reward(0.8, 1.0, 0.6, 1.0)
    assert max([a, b], key=nearness) is b               # nearer, though it pays less
    assert max([b, c, same], key=nearness) is c         # as near: what pays more, the first of it
    assert nearness(Reward(0.4, 1.0, answer=0.4)) == (0.0, 0.4)


def test_groups_are_made_of_all_outputs_by_one_call():
    """The second prompt was too long: it has no outputs and no group."""
    calls = []

    def prompt(number):
        golds = [{"step_type": "ans", "answer": f"gold {number}"}]
        return SimpleNamespace(golds=lambda: golds, conversation=lambda: [f"chat {number}"],
                               label=lambda: "answer")

    def rewards_of(outputs):
        calls.append([(text, golds[0]["answer"]) for text, golds in outputs])
        return [Reward(float(place), 1.0) for place in range(len(outputs))]

    def outputs(*texts):
        return tuple(Candidate(text, (1, 2), (), None) for text in texts)

    a, c = outputs("a1", "a2"), outputs("c1", "c2")
    first, none, third = groups_of([prompt(1), prompt(2), prompt(3)],
                                   [((7,), a), ((8,), ()), ((9, 9), c)], rewards_of)
    assert calls == [[("a1", "gold 1"), ("a2", "gold 1"), ("c1", "gold 3"), ("c2", "gold 3")]]
    assert none is None
    assert (first.rewards, third.rewards) == ([0.0, 1.0], [2.0, 3.0])
    assert third.conversation == ["chat 3"] and third.prompt_ids == (9, 9)
    assert third.candidates == c and third.label == "answer" and third.golds == ["gold 3"]
    assert third.size() == 6 and third.output_tokens() == 4


def test_a_group_is_solved_where_all_is_right_not_where_all_is_equally_wrong():
    right, near = Reward(1.0, 1.0, 1.0, 1.0), Reward(0.95, 1.0, 0.9, 1.0)
    assert group(parts=[right, right]).solved
    assert not group(parts=[near, near]).solved and not group(parts=[right, near]).solved
    assert group(parts=[Reward(1.0, 1.0, answer=1.0)]).solved
    assert not group(parts=[Reward(0.0, 0.0, answer=0.0)]).solved
    assert not group(parts=[near, near]).mixed and group(parts=[right, near]).mixed


def test_a_group_is_finite_where_all_its_probabilities_are_numbers():
    good, bad = Candidate("", (1,), (-0.5,), None), Candidate("", (1,), (float("nan"),), None)
    assert group(candidates=[good, good]).finite and not group(candidates=[good, bad]).finite


def test_a_row_of_samples_says_prompt_picture_and_what_each_output_earned():
    picture = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Who?"}]
    candidate = Candidate("said", (1,), (-0.5,), None)
    one = Group([{"role": "user", "content": picture}], (1,), (candidate,), [0.5],
                [Reward(0.5, 1.0, route=0.5)], "none", ["x"], torch.tensor([0.123456]))
    parts = {"total": 0.5, "form": 1.0, "route": 0.5, "price": 0.0}
    assert one.as_row() == {
        "label": "none", "prompt": "Who?", "image": "a.png", "gold": ["x"],
        "outputs": [{"text": "said", "reward": 0.5, "advantage": 0.1235, "parts": parts}]}
    assert one.has_picture()
    plain = Group([{"role": "user", "content": "Who?"}], (1,), (candidate,), [0.5], [], "outcome",
                  ["x"], torch.tensor([0.5]))
    assert plain.as_row()["outputs"][0]["parts"] == {} and plain.as_row()["image"] is None
    assert plain.as_row()["prompt"] == "Who?" and not plain.has_picture()


@pytest.mark.parametrize("answer, malformed, reward", [
    ("Rut", 0, 1.0), ("Rut", 1, 0.0), ("the town", 0, 0.0), ("New Rut", 0, 1.0)])
def test_an_outcome_is_the_recall_of_a_trajectory_without_faults(answer, malformed, reward):
    row = {"answer": ["Rut"]}
    done = SimpleNamespace(row=row, answer=answer, malformed=malformed)
    assert outcome_reward(done) == reward


# -------------------------------------------------------------------------- which prompts are drawn

def draw(prompts, **options):
    o = train.GrpoOptions(prompts=32, **options)
    return balanced(o, prompts, Prompt.label, Interest(0.8, {}), random.Random(1))


def test_balanced_draw_is_even_over_gold_routes():
    """4 % of the prompts are of one route: drawn as they come it gets about one of 32, balanced it
    gets its sixth."""
    labels = ["text image retriever"] * 8 + ["text retriever"] * 60 + ["table retriever"] * 32
    labels += ["none"] * 40 + ["answer"] * 60
    prompts = [Prompt(label) for label in labels]

    def count(chosen):
        assert len({id(prompt) for prompt in chosen}) == 32             # nothing is drawn twice
        return {name: sum(prompt.name == name for prompt in chosen) for name in set(labels)}

    assert count(draw(prompts)) == {"answer": 8, "none": 6, "table retriever": 6,
                                    "text image retriever": 6, "text retriever": 6}
    assert count(draw(prompts, balance=False))["text image retriever"] < 6


def test_what_one_label_cannot_fill_the_others_do():
    prompts = [Prompt("none")] * 1 + [Prompt("answer") for _ in range(50)]
    chosen = draw(prompts)
    assert len(chosen) == 32 and sum(prompt.name == "none" for prompt in chosen) == 1
    assert len(draw([Prompt("answer") for _ in range(5)])) == 5


def test_quotas_by_hand():
    """10 prompts, a quarter of them answers: round(2.5) = 2, and 8 for three routes: 3, 3, 2."""
    o = train.GrpoOptions(prompts=10)
    counts = quotas(o, ["a", "answer", "b", "c"], random.Random(0))
    assert counts.pop("answer") == 2 and sorted(counts.values()) == [2, 3, 3]
    assert quotas(o, ["a"], random.Random(0)) == {"answer": 0, "a": 10}


def test_solved_prompts_are_drawn_less_often_but_not_never():
    interest = Interest(0.8, {})
    for _ in range(100):
        interest.learn("solved", True)
    rng, items = random.Random(0), ["solved"] * 50 + ["open"] * 50
    chosen = []
    for _ in range(400):
        chosen += interest.choose(items, 5, str, rng)
    share = chosen.count("solved") / len(chosen)
    assert 0.1 < share < 0.25                       # weights 0.2 against 1: 0.2 / 1.2 = 0.167
    for _ in range(100):
        interest.learn("solved", False)             # forgotten again
    assert interest.weight("solved") == pytest.approx(1, abs=1e-4)


def test_interest_is_a_moving_average():
    """By hand: 1, then 0.9, 0.81, then 0.81 * 0.9 + 0.1 = 0.829; weight 1 - 0.5 * 0.171."""
    unsolved = {}
    interest = Interest(0.5, unsolved)
    for solved in (True, True, False):
        interest.learn("key", solved)
    assert unsolved["key"] == pytest.approx(0.829)
    assert interest.weight("key") == pytest.approx(1 - 0.5 * 0.171) and interest.weight("new") == 1


# ---------------------------------------------------------------------------------- what a log says

def test_what_a_log_says_of_routes_by_hand():
    """Two prompts want the text base, one the table: text is asked for 3 times of 6, rightly 3 of
    4. What cannot be read asks for nothing."""
    def routed(gold, routes):
        text = "<think> t</think><sub-question> q</sub-question><ret> {}</ret>"
        candidates, parts = [], []
        for route in routes:
            candidates.append(Candidate("", (), (), parse_step(text.format(route))))
            right = float(route.lower() == gold)
            parts.append(Reward(right, 1.0, route=right))
        made = group(gold, candidates, parts)
        made.advantages = group_advantages(torch.tensor(made.rewards), torch.zeros(2))
        return made

    TEXT, TABLE = "Text Retriever", "Table Retriever"
    groups = [routed("text retriever", [TEXT, TEXT]), routed("text retriever", [TEXT, TABLE]),
              routed("table retriever", [TABLE, TABLE])]
    m = reward_metrics(groups)
    assert (m["route:text"], m["asked:text"]) == (3 / 4, 1 / 2)
    assert (m["prompts:text"], m["mixed:text"]) == (2 / 3, 1 / 2)
    assert (m["route:table"], m["asked:table"]) == (1, 1 / 2)
    assert (m["prompts:table"], m["mixed:table"]) == (1 / 3, 0)
    assert m["reward"] == pytest.approx(5 / 6) and m["flat_groups"] == pytest.approx(2 / 3)
    assert m["form"] == 1 and m["similarity"] is None and m["answer"] is None
    broken = routed("none", ["None", "Radio"])
    assert reward_metrics([broken])["asked:none"] == 1                  # of those that can be read


def test_answers_are_no_routes():
    answers = group("answer", [Candidate("", (), (), None)], [Reward(1.0, 1.0, answer=1.0)])
    answers.advantages = torch.zeros(1)
    assert reward_metrics([answers]) == {"reward": 1, "form": 1, "similarity": None, "route": None,
                                         "answer": 1, "flat_groups": 1}


def test_means_of_rows():
    assert mean_of([{"a": 1, "b": 2.0}, {"a": 2, "b": 4.0}]) == {"a": 1.5, "b": 3.0}
    assert mean_of([]) == {}
