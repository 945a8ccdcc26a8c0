"""Training: a supervised warm start (sft) and Step-GRPO (grpo), on one device or on several (torchrun).

What flows through this file:
    sft     step files -> prompts and target texts -> cross-entropy on the response tokens only -> AdamW -> checkpoints
    grpo    step prompts (from files, or from live trajectories) -> G outputs of each, a group -> rewards -> advantages
            -> clipped loss over the sampled tokens -> AdamW -> checkpoints
    show    one question as grpo sees it, printed        export    a checkpoint as a plain model directory

Reading order: sft, then grpo (each on one screen), Online and balanced, accumulate and pack. What a run is (options,
folder, checkpoints, ranks) stands in run.py.

Legend of shapes
    B examples of a batch   T tokens of a row   N groups of a micro-batch   n outputs of a group (G)   L response tokens

Deviations from the paper and from the released code, with the reason
    * The warm start's targets carry a thought: published step files have none, so a step without one is trained with an
      empty thought.
    * A prompt that is too long is counted and left out. It is never cut: cutting loses the question.
    * Online mode samples the steps of live trajectories through the three bases; the released recipe (offline) asks
      prompts with gold history and retrieves nothing.
    * Step prompts are drawn evenly over their gold route (see `balanced`): as they come, a rare route dies out.
    * Groups without variance are left out of the update, and prompts that are always solved are drawn less often.
    * The KL reference costs no memory where an adapter is trained, and no time where its coefficient is 0.
"""
import copy
import math
import os
import random
import re
import shutil
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from grpo import (RewardOptions, answer_reward, group_advantages, grpo_loss, similarity_table,
                  step_reward)
from infer import Candidate, Router, Search
from model import VLM
from parts.chat import Processor
from parts.evaluate import evaluate
from parts.groups import Group, Interest, balanced, reward_metrics
from parts.lora import add_lora, load_adapter, lora_disabled, merge_lora, save_adapter
from parts.pretrained import load_encoder
from parts.questions import embedded_world, golds_of, load_questions
from parts.score import answer_scores
from parts.stepfiles import (Mixture, gold_label, in_budget, load_prompts, offline_rows, prompts_of,
                             read_sources)
from parts.steps import BASES, parse_step
from plumbing.old import (code_of, option_run as option, parse_options, printable, read_json,
                          settle, stop_on_sigterm, usable_device, write_json)
from plumbing.ranks import expect_pictures, first_rank_first, gather, join_ranks, rank, ranks
from plumbing.run import Options, Run, reading_checkpoint
from retrieve import world_bases


def encoded(processor, example):
    """An example -> its prompt, (ids, patches, grids), and the ids of its target, the end of turn included."""
    return processor.prompt(example.conversation()), processor.encode(example.target()) + [processor.end]


def count_tokens(processor, example):
    """Tokens of an example, prompt and target."""
    (ids, _, _), response = encoded(processor, example)
    return len(ids) + len(response)


def make_batch(processor, examples, max_positions, device):
    """Prompts and targets side by side: [prompt | target | eos], left-padded. Returns the model's inputs, the mask
    (B, T) of the target tokens, and how many examples were too long to be used."""
    rows, responses, too_long = [], [], 0
    for (ids, patches, grids), response in (encoded(processor, e) for e in examples):
        if len(ids) + len(response) > max_positions:
            too_long += 1
            continue
        rows.append((ids + response, patches, grids))
        responses.append(len(response))
    if not rows:                                         # a rank's empty share is a row without targets, so it joins in
        rows, responses = [([processor.pad_id] * 2, [], [])], [0]
    batch = processor.batch(rows)
    T = batch["input_ids"].shape[1]
    mask = torch.arange(T) >= T - torch.tensor(responses)[:, None]        # (B, T): rows end together, targets are last
    return {k: None if v is None else v.to(device) for k, v in batch.items()}, mask.to(device), too_long


class RankRouter(Router):
    """A router whose model calls are dealt out to the ranks. All draw the noise of all, so the outputs are the same
    for any number of ranks."""

    def sample(self, talks, generator, n=None):
        noise, mine = self.noise(talks, generator, n), slice(rank(), None, ranks())
        outputs = [None] * len(talks)
        for r, some in enumerate(gather(super().sample(talks[mine], generator, n, noise[mine]))):
            outputs[r::ranks()] = some
        return outputs


MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json",
               "processor_config.json", "generation_config.json", "chat_template.json", "chat_template.jinja")


def write_model(path, model, origin, prompts, dtype=None):
    """A model directory: our weights (or adapter), and tokenizer, picture settings and prompts of the directory that
    training started from."""
    path.mkdir(parents=True, exist_ok=True)
    for name in MODEL_FILES[1:]:
        if (Path(origin) / name).exists():
            shutil.copy(Path(origin) / name, path / name)
    if prompts:
        write_json(path / "prompts.json", prompts)
    save_adapter(model, path) if hasattr(model, "lora") else model.save_pretrained(path, dtype)


def read_model(path, model):
    """The weights (or the adapter) of a checkpoint, into a model that is there."""
    if hasattr(model, "lora"):
        load_adapter(model, path)
    else:
        saved = VLM.from_pretrained(path, dtype=next(model.parameters()).dtype)
        model.load_state_dict(saved.state_dict())


