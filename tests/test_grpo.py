"""Rewards, advantages and the loss, against the published rewards, cases worked by hand, and loops
in float64."""
import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from grpo import (Reward, RewardOptions, answer_reward, group_advantages, grpo_loss, read_route,
                  similarity_table, state_advantages, step_reward, token_weights)

RET = {"step_type": "ret", "answer": {"query": "what city is this?",
                                      "retriever": ["text image retriever"]}}
STOP = {"step_type": "ret", "answer": {"query": "none", "retriever": ["none"]}}
STRICT = RewardOptions(form="strict")
MALFORMED = Reward(0.0, 0.0, similarity=0.0, route=0.0)


def route(query, base, thought="hm"):
    return f"<think> {thought}</think><sub-question> {query}</sub-question><ret> {base}</ret>"


def answering(gold):
    return {"step_type": "ans", "answer": gold}


def alike(query, gold):
    """Stands for the encoder: 1 where equal, else 0.4."""
    return 1.0 if query == gold else 0.4


def rows_of(path):
    return [json.loads(line) for line in path.open(encoding="utf-8")]


# --------------------------------------------------------------------------------- answering steps


def test_answer_reward_equals_every_published_row(golden):
    rows = rows_of(golden / "answer_reward.jsonl")
    assert len(rows) > 100
    for row in rows:
        reward = step_reward(row["output"], answering(row["gold"]), alike)
        assert reward.total == pytest.approx(row["reward"], abs=1e-9), row


@pytest.mark.parametrize("output, published, strict", [
    # what an output earns where the gold answer is "oslo"; (total, form) under either rule
    ("<think> t</think><answer> Oslo</answer>", (1, 1), (1, 1)),
    ("<THINK> t</THINK>\n<Answer>oslo</Answer>\n", (1, 1), (1, 1)),
    ("<think> t</think><answer> Bern</answer>", (0, 1), (0, 1)),
    ("<think> t</think><answer></answer>", (0, 1), (0, 0)),             # strict: an empty answer
    ("so <think> t</think><answer> Oslo</answer>", (1, 1), (0, 0)),     # strict: text outside
    ("<answer> Oslo</answer><think> t</think>", (1, 1), (0, 0)),        # strict: out of order
    ("<think> t</think><answer> Oslo</answer><answer> Bern</answer>", (1, 1), (0, 0)),
    ("<think> t</think><answer> Bern</answer><answer> Oslo</answer>", (0, 1), (0, 0)),
    ("<answer> Oslo</answer>", (0, 0), (0, 0)),
    ("<think> t<answer> Oslo</answer>", (0, 0), (0, 0)),
    ("<think> t</think> Oslo", (0, 0), (0, 0)),
    (route("Oslo", "Text Retriever"), (0, 0), (0, 0)),                  # the other kind of step
    ("", (0, 0), (0, 0)),
])
def test_which_answers_count_under_each_form(output, published, strict):
    for options, (total, form) in ((RewardOptions(), published), (STRICT, strict)):
        reward = step_reward(output, answering("oslo"), alike, options)
        assert reward == Reward(float(total), float(form), answer=float(total))


@pytest.mark.parametrize("answer, gold, published, recall, f1, exact", [
    ("no", "no", 1, 1, 1, 1),
    ("yes no", "no", 1, 1, 2 / 3, 0),                   # precision 1/2, recall 1: dumping
    ("red", "red car", 0, 1 / 2, 2 / 3, 0),             # precision 1, recall 1/2
    ("car red", "red car", 1, 1, 1, 1),                 # the same words in another order
    ("blue bus", "red car", 0, 0, 0, 0),
    # the best of several golds counts
    ("car", ["a red car", "car"], 1, 1, 1, 1),
    # five words are short, six are long and paid by share: 3 of 5, 3 of 6
    ("one two red", "red blue green one two", 0, 3 / 5, 3 / 4, 0),
    ("one two red", "red blue green one two six", 3 / 6, 3 / 6, 2 / 3, 0),
    ("one two red", ["red blue green one two six"], 3 / 6, 3 / 6, 2 / 3, 0),
    ("one two red", ["red blue green one two six", "x"], 0, 3 / 6, 2 / 3, 0),
    # a range is no text, so it is short: 7 is in it, one of two tokens
    ("7 km", [{"range": [6.5, 7.0]}], 1, 1, 2 / 3, 0),
])
def test_rules_of_answers_by_hand(answer, gold, published, recall, f1, exact):
    rules = {"published": published, "recall": recall, "f1": f1, "exact": exact}
    for rule, expected in rules.items():
        assert answer_reward(answer, gold, rule) == pytest.approx(expected), rule
    assert answer_reward(answer, gold) == pytest.approx(published)


