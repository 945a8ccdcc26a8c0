"""Training: the supervised loss against transformers, the Step-GRPO update against a plain one, exact resume, and what
files may hold."""
import inspect
import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import grpo
import infer
import train
from conftest import ROOT
from grpo import group_advantages, grpo_loss
from model import VLM
from parts.chat import Processor
from parts.groups import Group, Interest, balanced, reward_metrics
from parts.stepfiles import (Mixture, StepExample, clean_rows, gold_base, gold_label, in_budget,
                             read_sources, read_steps)
from parts.steps import BASES, AnswerStep, RouteStep, parse_step, render_route
from plumbing.run import Run


def run(script, *words, **more):
    program = ["-m", script] if script.startswith("lab.") else [str(ROOT / script)]
    command = [sys.executable, *program, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, **more)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A small training world with practice files, and a random tiny model that knows its prompts."""
    out = tmp_path_factory.mktemp("train")
    made = run("lab.world", "--split", "train", "--countries", 40, "--questions", 39, "--practice", 8,
               "--out", out / "w", "--shell", out / "m", "--shape", 32, 2, 2, 1, 48)
    assert made.returncode == 0, made.stderr
    (out / "m" / "prompts.json").write_text('{"route": "plan", "answer": "read", "final": "answer"}')
    return out


@pytest.fixture(scope="module")
def model(home):
    return VLM.from_config(home / "m", seed=1)


@pytest.fixture(scope="module")
def processor(home):
    return Processor.from_pretrained(home / "m")


def weights(path):
    return (path / "last" / "model.safetensors").read_bytes()


def log_of(path):
    """Log rows of updates, without what the clock says."""
    rows = [json.loads(line) for line in open(path / "log.jsonl")]
    timed = lambda k: k.endswith(("seconds", "_s")) or k == "validation"
    return [{k: v for k, v in row.items() if not timed(k)} for row in rows]


# ----------------------------------------------------------------------------------------------------------- step files


def test_published_step_file_is_read_whole(golden):
    rows = read_steps(golden / "stepgrpo_steps.jsonl")
    raw = [json.loads(line) for line in open(golden / "stepgrpo_steps.jsonl")]
    assert [len(r) for r in rows] == [len(r["steps"]) for r in raw]
    for row, r in zip(rows, raw):
        assert [s.problem for s in row] == [s["problem"] for s in r["steps"]]
        assert row[-1].final and not any(s.final for s in row[:-1])
    for s in (s for row in rows for s in row):
        parsed = parse_step(s.target())
        assert isinstance(parsed, RouteStep if s.kind == "ret" else AnswerStep) or not str(s.answer).strip()
        if s.kind == "ret":
            assert parsed.route.lower() == s.answer["retriever"][0].strip()


def test_published_rows_are_counted_and_left_out_by_option(golden, tmp_path):
    """Counted by hand over the raw file: a sub-question (other than none) that comes twice; pictures are not there at
    all."""
    raw = [json.loads(line) for line in open(golden / "stepgrpo_steps.jsonl")]
    asked = [[s["answer"]["query"].strip().lower() for s in r["steps"] if s["step_type"] == "ret"] for r in raw]
    repeats = sum(len([q for q in a if q != "none"]) > len({q for q in a if q != "none"}) for a in asked)
    rows = read_steps(golden / "stepgrpo_steps.jsonl")
    kept, counts = clean_rows(rows, ())
    assert counts["no_picture"] == sum(bool(r["images"]) for r in raw) and counts["repeats"] == repeats > 0
    assert len(kept) == len(raw) - counts["no_picture"]
    # intermediate golds that say that nothing is said, found by reading all 94 of the file
    assert counts["no_information"] == 7                                 # rows 3, 6, 11, 13, 14, 24, 33
    fewer, _ = clean_rows(rows, ("repeats", "no_information"))
    assert 0 < len(fewer) < len(kept)


@pytest.mark.parametrize("line, found", [
    ('{"steps": [', "line 2"),
    ('{"images": [], "steps": [{"step_type": "ret", "problem": "p", "system": "s", "answer": "text"}]}',
     "step_type 'ret'"),
    ('{"images": [], "steps": [{"step_type": "nap", "problem": "p", "system": "s", "answer": "text"}]}',
     "step_type 'nap'"),
    ('{"images": [], "steps": []}', "steps"),
    ('{"images": []}', "line 2"),
    ('{"images": ["a.jpg", "b.jpg"], "steps": [{"step_type": "ans", "problem": "p", "system": "s", "answer": "a"}]}',
     "2 pictures"),
])
def test_a_row_that_does_not_fit_is_named_with_file_and_line(tmp_path, line, found):
    good = '{"images": [], "steps": [{"step_type": "ans", "problem": "p", "system": "s", "answer": "a"}]}'
    path = tmp_path / "steps.jsonl"
    path.write_text(good + "\n" + line + "\n")
    with pytest.raises(ValueError, match="steps.jsonl, line 2") as e:
        read_steps(path)
    assert found in str(e.value) and "\n" not in str(e.value)


# ----------------------------------------------------------------------------------------------------------- supervised


def test_the_mask_covers_the_target_and_its_end_and_nothing_else(home, processor):
    examples = [s for row in read_steps(home / "w" / "steps.jsonl")[:6] for s in row]
    batch, mask, too_long = train.make_batch(processor, examples, 2048, "cpu")
    assert too_long == 0 and batch["attention_mask"][:, -1].all()
    for ids, m, e in zip(batch["input_ids"], mask, examples):
        assert processor.tokenizer.decode(ids[m].tolist(), skip_special_tokens=False) == e.target() + "<|im_end|>"
    _, _, dropped = train.make_batch(processor, examples, 70, "cpu")
    assert 0 < dropped < len(examples)


def test_the_target_of_a_step_that_is_none_in_one_is_none_in_both():
    gold = {"query": "none", "retriever": ["text retriever"]}
    step = parse_step(StepExample("ret", "s", "p", gold, "enough", ()).target())
    assert step.route == "None" and step.query == "None" and gold_base(gold) == "none"


def test_rows_whose_picture_is_missing_are_counted_and_left_out_of_sft_too(home, tmp_path, capsys):
    """As of the published file, whose pictures nobody has."""
    rows = [json.loads(line) for line in open(home / "w" / "steps.jsonl")][:12]
    lost = [{**row, "images": ["gone.jpg"]} for row in rows if row["images"]]
    folder = home / "w"                                           # pictures lie beside the file
    (folder / "lost.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lost + rows))
    [(_, steps, share)] = read_sources([str(folder / "lost.jsonl") + "=2"])
    assert len(steps) == sum(len(row["steps"]) for row in rows) and share == 2 and lost
    assert f"left out {len(lost)} rows whose picture is missing" in capsys.readouterr().err
    done = run("train.py", "sft", "--model", home / "m", "--data", folder / "lost.jsonl", "--steps", 2, "--tokens", 400,
               "--val-every", 0, "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    (folder / "lost.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lost))
    with pytest.raises(ValueError, match="lost.jsonl: no row is left to train on"):
        read_sources([str(folder / "lost.jsonl")])


def test_supervised_loss_equals_transformers(home, model, processor, tmp_path):
    """The same batch, with labels -100 outside the response, through the library's own loss."""
    transformers = pytest.importorskip("transformers")
    model.save_pretrained(tmp_path)
    theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path).eval()
    examples = [s for row in read_steps(home / "w" / "steps.jsonl")[:8] for s in row]
    batch, mask, _ = train.make_batch(processor, examples, 2048, "cpu")
    assert batch["pixel_values"] is not None
    labels = batch["input_ids"].masked_fill(~mask, -100)
    newer = "mm_token_type_ids" in inspect.signature(theirs.forward).parameters
    extra = {"mm_token_type_ids": (batch["input_ids"] == model.config.image_token_id).int()} if newer else {}
    inputs = {k: v.long() if v.dtype == torch.bool else v for k, v in batch.items()}
    with torch.no_grad():
        expected = theirs(**inputs, **extra, labels=labels).loss
        loss = -model.log_probs(targets_mask=mask, **batch).sum() / mask.sum()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)


