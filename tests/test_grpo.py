"""Rewards, advantages and the loss against the published reward file, cases worked by hand and a float64 reference."""
import json
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from grpo import (Reward, RewardOptions, answer_reward, group_advantages, grpo_loss, read_route,
                  similarity_table, step_reward)

RET = {"step_type": "ret", "answer": {"query": "what city is this?", "retriever": ["text image retriever"]}}
STOP = {"step_type": "ret", "answer": {"query": "none", "retriever": ["none"]}}
STRICT = RewardOptions(form="strict")


def route(query, base, thought="hm"):
    return f"<think> {thought}</think><sub-question> {query}</sub-question><ret> {base}</ret>"


def alike(query, gold):
    """Stands for the encoder: 1 where equal, else 0.4."""
    return 1.0 if query == gold else 0.4


# -------------------------------------------------------------------------------------------------------------- rewards


def test_answer_reward_equals_every_published_row(golden):
    rows = [json.loads(line) for line in open(golden / "answer_reward.jsonl")]
    assert len(rows) > 100
    got = lambda r: step_reward(r["output"], {"step_type": "ans", "answer": r["gold"]}, alike).total
    wrong = [r for r in rows if got(r) != pytest.approx(r["reward"], abs=1e-9)]
    assert not wrong, wrong[:3]


@pytest.mark.parametrize("output, step, total, sim, base", [
    (route("What city is this?", "Text Image Retriever"), RET, 1.0, 1.0, 1.0),  # 0.5 * 1 + 0.5 * 1, whatever the case
    (route("Where is it?", "Text Image Retriever"), RET, 0.7, 0.4, 1.0),        # 0.5 * 0.4 + 0.5
    (route("What city is this?", "Text Retriever"), RET, 0.5, 1.0, 0.0),        # the right words to the wrong base
    (route("None", "None"), RET, 0.0, 0.0, 0.0),                                # stops too early
    (route("None", "None"), STOP, 1.0, 1.0, 1.0),
    (route("None", "Text Retriever"), STOP, 1.0, 1.0, 1.0),                     # None in one place means None in both
    (route("Where is it?", "None"), RET, 0.0, 0.0, 0.0),
    (route("What city is this?", "Text Retriever"), STOP, 0.0, 0.0, 0.0),       # asks on when enough is known
    # no thought: malformed
    ("<sub-question> what city is this?</sub-question><ret> text image retriever</ret>", RET, 0.0, 0.0, 0.0),
    ("", RET, 0.0, 0.0, 0.0),
])
def test_routing_reward_by_hand(output, step, total, sim, base):
    r = step_reward(output, step, alike)
    assert (r.total, r.similarity, r.route) == (pytest.approx(total), pytest.approx(sim), base)


@pytest.mark.parametrize("output", [
    "Text Image Retriever! " + route("what city is this?", "Text Image Retriever"),     # text outside the tags
    route("what city is this?", "Text Image Retriever") * 2,                            # everything twice
    "<ret> Text Image Retriever</ret><think> a</think><sub-question> what city is this?</sub-question>",
])
def test_hacks_that_the_published_rule_pays_and_the_strict_one_does_not(output):
    assert step_reward(output, RET, alike).total == 1.0
    assert step_reward(output, RET, alike, STRICT) == Reward(0.0, 0.0, similarity=0.0, route=0.0)


def test_dumping_guesses_is_paid_by_recall_but_not_by_f1():
    output, step = "<think> a</think><answer> yes no</answer>", {"step_type": "ans", "answer": "no"}
    total = {rule: step_reward(output, step, alike, RewardOptions(answer=rule)).total
             for rule in ("published", "recall", "f1", "exact")}
    # precision 1/2, recall 1
    assert total == {"published": 1.0, "recall": 1.0, "f1": pytest.approx(2 / 3), "exact": 0.0}


def test_long_gold_is_paid_by_share():
    # 7 words; the articles "the" go, 5 tokens stay, 2 of them are found
    gold = "the cat sat on the red mat"
    assert answer_reward("cat sat", gold) == pytest.approx(2 / 5)
    assert answer_reward("cat sat", [gold, gold]) == 0.0


@pytest.mark.parametrize("gold", [{"query": "none", "retriever": ["text retriever"]},
                                  {"query": "which?", "retriever": ["none"]}])
def test_none_of_the_gold_sub_question_or_base_is_meant_of_both(gold):
    stop = "<think> t</think><sub-question> None</sub-question><ret> None</ret>"
    ask = "<think> t</think><sub-question> which?</sub-question><ret> Text Retriever</ret>"
    paid = lambda output: step_reward(output, {"step_type": "ret", "answer": gold}, lambda query, gold: 1.0).total
    assert (paid(stop), paid(ask)) == (1.0, 0.0)