def test_dumping_guesses_is_paid_by_recall_but_not_by_f1():
    output = "<think> a</think><answer> yes no</answer>"
    earned = {}
    for rule in ("published", "recall", "f1", "exact"):
        options = RewardOptions(answer=rule)
        earned[rule] = step_reward(output, answering("no"), alike, options).total
    assert earned == {"published": 1.0, "recall": 1.0, "f1": pytest.approx(2 / 3), "exact": 0.0}


def test_long_gold_is_paid_by_share():
    # 7 words; the articles "the" go, 5 tokens stay, 2 of them are in the answer
    gold = "the cat sat on the red mat"
    assert answer_reward("cat sat", gold) == pytest.approx(2 / 5)
    assert answer_reward("cat sat", [gold, gold]) == 0.0


# ----------------------------------------------------------------------------------- routing steps


def test_routing_reward_equals_every_published_row(golden):
    """The rows name the texts that the released function compares: it asks for these and no others,
    with the gold sub-question as it stands, blanks included."""
    rows = rows_of(golden / "route_reward.jsonl")
    assert len(rows) > 100
    for row in rows:
        similarities = {(query, gold): value for query, gold, value in row["similarities"]}
        compared = []

        def similarity(query, gold):
            compared.append((query, gold))
            return similarities[query, gold]

        reward = step_reward(row["output"], {"step_type": "ret", "answer": row["gold"]}, similarity)
        assert reward.total == pytest.approx(row["reward"], abs=1e-9), row
        assert compared == list(similarities), row


@pytest.mark.parametrize("output, step, published, strict", [
    # (similarity, base) under either rule; the total is half of each
    (route("What city is this?", "Text Image Retriever"), RET, (1, 1), (1, 1)),
    (route("Where is it?", "Text Image Retriever"), RET, (0.4, 1), (0.4, 1)),
    # the right words to the wrong base
    (route("What city is this?", "Text Retriever"), RET, (1, 0), (1, 0)),
    # stops too early: "none" is a text like any other for the released code
    (route("None", "None"), RET, (0.4, 0), (0, 0)),
    (route("None", "None"), STOP, (1, 1), (1, 1)),
    # none in one place only
    (route("None", "Text Retriever"), STOP, (1, 0), (1, 1)),
    (route("None", "Text Image Retriever"), RET, (0.4, 1), (0, 0)),
    (route("What city is this?", "None"), RET, (1, 0), (0, 0)),
    (route("What city is this?", "None"), STOP, (0.4, 1), (1, 1)),
    # asks on when enough is known
    (route("What city is this?", "Text Retriever"), STOP, (0.4, 0), (0, 0)),
    # several bases: the similarity alone, even where the gold one is among them
    (route("What city is this?", "Text Image Retriever, Table Retriever"), RET, (1, 0), None),
    (route("What city is this?", "Text Image Retriever,Text Image Retriever"), RET, (1, 0), None),
    (route("What city is this?", "Text Image Retriever, None"), RET, None, None),
    (route("What city is this?", "None, None"), STOP, None, None),
    (route("What city is this?", "Text Image Retriever,"), RET, None, None),
    # an empty sub-question, an unknown base, none at all
    (route("", "Text Image Retriever"), RET, (0.4, 1), None),
    (route("What city is this?", "Google"), RET, None, None),
    (route("What city is this?", ""), RET, None, None),
    ("<sub-question> what city is this?</sub-question><ret> text image retriever</ret>",
     RET, None, None),
    ("<think> t</think><ret> None</ret>", STOP, None, None),
    ("<think> t</think><sub-question> None</sub-question>", STOP, None, None),
    ("<think> t</think><answer> a</answer>", RET, None, None),
    ("", RET, None, None),
])
def test_routing_reward_by_hand(output, step, published, strict):
    for options, parts in ((RewardOptions(), published), (STRICT, strict)):
        reward = step_reward(output, step, alike, options)
        if parts is None:
            assert reward == MALFORMED
        else:
            sim, base = parts
            assert reward == Reward(sim / 2 + base / 2, 1.0, similarity=sim, route=base)