def test_a_mixture_draws_by_share_and_repeats_nothing_within_an_epoch():
    make = lambda name, n: [StepExample("ans", "s", f"{name}{i}", "a", "", ()) for i in range(n)]
    length = lambda e: 10 * len(e.problem)                                       # 20 to 50
    mixture = Mixture([("a", make("a", 5000), 3.0), ("b", make("b", 100), 1.0)], length, 1280, 0)
    drawn = [e.problem for pool in range(4) for b in mixture.batches(pool) for e in b]
    a, b = [x for x in drawn if x[0] == "a"], [x for x in drawn if x[0] == "b"]
    assert len(a) == 4 * 768 and len(b) == 4 * 256 and len(set(a)) == len(a)
    assert max(map(b.count, set(b))) - min(map(b.count, set(b))) <= 1           # ten epochs of 100, each a permutation
    for b in mixture.batches(3):                                                  # the budget is kept, and well used
        assert len(b) * max(map(length, b)) <= 1280
    assert sum(len(b) * max(map(length, b)) > 1100 for b in mixture.batches(3)) > 0.8 * len(mixture.batches(3))
    again = Mixture([("a", make("a", 5000), 3.0), ("b", make("b", 100), 1.0)], length, 1280, 0)
    assert [e.problem for b in again.batches(2) for e in b] == [e.problem for b in mixture.batches(2) for e in b]


def test_previous_token_head_looks_at_the_token_before(model, home):
    fresh = VLM.from_config(home / "m", seed=3)
    T = 50
    ids = torch.randint(20, 800, (1, T), generator=torch.Generator().manual_seed(0))

    def attention():
        d, positions = fresh.model, torch.arange(T).expand(3, 1, T)
        from model import rotate
        cos, sin = d.angles(positions)
        a, x = d.layers[0].self_attn, d.layers[0].input_layernorm(d.embed_tokens(ids))
        q = rotate(a.q_proj(x)[..., :a.head_dim][:, None], cos, sin)[0, 0]
        k = rotate(a.k_proj(x)[..., :a.head_dim][:, None], cos, sin)[0, 0]
        scores = (q @ k.T / a.head_dim ** 0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -1e9)
        return scores.softmax(-1).diagonal(-1).mean().item()
    before = attention()
    train.start_previous_token_head(fresh)
    # two rotary pairs here; the shipped size has four and reaches 0.99
    assert before < 0.2 and attention() > 0.6


# ----------------------------------------------------------------------------------------------------- Step-GRPO update