def validation_scores(o, model, processor, prompts):
    """The validation world's questions, answered greedily through the router -> their scores."""
    with first_rank_first():
        world = o.val_world or embedded_world("val", "val", 0, 260)
        bases = world_bases(world)
    rows, _ = load_questions(Path(world) / "questions.jsonl", limit=o.val_questions)
    as_trained = ("k", "max_steps", "max_new_tokens", "call_tokens")
    router = RankRouter(model, processor, bases, prompts=prompts,
                        **{name: getattr(o, name) for name in as_trained if hasattr(o, name)})
    return evaluate(router.run(rows))


def open_run(o, model, processor, prompts):
    """The folder of a run of this model, new or continued."""
    return Run(o, model, processor, prompts, save=write_model, load=read_model, validate=validation_scores)


def open_model(options):
    """Weights where the directory has them, random ones where it holds a config alone."""
    path, dtype = Path(options.model), getattr(torch, options.dtype)
    if not path.is_dir():
        raise ValueError(f"--model {path}: no such directory")
    usable_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    fresh = not any(path.glob("*.safetensors"))
    model = (VLM.from_config(path, options.seed, dtype, options.device) if fresh else
             VLM.from_pretrained(path, dtype, options.device))
    model.model.gradient_checkpointing = options.checkpointing
    return model, Processor.from_pretrained(path), fresh


# ----------------------------------------------------------------------------------------------------------- supervised


@dataclass(frozen=True)
class SftOptions(Options):
    """Options of supervised training."""
    data: tuple = option((), "step files, each may carry its share of the examples: steps.jsonl=3 copy.jsonl=1",
                         nargs="+")
    tokens: int = option(1536, "token budget of a batch, padding included", least=1)
    previous_token_head: bool = option(False, "start from random weights with one head of the first layers attending "
                                       "to the token before")


@torch.no_grad()
def start_previous_token_head(model, layers=(0, 1), strength=10.0):
    """Let query head 0 of the first layers start out attending to the token before (half of an induction head).

    On the rotary pairs that turn with time the weights of its query and key are set to zero and their biases to
    constants: key (m, 0), query (m cos w, -m sin w) for a pair of speed w. After rotation the product is largest at
    distance one. The architecture is unchanged.
    """
    c = model.config
    speeds = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float32) / c.head_dim)
    half, size = c.head_dim // 2, math.sqrt(strength * math.sqrt(c.head_dim))
    for layer in layers:
        q, k = model.model.layers[layer].self_attn.q_proj, model.model.layers[layer].self_attn.k_proj
        q.weight[:c.head_dim] *= 0.1
        for pair in range(c.mrope_section[0]):
            both = [pair, pair + half]
            q.weight[both], k.weight[both] = 0.0, 0.0
            k.bias[both] = torch.tensor([size, 0.0])
            q.bias[both] = size * torch.tensor([math.cos(speeds[pair]), -math.sin(speeds[pair])])


def sft(o):
    """Supervised training on step files: cross-entropy of the response tokens, nothing else."""
    join_ranks(o.device)
    model, processor, fresh = open_model(o)
    if o.previous_token_head and fresh:
        start_previous_token_head(model)
    sources = read_sources(o.data)
    mixture = Mixture(sources, lambda example: count_tokens(processor, example), o.tokens, o.seed)
    run = open_run(o, model, processor, prompts_of(sources[0][1]))
    pool, place = run.state.setdefault("place", [0, 0])
    batches = mixture.batches(pool)
    for step in run.steps():
        if place == len(batches):
            pool, place = pool + 1, 0
            batches = mixture.batches(pool)
        examples, place = batches[place], place + 1
        batch, mask, too_long = make_batch(processor, examples[rank()::ranks()], model.config.max_positions, o.device)
        counts, pictures = zip(*gather((int(mask.sum()), batch["pixel_values"] is not None)))
        if not sum(counts):
            raise ValueError(f"all {len(examples)} examples of a batch are longer than the model's "
                             f"{model.config.max_positions} positions")
        expect_pictures(run.model, any(pictures))
        logps = run.model.log_probs(targets_mask=mask, **batch)               # (B, T - 1)
        loss = -logps.sum() / sum(counts)                                     # this rank's part of the batch's loss
        (loss * ranks()).backward()                                           # FSDP takes the mean over ranks
        metrics = run.update(step)
        tokens = batch["input_ids"].numel() if counts[rank()] else 0
        losses, tokens, too_long = map(sum, zip(*gather((loss.item(), tokens, too_long))))
        run.state["tokens"] += tokens
        run.state["place"] = [pool, place]
        run.log({"step": step + 1, "loss": losses, "examples": len(examples), "tokens": tokens, "too_long": too_long,
                 **metrics})


# ------------------------------------------------------------------------------------------------------------ Step-GRPO