def test_a_negative_similarity_is_kept_by_the_published_rule_alone():
    output = route("Where is it?", "Text Retriever")
    for options, total in ((RewardOptions(), -0.1), (STRICT, 0.0)):
        assert step_reward(output, RET, lambda query, gold: -0.2, options).total == total


@pytest.mark.parametrize("output, published, strict", [
    (route("Where?", "Text Retriever"), ("where?", "text retriever"), ("where?", "text retriever")),
    (route("NONE", "none"), ("none", "none"), ("none", "none")),
    (route("Where?", "None"), ("where?", "none"), ("none", "none")),
    (route("", "Text Retriever"), ("", "text retriever"), None),
    (route("a", " Table Retriever ,TEXT Retriever"), ("a", "table retriever,text retriever"), None),
    (route("Where?", "Google"), None, None),
])
def test_how_routes_are_read_under_each_form(output, published, strict):
    assert read_route(output) == published and read_route(output, "strict") == strict


@pytest.mark.parametrize("output", [
    "Text Image Retriever! " + route("what city is this?", "Text Image Retriever"),
    route("what city is this?", "Text Image Retriever") * 2,
    "<ret> Text Image Retriever</ret><think> a</think><sub-question> what city is this?"
    "</sub-question>",
])
def test_hacks_that_the_published_rule_pays_and_the_strict_one_does_not(output):
    assert step_reward(output, RET, alike).total == 1.0
    assert step_reward(output, RET, alike, STRICT) == MALFORMED


def test_a_strict_step_is_paid_by_its_parts():
    right = route("what city is this?", "Text Image Retriever")
    assert step_reward(right, RET, alike, STRICT) == Reward(1.0, 1.0, similarity=1.0, route=1.0)
    # 0.3 * 0.4 + 0.6 * 1
    options = RewardOptions("strict", similarity_weight=0.3, route_weight=0.6)
    reward = step_reward(route("where?", "Text Image Retriever"), RET, alike, options)
    assert reward == Reward(pytest.approx(0.72), 1.0, similarity=0.4, route=1.0)


@pytest.mark.parametrize("gold", [{"query": "none", "retriever": ["text retriever"]},
                                  {"query": "which?", "retriever": ["none"]}])
def test_none_of_the_gold_sub_question_or_base_is_meant_of_both(gold):
    step = {"step_type": "ret", "answer": gold}
    stops, asks = route("None", "None"), route("which?", "Text Retriever")
    assert step_reward(stops, step, alike, STRICT).total == 1.0
    assert step_reward(asks, step, alike, STRICT).total == 0.0


def test_price_of_a_retrieval_is_taken_off_routing_steps_only():
    options = RewardOptions(price=0.2)
    asks, stops = route("what city is this?", "Text Image Retriever"), route("None", "None")
    paid = step_reward(asks, RET, alike, options)
    assert paid == Reward(pytest.approx(0.8), 1.0, similarity=1.0, route=1.0, price=0.2)
    free = step_reward(stops, STOP, alike, options)
    assert free == Reward(1.0, 1.0, similarity=1.0, route=1.0, price=0.0)
    # 0.5 * 0.4 for the sub-question, less 0.3: no less than nothing
    astray = step_reward(route("where?", "Text Retriever"), RET, alike, RewardOptions(price=0.3))
    assert astray.total == 0.0 and astray.price == 0.3