@pytest.fixture(scope="module")
def groups(home, model, processor):
    """Six sampled groups of a random model, with pictures among them and advantages as if the rewards had varied."""
    steps = [s for row in read_steps(home / "w" / "steps.jsonl") for s in row]
    chosen = [s for s in steps if s.images][:3] + [s for s in steps if not s.images][:3]
    router = infer.Router(model, processor, {b: None for b in BASES}, temperature=1.0, max_new_tokens=12)
    outputs = router.sample([s.conversation() for s in chosen], torch.Generator().manual_seed(0), 4)
    made, rng = [], random.Random(0)
    for s, (ids, candidates) in zip(chosen, outputs):
        g = Group(s.conversation(), ids, candidates, [rng.random() for _ in candidates], [], gold_label(s), [])
        g.advantages = group_advantages(torch.tensor(g.rewards), torch.zeros(4))
        made.append(g)
    return made


@pytest.mark.parametrize("level, budget", [("token", 100000), ("token", 1), ("sequence", 300)])
def test_update_with_shared_prompts_and_micro_batches_equals_the_plain_one(
        home, model, processor, groups, level, budget):
    """Oracle: every sample as a row of its own through log_probs, one loss over all; the gradients must be the same."""
    o = train.GrpoOptions(level=level, tokens=budget)
    model.zero_grad()
    metrics = train.accumulate(o, model, None, processor, groups)
    got = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    logps, olds, advantages, masks = [], [], [], []
    for g in groups:
        for c, a in zip(g.candidates, g.advantages):
            row = processor([g.conversation])
            ids = torch.cat((row["input_ids"], torch.tensor([c.token_ids])), dim=1)
            m = torch.arange(ids.shape[1])[None] >= row["input_ids"].shape[1]
            x = model.log_probs(ids, m, None, row["pixel_values"], row["image_grid_thw"])[:, -len(c.token_ids):]
            pad = lambda row: torch.nn.functional.pad(row, (0, 12 - len(c.token_ids)))
            logps.append(pad(x)), olds.append(pad(torch.tensor([c.logps])))
            masks.append(torch.arange(12)[None] < len(c.token_ids)), advantages.append(a[None])
    loss, _ = grpo_loss(torch.cat(logps), torch.cat(olds), torch.cat(advantages), torch.cat(masks), level=level)
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    for n, p in model.named_parameters():
        assert torch.allclose(got[n], p.grad, atol=2e-6), n


def test_sampler_and_update_see_the_same_tokens(model, processor, groups):
    inputs, old, _, _ = train.pack(processor, groups, "cpu", False)
    new = model.group_log_probs(**inputs)
    assert inputs["mask"].sum() == sum(len(c.token_ids) for g in groups for c in g.candidates)
    assert (new - old)[inputs["mask"]].abs().max() < 1e-4
    for g, ids, keep in zip(groups, inputs["input_ids"], inputs["attention_mask"]):
        assert tuple(ids[keep].tolist()) == g.prompt_ids


def test_micro_batches_hold_every_group_once_and_keep_the_budget(groups):
    for budget in (1, 200, 10 ** 9):
        parts = in_budget(groups, lambda g: g.size, budget)
        assert sorted(id(g) for p in parts for g in p) == sorted(map(id, groups))
        assert all(len(p) == 1 or max(g.size for g in p) * len(p) <= budget for p in parts)
    # by hand: 3 + 3 rows of width 3 are 6, a third of width 4 would make 12
    assert in_budget([9, 4, 3, 3], int, 8) == [[3, 3], [4], [9]]


@pytest.mark.parametrize("budget", [1, 300, 10 ** 9])
def test_outputs_do_not_depend_on_the_token_budget_of_a_model_call(home, model, processor, groups, budget):
    calls = []
    class Counting:
        config = model.config
        parameters = model.parameters
        def generate(self, **more):
            calls.append(more["input_ids"].shape)
            return model.generate(**more)
    router = infer.Router(Counting(), processor, {b: None for b in BASES}, temperature=1.0, max_new_tokens=12,
                          call_tokens=budget)
    outputs = router.sample([g.conversation for g in groups], torch.Generator().manual_seed(0), 4)
    assert [c.text for _, cs in outputs for c in cs] == [c.text for g in groups for c in g.candidates]
    assert [ids for ids, _ in outputs] == [g.prompt_ids for g in groups]
    assert sum(B for B, _ in calls) == len(groups) and len(calls) == {1: 6, 300: len(calls), 10 ** 9: 1}[budget]
    assert all(B == 1 or B * (T + 4 * 12) <= budget for B, T in calls)


def test_balanced_draw_is_even_over_gold_routes():
    """4 % of the prompts are of one route: drawn as they come it gets about one of 32, balanced it gets its sixth."""
    labels = ["text image retriever"] * 8 + ["text retriever"] * 60 + ["table retriever"] * 32
    labels += ["none"] * 40 + ["answer"] * 60
    items, label = list(enumerate(labels)), lambda x: x[1]
    draw = lambda o: balanced(o, items, label, label, Interest(0.8, {}), random.Random(1))
    even, plain = draw(train.GrpoOptions(prompts=32)), draw(train.GrpoOptions(prompts=32, balance=False))
    count = lambda drawn: {name: sum(label(x) == name for x in drawn) for name in set(labels)}
    assert count(even) == {"answer": 8, "none": 6, "table retriever": 6, "text image retriever": 6, "text retriever": 6}
    assert len(set(even)) == len(set(plain)) == 32                          # nothing is drawn twice
    assert count(plain)["text image retriever"] < 6