@dataclass(frozen=True)
class GrpoOptions(Options):
    """Options of Step-GRPO and of its ablations. The defaults train weights/tiny-warm in the embedded world."""
    out: str = option("runs/step-grpo", "folder of the run; an unfinished run there is continued")
    steps: int = option(250, "number of updates", least=1)
    val_every: int = option(50, "updates between validations; 0: none")
    mode: str = option("online", "offline: step files with gold history; online: live trajectories, a group a step; "
                       "outcome: a group a question", choices=("offline", "online", "outcome"))
    data: tuple = option((), "offline: step files", nargs="+")
    world: str = option("", "online, outcome: a world to practise in; by default the embedded one")
    encoder: str = option("lexical", "offline: the encoder that measures similarity; online takes the text base's")
    prompts: int = option(32, "step prompts an update (offline, online)", least=1)
    questions: int = option(8, "questions an update (outcome)", least=1)
    group: int = option(8, "samples of a prompt: the group G", least=2)
    temperature: float = option(1.0, "of sampling, and of the log-probabilities in the loss", least=0.01)
    max_new_tokens: int = option(64, "longest output", least=1)
    call_tokens: int = option(65536, "token budget of a model call in sampling: prompts, and room for all outputs",
                              least=1)
    balance: bool = option(True, "draw step prompts evenly over their gold route (offline, online), questions over "
                           "their routes (outcome)")
    answer_share: float = option(0.25, "share of answering steps among the prompts, where they are balanced", most=1)
    rest: float = option(0.8, "how much less often solved prompts are drawn: 0 as often, 1 never again", most=1)
    follow: str = option("random", "online: the candidate that the trajectory goes on with", choices=("random", "best"))
    match: float = option(0.9, "online: how similar to an open gold hop a sub-question must be to stand for it")
    ready: bool = option(False, "online: measure a sub-question by those open hops alone that can be asked for by now")
    open_questions: int = option(160, "online: trajectories that are under way at once", least=1)
    k: int = option(2, "online, outcome: passages of evidence", least=1)
    max_steps: int = option(4, "online, outcome: sub-questions at most", least=1)
    form: str = option("strict", "of the reward: strict pays only what the router can read, published searches for "
                       "tags", choices=("strict", "published"))
    similarity_weight: float = option(0.5, "of the routing reward")
    route_weight: float = option(0.5, "of the routing reward")
    answer_rule: str = option("published", "of the answering reward", choices=("published", "recall", "f1", "exact"))
    price: float = option(0.0, "taken off the reward for each retrieval asked for")
    scale: bool = option(True, "divide advantages by the group's standard deviation")
    clip: float = option(0.2, "the ratio is clipped below 1 - clip")
    clip_high: float = option(0.0, "the ratio is clipped above 1 + clip_high; 0: as --clip")
    kl_coef: float = option(0.0, "weight of the KL term; 0 computes no reference")
    entropy_coef: float = option(0.0, "bonus for entropy on the tokens between the ret tags")
    level: str = option("token", "mean over all tokens, or over outputs", choices=("token", "sequence"))
    fill: int = option(8, "sample until this many groups of an update teach something (outcome mode has a "
                       "group for each prompt, and hardly ever samples twice) ...")
    tries: int = option(4, "... but at most this many times; 1 samples once", least=1)
    updates: int = option(1, "passes over a batch of samples; above 1 the clip matters", least=1)
    tokens: int = option(2048, "token budget of a micro-batch of the update: prompts and outputs", least=1)
    lora_rank: int = option(0, "train an adapter of this rank instead of all weights; 0 trains all")
    lora_alpha: float = option(32.0, "the adapter is scaled by alpha / rank")
    drop: tuple = option((), "offline: rows to leave out", nargs="*",
                         choices=("no_picture", "repeats", "no_information"))


class Offline:
    """The released recipe: step prompts with gold history from step files, nothing is retrieved."""

    def __init__(self, o, run, router, rows):
        self.o, self.run, self.router = o, run, router
        self.steps = [step for row in rows for step in row]
        self.place = {id(s): str(i) for i, s in enumerate(self.steps)}
        queries = [s.answer["query"] for s in self.steps if s.kind == "ret"]
        self.encoder, _ = load_encoder(o.encoder).fitted([{"text": q} for q in queries])
        self.interest = Interest(o.rest, run.state.setdefault("interest", {}))

    def sample(self, rng):
        o, place = self.o, self.place
        chosen = balanced(o, self.steps, gold_label, lambda s: place[id(s)], self.interest, rng)
        outputs = self.router.sample([s.conversation() for s in chosen], self.run.generator, o.group)
        before, groups = self.run.now(), []
        scored = score(o, [(c, [s.as_published()]) for s, (_, cs) in zip(chosen, outputs) for c in cs], self.encoder)
        spent = self.run.now() - before
        for s, (ids, candidates) in zip(chosen, outputs):
            parts = [scored.pop(0) for _ in candidates]
            if candidates:
                rewards = [p.total for p in parts]
                groups.append(Group(s.conversation(), ids, candidates, rewards, parts, gold_label(s), [s.answer]))
                self.interest.learn(place[id(s)], groups[-1].solved)
        return groups, {"too_long": len(chosen) - len(groups), "reward_s": spent}


def score(o, asked, encoder):
    """Rewards of (candidate, [gold steps that would be right]): each by the gold step nearest to it. One call of the
    encoder for all."""
    options = RewardOptions(o.form, o.similarity_weight, o.route_weight, o.answer_rule, o.price)
    pairs = [(c.text, gold) for c, golds in asked for gold in golds]
    similarity = similarity_table([t for t, _ in pairs], [g for _, g in pairs], encoder.encode_queries, o.form)
    nearest = lambda rewards: max(rewards, key=lambda r: (r.similarity or 0.0, r.total))
    return [nearest([step_reward(c.text, gold, similarity, options) for gold in golds]) for c, golds in asked]