def test_similarities_come_from_one_call_of_the_encoder():
    calls = []

    def encode(texts):
        calls.append(list(texts))
        return torch.nn.functional.normalize(torch.tensor([[len(t), 1.0] for t in texts]), dim=1)

    outputs = [route("ab", "Text Retriever"), "no tags", route("None", "None"),
               "<think> t</think><answer> a</answer>"]
    similarity = similarity_table(outputs, [RET, RET, RET, answering("a")], encode)
    assert calls == [["ab", "none", "what city is this?"]]
    # by hand: gold has 18 letters; (2, 1) . (18, 1) / (sqrt 5 * sqrt 325) = 37 / sqrt 1625
    expected = 37 / math.sqrt(1625)
    assert similarity("ab", "what city is this?") == pytest.approx(expected, abs=1e-6)
    # under the strict rule this output asks for nothing
    calls.clear()
    similarity_table(["so " + outputs[0]], [RET], encode, "strict")
    similarity_table([], [], encode)
    assert calls == []


@pytest.mark.parametrize("cosine, expected", [(0.12345678, 0.123457), (-0.5, -0.5), (1.0, 1.0)])
def test_similarity_is_a_cosine_that_is_rounded(cosine, expected):
    other = math.sqrt(1 - cosine ** 2)
    rows = {"ab": [1.0, 0.0], "what city is this?": [cosine, other]}

    def encode(texts):
        return torch.tensor([rows[text] for text in texts], dtype=torch.float64)

    similarity = similarity_table([route("ab", "Text Retriever")], [RET], encode)
    assert similarity("ab", "what city is this?") == expected


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="<>/thinkretsubquonaw -", max_size=120))
def test_any_output_gets_a_reward_between_0_and_1(output):
    for step in (RET, STOP, answering(["a", "b"])):
        for options in (RewardOptions(), STRICT):
            assert 0 <= step_reward(output, step, alike, options).total <= 1
    assert read_route(output) is None or len(read_route(output)) == 2


def test_the_published_rule_is_the_default_and_wrong_options_are_named():
    assert RewardOptions() == RewardOptions("published", 0.5, 0.5, "published", 0.0)
    assert Reward(1.0, 1.0) == Reward(1.0, 1.0, None, None, None, 0.0)
    with pytest.raises(ValueError, match="form is 'loose': give published or strict"):
        RewardOptions(form="loose")
    with pytest.raises(ValueError, match="answer is 'bleu': give published, recall, f1 or exact"):
        RewardOptions(answer="bleu")
    for frozen, name in ((Reward(1.0, 1.0), "total"), (RewardOptions(), "form")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, 0.0)


# -------------------------------------------------------------------------------------- advantages


def test_advantages_by_hand():
    # group 7: rewards 1, 0, 0.5 -> mean 0.5, std (n - 1) = 0.5 -> 1, -1, 0
    # group 3: no variance -> 0;  group 9: alone -> 0
    rewards, groups = torch.tensor([1.0, 0.3, 0.0, 0.8, 0.5, 0.3]), torch.tensor([7, 3, 7, 9, 7, 3])
    scaled, plain = group_advantages(rewards, groups), group_advantages(rewards, groups, False)
    assert scaled.tolist() == pytest.approx([1, 0, -1, 0, 0, 0], abs=1e-5)
    assert plain.tolist() == pytest.approx([0.5, 0, -0.5, 0, 0, 0], abs=1e-6)
    # eps 0.5 beside a deviation of 0.5 halves what is left of 1
    halved = group_advantages(rewards, groups, eps=0.5)
    assert halved.tolist() == pytest.approx([0.5, 0, -0.5, 0, 0, 0], abs=1e-6)


