"""train.py: the supervised loss against transformers, the Step-GRPO update against plain loops, the
sources of groups by hand."""
import copy
import inspect
import os
import random
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import infer
import train
from conftest import run
from grpo import group_advantages, grpo_loss
from model import VLM, rotate
from parts.batches import make_batch, pack, route_tokens
from parts.chat import Processor
from parts.groups import Group
from parts.modeldir import start_previous_token_head
from parts.settings import complete
from parts.stepfiles import read_steps, step_output
from parts.steps import BASES, parse_step, render_route
from parts.trajectory import Candidate, Step
from test_live import Words, hop, live_question, route_step
from training import WARM, commands, log_of


@pytest.fixture(scope="module")
def model(shell):
    return VLM.from_config(shell, seed=1)


@pytest.fixture(scope="module")
def processor(shell):
    return Processor.from_pretrained(shell)


def examples_of(world, trajectories=None):
    rows, faults = read_steps(world / "steps.jsonl", trajectories)
    assert not faults
    examples = []
    for steps in rows:
        examples += steps
    return examples


# --------------------------------------------------------------------------------------- supervised

def test_the_mask_covers_the_target_and_its_end_and_nothing_else(world, processor):
    examples = examples_of(world, 6)
    batch, mask, too_long = make_batch(processor, examples, 2048, "cpu")
    assert too_long == 0 and batch["attention_mask"][:, -1].all()
    for ids, m, example in zip(batch["input_ids"], mask, examples):
        target = processor.tokenizer.decode(ids[m].tolist(), skip_special_tokens=False)
        assert target == step_output(example) + "<|im_end|>"
    _, _, too_long = make_batch(processor, examples, 70, "cpu")
    assert 0 < too_long < len(examples)


def test_an_example_is_too_long_where_it_is_longer_than_the_model(world, processor):
    examples = examples_of(world, 1)[:1]
    batch, _, _ = make_batch(processor, examples, 2048, "cpu")
    length = batch["input_ids"].shape[1]
    assert make_batch(processor, examples, length, "cpu")[2] == 0
    assert make_batch(processor, examples, length - 1, "cpu")[2] == 1


def test_a_rank_without_examples_takes_part_and_adds_nothing(shell, processor):
    model = VLM.from_config(shell)
    batch, mask, too_long = make_batch(processor, [], 2048, "cpu")
    loss = -model.log_probs(targets_mask=mask, **batch).sum()
    loss.backward()
    assert loss == 0 and not mask.any() and too_long == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.model.parameters())


def test_supervised_loss_equals_transformers(world, model, processor, tmp_path):
    """The same batch, with labels -100 outside the response, through the library's own loss."""
    transformers = pytest.importorskip("transformers")
    model.save_pretrained(tmp_path)
    theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch, mask, _ = make_batch(processor, examples_of(world, 8), 2048, "cpu")
    assert batch["pixel_values"] is not None
    labels = batch["input_ids"].masked_fill(~mask, -100)
    inputs = {}
    for name, tensor in batch.items():
        inputs[name] = tensor.long() if tensor.dtype == torch.bool else tensor
    if "mm_token_type_ids" in inspect.signature(theirs.forward).parameters:         # newer ones
        is_picture = batch["input_ids"] == model.config.image_token_id
        inputs["mm_token_type_ids"] = is_picture.int()
    with torch.no_grad():
        expected = theirs(**inputs, labels=labels).loss
        loss = -model.log_probs(targets_mask=mask, **batch).sum() / mask.sum()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)


def test_rows_whose_picture_is_missing_are_left_out_of_training(world, shell, tmp_path):
    """As of the published file, whose pictures nobody has."""
    row = '{"images": ["gone.jpg"], "steps": [{"step_type": "ans", "problem": "p <image>", ' \
          '"system": "s", "answer": "a"}]}\n'
    (tmp_path / "steps.jsonl").write_text(row + row.replace('"gone.jpg"', ""))
    words = ("sft", "--model", shell, "--data", tmp_path / "steps.jsonl", "--steps", 2)
    done = run("train.py", *words, "--tokens", 400, "--out", tmp_path / "r")
    assert done.returncode == 0 and "left out 1 rows whose picture is missing" in done.stderr
    assert [row["too_long"] for row in log_of(tmp_path / "r")] == [0, 0]