def base_of(hop):
    """The gold base of a hop as labels have it: "text retriever", ..."""
    return hop["retriever"].strip().lower()


def nearest_hops(o, asked, encoder):
    """The gold hop that each sub-question stands for: the nearest in meaning of those still open, None where none is
    as near as --match. asked: list of (sub-question, open hops). One call of the encoder for all."""
    texts = [text for query, hops in asked for text in (query, *(h["query"] for h in hops))]
    vectors, found = iter(torch.as_tensor(encoder.encode_queries(texts)) if texts else ()), []
    for _, hops in asked:
        own = next(vectors)                                               # (dim,)
        near = [(float(own @ next(vectors)), i) for i in range(len(hops))]
        best, i = max(near, default=(0.0, None))
        found.append(hops[i] if best >= o.match else None)
    return found


def ready(hops):
    """The open hops that can be asked for by now: no answer that another one has yet to find is part of their query.
    Who asks for such an answer all the same has made it up."""
    names = lambda query, answer: re.search(rf"(?<!\w){re.escape(str(answer))}(?!\w)", query)
    return [hop for hop in hops if not any(names(hop["query"], h["answer"]) for h in hops if h is not hop)] or hops


class Live:
    """A question under way: where its trajectory stands, and which of its gold hops are still open."""

    def __init__(self, question, number, only_ready=False):
        self.q, self.row, self.number, self.only_ready = question, question.row, number, only_ready
        self.open, self.asked, self.said = list(question.row["hops"]), None, []

    @property
    def measure(self):
        """The hops that a sub-question is measured by."""
        return ready(self.open) if self.only_ready else self.open

    @property
    def request(self):
        return self.q.request

    def golds(self):
        """The gold steps that would be right now, as a published file has them; [] where nothing can be judged."""
        if self.request.kind == "final":
            return [{"step_type": "ans", "answer": golds_of(self.row)}]
        if self.request.kind == "answer":
            return [{"step_type": "ans", "answer": self.asked["answer"]}] if self.asked else []
        hops = self.measure or [{"query": "none", "retriever": "none"}]
        return [{"step_type": "ret", "answer": {"query": h["query"], "retriever": [h["retriever"]]}} for h in hops]

    def label(self):
        if self.request.kind != "route":
            return "answer"
        return base_of(self.measure[0]) if self.open else "none"

    def key(self):
        return f"{self.row.get('kind')} {self.request.kind} {len(self.open)}"

    def go_on(self, step):
        """Follow one candidate. A hop is closed once it was asked for and answered rightly."""
        self.said.append(step.candidates[step.followed].text if step.candidates else None)
        if step.kind == "answer" and self.asked and answer_reward(step.answer, self.asked["answer"]) == 1:
            self.open.remove(self.asked)
        self.q.go_on(step)


def go_on(o, followed, encoder):
    """Trajectories go on, each with the step that is followed; their sub-questions are matched with the open hops in
    one call. followed: list of (Live, infer.Step)."""
    routed = [(x, step) for x, step in followed if step.route]
    hops = nearest_hops(o, [(step.parsed.query, x.measure) for x, step in routed], encoder)
    for (x, _), hop in zip(routed, hops):
        x.asked = hop
    for x, step in followed:
        x.go_on(step)