def test_solved_prompts_are_drawn_less_often_but_not_never():
    interest = Interest(0.8, {})
    for _ in range(100):
        interest.learn("solved", True)
    rng, items = random.Random(0), ["solved"] * 50 + ["open"] * 50
    drawn = [x for _ in range(400) for x in interest.choose(items, 5, lambda x: x, rng)]
    share = drawn.count("solved") / len(drawn)
    assert 0.1 < share < 0.25                        # weights 0.2 against 1: 0.2 / 1.2 = 0.167
    for _ in range(100):
        interest.learn("solved", False)              # forgotten again
    assert interest.weight("solved") == pytest.approx(1, abs=1e-4)


def test_a_group_is_solved_where_all_is_right_not_where_all_is_equally_wrong():
    group = lambda *parts: Group([], (), (), [p.total for p in parts], list(parts), "", [])
    right, near = grpo.Reward(1.0, 1.0, 1.0, 1.0), grpo.Reward(0.95, 1.0, 0.9, 1.0)
    assert group(right, right).solved and not group(near, near).solved and not group(right, near).solved
    assert group(grpo.Reward(1.0, 1.0, answer=1.0)).solved and not group(grpo.Reward(0.0, 0.0, answer=0.0)).solved
    assert not group(near, near).mixed


class Words:
    """An encoder whose vectors can be computed by hand: a dimension a word, normalised."""
    words = "capital of Bakdol seat which currency area rut mes bakdol".split()

    def encode_queries(self, texts):
        rows = torch.tensor([[float(w in t.split()) for w in self.words] for t in texts])
        return (rows / rows.norm(dim=1, keepdim=True)).numpy()


def hop(query, answer="x"):
    return {"query": query, "retriever": "text retriever", "answer": answer}


def test_a_sub_question_in_other_words_stands_for_the_nearest_open_hop():
    """By hand: 3 words of 3 in common is 1; 2 of 3 and 3 is 2 / 3; 2 of 2 and 3 is 2 / sqrt(6) = 0.816; none is 0."""
    capital, currency = hop("capital of Bakdol"), hop("currency of Bakdol")
    asked = [("of Bakdol capital", [currency, capital]), ("seat of Bakdol", [capital]), ("of Bakdol", [capital]),
             ("which", [capital]), ("capital of Bakdol", [])]
    found = lambda least: train.nearest_hops(train.GrpoOptions(match=least), asked, Words())
    assert found(0.9) == [capital, None, None, None, None]
    assert found(0.8) == [capital, None, capital, None, None]
    assert found(0.6) == [capital, capital, capital, None, None]
    assert train.nearest_hops(train.GrpoOptions(), [], Words()) == []


def test_a_hop_is_closed_by_a_right_answer_to_it_in_any_order_and_wording():
    o = train.GrpoOptions(match=0.8)
    first, second = hop("capital of Bakdol", "Rut"), hop("currency of Bakdol", "Mes")

    class Question:
        row, request = {"hops": [first, second], "answer": ["Mes"]}, None
        def go_on(self, step):
            pass
    x = train.Live(Question(), 0)

    def said(kind, text):
        c = infer.Candidate(text, (), (), parse_step(text))
        train.go_on(o, [(x, infer.Step(kind, "", [], (), (c,), 0, {}))], Words())
    ask = lambda q: said("route", f"<think> t</think><sub-question> {q}</sub-question><ret> Table Retriever</ret>")
    answer = lambda a: said("answer", f"<think> t</think><answer> {a}</answer>")
    ask("of Bakdol currency"), answer("Rut")                  # the second hop was asked for, the answer is wrong
    assert x.asked is second and x.open == [first, second]
    ask("of Bakdol currency"), answer("Mes")
    assert x.open == [first]
    ask("which seat"), answer("Rut")                          # a right answer to nothing that was open
    assert x.asked is None and x.open == [first]
    ask("capital of Bakdol"), answer("Rut")
    assert x.open == [] and x.said[0].endswith("</ret>") and len(x.said) == 8


def test_hops_that_are_ready_by_hand():
    """The area of Rut can be asked for once Rut is found; Rutland is another name; a circle leaves all as they are."""
    first, second, third = hop("capital of Bakdol", "Rut"), hop("area of Rut?", "65"), hop("area of Rutland", "65")
    assert train.ready([first, second, third]) == [first, third]
    assert train.ready([second, third]) == [second, third] and train.ready([]) == []
    circle = [hop("area of Rut", "Mes"), hop("area of Mes", "Rut")]
    assert train.ready(circle) == circle
    assert train.ready([hop("1 + 1 (sum)", 2), hop("is 2.5 + 2", "x")]) == [hop("1 + 1 (sum)", 2)]