def test_previous_token_head_looks_at_the_token_before(shell):
    fresh = VLM.from_config(shell, seed=3)
    T = 50
    ids = torch.randint(20, 800, (1, T), generator=torch.Generator().manual_seed(0))

    def attention():
        """Mean attention of head 0 to the token before."""
        decoder = fresh.model
        cos, sin = decoder.angles(torch.arange(T).expand(3, 1, T))
        layer = decoder.layers[0]
        D = fresh.config.head_dim
        x = layer.input_layernorm(decoder.embed_tokens(ids))
        q = rotate(layer.self_attn.q_proj(x)[..., :D][:, None], cos, sin)[0, 0]         # (T, D)
        k = rotate(layer.self_attn.k_proj(x)[..., :D][:, None], cos, sin)[0, 0]
        future = torch.ones(T, T).triu(1).bool()
        scores = (q @ k.T / D ** 0.5).masked_fill(future, -1e9)
        return scores.softmax(-1).diagonal(-1).mean().item()

    before = attention()
    start_previous_token_head(fresh)
    # two rotary pairs here; the shipped size has four and reaches 0.99
    assert before < 0.2 and attention() > 0.6


# --------------------------------------------------------------------------------------- the update

SAMPLED = 1         # a seed with which the random model samples no picture token


@pytest.fixture(scope="module")
def groups(world, model, processor):
    """Six sampled groups of a random model, with pictures among them and advantages as if the
    rewards had varied."""
    examples = examples_of(world)
    chosen = [example for example in examples if example.image][:3]
    chosen += [example for example in examples if not example.image][:3]
    router = router_without_bases(model, processor, max_new_tokens=12)
    conversations = [example.conversation() for example in chosen]
    outputs = router.sample(conversations, torch.Generator().manual_seed(SAMPLED), 4)
    groups, rng = [], random.Random(0)
    for example, (ids, candidates) in zip(chosen, outputs):
        rewards = [rng.random() for _ in candidates]
        advantages = group_advantages(torch.tensor(rewards), torch.zeros(4))
        groups.append(Group(example.conversation(), ids, candidates, rewards, [], example.label(),
                            [], advantages))
    return groups


def router_without_bases(model, processor, **options):
    bases = {base: None for base in BASES}
    return infer.Router(model, processor, bases, temperature=1.0, **options)


@pytest.mark.parametrize("level, budget", [("token", 100000), ("token", 1), ("sequence", 300)])
def test_update_with_shared_prompts_and_micro_batches_equals_the_plain_one(
        model, processor, groups, level, budget):
    """Oracle: every sample as a row of its own through log_probs, one loss over all; the gradients
    must be the same."""
    o = train.GrpoOptions(level=level, tokens=budget)
    model.zero_grad()
    metrics = train.accumulate(o, model, None, processor, groups)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    def padded(row):
        return torch.nn.functional.pad(row, (0, 12 - row.shape[1]))

    logps, olds, advantages, masks = [], [], [], []
    for group in groups:
        for candidate, advantage in zip(group.candidates, group.advantages):
            row = processor([group.conversation])
            L = len(candidate.token_ids)
            ids = torch.cat((row["input_ids"], torch.tensor([candidate.token_ids])), dim=1)
            targets = torch.arange(ids.shape[1])[None] >= row["input_ids"].shape[1]
            logp = model.log_probs(ids, targets, None, row["pixel_values"], row["image_grid_thw"])
            logps.append(padded(logp[:, -L:]))
            olds.append(padded(torch.tensor([candidate.logps])))
            masks.append(torch.arange(12)[None] < L)
            advantages.append(advantage[None])
    loss, _ = grpo_loss(torch.cat(logps), torch.cat(olds), torch.cat(advantages), torch.cat(masks),
                        level=level)
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    for name, p in model.named_parameters():
        assert torch.allclose(gradients[name], p.grad, atol=2e-6), name


def test_sampler_and_update_see_the_same_tokens(model, processor, groups):
    inputs, old, _, _ = pack(processor, groups, "cpu", False)
    new = model.group_log_probs(**inputs)
    assert inputs["mask"].sum() == sum(group.output_tokens() for group in groups)
    assert (new - old)[inputs["mask"]].abs().max() < 1e-4
    for group, ids, mask in zip(groups, inputs["input_ids"], inputs["attention_mask"]):
        assert tuple(ids[mask].tolist()) == group.prompt_ids