class Online:
    """Live trajectories: G candidates for each step from one history, one is followed, its own evidence enters the next
    prompt."""

    def __init__(self, o, run, router, rows):
        self.o, self.run, self.router, self.rows = o, run, router, rows
        self.encoder = router.bases["text"].encoder
        self.interest = Interest(o.rest, run.state.setdefault("interest", {}))
        self.by_first = {}
        for i, row in enumerate(self.rows):
            self.by_first.setdefault(base_of(row["hops"][0]) if row["hops"] else "none", []).append(i)
        self.serial = 0
        self.live = [self.replay(number, said) for number, said in run.state.get("live", [])]

    def start(self, number):
        self.serial += 1
        return Live(self.router.open(self.serial, self.rows[number]), number, self.o.ready)

    def replay(self, number, said):
        """Bring a trajectory to where a checkpoint left it: the same outputs are followed, what they asked for is
        searched again."""
        x = self.start(number)
        for text in said:
            candidates = () if text is None else (Candidate(text, (), (), parse_step(text)),)
            go_on(self.o, [(x, self.router.step(x.q, (), candidates, 0))], self.encoder)
            if isinstance(x.request, Search):
                self.router.search([x.q])
        return x

    def new_question(self, rng):
        """Questions are drawn so that first steps, too, are even over the routes."""
        pool = self.by_first[rng.choice(sorted(self.by_first))] if self.o.balance else range(len(self.rows))
        first = lambda i: f"{self.rows[i].get('kind')} route {len(self.rows[i]['hops'])}"
        return self.start(self.interest.choose(rng.sample(pool, min(4, len(pool))), 1, first, rng)[0])

    def sample(self, rng):
        o = self.o
        while len(self.live) < o.open_questions:
            self.live.append(self.new_question(rng))
        judged = [x for x in self.live if x.golds()]
        chosen = balanced(o, judged, Live.label, Live.key, self.interest, rng)
        taken = set(map(id, chosen))
        # answers that were not drawn are read on with one sample, without training
        passed = [x for x in self.live if id(x) not in taken and x.request.kind != "route"]
        self.reward_s, self.read_on = 0.0, 0
        groups = self.advance(chosen, o.group, rng) + self.advance(passed, 1, rng)
        self.router.search([x.q for x in self.live if isinstance(x.request, Search)])
        self.live = [x for x in self.live if x.request is not None]
        self.run.state["live"] = [(x.number, x.said) for x in self.live]
        return groups, {"too_long": len(chosen) - len(groups), "reward_s": self.reward_s, "read_on": self.read_on}

    def advance(self, states, n, rng):
        """Sample n candidates for each state, score them, follow one. Returns the groups where n > 1."""
        o, groups, followed = self.o, [], []
        outputs = self.router.sample([x.q.conversation(self.router.prompts) for x in states], self.run.generator, n)
        before = self.run.now()
        asked = [(c, x.golds()) for x, (_, cs) in zip(states, outputs) for c in cs if n > 1]
        scored = score(o, asked, self.encoder)
        self.reward_s += self.run.now() - before
        for x, (ids, candidates) in zip(states, outputs):
            parts = [scored.pop(0) for _ in candidates] if n > 1 else []
            chosen = rng.randrange(max(1, len(candidates)))
            if o.follow == "best" and parts:
                chosen = max(range(len(parts)), key=lambda i: parts[i].total)
            step = self.router.step(x.q, ids, candidates, chosen)
            if n == 1:
                self.read_on += sum(len(c.token_ids) for c in candidates)
            if parts:
                rewards = [p.total for p in parts]
                golds = [gold["answer"] for gold in x.golds()]
                groups.append(Group(step.conversation, ids, candidates, rewards, parts, x.label(), golds))
                self.interest.learn(x.key(), groups[-1].solved)
            followed.append((x, step))
        go_on(o, followed, self.encoder)
        return groups


class Outcome:
    """Trajectory-level GRPO: G trajectories of a question are the group, the recall of the final answer is the only
    reward."""

    def __init__(self, o, run, router, rows):
        self.o, self.run, self.router, self.rows = o, run, router, rows
        self.interest = Interest(o.rest, run.state.setdefault("interest", {}))
        self.by_routes = {}
        for row in self.rows:
            self.by_routes.setdefault(" ".join(base_of(h) for h in row["hops"]), []).append(row)

    def sample(self, rng):
        o = self.o
        pools = [self.by_routes[rng.choice(sorted(self.by_routes))] if o.balance else self.rows
                 for _ in range(o.questions)]
        kind = lambda row: str(row.get("kind"))
        rows = [self.interest.choose(rng.sample(pool, min(4, len(pool))), 1, kind, rng)[0] for pool in pools]
        done = self.router.run([row for row in rows for _ in range(o.group)], generator=self.run.generator)
        before = self.run.now()
        rewards = [0.0 if t.malformed else answer_scores(t.answer, golds_of(t.row))[1] for t in done]
        spent = self.run.now() - before
        same_question = torch.arange(len(rows)).repeat_interleave(o.group)
        advantages = group_advantages(torch.tensor(rewards), same_question, o.scale)                        # Eq. 3
        groups = []
        for i in range(0, len(done), o.group):
            groups += self.by_prompt(done[i:i + o.group], rewards[i:], advantages[i:].tolist())
            self.interest.learn(kind(done[i].row), min(rewards[i:i + o.group]) == 1)
        mean = lambda values: sum(values) / len(done)
        return groups, {"reward": mean(rewards), "retrievals": mean(t.retrievals for t in done),
                        "malformed": mean(t.malformed > 0 for t in done), "too_long": sum(t.too_long for t in done),
                        "reward_s": spent}

    def by_prompt(self, trajectories, rewards, advantages):
        """The steps of a question's trajectories as groups to update: those that answered the same prompt together.
        Every step carries the reward and the advantage of its trajectory."""
        same = {}
        for t, r, a in zip(trajectories, rewards, advantages):
            for s in (s for s in t.steps if s.candidates):
                same.setdefault((s.prompt_ids, str(t.row.get("image"))), []).append((s, r, a))
        groups = []
        for (ids, _), members in same.items():
            steps, rewards, advantages = zip(*members)
            groups.append(Group(steps[0].conversation, ids, tuple(s.candidates[0] for s in steps), list(rewards), [],
                                "outcome", golds_of(trajectories[0].row), torch.tensor(advantages)))
        return groups


def practice_rows(world):
    """The questions of a world with gold hops."""
    rows, faults = load_questions(Path(world) / "questions.jsonl")
    if faults or any(row.get("hops") is None for row in rows):
        why = faults[0] if faults else "questions without gold hops cannot be rewarded step by step"
        raise ValueError(f"--world {world}: {why}")
    if wrong := [row for row in rows if not all(isinstance(hop.get("answer"), str) for hop in row["hops"])]:
        raise ValueError(f"--world {world}: questions.jsonl:{wrong[0]['line']}: a hop without 'answer', a text")
    return rows