def test_advantages_have_the_type_of_the_rewards():
    assert group_advantages(torch.tensor([1.0, 0.0]), torch.zeros(2)).dtype == torch.float32
    doubles = group_advantages(torch.tensor([1.0, 0.0], dtype=torch.float64), torch.zeros(2))
    assert doubles.dtype == torch.float64
    # whole numbers, in a list: mean 1/2, deviation sqrt(1/2)
    whole = group_advantages([1, 0], [4, 4])
    assert whole.dtype == torch.float32
    assert whole.tolist() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)], abs=1e-5)


def test_a_lone_right_sample_of_eight():
    # mean 1/8, variance (n - 1) = (49/64 + 7/64) / 7 = 1/8 -> (7/8) / sqrt(1/8) = 2.4749
    a = group_advantages(torch.tensor([1.0] + [0.0] * 7), torch.zeros(8))
    assert a[0].item() == pytest.approx(7 / 8 / math.sqrt(1 / 8), abs=1e-4)
    assert a.sum().item() == pytest.approx(0, abs=1e-5)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3)), min_size=1, max_size=24))
def test_advantages_equal_a_loop_over_groups(pairs):
    rewards, groups = [r for r, _ in pairs], [g for _, g in pairs]
    got = group_advantages(torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups))
    for i, (reward, group) in enumerate(pairs):
        members = [r for r, g in pairs if g == group]
        expected = 0.0
        if max(members) > min(members):
            mean = math.fsum(members) / len(members)
            squares = math.fsum((r - mean) ** 2 for r in members)
            std = math.sqrt(squares / (len(members) - 1))
            expected = (reward - mean) / (std + 1e-6)
        assert got[i].item() == pytest.approx(expected, abs=1e-4)


def test_credit_by_state_by_hand():
    """Three trajectories of a question: all begin in state a; two go on to b, one to c. In a the
    rewards are 1, 0, 1 (mean 2/3, deviation sqrt(1/3)); in b 1 and 0 (1/2, sqrt(1/2)); c and d saw
    one trajectory each, so nothing is said of them. The second was in e twice, with one reward."""
    states = [["a", "b", "d"], ["a", "b", "e", "e"], ["a", "c"]]
    got = [own.tolist() for own in state_advantages([1.0, 0.0, 1.0], states)]
    a, b = (1 / 3) / math.sqrt(1 / 3), (1 / 2) / math.sqrt(1 / 2)
    assert got[0] == pytest.approx([a, b, 0], abs=1e-5)
    assert got[1] == pytest.approx([-2 * a, -b, 0, 0], abs=1e-5)
    assert got[2] == pytest.approx([a, 0], abs=1e-5)
    # without division by the deviation
    got = [own.tolist() for own in state_advantages([1.0, 0.0, 1.0], states, scale=False)]
    assert got[1] == pytest.approx([-2 / 3, -1 / 2, 0, 0], abs=1e-6)
    # trajectories that all ended alike, and one that asked nothing
    assert [own.tolist() for own in state_advantages([0.5, 0.5], [["a"], []])] == [[0], []]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0, 0.25, 1]),
                          st.lists(st.sampled_from("abcd"), max_size=5)), min_size=1, max_size=8))
def test_credit_by_state_equals_a_float64_loop(trajectories):
    rewards, states = [r for r, _ in trajectories], [own for _, own in trajectories]
    for reward, own, advantages in zip(rewards, states, state_advantages(rewards, states)):
        assert advantages.shape == (len(own),)
        for state, advantage in zip(own, advantages.tolist()):
            group = [r for r, other in trajectories for one in other if one == state]
            mean = sum(group) / len(group)
            expected = 0.0
            if len(set(group)) > 1:
                deviation = math.sqrt(sum((r - mean) ** 2 for r in group) / (len(group) - 1))
                expected = (reward - mean) / (deviation + 1e-6)
            assert advantage == pytest.approx(expected, abs=1e-5)


# -------------------------------------------------------------------------------------------- loss