@pytest.mark.parametrize("budget", [1, 300, 10 ** 9])
def test_outputs_do_not_depend_on_the_token_budget_of_a_model_call(
        model, processor, groups, budget):
    shapes = []

    class Counting:
        config, parameters = model.config, model.parameters

        def generate(self, **inputs):
            shapes.append(inputs["input_ids"].shape)
            return model.generate(**inputs)

    router = router_without_bases(Counting(), processor, max_new_tokens=12, call_tokens=budget)
    conversations = [group.conversation for group in groups]
    outputs = router.sample(conversations, torch.Generator().manual_seed(SAMPLED), 4)
    for (ids, candidates), group in zip(outputs, groups, strict=True):
        assert ids == group.prompt_ids
        assert [c.text for c in candidates] == [c.text for c in group.candidates]
    assert sum(B for B, _ in shapes) == len(groups)
    assert budget == 300 or len(shapes) == (6 if budget == 1 else 1)
    assert all(B == 1 or B * (T + 4 * 12) <= budget for B, T in shapes)


def test_samples_do_not_depend_on_what_they_are_batched_with(world):
    """Each conversation alone, with its part of the noise, against all in one list, in which one
    stands twice."""
    router = router_without_bases(VLM.from_pretrained(WARM), Processor.from_pretrained(WARM),
                                  max_new_tokens=24)
    examples = examples_of(world, 3)
    conversations = [example.conversation() for example in (*examples, examples[0])]
    generator = torch.Generator().manual_seed(0)
    noise = router.noise(conversations, generator, 4)
    together = router.sample(conversations, None, 4, noise)
    for i, (ids, candidates) in enumerate(together):
        [(own_ids, own)] = router.sample(conversations[i:i + 1], None, 4, noise[i:i + 1])
        assert own_ids == ids and [c.token_ids for c in own] == [c.token_ids for c in candidates]
        for a, b in zip(own, candidates):
            assert a.logps == pytest.approx(b.logps, abs=1e-4)
    assert router.sample(conversations, generator.manual_seed(0), 4) == together
    of_the_same = [*together[0][1], *together[-1][1]]
    assert len({candidate.token_ids for candidate in of_the_same}) > 1


def test_route_tokens_are_those_between_the_ret_tags(processor):
    def at_route(text):
        ids = tuple(processor.encode(text))
        inside = route_tokens(processor, Candidate(text, ids, (0.0,) * len(ids), None))
        return processor.decode([i for i, here in zip(ids, inside) if here])

    text = render_route("need capital", "What is the capital of Bakdol?", "Text Image Retriever")
    assert at_route(text) == " Text Image Retriever"
    assert at_route("no tags") == at_route("</ret> x <ret>") == at_route("<ret> x") == ""