def test_price_of_a_retrieval_is_taken_off_routing_steps_only():
    options = RewardOptions(price=0.2)
    asks, stops = route("what city is this?", "Text Image Retriever"), route("None", "None")
    assert step_reward(asks, RET, alike, options).total == pytest.approx(0.8)
    assert step_reward(stops, STOP, alike, options).total == 1.0


def test_similarities_come_from_one_call_of_the_encoder():
    calls = []

    def encode(texts):
        calls.append(list(texts))
        return torch.nn.functional.normalize(torch.tensor([[len(t), 1.0] for t in texts]), dim=1)
    outputs = [route("ab", "Text Retriever"), route("abcd", "Table Retriever"), "no tags", route("None", "None")]
    similarity = similarity_table(outputs, [RET] * 4, encode)
    assert len(calls) == 1
    # by hand: gold has 18 letters; (2, 1) . (18, 1) / (sqrt 5 * sqrt 325) = 37 / sqrt 1625
    assert similarity("ab", "what city is this?") == pytest.approx(37 / math.sqrt(1625), abs=1e-6)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="<>/thinkretsubquonaw -", max_size=120))
def test_any_output_gets_a_reward_between_0_and_1(output):
    for step in (RET, STOP, {"step_type": "ans", "answer": ["a", "b"]}):
        for options in (RewardOptions(), STRICT):
            assert 0 <= step_reward(output, step, alike, options).total <= 1
    assert read_route(output) is None or len(read_route(output)) == 2


# ----------------------------------------------------------------------------------------------------------- advantages


def test_advantages_by_hand():
    # group 7: rewards 1, 0, 0.5 -> mean 0.5, std (n - 1) = 0.5 -> 1, -1, 0
    # group 3: no variance -> 0;  group 9: alone -> 0
    rewards, groups = torch.tensor([1.0, 0.3, 0.0, 0.8, 0.5, 0.3]), torch.tensor([7, 3, 7, 9, 7, 3])
    assert group_advantages(rewards, groups).tolist() == pytest.approx([1, 0, -1, 0, 0, 0], abs=1e-5)
    assert group_advantages(rewards, groups, scale=False).tolist() == pytest.approx([0.5, 0, -0.5, 0, 0, 0], abs=1e-6)


def test_a_lone_right_sample_of_eight():
    # mean 1/8, variance (n - 1) = (49/64 + 7/64) / 7 = 1/8 -> (7/8) / sqrt(1/8) = 2.4749
    a = group_advantages(torch.tensor([1.0] + [0.0] * 7), torch.zeros(8))
    assert a[0].item() == pytest.approx(7 / 8 / math.sqrt(1 / 8), abs=1e-4)
    assert a.sum().item() == pytest.approx(0, abs=1e-5)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3)), min_size=1, max_size=24))
def test_advantages_equal_a_loop_over_groups(pairs):
    rewards, groups = [p[0] for p in pairs], [p[1] for p in pairs]
    got = group_advantages(torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups))
    for i, (r, g) in enumerate(pairs):
        members = [x for x, y in pairs if y == g]
        mean = math.fsum(members) / len(members)
        std = math.sqrt(math.fsum((x - mean) ** 2 for x in members) / (len(members) - 1)) if len(members) > 1 else 0.0
        expected = (r - mean) / (std + 1e-6) if len(members) > 1 and max(members) > min(members) else 0.0
        assert got[i].item() == pytest.approx(expected, abs=1e-4)


# ----------------------------------------------------------------------------------------------------------------- loss


def test_loss_by_hand():
    # two outputs of two and one tokens; ratios: 1.5 and 0.5 with A = 2, 1.1 with A = -1; clip 0.2
    #   token 1: min(1.5 * 2, 1.2 * 2) = 2.4   token 2: min(0.5 * 2, 0.8 * 2) = 1.0   token 3: min(-1.1, -1.1) = -1.1
    #   token level: -(2.4 + 1.0 - 1.1) / 3;   sequence level: -((2.4 + 1.0) / 2 + -1.1) / 2
    logp = torch.tensor([[1.5, 0.5], [1.1, 777.0]]).log()
    old, A, mask = torch.zeros(2, 2), torch.tensor([2.0, -1.0]), torch.tensor([[True, True], [True, False]])
    loss, metrics = grpo_loss(logp, old, A, mask)
    assert loss.item() == pytest.approx(-2.3 / 3, abs=1e-6)
    assert metrics["clip_fraction"] == pytest.approx(2 / 3)
    assert metrics["ratio_max"] == pytest.approx(1.5) and metrics["ratio_min"] == pytest.approx(0.5)
    assert grpo_loss(logp, old, A, mask, level="sequence")[0].item() == pytest.approx(-(1.7 - 1.1) / 2, abs=1e-6)
    # clip_high 0.4: token 1 becomes 1.4 * 2 = 2.8
    assert grpo_loss(logp, old, A, mask, clip_high=0.4)[0].item() == pytest.approx(-(2.8 + 1.0 - 1.1) / 3, abs=1e-6)