def route_tokens(processor, candidate):
    """True at the tokens between <ret> and </ret>: where the route is chosen."""
    pieces = [processor.decode([i]) for i in candidate.token_ids]
    text = "".join(pieces)
    start, end = text.find("<ret>"), text.find("</ret>")
    place, inside = 0, []
    for piece in pieces:
        inside.append(0 <= start and start + len("<ret>") <= place < end)
        place += len(piece)
    return inside


def pack(processor, groups, device, entropy):
    """Groups -> the inputs of model.group_log_probs, and old log-probabilities, advantages and route tokens of the
    same shape.

    Groups of different sizes (outcome mode) are filled up with empty responses, which the mask keeps out.
    """
    batch = processor([g.conversation for g in groups])
    n, L = max(len(g.candidates) for g in groups), max(len(c.token_ids) for g in groups for c in g.candidates)
    tokens = torch.zeros(len(groups), n, L, dtype=torch.long)
    mask, route = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens, dtype=torch.bool)
    old, advantages = torch.zeros(len(groups), n, L), torch.zeros(len(groups), n)
    for i, g in enumerate(groups):
        advantages[i, :len(g.candidates)] = g.advantages
        for j, c in enumerate(g.candidates):
            m = len(c.token_ids)
            tokens[i, j, :m], mask[i, j, :m], old[i, j, :m] = torch.tensor(c.token_ids), True, torch.tensor(c.logps)
            if entropy:
                route[i, j, :m] = torch.tensor(route_tokens(processor, c))
    flat = lambda x: x.flatten(0, 1).to(device)
    batch = {k: None if v is None else v.to(device) for k, v in batch.items()}
    return {"tokens": flat(tokens), "mask": flat(mask), **batch}, flat(old), flat(advantages), flat(route)


def accumulate(o, model, reference, processor, groups):
    """Gradient of one update over all groups, micro-batch by micro-batch. Returns the metrics of the whole.

    Every rank knows all groups and takes its share. All make equally many passes: one that is through earlier goes on
    with the smallest group at weight 0.
    """
    total = sum(len(c.token_ids) if o.level == "token" else 1 for g in groups for c in g.candidates)
    groups, sums, ratios = sorted(groups, key=lambda g: g.size), Counter(), []
    shares = [in_budget(groups[r::ranks()], lambda g: g.size, o.tokens) for r in range(ranks())]
    expect_pictures(model, any(g.picture for g in groups))
    for i in range(max(map(len, shares))):
        mine = i < len(shares[rank()])
        part = shares[rank()][i] if mine else groups[:1]
        inputs, old, advantages, route = pack(processor, part, o.device, o.entropy_coef > 0)
        logp, entropy = model.group_log_probs(**inputs, temperature=o.temperature,
                                              entropy="grad" if o.entropy_coef else True)
        ref = None
        if o.kl_coef:
            with torch.no_grad(), reference(model) as ref_model:
                ref = ref_model.group_log_probs(**inputs, temperature=o.temperature)
        loss, metrics = grpo_loss(logp, old, advantages, inputs["mask"], ref_logp=ref, clip=o.clip,
                                  clip_high=o.clip_high or None, kl_coef=o.kl_coef, level=o.level, normalizer=total)
        if o.entropy_coef:
            loss = loss - o.entropy_coef * (entropy * route).sum() / total
        (loss * (ranks() * mine)).backward()                              # FSDP takes the mean over ranks
        if not mine:
            continue
        share = int(inputs["mask"].sum())
        measured = {"kl": metrics["kl"]} if o.kl_coef else {}
        sums.update({"loss": loss.item(), **measured, "entropy": entropy.sum().item(), "tokens": share,
                     "clip_fraction": metrics["clip_fraction"] * share})
        ratios += metrics["ratio_min"], metrics["ratio_max"]
    every = gather((sums, ratios))
    sums, ratios = Counter(), [r for _, some in every for r in some]
    for one, _ in every:
        sums.update(one)                                                  # adds
    tokens = sums.pop("tokens")
    return {**sums, "entropy": sums["entropy"] / tokens, "clip_fraction": sums["clip_fraction"] / tokens,
            "ratio_min": min(ratios), "ratio_max": max(ratios)}


def sample(o, source, step):
    """Groups for an update, with their advantages, and what was counted.

    Sampling goes on until `fill` groups teach something, at most `tries` times (dynamic sampling, DAPO, 2503.14476).
    Near the end of training one group in twenty does; and since Adam takes a step of the same size however few groups
    it is made of, updates from one or two of them are noise that wears down what was learned.
    """
    groups, found = [], []
    for i in range(o.tries):
        some, counts = source.sample(random.Random(f"{o.seed} {step} {i}"))
        if o.mode != "outcome":                                 # there the group is the question, not the step prompt
            for g in some:
                g.advantages = group_advantages(torch.tensor(g.rewards), torch.zeros(len(g.rewards)), o.scale)  # Eq. 3
        if not all(math.isfinite(p) for g in some for c in g.candidates for p in c.logps):
            raise FloatingPointError(f"step {step + 1}: the policy's probabilities are no numbers; the last good "
                                     f"checkpoint is {Path(o.out) / 'last'}; try a lower --learning-rate")
        groups += some
        found.append(counts)
        if sum(g.teaches for g in groups) >= o.fill:
            break
    if not groups:
        raise ValueError(f"step {step + 1}: no prompt was left to sample, {found[-1]['too_long']} were too long for "
                         "the model; lower --max-new-tokens or --k")
    total = {k: sum(counts[k] for counts in found) for k in found[0]}
    return groups, {k: v if k in ("too_long", "reward_s", "read_on") else v / len(found) for k, v in total.items()}