def test_loss_by_hand():
    # two outputs of two and one tokens; ratios: 1.5 and 0.5 with A = 2, 1.1 with A = -1; clip 0.2
    #   token 1: min(1.5 * 2, 1.2 * 2) = 2.4   token 2: min(0.5 * 2, 0.8 * 2) = 1.0
    #   token 3: min(-1.1, -1.1) = -1.1
    #   token level: -(2.4 + 1.0 - 1.1) / 3;   sequence level: -((2.4 + 1.0) / 2 + -1.1) / 2
    logp = torch.tensor([[1.5, 0.5], [1.1, 777.0]]).log()
    old, A = torch.zeros(2, 2), torch.tensor([2.0, -1.0])
    mask = torch.tensor([[True, True], [True, False]])
    loss, metrics = grpo_loss(logp, old, A, mask)
    assert loss.item() == pytest.approx(-2.3 / 3, abs=1e-6)
    expected = {"clip_fraction": 2 / 3, "ratio_min": 0.5, "ratio_max": 1.5}
    assert metrics == pytest.approx(expected)
    sequence, _ = grpo_loss(logp, old, A, mask, level="sequence")
    assert sequence.item() == pytest.approx(-(1.7 - 1.1) / 2, abs=1e-6)
    # clip_high 0.4: token 1 becomes 1.4 * 2 = 2.8, token 2 stays
    high, _ = grpo_loss(logp, old, A, mask, clip_high=0.4)
    assert high.item() == pytest.approx(-(2.8 + 1.0 - 1.1) / 3, abs=1e-6)
    # clip 0.6: nothing is clipped, token 1 is 1.5 * 2
    wide, metrics = grpo_loss(logp, old, A, mask, clip=0.6)
    assert wide.item() == pytest.approx(-(3.0 + 1.0 - 1.1) / 3, abs=1e-6)
    assert metrics["clip_fraction"] == 0.0


def test_token_weights_by_hand():
    mask = torch.tensor([[True, True, True, False], [True, False, False, False], [False] * 4])
    assert token_weights(mask).tolist() == [0.25] * 4
    third = 1 / 3 / 2                       # two outputs have tokens, the first has three
    assert token_weights(mask, "sequence").tolist() == pytest.approx([third] * 3 + [0.5])
    # a part of a batch of four outputs
    expected = [1 / 12] * 3 + [0.25]
    assert token_weights(mask, "sequence", 4).tolist() == pytest.approx(expected)


def test_kl_term_by_hand():
    # ref - logp = log 2 for both tokens: k3 = 2 - log 2 - 1; A = 0: the loss is the KL term alone
    logp, ref = torch.zeros(1, 2), torch.full((1, 2), math.log(2))
    mask = torch.ones(1, 2)
    loss, metrics = grpo_loss(logp, logp, torch.zeros(1), mask, ref_logp=ref, kl_coef=0.1)
    k3 = 2 - math.log(2) - 1
    assert loss.item() == pytest.approx(0.1 * k3, abs=1e-6)
    assert metrics["kl"] == pytest.approx(k3, abs=1e-6)
    # without a coefficient it is measured and does not enter the loss
    loss, metrics = grpo_loss(logp, logp, torch.zeros(1), mask, ref_logp=ref)
    assert loss.item() == 0 and metrics["kl"] == pytest.approx(k3, abs=1e-6)
    _, metrics = grpo_loss(logp, logp, torch.zeros(1), mask)
    assert "kl" not in metrics


def reference(logp, old, A, mask, ref, clip, high, kl, level):
    """The loss in float64, token by token, as the equations read."""
    per_output = []
    for i in range(len(logp)):
        terms = []
        for t in range(logp.shape[1]):
            if mask[i, t]:
                ratio = (logp[i, t] - old[i, t]).exp()
                clipped = torch.clamp(ratio, 1 - clip, 1 + high)
                policy = -torch.minimum(ratio * A[i], clipped * A[i])
                d = ref[i, t] - logp[i, t]
                terms.append(policy + kl * (d.exp() - d - 1))
        per_output.append(terms)
    if level == "token":
        return sum(sum(terms) for terms in per_output) / sum(len(terms) for terms in per_output)
    means = [sum(terms) / len(terms) for terms in per_output if terms]
    return sum(means) / len(means)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kl, high", [(0.0, 0.2), (0.05, 0.2), (0.05, 0.3)])