@pytest.mark.parametrize("only_ready", [False, True])
def test_an_invented_name_is_paid_unless_only_ready_hops_count(only_ready):
    """The gold of the first step is the capital; the area of the capital counts as well, unless hops must be ready.
    With Words, "area of mes" has 2 words of 3 in common with "area of rut", and the right base: (2/3 + 1) / 2."""
    first, second = hop("capital of bakdol", "rut"), {**hop("area of rut", "65"), "retriever": "table retriever"}

    class Question:
        row = {"hops": [first, second], "answer": ["65"]}
        request = SimpleNamespace(kind="route", query=None)
        def go_on(self, step):
            pass
    x = train.Live(Question(), 0, only_ready)
    text = "<think> t</think><sub-question> area of {}</sub-question><ret> Table Retriever</ret>"
    asked = lambda name: infer.Candidate(text.format(name), (), (), parse_step(text.format(name)))
    [reward] = train.score(train.GrpoOptions(), [(asked("mes"), x.golds())], Words())
    assert reward.total == pytest.approx((1 / 3 + 0) / 2 if only_ready else (2 / 3 + 1) / 2, abs=1e-5)
    train.go_on(train.GrpoOptions(), [(x, infer.Step("route", "", [], (), (asked("rut"),), 0, {}))], Words())
    assert x.asked is (None if only_ready else second) and x.label() == "text retriever"
    x.open.remove(first)
    assert x.label() == "table retriever"
    [reward] = train.score(train.GrpoOptions(), [(asked("rut"), x.golds())], Words())
    assert reward.total == pytest.approx(1)


def test_sampling_goes_on_until_enough_groups_are_mixed():
    """A source with one mixed group of two each time: three are there after three times."""
    made = lambda rewards: Group([], (), (), rewards, [], "answer", [])

    class Source:
        def sample(self, rng):
            return [made([1.0, 0.0]), made([1.0, 1.0])], {"too_long": 1, "retrievals": 3.0, "reward_s": 0.5}
    for fill, tries, times in ((3, 4, 3), (3, 2, 2), (1, 4, 1), (9, 1, 1)):
        groups, counts = train.sample(train.GrpoOptions(fill=fill, tries=tries), Source(), 0)
        assert len(groups) == 2 * times and sum(g.teaches for g in groups) == times
        assert counts == {"too_long": times, "retrievals": 3.0, "reward_s": times / 2}
    assert groups[0].advantages.tolist() == pytest.approx([0.7071, -0.7071], abs=1e-4)      # (1 - 1/2) / sqrt(1/2)


def test_what_a_log_says_of_routes_by_hand():
    """Two prompts want the text base, one wants none: 3 of 4 outputs are right; text is asked for 3 times of 6."""
    def group(gold, routes):
        text = "<think> t</think><sub-question> q</sub-question><ret> {}</ret>"
        outputs = tuple(infer.Candidate("", (), (), parse_step(text.format(r))) for r in routes)
        right = [float(r.lower() == gold) for r in routes]
        return Group([], (), outputs, right, [grpo.Reward(r, 1.0, route=r) for r in right], gold, [])
    T, N = "Text Retriever", "Table Retriever"
    groups = [group("text retriever", [T, T]), group("text retriever", [T, N]), group("table retriever", [N, N])]
    for g in groups:
        g.advantages = group_advantages(torch.tensor(g.rewards), torch.zeros(2))
    m = reward_metrics(groups)
    assert (m["route:text"], m["asked:text"], m["prompts:text"], m["mixed:text"]) == (3 / 4, 1 / 2, 2 / 3, 1 / 2)
    assert (m["route:table"], m["asked:table"], m["prompts:table"], m["mixed:table"]) == (1, 1 / 2, 1 / 3, 0)
    assert m["reward"] == pytest.approx(5 / 6) and m["flat_groups"] == pytest.approx(2 / 3)


def test_route_tokens_are_those_between_the_ret_tags(processor):
    text = render_route("need capital", "What is the capital of Bakdol?", "Text Image Retriever")
    ids = tuple(processor.encode(text))
    inside = train.route_tokens(processor, infer.Candidate(text, ids, (0.0,) * len(ids), None))
    assert processor.decode([i for i, x in zip(ids, inside) if x]) == " Text Image Retriever"
    assert not any(train.route_tokens(processor, infer.Candidate("", tuple(processor.encode("no tags")), (), None)))


# ---------------------------------------------------------------------------------------------- runs, resume, bad input



def commands(home):
    """Short runs of each kind. Step-GRPO starts from the shipped weak model: a random one never earns a reward, and
    nothing would be updated."""
    rest = ("--save-every", 3, "--log-every", 2, "--threads", 1)
    common = ("--model", ROOT / "weights" / "tiny-warm", *rest)
    return {
        "sft": ("sft", "--model", home / "m", *rest, "--data", home / "w" / "steps.jsonl=2", home / "w" / "copy.jsonl"),
        "online": ("grpo", *common, "--val-every", 0, "--world", home / "w",
                   "--prompts", 6, "--group", 4, "--open-questions", 12),
        "offline": ("grpo", *common, "--val-every", 0, "--mode", "offline", "--data", home / "w" / "steps.jsonl",
                    "--prompts", 6, "--group", 4),
        "outcome": ("grpo", *common, "--val-every", 0, "--mode", "outcome", "--world", home / "w",
                    "--questions", 4, "--group", 4),
    }