def test_the_whole_update_equals_a_float64_loop(model, processor, groups):
    """Everything that can be switched on at once (temperature, KL, both clips, entropy bonus on
    route tokens), against a loop over single samples in float64 that follows Eq. 3 to 6 as they are
    written. The weights have moved since the samples were drawn, so ratios differ from 1 and some
    are clipped."""
    o = train.GrpoOptions(temperature=0.7, kl_coef=0.1, clip=0.05, clip_high=0.08,
                          entropy_coef=0.03, tokens=200)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for i, p in enumerate(moved.parameters()):
            if p.numel() > 1:
                noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
                p += 0.003 * p.std() * noise
    text = "<think> t</think><sub-question> q</sub-question><ret> Text Retriever</ret>"
    ids = tuple(processor.encode(text))
    routed = Candidate(text, ids, (-1.0,) * len(ids), parse_step(text))
    groups = [copy.copy(group) for group in groups]
    groups[4].candidates = (routed, *groups[4].candidates[1:])  # an output with route tokens
    moved.zero_grad()
    metrics = train.accumulate(o, moved, lambda _: nullcontext(model), processor, groups)
    gradients = {name: p.grad.clone() for name, p in moved.named_parameters()}

    policy, base = copy.deepcopy(moved).double(), copy.deepcopy(model).double()
    policy.zero_grad()
    total = sum(group.output_tokens() for group in groups)
    loss, kl, clipped_tokens = 0.0, 0.0, 0
    for group in groups:
        prompt = processor([group.conversation])
        P, pixels = prompt["input_ids"].shape[1], prompt["pixel_values"]
        pictures = {"pixel_values": None if pixels is None else pixels.double(),
                    "image_grid_thw": prompt["image_grid_thw"]}
        for candidate, A in zip(group.candidates, group.advantages.tolist()):
            y = torch.tensor(candidate.token_ids)                                       # (L,)
            ids = torch.cat((prompt["input_ids"], y[None]), dim=1)
            logits = policy(ids, **pictures)[0, P - 1:-1]
            logs = (logits / 0.7).log_softmax(-1)                                       # (L, V)
            with torch.no_grad():
                ref_logs = (base(ids, **pictures)[0, P - 1:-1] / 0.7).log_softmax(-1)
            logp, ref = logs[range(len(y)), y], ref_logs[range(len(y)), y]
            ratio = (logp - torch.tensor(candidate.logps, dtype=torch.float64)).exp()   # Eq. 4
            limited = ratio.clamp(1 - 0.05, 1 + 0.08)
            k3 = (ref - logp).exp() - (ref - logp) - 1                                  # Eq. 6
            entropy = -(logs.exp() * logs).sum(-1)
            pieces = [processor.decode([i]) for i in candidate.token_ids]
            at_route = torch.zeros(len(pieces), dtype=torch.bool)
            if "<ret>" in pieces and "</ret>" in pieces[pieces.index("<ret>"):]:
                at_route[pieces.index("<ret>") + 1:pieces.index("</ret>")] = True
            worse = -torch.min(ratio * A, limited * A)                                  # Eq. 5
            loss = loss + (worse + 0.1 * k3 - 0.03 * entropy * at_route).sum() / total
            kl += k3.sum().item() / total
            clipped_tokens += int((ratio != limited).sum())
    loss.backward()
    assert metrics["kl"] == pytest.approx(kl, rel=1e-3) and kl > 1e-5
    share = clipped_tokens / total
    assert metrics["clip_fraction"] == pytest.approx(share, abs=0.02) and clipped_tokens
    for name, p in policy.named_parameters():
        assert torch.allclose(gradients[name].double(), p.grad, atol=2e-5, rtol=1e-3), name