def test_value_and_gradient_equal_a_float64_reference(level, kl, high):
    g = torch.Generator().manual_seed(3)
    logp = (torch.randn(6, 9, generator=g, dtype=torch.float64) * 0.3).requires_grad_()
    old = logp.detach() + torch.randn(6, 9, generator=g) * 0.2
    ref = logp.detach() + torch.randn(6, 9, generator=g) * 0.2
    A, mask = torch.randn(6, generator=g, dtype=torch.float64), torch.rand(6, 9, generator=g) < 0.6
    mask[4] = False                                                 # an output without tokens
    expected = reference(logp, old, A, mask, ref, 0.2, high, kl, level)
    wanted, = torch.autograd.grad(expected, logp)
    options = {"ref_logp": ref, "clip": 0.2, "clip_high": high, "kl_coef": kl, "level": level}
    loss, _ = grpo_loss(logp, old, A, mask, **options)
    got, = torch.autograd.grad(loss, logp)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    assert torch.allclose(got, wanted, atol=1e-9) and wanted.abs().max() > 1e-3


def test_gradient_by_finite_differences():
    logp = torch.tensor([[-0.3, -1.2, -0.7]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-0.35, -1.1, -0.71]], dtype=torch.float64)
    A, mask = torch.tensor([1.3], dtype=torch.float64), torch.ones(1, 3)

    def loss_of(logp):
        loss, _ = grpo_loss(logp, old, A, mask, ref_logp=old - 0.1, kl_coef=0.2)
        return loss

    assert torch.autograd.gradcheck(loss_of, logp)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_parts_of_a_batch_add_up_to_the_whole(level):
    g = torch.Generator().manual_seed(0)
    logp, old = torch.randn(4, 5, generator=g) * 0.1, torch.randn(4, 5, generator=g) * 0.1
    A, mask = torch.randn(4, generator=g), torch.rand(4, 5, generator=g) < 0.7
    whole, _ = grpo_loss(logp, old, A, mask, level=level)
    total = int(mask.sum()) if level == "token" else int(mask.any(1).sum())
    parts = 0.0
    for part in (slice(0, 2), slice(2, 4)):
        loss, _ = grpo_loss(logp[part], old[part], A[part], mask[part], level=level,
                            normalizer=total)
        parts += loss.item()
    assert parts == pytest.approx(whole.item(), abs=1e-6)


def test_garbage_outside_the_mask_reaches_neither_value_nor_gradient():
    logp = torch.tensor([[-0.5, math.inf], [-0.2, math.nan]], requires_grad=True)
    mask = torch.tensor([[True, False], [True, False]])
    loss, _ = grpo_loss(logp, torch.zeros(2, 2), torch.tensor([1.0, -1.0]), mask)
    loss.backward()
    assert math.isfinite(loss.item())
    assert logp.grad[:, 1].eq(0).all() and logp.grad[:, 0].ne(0).all()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_batch_without_tokens_has_loss_0_and_moves_nothing(level):
    logp = torch.zeros(2, 3, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    loss, metrics = grpo_loss(logp, torch.zeros(2, 3), torch.ones(2), mask, level=level,
                              ref_logp=torch.ones(2, 3), kl_coef=0.1)
    loss.backward()
    assert loss.item() == 0 and logp.grad.eq(0).all()
    assert metrics == {"clip_fraction": 0.0, "ratio_min": 1.0, "ratio_max": 1.0, "kl": 0.0}


def test_bad_arguments_are_named():
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="kl_coef is 0.1"):
        grpo_loss(x, x, torch.zeros(1), x + 1, kl_coef=0.1)
    with pytest.raises(ValueError, match="level is 'word'"):
        grpo_loss(x, x, torch.zeros(1), x + 1, level="word")