def test_kl_term_by_hand():
    # ref - logp = log 2 for both tokens: k3 = 2 - log 2 - 1; A = 0, so the loss is the KL term alone
    logp, ref = torch.zeros(1, 2), torch.full((1, 2), math.log(2))
    loss, metrics = grpo_loss(logp, logp, torch.zeros(1), torch.ones(1, 2), ref_logp=ref, kl_coef=0.1)
    k3 = 2 - math.log(2) - 1
    assert loss.item() == pytest.approx(0.1 * k3, abs=1e-6) and metrics["kl"] == pytest.approx(k3, abs=1e-6)


def reference(logp, old, A, mask, ref, clip, high, kl, level):
    """The loss in float64, token by token, as the equations read."""
    per_output = []
    for i in range(len(logp)):
        terms = []
        for t in range(logp.shape[1]):
            if mask[i, t]:
                ratio = (logp[i, t] - old[i, t]).exp()
                l = -torch.minimum(ratio * A[i], torch.clamp(ratio, 1 - clip, 1 + high) * A[i])
                terms.append(l + kl * ((ref[i, t] - logp[i, t]).exp() - (ref[i, t] - logp[i, t]) - 1))
        per_output.append(terms)
    if level == "token":
        return sum(sum(x) for x in per_output) / sum(len(x) for x in per_output)
    return sum(sum(x) / len(x) for x in per_output if x) / sum(bool(x) for x in per_output)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kl, high", [(0.0, 0.2), (0.05, 0.2), (0.05, 0.3)])
def test_value_and_gradient_equal_a_float64_reference(level, kl, high):
    g = torch.Generator().manual_seed(3)
    logp = (torch.randn(6, 9, generator=g, dtype=torch.float64) * 0.3).requires_grad_()
    old = logp.detach() + torch.randn(6, 9, generator=g) * 0.2
    ref = logp.detach() + torch.randn(6, 9, generator=g) * 0.2
    A, mask = torch.randn(6, generator=g, dtype=torch.float64), torch.rand(6, 9, generator=g) < 0.6
    expected = reference(logp, old, A, mask, ref, 0.2, high, kl, level)
    wanted, = torch.autograd.grad(expected, logp)
    loss, _ = grpo_loss(logp, old, A, mask, ref_logp=ref, clip=0.2, clip_high=high, kl_coef=kl, level=level)
    got, = torch.autograd.grad(loss, logp)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    assert torch.allclose(got, wanted, atol=1e-9) and wanted.abs().max() > 1e-3


def test_gradient_by_finite_differences():
    logp = torch.tensor([[-0.3, -1.2, -0.7]], dtype=torch.float64, requires_grad=True)
    old, mask = torch.tensor([[-0.35, -1.1, -0.71]], dtype=torch.float64), torch.ones(1, 3)
    f = lambda x: grpo_loss(x, old, torch.tensor([1.3], dtype=torch.float64), mask, ref_logp=old - 0.1, kl_coef=0.2)[0]
    assert torch.autograd.gradcheck(f, logp)


def test_parts_of_a_batch_add_up_to_the_whole():
    g = torch.Generator().manual_seed(0)
    logp, old = torch.randn(4, 5, generator=g) * 0.1, torch.randn(4, 5, generator=g) * 0.1
    A, mask = torch.randn(4, generator=g), torch.rand(4, 5, generator=g) < 0.7
    whole = grpo_loss(logp, old, A, mask)[0]
    parts = [grpo_loss(logp[i:i + 2], old[i:i + 2], A[i:i + 2], mask[i:i + 2], normalizer=int(mask.sum()))[0]
             for i in (0, 2)]
    assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-6)


def test_garbage_outside_the_mask_reaches_neither_value_nor_gradient():
    logp = torch.tensor([[-0.5, math.inf], [-0.2, math.nan]], requires_grad=True)
    mask = torch.tensor([[True, False], [True, False]])
    loss, _ = grpo_loss(logp, torch.zeros(2, 2), torch.tensor([1.0, -1.0]), mask)
    loss.backward()
    assert math.isfinite(loss.item()) and logp.grad[:, 1].eq(0).all() and logp.grad[:, 0].ne(0).all()


def test_bad_arguments_are_named():
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="kl_coef is 0.1"):
        grpo_loss(x, x, torch.zeros(1), x + 1, kl_coef=0.1)
    with pytest.raises(ValueError, match="level is 'word'"):
        grpo_loss(x, x, torch.zeros(1), x + 1, level="word")