def test_lora_trains_the_adapter_alone_and_its_base_is_the_reference(world, shell, tmp_path):
    words = (*commands(world, shell)["online"], "--steps", 3, "--lora-rank", 4, "--kl-coef", 0.1)
    done = run("train.py", *words, "--form", "published", "--entropy-coef", 0.01,
               "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    saved = os.listdir(tmp_path / "r" / "last")
    assert {"adapter_config.json", "adapter_model.safetensors", "trainer.safetensors"} <= set(saved)
    assert "model.safetensors" not in saved
    # a new adapter is the base: no distance before the first update, some after it
    kl = [row["kl"] for row in log_of(tmp_path / "r") if "kl" in row]
    assert len(kl) >= 2 and abs(kl[0]) < 1e-7 < 100 * kl[-1], kl


# --------------------------------------------------------------------------- where groups come from

def test_sampling_goes_on_until_enough_groups_are_mixed():
    """A source with one mixed group of two each time: three are there after three times."""
    class Source:
        def groups(self, rng):
            made = [Group([], (), (), rewards, [], "answer", [])
                    for rewards in ([1.0, 0.0], [1.0, 1.0])]
            return made, {"too_long": 1, "retrievals": 3.0, "reward_s": 0.5}

    for fill, tries, times in ((3, 4, 3), (3, 2, 2), (1, 4, 1), (9, 1, 1)):
        o = train.GrpoOptions(fill=fill, tries=tries, eps=0.5)
        groups, counts = train.sample_groups(o, Source(), 0)
        assert len(groups) == 2 * times and sum(group.teaches for group in groups) == times
        assert counts == {"too_long": times, "retrievals": 3.0, "reward_s": times / 2}
    # (1 - 1/2) / (sqrt(1/2) + 1/2)
    assert groups[0].advantages.tolist() == pytest.approx([0.4142, -0.4142], abs=1e-4)


@pytest.mark.parametrize("given, eps", [
    ({}, 0.2), ({"mode": "outcome"}, 1e-6), ({"mode": "outcome", "eps": 0.3}, 0.3)])
def test_small_differences_count_in_full_where_whole_answers_are_paid(given, eps):
    flags = dict(given)
    complete(flags)
    assert train.GrpoOptions(**flags).eps == eps


def test_outcome_mode_samples_until_enough_questions_are_mixed():
    """Each sampling has three groups that teach, but they are of one question."""
    class Source:
        def groups(self, rng):
            made = [Group([], (), (), [1.0, 0.0], [], "outcome", [], torch.tensor([1.0, -1.0]))
                    for _ in range(3)]
            return made, {"too_long": 0, "mixed_questions": 1, "reward_s": 0.5}

    for fill, tries, times in ((2, 4, 2), (1, 4, 1), (9, 4, 4)):
        o = train.GrpoOptions(mode="outcome", fill=fill, tries=tries)
        groups, _ = train.sample_groups(o, Source(), 0)
        assert len(groups) == 3 * times


def test_questions_are_balanced_where_all_have_hops():
    """Nine questions of one route, one of another: balanced, half of those drawn are the other."""
    def row(number, base):
        return {"question": str(number), "kind": "k", "hops": [{"query": "q", "retriever": base}]}

    rows = [row(number, "text retriever") for number in range(9)] + [row(9, "table retriever")]
    run_ = SimpleNamespace(state={})
    shares = []
    for some in (rows, [*rows, {"question": "10", "kind": "k"}]):
        o = train.GrpoOptions(mode="outcome", questions=200, rest=0)
        drawn = train.Outcome(o, run_, None, some).draw(random.Random(0))
        shares.append(sum(row["question"] == "9" for row in drawn) / 200)
    assert shares[0] == pytest.approx(0.5, abs=0.1) and shares[1] == pytest.approx(0.1, abs=0.07)


def test_a_source_without_prompts_that_fit_is_named():
    source = SimpleNamespace(groups=lambda rng: ([], {"too_long": 7}))
    with pytest.raises(ValueError, match="step 3: no prompt was left to sample, 7 were too long"):
        train.sample_groups(train.GrpoOptions(), source, 2)


def finished(row, answer, malformed, *prompts):
    """A trajectory whose steps answered these prompts."""
    candidate = Candidate(answer, (1, 2), (-0.1, -0.2), None)
    steps = tuple(Step("route", "", [], prompt_ids, (candidate,), 0, {}) for prompt_ids in prompts)
    return SimpleNamespace(row=row, answer=answer, malformed=malformed, steps=steps, retrievals=1,
                           too_long=0)


@pytest.mark.parametrize("credit, alone", [("state", 0.0), ("trajectory", 0.7071)])
def test_outcome_groups_by_hand(credit, alone):
    """Two questions without gold hops, two trajectories each: [right, malformed], [wrong, right]. A
    malformed one is paid 0, whatever it says. Steps that answer the same prompt stand together. By
    trajectory each has the advantage of its own (Eq. 3: (1 - 1/2) / sqrt(1/2) = 0.7071); by state a
    step that no other trajectory came to has none (Eq. 7)."""
    first, second = ({"question": q, "answer": ["Rut"], "kind": q} for q in "ab")
    trajectories = [finished(first, "Rut", 0, (1,), (2,)), finished(first, "Rut", 1, (1,), (3,)),
                    finished(second, "Mes", 0, (4,)), finished(second, "Rut", 0, (4,))]

    class Router:
        def run(self, rows, generator):
            questions = [row["question"] for row in rows]
            assert questions[0] == questions[1] and questions[2] == questions[3]
            return trajectories

    o = train.GrpoOptions(mode="outcome", questions=2, group=2, credit=credit, eps=1e-6)
    run_ = SimpleNamespace(state={}, generator=None, now=lambda: 0.0)
    groups, counts = train.Outcome(o, run_, Router(), [first, second]).groups(random.Random(0))
    by_prompt = {}
    for group in groups:
        advantages = [round(a, 4) for a in group.advantages.tolist()]
        by_prompt[group.prompt_ids] = group.rewards, advantages
    assert by_prompt == {(1,): ([1.0, 0.0], [0.7071, -0.7071]), (2,): ([1.0], [alone]),
                         (3,): ([0.0], [-alone]), (4,): ([0.0, 1.0], [-0.7071, 0.7071])}
    assert (counts["reward"], counts["malformed"], counts["retrievals"]) == (0.5, 0.25, 1)
    assert counts["mixed_questions"] == 2
    assert [group.teaches for group in groups] == [True, alone > 0, alone > 0, True]
    assert run_.state["interest"] == {"a": pytest.approx(1), "b": pytest.approx(1)}


def test_no_base_runs_out_of_first_steps():
    """Twelve questions are under way, all at their second step: each of the three first bases gets
    the share of six prompts, two, and the oldest questions make room."""
    bases = ("text retriever", "text image retriever", "table retriever")
    rows = []
    for i in range(30):
        rows.append({"hops": [{"query": str(i), "retriever": bases[i % 3], "answer": "x"}]})
    run_ = SimpleNamespace(state={}, generator=None, now=lambda: 0.0)
    router = SimpleNamespace(bases={"text": SimpleNamespace(encoder=None)}, prompts={},
                             open=lambda serial, row: SimpleNamespace(
                                 request=SimpleNamespace(kind="route")))
    source = train.Online(train.GrpoOptions(prompts=6, open_questions=12), run_, router, rows)
    source.fill_up(random.Random(0))
    first = list(source.under_way)
    assert len(first) == 12 and all(live.open_hops for live in first)
    for live in first:
        live.open_hops = []
    source.fill_up(random.Random(1))
    assert len(source.under_way) == 12 and source.under_way[:6] == first[6:]
    assert sorted(live.label() for live in source.under_way[6:]) == sorted(2 * bases)


@pytest.mark.parametrize("follow", ["best", "random"])
def test_which_candidate_is_followed(follow):
    """Of four candidates the third alone is right: best always goes on with it, random does so
    about every fourth time (of 200: 50 with a deviation of 6)."""
    candidates = []
    for query in ("which", "seat", "capital of Bakdol", "seat which"):
        candidates += route_step(query, "Text").candidates
    followed = []

    class Router:
        bases = {"text": SimpleNamespace(encoder=Words())}

        def sample(self, conversations, generator, n):
            return [((1,), tuple(candidates)) for _ in conversations]

        def step(self, question, prompt_ids, candidates, choice):
            followed.append(choice)
            return Step("route", "", [], prompt_ids, candidates, choice, {})

    questions = []
    for _ in range(200):
        live = live_question([hop("capital of Bakdol")])
        live.question.conversation = lambda prompts: []
        questions.append(live)
    run_ = SimpleNamespace(state={}, generator=None, now=lambda: 0.0)
    source = train.Online(train.GrpoOptions(follow=follow, group=4), run_, Router(), [])
    groups = source.advance(questions, 4, random.Random(0))
    assert groups[0].rewards[2] == max(groups[0].rewards) and len(groups) == 200
    if follow == "best":
        assert set(followed) == {2}
    else:
        assert 26 < followed.count(2) < 74


def test_a_shown_question_has_the_advantages_of_its_rewards(world):
    """Eq. 3 from the printed rewards of each group."""
    done = run("train.py", "show", "--model", WARM, "--world", world, "--question", 3, "--group", 6,
               "--threads", 1, "--seed", 1)
    assert done.returncode == 0, done.stderr
    blocks = done.stdout.split("\n\n")
    assert "gold:" in blocks[0] and "route step" in blocks[1] and "final step" in blocks[-1]
    mixed = 0
    for block in blocks[1:]:
        lines = re.findall(r"r (\d\.\d+)  A ([+-]\d\.\d+) ", block)
        assert len(lines) in (0, 6)
        if lines:
            rewards, advantages = torch.tensor([[float(x) for x in line] for line in lines]).T
            expected = group_advantages(rewards, torch.zeros(6), eps=0.2)
            assert torch.allclose(advantages, expected, atol=0.02)
            mixed += bool(expected.any())
    assert mixed and "  evidence " in done.stdout


# --------------------------------------------------------------------------------- the command line

@pytest.mark.parametrize("words, message", [
    (("sft", "--model", "nowhere", "--data", "x"), "nowhere"),
    (("sft", "--data"), "expected at least one argument"),
    (("grpo", "--mode", "sideways"), "invalid choice"),
    (("grpo", "--steps", "many"), "invalid int"),
    (("sft", "--no-such-flag", "1"), "unrecognized"),
    (("dance",), "usage"),
])
def test_wrong_options_end_with_one_line_and_code_2(tmp_path, words, message):
    done = run("train.py", *words, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 and not os.listdir(tmp_path)


def test_help_lists_the_commands_and_the_flags_of_each():
    alone = run("train.py")
    assert alone.returncode == 0 and alone.stdout == run("train.py", "--help").stdout
    for name, (options, _) in train.COMMANDS.items():
        assert f"  {name:8}{options.__doc__}\n" in alone.stdout
    done = run("train.py", "grpo", "--help")
    assert done.returncode == 0 and "-k N" in done.stdout and "--no-balance" in done.stdout
    assert "samples of a prompt: the group G [8]" in " ".join(done.stdout.split())