def grpo(o):
    """Step-GRPO on one screen: sample, reward, advantage, loss, update, log, save."""
    if idle := "--data" if o.data and o.mode != "offline" else "--world" if o.world and o.mode == "offline" else "":
        raise ValueError(f"{idle} does nothing beside --mode {o.mode}: step files are of --mode offline, a world of the "
                         "others")
    join_ranks(o.device)
    model, processor, _ = open_model(o)
    if o.lora_rank:
        add_lora(model, o.lora_rank, o.lora_alpha)
    prompts = prompts_in(o.model)
    with first_rank_first():
        world = o.world or embedded_world("train", "train", 0, 3000) if o.mode != "offline" else None
        bases = world_bases(world) if world else {base: None for base in BASES}
    router = RankRouter(model, processor, bases, prompts=prompts, k=o.k, max_steps=o.max_steps,
                        max_new_tokens=o.max_new_tokens, temperature=o.temperature, call_tokens=o.call_tokens)
    reference = reference_of(o, model)
    rows = practice_rows(world) if world else offline_rows(o)
    run = open_run(o, model, processor, prompts)
    source = {"offline": Offline, "online": Online, "outcome": Outcome}[o.mode](o, run, router, rows)
    for step in run.steps():
        clock = [run.now()]
        with run.whole():
            groups, counts = sample(o, source, step)                                # sample, reward, advantage
        clock.append(run.now())
        useful = [g for g in groups if g.teaches]
        passes = [accumulate(o, run.model, reference, processor, useful)            # loss (Eq. 4-6)
                  | run.update(step) for _ in range(o.updates if useful else 0)]    # update
        metrics = {k: sum(m[k] for m in passes) / len(passes) for k in (passes or [{}])[0]}
        clock.append(run.now())
        run.show(step, groups)
        outputs = [c.token_ids for g in groups for c in g.candidates]
        tokens, (began, sampled, updated) = sum(map(len, outputs)) + counts.pop("read_on", 0), clock
        run.state["tokens"] += tokens
        unfinished = sum(ids[-1] not in processor.eos_ids for ids in outputs)
        run.log({"step": step + 1, **reward_metrics(groups), **counts, **metrics, "groups": len(groups),
                 "outputs": len(outputs), "unfinished": unfinished, "tokens": tokens,
                 "tokens_s": tokens / (updated - began), "sample_s": sampled - began - counts["reward_s"],
                 "update_s": updated - sampled})                                    # log; run.steps saves


def prompts_in(folder):
    """The system prompts that a model directory was trained with; {} where it has none."""
    path = Path(folder) / "prompts.json"
    return load_prompts(path) if path.exists() else {}


def reference_of(o, model):
    """The reference policy of the KL term, as a context: the base with its adapter off, or a frozen copy of the start,
    whole on every rank."""
    if o.kl_coef and not o.lora_rank:
        frozen = copy.deepcopy(model).requires_grad_(False)
        return lambda _: nullcontext(frozen)
    return lora_disabled


@dataclass(frozen=True)
class ShowOptions(GrpoOptions):
    """Show one question as training sees it: the group of each step, its rewards and advantages. Nothing is trained."""
    question: int = option(0, "number of the question in the world's file")
    follow: str = option("best", "the candidate that the trajectory goes on with", choices=("random", "best"))


def show(o):
    """Print a trajectory with the whole group of every step: the arithmetic of Eq. 1 to 3 on real outputs."""
    model, processor, _ = open_model(o)
    world = o.world or embedded_world("train", "train", 0, 3000)
    rows, bases, prompts = practice_rows(world), world_bases(world), prompts_in(o.model)
    if o.question >= len(rows):
        raise ValueError(f"--question {o.question}: {world} has questions 0 to {len(rows) - 1}")
    router = Router(model, processor, bases, prompts=prompts, k=o.k, max_steps=o.max_steps, temperature=o.temperature,
                    max_new_tokens=o.max_new_tokens)
    rng, generator = random.Random(o.seed), torch.Generator(o.device).manual_seed(o.seed)
    x = Live(router.open(0, rows[o.question]), 0, o.ready)
    print(f"{x.row['question']}   gold: {' | '.join(map(str, golds_of(x.row)))}")
    while x.request is not None:
        (ids, candidates), = router.sample([x.q.conversation(router.prompts)], generator, o.group)
        print(f"\n{x.request.kind} step, {len(ids)} prompt tokens", end="")
        if not (golds := x.golds()):
            print(": a sub-question that no gold hop matches cannot be judged; one output is followed")
            go_on(o, [(x, router.step(x.q, ids, candidates, 0))], bases["text"].encoder)
        else:
            parts = score(o, [(c, golds) for c in candidates], bases["text"].encoder)
            rewards = [p.total for p in parts]
            advantages = group_advantages(torch.tensor(rewards), torch.zeros(len(parts)), o.scale).tolist()
            print(f", gold: {' | '.join(str(g['answer']) for g in golds)}")
            for c, p, a in zip(candidates, parts, advantages):
                kept = "  ".join(f"{k} {getattr(p, k):.2f}" for k in ("form", "similarity", "route", "answer")
                                 if getattr(p, k) is not None)
                print(f"  r {p.total:.3f}  A {a:+.3f}  {len(c.token_ids):2d} tokens  {kept}  {c.text}")
            best = rewards.index(max(rewards)) if o.follow == "best" else rng.randrange(len(parts))
            go_on(o, [(x, router.step(x.q, ids, candidates, best))], bases["text"].encoder)
        if isinstance(x.request, Search):
            router.search([x.q])
            for base, hits in x.request.evidence.items():
                print("".join(f"  evidence {hit.score:.3f}  {hit.text}\n" for hit in hits), end="")