@pytest.mark.parametrize("kind", ["sft", "online", "offline", "outcome"])
def test_six_steps_equal_three_a_kill_and_three_more(home, tmp_path, kind):
    words = commands(home)[kind]
    whole = run("train.py", *words, "--steps", 6, "--decay", 0, "--out", tmp_path / "a")
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *map(str, words),
                                "--steps", "6", "--decay", "0", "--out", str(tmp_path / "b")],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.time() + 60
    while not (tmp_path / "b" / "last").exists() and process.poll() is None and time.time() < end:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL                     # it was still at work
    assert (tmp_path / "b" / "last").exists()
    done = run("train.py", *words, "--steps", 6, "--decay", 0, "--out", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    state = [(tmp_path / x / "last" / "trainer.safetensors").read_bytes() for x in "ab"]
    assert state[0] == state[1]
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b") and len(log_of(tmp_path / "a")) == 6
    if kind != "sft":                       # and so is what report.py shows: two groups of every second update
        text = (tmp_path / "a" / "samples.jsonl").read_text()
        assert text == (tmp_path / "b" / "samples.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert [row["step"] for row in rows] == [2, 2, 4, 4, 6, 6]
        for row in rows:
            assert row["prompt"] and row["gold"] and all("<" in x["text"] for x in row["outputs"])
            if kind == "outcome":           # the group is the question, of which a row shows the outputs of one prompt
                continue
            rewards = torch.tensor([x["reward"] for x in row["outputs"]])
            advantages = torch.tensor([x["advantage"] for x in row["outputs"]])
            assert torch.allclose(advantages, (rewards - rewards.mean()) / (rewards.std() + 1e-6), atol=1e-3)
    # weights were really updated, before and after
    assert sum("grad_norm" in row for row in log_of(tmp_path / "a")) >= 4


def test_the_whole_update_equals_a_float64_loop(home, model, processor, groups):
    """Everything that can be switched on at once (temperature, KL, both clips, entropy bonus on route tokens), against
    a loop over single samples in float64 that follows Eq. 3 to 6 as they are written. The weights have moved since the
    samples were drawn, so ratios differ from 1 and some are clipped."""
    o = train.GrpoOptions(temperature=0.7, kl_coef=0.1, clip=0.05, clip_high=0.08, entropy_coef=0.03, tokens=200)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for i, p in enumerate(moved.parameters()):
            p += 0.003 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) if p.numel() > 1 else 0
    text = "<think> t</think><sub-question> q</sub-question><ret> Text Retriever</ret>"
    said = tuple(processor.encode(text))
    mine = [copy.copy(g) for g in groups]
    mine[4].candidates = (infer.Candidate(text, said, (-1.0,) * len(said), parse_step(text)),
                          *groups[4].candidates[1:])                      # an output with route tokens
    moved.zero_grad()
    metrics = train.accumulate(o, moved, lambda _: nullcontext(model), processor, mine)
    got = {n: p.grad.clone() for n, p in moved.named_parameters()}
    policy, base = copy.deepcopy(moved).double(), copy.deepcopy(model).double()
    policy.zero_grad()
    total, loss, kl, clipped_tokens = sum(len(c.token_ids) for g in mine for c in g.candidates), 0.0, 0.0, 0
    for g in mine:
        prompt = processor([g.conversation])
        P, pixels = prompt["input_ids"].shape[1], prompt["pixel_values"]
        for c, A in zip(g.candidates, g.advantages.tolist()):
            ids = torch.cat((prompt["input_ids"], torch.tensor([c.token_ids])), dim=1)
            see = {"pixel_values": None if pixels is None else pixels.double(), "image_grid_thw": prompt["image_grid_thw"]}
            y = torch.tensor(c.token_ids)
            dist = (policy(ids, **see)[0, P - 1:-1] / 0.7).log_softmax(-1)                        # (L, V)
            with torch.no_grad():
                ref = (base(ids, **see)[0, P - 1:-1] / 0.7).log_softmax(-1)
            logp, logref = dist[range(len(y)), y], ref[range(len(y)), y]
            ratio = (logp - torch.tensor(c.logps, dtype=torch.float64)).exp()                     # Eq. 4
            limited = ratio.clamp(1 - 0.05, 1 + 0.08)
            k3 = (logref - logp).exp() - (logref - logp) - 1                                      # Eq. 6
            entropy = -(dist.exp() * dist).sum(-1)
            pieces = [processor.decode([i]) for i in c.token_ids]
            whole = "<ret>" in pieces and "</ret>" in pieces[pieces.index("<ret>"):]
            at_route = torch.tensor([whole and pieces.index("<ret>") < i < pieces.index("</ret>")
                                     for i in range(len(pieces))])
            loss = loss + (-torch.min(ratio * A, limited * A) + 0.1 * k3 - 0.03 * entropy * at_route).sum() / total
            kl, clipped_tokens = kl + k3.sum().item() / total, clipped_tokens + int((ratio != limited).sum())
    loss.backward()
    assert metrics["kl"] == pytest.approx(kl, rel=1e-3) and kl > 1e-5
    assert metrics["clip_fraction"] == pytest.approx(clipped_tokens / total, abs=0.02) and clipped_tokens
    for n, p in policy.named_parameters():
        assert torch.allclose(got[n].double(), p.grad, atol=2e-5, rtol=1e-3), n


def test_outcome_groups_by_hand():
    """Two questions, two trajectories each: [right, malformed] and [wrong, right]. A malformed one is paid 0, whatever
    it says. Steps that answer the same prompt stand together, each with the advantage of its trajectory (Eq. 3:
    (1 - 1/2) / sqrt(1/2) = 0.7071)."""
    def made(row, answer, malformed, prompts):
        c = infer.Candidate(answer, (1, 2), (-0.1, -0.2), None)
        steps = tuple(infer.Step("route", "", [], ids, (c,), 0, {}) for ids in prompts)
        return SimpleNamespace(row=row, answer=answer, malformed=malformed, steps=steps, retrievals=1, too_long=0)
    first, second = ({"question": q, "answer": ["Rut"], "hops": [], "kind": q} for q in "ab")
    done = [made(first, "Rut", 0, [(1,), (2,)]), made(first, "Rut", 1, [(1,), (3,)]),
            made(second, "Mes", 0, [(4,)]), made(second, "Rut", 0, [(4,)])]
    o = train.GrpoOptions(mode="outcome", questions=2, group=2)

    class Stub:
        def run(self, rows, generator):
            assert [r["question"] for r in rows] in (["a", "a", "b", "b"], ["b", "b", "a", "a"], ["a"] * 4, ["b"] * 4)
            return done
    run = SimpleNamespace(state={}, generator=None, now=lambda: 0.0)
    groups, counts = train.Outcome(o, run, Stub(), [first, second]).sample(random.Random(0))
    found = {g.prompt_ids: (g.rewards, [round(a, 4) for a in g.advantages.tolist()]) for g in groups}
    assert found == {(1,): ([1.0, 0.0], [0.7071, -0.7071]), (2,): ([1.0], [0.7071]), (3,): ([0.0], [-0.7071]),
                     (4,): ([0.0, 1.0], [-0.7071, 0.7071])}
    assert counts["reward"] == 0.5 and counts["malformed"] == 0.25 and counts["retrievals"] == 1
    assert all(g.teaches for g in groups) and reward_metrics(groups)["flat_groups"] == 0


def test_learning_rates_are_those_of_the_schedule(home, tmp_path):
    """By hand: 10 steps, peak 1, warm-up over 4, the last half falls to a tenth: 1/4, 2/4, 3/4, 1, 1, 1, then
    0.1 + 0.9 * 2 * (1 - s / 10)."""
    done = run("train.py", *commands(home)["sft"], "--learning-rate", 1e-3, "--warmup", 4, "--steps", 10, "--clip-norm",
               0.01, "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    rates = [row["learning_rate"] * 1e3 for row in log_of(tmp_path / "r")]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.82, 0.64, 0.46, 0.28])


def test_the_gradient_is_clipped_to_its_norm(home, tmp_path):
    """SGD in place of AdamW shows what the optimizer is given: a step of length clip_norm."""
    model, processor = VLM.from_config(home / "m", seed=1), Processor.from_pretrained(home / "m")
    o = train.SftOptions(out=str(tmp_path / "r"), clip_norm=0.5, learning_rate=1.0, warmup=1, decay=0.0)
    r = train.open_run(o, model, processor, {})
    r.optimizer, before = torch.optim.SGD(model.parameters(), lr=1.0), [p.detach().clone() for p in model.parameters()]
    r.agree()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    norm = sum(p.numel() for p in model.parameters()) ** 0.5
    assert r.update(0)["grad_norm"] == pytest.approx(norm, rel=1e-4)
    moved = sum(((p - b) ** 2).sum() for p, b in zip(model.parameters(), before)) ** 0.5
    assert moved.item() == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("follow", ["best", "random"])
def test_which_candidate_is_followed(follow):
    """Of four candidates the third alone is right: best always goes on with it, random does so about every fourth
    time (of 200: 50 with a deviation of 6)."""
    texts = [f"<think> t</think><sub-question> {q}</sub-question><ret> Text Retriever</ret>"
             for q in ("which", "seat", "capital of Bakdol", "seat which")]
    candidates = tuple(infer.Candidate(t, (1,), (0.0,), parse_step(t)) for t in texts)
    followed = []

    class Stub:
        prompts, bases = {}, {"text": SimpleNamespace(encoder=Words())}
        def sample(self, talks, generator, n):
            return [((1,), candidates) for _ in talks]
        def step(self, q, ids, cs, chosen):
            followed.append(chosen)
            return infer.Step("route", "", [], ids, cs, chosen, {})
    Q = SimpleNamespace(row={"hops": [hop("capital of Bakdol")], "kind": "k", "answer": ["x"]}, go_on=lambda step: None,
                        request=SimpleNamespace(kind="route"), conversation=lambda prompts: [])
    run_ = SimpleNamespace(state={}, generator=None, now=lambda: 0.0)
    source = train.Online(train.GrpoOptions(follow=follow, group=4), run_, Stub(), [])
    source.reward_s, source.read_on = 0.0, 0
    groups = source.advance([train.Live(Q, i) for i in range(200)], 4, random.Random(0))
    assert groups[0].rewards[2] == max(groups[0].rewards) and len(groups) == 200
    assert set(followed) == {2} if follow == "best" else 26 < followed.count(2) < 74


def test_a_policy_without_finite_probabilities_ends_with_one_line(home, tmp_path):
    words = [*commands(home)["online"], "--learning-rate", "1e30", "--warmup", 0, "--steps", 3, "--save-every", 1]
    done = run("train.py", *words, "--out", tmp_path / "r")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "no numbers" in done.stderr.splitlines()[-1]
    assert (tmp_path / "r" / "last").exists()


def test_a_checkpoint_that_no_link_points_to_is_not_taken_for_this_run(home, tmp_path):
    words = ("sft", "--model", home / "m", "--threads", 1, "--data", home / "w" / "steps.jsonl", "--save-every", 1)
    assert run("train.py", *words, "--seed", 7, "--steps", 1, "--out", tmp_path / "a").returncode == 0
    (tmp_path / "a" / "last").unlink()                     # as after a kill between writing and linking
    assert run("train.py", *words, "--seed", 8, "--steps", 1, "--out", tmp_path / "a").returncode == 0
    assert run("train.py", *words, "--seed", 8, "--steps", 1, "--out", tmp_path / "b").returncode == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_a_signal_stops_behind_the_update_with_a_checkpoint(home, tmp_path):
    words = [sys.executable, str(ROOT / "train.py"), *map(str, commands(home)["sft"]),
             "--steps", "100000", "--out", str(tmp_path / "r")]
    log = tmp_path / "r" / "log.jsonl"
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        before = len(log_of(tmp_path / "r")) if log.exists() else 0
        end = time.time() + 60
        while time.time() < end and not (log.exists() and len(log_of(tmp_path / "r")) > before + 1):
            time.sleep(0.05)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code and "continues" in err
        state = json.loads((tmp_path / "r" / "last" / "trainer.json").read_text())
        assert state["step"] == log_of(tmp_path / "r")[-1]["step"]


def test_validation_chooses_the_best_checkpoint(home, tmp_path):
    done = run("train.py", *commands(home)["sft"], "--steps", 4, "--val-world", home / "w", "--val-every", 2,
               "--val-questions", 6, "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in open(tmp_path / "r" / "log.jsonl")]
    scores = {r["step"]: r["validation"]["f1_recall"] for r in rows if "validation" in r}
    assert set(scores) == {2, 4} and (tmp_path / "r" / "best" / "model.safetensors").exists()
    best = json.loads(done.stdout.splitlines()[-1])["best"]
    assert best["f1_recall"] == max(scores.values())
    assert best["step"] == min(s for s in scores if scores[s] == best["f1_recall"])
    assert Processor.from_pretrained(tmp_path / "r" / "best") and VLM.from_pretrained(tmp_path / "r" / "best")


def test_lora_trains_the_adapter_alone_and_its_base_is_the_reference(home, tmp_path):
    done = run("train.py", *commands(home)["online"], "--steps", 3, "--lora-rank", 4, "--kl-coef", 0.1,
               "--form", "published", "--entropy-coef", 0.01, "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    saved = {p.name for p in (tmp_path / "r" / "last").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "trainer.safetensors"} <= saved
    assert "model.safetensors" not in saved
    # a new adapter is the base: no distance before the first update, some after it
    kl = [row["kl"] for row in log_of(tmp_path / "r") if "kl" in row]
    assert len(kl) >= 2 and abs(kl[0]) < 1e-7 < 100 * kl[-1], kl


def test_bfloat16_learns_as_float32_does_because_the_masters_are_float32(home, tmp_path):
    """At this rate an update is far below what a bfloat16 weight can hold: without masters nothing would change."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        words = ("sft", "--model", ROOT / "weights" / "tiny-warm", "--data", home / "w" / "steps.jsonl", "--dtype", dtype,
                 "--steps", 24, "--learning-rate", 2e-5, "--warmup", 1, "--threads", 1, "--checkpointing")
        done = run("train.py", *words, "--out", tmp_path / dtype)
        assert done.returncode == 0, done.stderr
        rows = log_of(tmp_path / dtype)
        losses[dtype] = [sum(r["loss"] for r in part) / 8 for part in (rows[:8], rows[-8:])]
    (start, end), (start16, end16) = losses["float32"], losses["bfloat16"]
    assert end < 0.75 * start and abs((start16 - end16) - (start - end)) < 0.15 * (start - end)
    state = load_file(tmp_path / "bfloat16" / "last" / "trainer.safetensors")
    saved = load_file(tmp_path / "bfloat16" / "last" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert saved[name].dtype == torch.bfloat16 and torch.equal(state["master." + name].bfloat16(), saved[name])


@pytest.mark.parametrize("words, message", [
    (("sft", "--model", "nowhere", "--data", "x"), "nowhere"),
    (("sft", "--data"), "expected at least one argument"),
    (("grpo", "--mode", "sideways"), "invalid choice"),
    (("grpo", "--steps", "many"), "invalid int"),
    (("sft", "--no-such-flag", "1"), "unrecognized"),
    (("dance",), "usage"),
])
def test_wrong_options_end_with_one_line_and_code_2(home, tmp_path, words, message):
    done = run("train.py", *words, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 and not os.listdir(tmp_path)


def test_a_run_with_other_options_is_not_overwritten(home, tmp_path):
    words = commands(home)["sft"]
    assert run("train.py", *words, "--steps", 1, "--out", tmp_path / "r").returncode == 0
    done = run("train.py", *words, "--steps", 1, "--seed", 9, "--out", tmp_path / "r")
    assert done.returncode == 2 and "--seed" in done.stderr and done.stderr.count("\n") == 1
    # an option that is younger than the run was as by default
    options = json.loads((tmp_path / "r" / "options.json").read_text())
    del options["warmup"]
    (tmp_path / "r" / "options.json").write_text(json.dumps(options))
    for more, code in (([], 0), (["--warmup", 7], 2)):
        assert run("train.py", *words, "--steps", 1, *more, "--out", tmp_path / "r").returncode == code