@dataclass(frozen=True)
class ExportOptions:
    """Write a checkpoint of a run as a plain model directory; an adapter is merged into its base."""
    run: str = option("runs/run", "folder of the run")
    which: str = option("best", "the checkpoint with the best validation, or the last one", choices=("best", "last"))
    out: str = option("weights/mine", "model directory to write")
    dtype: str = option("float16", "type of the weights on disk", choices=("float32", "bfloat16", "float16"))


def export(o):
    """A checkpoint -> a model directory without optimizer, ready for infer.py and for transformers."""
    source = Path(o.run) / o.which
    if not source.exists():
        hint = "; without --val-every a run has only --which last" if o.which == "best" else ""
        raise ValueError(f"{source}: no such checkpoint{hint}")
    with reading_checkpoint(source):
        origin = Path(read_json(Path(o.run) / "options.json")["model"])
        step = read_json(source / "trainer.json")["step"]
    adapter = (source / "adapter_config.json").exists()
    model = VLM.from_pretrained(origin if adapter else source)
    if adapter:
        load_adapter(model, source)
        merge_lora(model)
    prompts = read_json(source / "prompts.json") if (source / "prompts.json").exists() else {}
    files = source if (source / "tokenizer.json").exists() else origin
    out = Path(os.path.realpath(o.out))
    if out.is_dir() and any(out.iterdir()) and not any((out / name).is_file() for name in MODEL_FILES[:2]):
        raise ValueError(f"--out {o.out}: holds other files and no model: name another place, nothing was overwritten")
    new = out.parent / f".{out.name}.new"
    shutil.rmtree(new, ignore_errors=True)                                         # of an export that was killed
    try:
        write_model(new, model, files, prompts, getattr(torch, o.dtype))
        put_model(new, out)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    size = sum(p.numel() for p in model.parameters())
    print(f"{o.out}: {size:,} weights in {o.dtype}, step {step} of {o.run}")


def put_model(new, out):
    """Rename a finished model directory to `out`. Where that holds something already, its files go there one by one,
    config.json last: without it a directory is refused, so that old and new files are never read together."""
    settle(*new.iterdir(), new)
    names = {file.name for file in new.iterdir()}
    if not out.is_dir() or not any(out.iterdir()):
        os.replace(new, out)
    else:
        for old in (out / "config.json", out / "prompts.json", *out.glob("model*.safetensors*")):
            old.unlink(missing_ok=True)
        for file in sorted(new.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, out / file.name)
        for old in (out / name for name in MODEL_FILES if name not in names):
            old.unlink(missing_ok=True)
        settle(out)
    settle(out.parent)


COMMANDS = {"sft": (SftOptions, sft), "grpo": (GrpoOptions, grpo), "show": (ShowOptions, show),
            "export": (ExportOptions, export)}


def main():
    name, *words = sys.argv[1:] or ["grpo"]            # without any word: Step-GRPO in the embedded world
    if name not in COMMANDS:
        print(f"usage: train.py {{{','.join(COMMANDS)}}} [options]; train.py sft --help lists them", file=sys.stderr)
        sys.exit(0 if name in ("-h", "--help") else 2)
    options, command = COMMANDS[name]
    code, o = 0, None
    try:
        o = parse_options(options, words)
        command(o)
    except (ValueError, OSError, FloatingPointError, SafetensorError) as e:
        if isinstance(e, OSError) and e.strerror and not e.filename:                 # a file that could not be written
            e = f"{o.out}: {e.strerror}: make room, and the same command goes on from the last checkpoint"
        sys.stderr.write(f"train.py: {printable(e)}\n")   # torchrun ends the others once one failed, so each says why
        code = 2
    except KeyboardInterrupt as stop:                  # before the first update, or in a command that is no training
        print("train.py: stopped; the same command continues from the last checkpoint", file=sys.stderr)
        code = code_of(stop)
    except SystemExit as e:                            # --help, or a signal that ended the run behind an update
        code = e.code or 0
    if dist.is_initialized():                          # all files are closed; the interpreter's teardown is left out,
        sys.stdout.flush(), sys.stderr.flush()         # since gloo's threads abort in it now and then
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    stop_on_sigterm()
    main()
