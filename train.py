"""Training: a supervised warm start (sft) and Step-GRPO (grpo), on one device or several.

What flows through this file:
    sft     step files -> prompts and target texts -> cross-entropy on the response tokens only
            -> AdamW -> checkpoints
    grpo    step prompts (from files, or from live trajectories) -> G outputs of each, a group
            -> rewards -> advantages -> clipped loss over the sampled tokens -> AdamW -> checkpoints
    show    one question as grpo sees it, printed
    export  a checkpoint as a plain model directory

Reading order: sft, then grpo (each on one screen), Online with parts/live.py and parts/groups.py
(Group; Interest: how often a kind of prompt is drawn), accumulate with parts/batches.py. A run (its
folder, optimizer, checkpoints) is plumbing/run.py, several GPUs (torchrun) are plumbing/ranks.py.

Legend of shapes
    B examples of a batch   T tokens of a row   N groups of a micro-batch
    n outputs of a group (G)   L tokens of a response   M tokens under the mask

Deviations from the paper and from the released code, with the reason
    * The warm start's targets carry a thought: published step files have none, so a step without
      one is trained with an empty thought.
    * A prompt that is too long is counted and left out. It is never cut: that loses the question.
    * Online mode samples the steps of live trajectories through the three bases; the released
      recipe (offline) asks prompts with gold history and retrieves nothing.
    * Step prompts are drawn evenly over their gold route (see `balanced`): as they come, a rare
      route dies out.
    * Groups without variance are left out of the update, with their KL and entropy terms, and
      prompts that are always solved are drawn less often.
    * Final answers alone are enough for --mode outcome, where credit goes by state (Eq. 7); the
      paper rewards steps by gold steps.
    * Every update samples anew; the released code cuts one rollout into several updates.
    * --recipe released takes the released settings: parts/recipes.py, docs/recipe.md.
"""
import copy
import math
import random
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import torch

from grpo import (RewardOptions, group_advantages, grpo_loss, similarity_table, state_advantages,
                  step_reward, token_weights)
from infer import Router, Search
from model import VLM
from parts.batches import Mixture, count_tokens, in_budget, make_batch, pack
from parts.chat import Processor
from parts.groups import (Group, Interest, balanced, groups_by_prompt, groups_of, mean_of,
                          nearness, outcome_reward, reward_metrics, states_of)
from parts.live import (Live, asked_last, check_hops, gold_base, nearest_hops,
                        practice_rows)
from parts.lora import add_lora, load_adapter, lora_disabled, merge_lora
from parts.modeldir import (keep_others, prompts_in, read_model, start_previous_token_head,
                            write_model)
from parts.pretrained import load_encoder
from parts.questions import embedded_world, golds_of
from parts.settings import ExportOptions, GrpoOptions, SftOptions, ShowOptions, complete
from parts.stepfiles import (clean_rows, is_step_file, offline_rows, read_sources,
                             steps_to_train_on, system_prompts)
from parts.steps import BASES, parse_step
from parts.trajectory import Candidate
from parts.validation import on_questions, on_steps
from plumbing.files import read_json, replacing, run_command
from plumbing.options import OneLineParser, add_flags, from_flags
from plumbing.ranks import (backward, expect_pictures, first_rank_first, gather, in_step,
                            join_ranks, leave_ranks, mine, tell, together, total)
from plumbing.run import DEFAULT_RATE, open_run, reading_checkpoint
from plumbing.weights import check_model, usable_device, use_threads
from retrieve import load_bases, world_bases


# ------------------------------------------------------------------------------ supervised training

def sft(o):
    """Supervised training: cross-entropy of the response tokens, nothing else."""
    join_ranks(o.device)
    model, processor, random_weights = load_model(o)
    o = with_rate(o, model)
    if o.previous_token_head and random_weights:
        start_previous_token_head(model)
    sources = read_sources(o.data)
    _, trajectories, _ = sources[0]
    longest = model.config.max_position_embeddings
    mixture = Mixture(sources, partial(count_tokens, processor), o.tokens, o.seed)
    with training_run(o, model, processor, system_prompts(trajectories)) as run:
        pool, place = run.state.setdefault("place", [0, 0])     # of the next batch
        batches = mixture.batches(pool)
        for number in run.updates():
            if place == len(batches):
                pool, place = pool + 1, 0
                batches = mixture.batches(pool)
            examples = batches[place]
            place += 1
            batch, mask, too_long = make_batch(processor, mine(examples), longest, o.device)
            own_targets = int(mask.sum())
            targets, pictures = total(own_targets, batch["pixel_values"] is not None)
            if not targets:
                raise ValueError(f"all {len(examples)} examples of a batch are longer than the "
                                 f"model's {longest} positions")
            expect_pictures(run.model, pictures > 0)

            logps = run.model.log_probs(targets_mask=mask, **batch)                 # (B, T - 1)
            loss = -logps.sum() / targets               # this rank's part of the batch's loss
            backward(loss)
            metrics = run.optimize(number)

            tokens = batch["input_ids"].numel() if own_targets else 0
            loss, tokens, too_long = total(loss.item(), tokens, too_long)
            run.state["tokens"] += tokens
            run.state["place"] = [pool, place]
            row = run.record({"step": number + 1, "loss": loss, "examples": len(examples),
                              "tokens": tokens, "too_long": too_long, **metrics})
            run.say(row)


# ---------------------------------------------------------------------------------------- Step-GRPO

def grpo(o):
    """Step-GRPO on one screen: sample, reward, advantage, loss, update, log, save."""
    join_ranks(o.device)
    model, processor, _ = load_model(o)
    o = with_rate(o, model)
    if o.lora_rank:
        add_lora(model, o.lora_rank, o.lora_alpha)
    prompts = prompts_in(o.model)
    if o.mode == "offline":
        rows, bases, opened = offline(o), dict.fromkeys(BASES), None
        prompts |= system_prompts(rows)
    else:
        rows, bases = practice(o)
        opened = bases if o.kb else None
    router = router_of(o, model, processor, bases, prompts, temperature=o.temperature)
    reference = reference_of(o, model)
    with training_run(o, model, processor, prompts, opened) as run:
        source = SOURCES[o.mode](o, run, router, rows)
        for number in run.updates():                    # which also validates and saves
            began = run.now()
            with run.whole():
                groups, counts = sample_groups(o, source, number)   # sample, reward, advantage
            sampled = run.now()
            useful = [group for group in groups if group.teaches]
            passes = []
            for _ in range(o.updates if useful else 0):
                measured = accumulate(o, run.model, reference, processor, useful)   # loss, Eq. 4-6
                passes.append(measured | run.optimize(number))                      # update
            updated = run.now()

            candidates = []
            for group in groups:
                candidates += group.candidates
            unfinished = sum(c.token_ids[-1] not in processor.eos_ids for c in candidates)
            tokens = sum(len(c.token_ids) for c in candidates) + counts.pop("untrained_tokens", 0)
            run.state["tokens"] += tokens
            row = run.record({                                                      # log
                "step": number + 1, **reward_metrics(groups), **counts, **mean_of(passes),
                "groups": len(groups), "outputs": len(candidates), "unfinished": unfinished,
                "tokens": tokens, "tokens_s": tokens / (updated - began),
                "sample_s": sampled - began - counts["reward_s"], "update_s": updated - sampled})
            run.say(row, without=("asked:", "prompts:", "mixed:"))
            useful_first = useful + [group for group in groups if not group.teaches]
            run.record_samples(number + 1, [group.as_row() for group in useful_first[:2]])


def sample_groups(o, source, number):
    """Groups for an update, with their advantages, and {metric: value} of the sampling.

    Sampling goes on until `fill` groups teach something, at most `tries` times (dynamic sampling,
    DAPO, 2503.14476). Near the end of training one group in twenty does; and since Adam takes a
    step of the same size however few groups it is made of, updates from one or two of them are
    noise that wears down what was learned.
    """
    groups, all_counts, mixed = [], [], 0
    for i in range(o.tries):
        new_groups, counts = source.groups(random.Random(f"{o.seed} {number} {i}"))
        for group in new_groups:
            if not group.finite:
                raise FloatingPointError(f"step {number + 1}: the policy's probabilities are no "
                                         f"numbers; the last good checkpoint is {o.out}/last; try "
                                         "a lower --learning-rate")
            if group.advantages is None:        # else it has those of its question
                set_advantages(o, group)
        groups += new_groups
        all_counts.append(counts)
        teaching = sum(group.teaches for group in new_groups)
        mixed += counts.get("mixed_questions", teaching)
        if mixed >= o.fill:
            break
    if not groups:
        raise ValueError(f"step {number + 1}: no prompt was left to sample, "
                         f"{counts['too_long']} were too long for the model; lower "
                         "--max-new-tokens or -k")
    metrics = mean_of(all_counts)
    add_up = {"too_long", "reward_s", "untrained_tokens", "mixed_questions"}
    for name in metrics.keys() & add_up:
        metrics[name] = sum(counts[name] for counts in all_counts)
    return groups, metrics


def set_advantages(o, group):
    rewards = torch.tensor(group.rewards)                                               # (n,)
    one_group = torch.zeros_like(rewards)
    group.advantages = group_advantages(rewards, one_group, o.scale, o.eps)             # Eq. 3


# --------------------------------------------------------------------------- where groups come from

class Offline:
    """The released recipe: step prompts with gold history from step files, nothing is retrieved."""

    def __init__(self, o, run, router, trajectories):
        self.o, self.run, self.router = o, run, router
        self.steps = []
        for steps in trajectories:
            self.steps += steps
        self.keys = {id(step): str(place) for place, step in enumerate(self.steps)}
        self.encoder = encoder_of(o, self.steps)
        self.interest = Interest(o.rest, run.state.setdefault("interest", {}))

    def key(self, step):
        return self.keys[id(step)]

    def groups(self, rng):
        o = self.o
        steps = balanced(o, self.steps, self.key, self.interest, rng)
        conversations = [step.conversation() for step in steps]
        outputs = self.router.sample(conversations, self.run.generator, o.group)
        groups, seconds = timed_groups(o, self.run, steps, outputs, self.encoder)
        for step, group in zip(steps, groups):
            if group is not None:
                self.interest.learn(self.key(step), group.solved)
        groups = [group for group in groups if group is not None]
        return groups, {"too_long": len(steps) - len(groups), "reward_s": seconds}


def encoder_of(o, steps):
    """The encoder that measures the similarity of sub-questions to those of steps of a file."""
    queries = [{"text": step.answer["query"]} for step in steps if step.kind == "ret"]
    encoder, _ = loaded_encoder(o.encoder).fitted(queries)
    return encoder


loaded_encoder = lru_cache(load_encoder)        # training and validation share one


def timed_groups(o, run, prompts, outputs, encoder):
    """Sampled outputs -> their groups, and the seconds that judging took."""
    start = run.now()
    groups = groups_of(prompts, outputs, partial(rewards_of, o, encoder))
    return groups, run.now() - start


def rewards_of(o, encoder, outputs):
    """The Rewards of [(output, gold steps)], Eq. 1 and 2, each by the gold step nearest to it. One
    call of the encoder measures all of them."""
    options = RewardOptions(o.form, o.similarity_weight, o.route_weight, o.answer_rule, o.price)
    texts, steps = [], []
    for output, golds in outputs:
        texts += [output] * len(golds)
        steps += golds
    similarity = similarity_table(texts, steps, encoder.encode_queries, o.form)

    rewards = []
    for output, golds in outputs:
        by_gold = [step_reward(output, gold, similarity, options) for gold in golds]
        rewards.append(max(by_gold, key=nearness))
    return rewards


class Online:
    """Live trajectories: G candidates for each step from one history, one is followed, its own
    evidence enters the next prompt."""

    def __init__(self, o, run, router, rows):
        self.o, self.run, self.router, self.rows = o, run, router, rows
        self.encoder = router.bases["text"].encoder
        self.interest = Interest(o.rest, run.state.setdefault("interest", {}))
        self.by_first_base = {}                 # gold base of the first hop -> numbers of questions
        for number, row in enumerate(rows):
            self.by_first_base.setdefault(gold_base(row["hops"]), []).append(number)
        self.opened = 0                         # how many questions so far
        self.reward_s = 0.0                     # seconds of judging
        self.untrained_tokens = 0               # sampled to go on, not to learn from
        self.under_way = []
        for number, outputs in run.state.get("live", []):
            self.under_way.append(self.replay(number, outputs))

    def start(self, number):
        self.opened += 1
        return Live(self.router, self.opened, number, self.rows[number], self.o.ready)

    def replay(self, number, outputs):
        """Brings a trajectory to where a checkpoint left it: the same outputs are followed, what
        they asked for is searched again. An output None: its prompt was too long."""
        live = self.start(number)
        for text in outputs:
            candidates = ()
            if text is not None:
                parsed = parse_step(text, self.o.several)
                candidates = (Candidate(text, token_ids=(), logps=(), parsed=parsed),)
            step = self.router.step(live.question, (), candidates, followed=0)
            self.follow([live], [step])
            self.search([live])
        return live

    def fill_up(self, rng):
        """Opens questions, even over their first bases, until enough are under way.

        Where prompts are balanced, each base that questions begin with gets its share of routing
        steps: what is missing is opened, and the oldest questions make room. A base without
        prompts of its own is voted down by the groups of the others within a few updates.
        """
        o, bases = self.o, sorted(self.by_first_base)
        labels = [live.label() for live in self.under_way if live.golds()]
        share = min(o.prompts, o.open_questions) // len(bases)
        for base in bases if o.balance else ():
            for _ in range(share - labels.count(base)):
                self.under_way.append(self.new_question(self.by_first_base[base], rng))
        while len(self.under_way) < o.open_questions:
            pool = range(len(self.rows))
            if o.balance:
                pool = self.by_first_base[rng.choice(bases)]
            self.under_way.append(self.new_question(pool, rng))
        self.under_way = self.under_way[-o.open_questions:]

    def new_question(self, pool, rng):
        """A question of those with these numbers; kinds that are always solved are rare."""
        some = rng.sample(pool, min(4, len(pool)))
        [number] = self.interest.choose(some, 1, self.first_key, rng)
        return self.start(number)

    def first_key(self, number):
        """The key of a question's first prompt."""
        row = self.rows[number]
        return f"{row.get('kind')} route {len(row['hops'])}"

    def groups(self, rng):
        o = self.o
        self.fill_up(rng)
        with_golds = [live for live in self.under_way if live.golds()]
        chosen = balanced(o, with_golds, Live.key, self.interest, rng)
        # of the others, routing steps wait, and the rest go on with one output, without training
        others = [live for live in self.under_way
                  if live not in chosen and live.request.kind != "route"]
        self.reward_s, self.untrained_tokens = 0.0, 0
        groups = self.advance(chosen, o.group, rng)
        self.advance(others, 1, rng)
        self.search(self.under_way)
        self.under_way = [live for live in self.under_way if live.request is not None]
        self.run.state["live"] = [(live.number, live.outputs) for live in self.under_way]
        return groups, {"too_long": len(chosen) - len(groups), "reward_s": self.reward_s,
                        "untrained_tokens": self.untrained_tokens}

    def advance(self, questions, n, rng):
        """Samples n outputs for each question, follows one. Returns the groups; none if n = 1."""
        conversations = [live.conversation() for live in questions]
        outputs = self.router.sample(conversations, self.run.generator, n)
        groups = [None] * len(questions)
        if n > 1:
            groups, seconds = timed_groups(self.o, self.run, questions, outputs, self.encoder)
            self.reward_s += seconds
        steps = []
        for live, (prompt_ids, candidates), group in zip(questions, outputs, groups):
            choice = rng.randrange(max(1, len(candidates)))
            if group is None:
                self.untrained_tokens += sum(len(candidate.token_ids) for candidate in candidates)
            else:
                self.interest.learn(live.key(), group.solved)
                if self.o.follow == "best":
                    choice = group.rewards.index(max(group.rewards))
            steps.append(self.router.step(live.question, prompt_ids, candidates, choice))
        self.follow(questions, steps)
        return [group for group in groups if group is not None]

    def follow(self, questions, steps):
        """The questions go on, each with its step; one call of the encoder matches all their
        sub-questions with open hops."""
        routed, queries_and_hops = [], []
        for live, step in zip(questions, steps):
            if step.route:
                routed.append(live)
                hops = asked_last(live.hops(), step.parsed.names)
                queries_and_hops.append((step.parsed.query, hops))
        hops = nearest_hops(queries_and_hops, self.o.match, self.encoder)
        for live, hop in zip(routed, hops):
            live.hop = hop
        for live, step in zip(questions, steps):
            live.follow(step)

    def search(self, questions):
        """Those questions that wait for evidence get it."""
        waiting = [live.question for live in questions if isinstance(live.request, Search)]
        self.router.search(waiting)


class Outcome:
    """Whole trajectories, G of a question, and the recall of its final answer as the only reward:
    nothing else of the question is read. Credit by state compares steps that answered the same
    prompt (Eq. 7); by trajectory, all steps share the advantage of their trajectory (Eq. 3)."""

    def __init__(self, o, run, router, rows):
        self.o, self.run, self.router, self.rows = o, run, router, rows
        self.interest = Interest(o.rest, run.state.setdefault("interest", {}))
        self.by_routes = {}                     # gold bases of all hops -> rows
        if o.balance and any(row.get("hops") is None for row in rows):
            tell("not every question has gold hops: questions are drawn as they come (--balance "
                 "needs the routes of all)")
        elif o.balance:
            for row in rows:
                routes = " ".join(gold_base([hop]) for hop in row["hops"])
                self.by_routes.setdefault(routes, []).append(row)

    def key(self, row):
        """Of questions without a kind each is its own."""
        return str(row.get("kind") or f"{row.get('file')}:{row.get('line')}")

    def draw(self, rng):
        """The questions of an update, evenly over their routes where these are known."""
        pools, rows = [self.rows] * self.o.questions, []
        if self.by_routes:
            names = sorted(self.by_routes)
            pools = [self.by_routes[rng.choice(names)] for _ in pools]
        for pool in pools:
            some = rng.sample(pool, min(4, len(pool)))
            rows += self.interest.choose(some, 1, self.key, rng)
        return rows

    def groups(self, rng):
        return self.ask(self.draw(rng))

    def ask(self, rows):
        """G trajectories of each question -> their steps as groups, with advantages, and counts."""
        G = self.o.group
        repeated = [row for row in rows for _ in range(G)]
        trajectories = self.router.run(repeated, generator=self.run.generator)
        start = self.run.now()
        rewards = [outcome_reward(trajectory) for trajectory in trajectories]
        seconds = self.run.now() - start
        groups, mixed = [], 0
        for first in range(0, len(trajectories), G):
            own, R = trajectories[first:first + G], rewards[first:first + G]
            groups += groups_by_prompt(own, R, self.advantages(own, R))
            mixed += max(R) > min(R)
            self.interest.learn(self.key(own[0].row), min(R) == 1)
        count = len(trajectories)
        return groups, {"reward": sum(rewards) / count, "mixed_questions": mixed,
                        "retrievals": sum(t.retrievals for t in trajectories) / count,
                        "malformed": sum(t.malformed > 0 for t in trajectories) / count,
                        "too_long": sum(t.too_long for t in trajectories), "reward_s": seconds}

    def advantages(self, trajectories, rewards):
        """For each trajectory of a question the advantages of its steps."""
        o = self.o
        if o.credit == "state":
            return state_advantages(rewards, states_of(trajectories), o.scale, o.eps)   # Eq. 7
        rewards = torch.tensor(rewards)
        of_trajectories = group_advantages(rewards, torch.zeros_like(rewards), o.scale, o.eps)
        return [A.expand(len(t.steps)) for A, t in zip(of_trajectories, trajectories)]  # Eq. 3


SOURCES = {"offline": Offline, "online": Online, "outcome": Outcome}


# --------------------------------------------------------------------------------------- the update

def accumulate(o, model, reference, processor, groups):
    """The gradient of one update over all groups, micro-batch by micro-batch. Returns its metrics.
    Every rank knows all groups and takes its share."""
    tokens = sum(group.output_tokens() for group in groups)
    outputs = sum(len(group.candidates) for group in groups)
    normalizer = tokens if o.level == "token" else outputs
    groups = sorted(groups, key=Group.size)
    expect_pictures(model, any(group.has_picture() for group in groups))
    batches = in_budget(mine(groups), Group.size, o.tokens)
    entropy_on = o.entropy_on if o.entropy_coef else None
    loss_sum = kl_sum = entropy_sum = clipped_sum = 0.0
    ratio_min, ratio_max = math.inf, -math.inf
    for batch, weight in in_step(batches, groups[:1]):      # weight 0: other ranks have one more
        inputs, old, advantages, bonus = pack(processor, batch, o.device, entropy_on)
        mask = inputs["mask"]                                                       # (N n, L)
        logp, entropy = model.group_log_probs(**inputs, temperature=o.temperature,
                                              entropy="grad" if o.entropy_coef else "value")
        ref = None
        if o.kl_coef:
            with torch.no_grad(), reference(model) as ref_model:
                ref = ref_model.group_log_probs(**inputs, temperature=o.temperature)
        loss, metrics = grpo_loss(logp, old, advantages, mask, ref_logp=ref, clip=o.clip,
                                  clip_high=o.clip_high or None, kl_coef=o.kl_coef,
                                  level=o.level, normalizer=normalizer)
        if o.entropy_coef:
            share = token_weights(mask, o.level, normalizer)                        # (M,)
            loss = loss - o.entropy_coef * (share * (entropy * bonus)[mask]).sum()
        backward(loss, weight)
        if weight:
            loss_sum += loss.item()
            kl_sum += metrics.get("kl", 0.0)
            entropy_sum += entropy.sum().item()
            clipped_sum += metrics["clip_fraction"] * int(mask.sum())
            ratio_min = min(ratio_min, metrics["ratio_min"])
            ratio_max = max(ratio_max, metrics["ratio_max"])
    loss_sum, kl_sum, entropy_sum, clipped_sum = total(loss_sum, kl_sum, entropy_sum, clipped_sum)
    kl = {"kl": kl_sum} if o.kl_coef else {}
    return {"loss": loss_sum, **kl, "entropy": entropy_sum / tokens,
            "clip_fraction": clipped_sum / tokens,
            "ratio_min": min(gather(ratio_min)), "ratio_max": max(gather(ratio_max))}


def reference_of(o, model):
    """reference(model) -> the reference policy of the KL term, as a context: the model with its
    adapter off, or a frozen copy of the start, whole on every rank."""
    if not o.kl_coef or o.lora_rank:
        return lora_disabled
    frozen = copy.deepcopy(model).requires_grad_(False)

    def reference(model):
        return nullcontext(frozen)
    return reference


# ---------------------------------------------------------------------------- models, worlds, a run

class RankRouter(Router):
    """A router whose model calls are dealt out to the ranks. All draw the noise of all, so the
    outputs are the same for any number of ranks."""

    def sample(self, conversations, generator, n=None):
        noise = self.noise(conversations, generator, n)
        return together(super().sample(mine(conversations), generator, n, mine(noise)))


def router_of(o, model, processor, bases, prompts=None, **more):
    """A router with the options of this training; in sft, which has none, with the defaults."""
    if isinstance(o, GrpoOptions):
        more |= {name: getattr(o, name)
                 for name in ("k", "max_steps", "max_new_tokens", "call_tokens", "lower_case",
                              "several")}
    return RankRouter(model, processor, bases, prompts=prompts, **more)


LARGE = 100e6               # weights of a model for which a learning rate must be named


def load_model(o):
    """The model, its processor, and whether its weights are random: a directory without weights."""
    path, dtype = Path(o.model), getattr(torch, o.dtype)
    if not path.is_dir():
        raise ValueError(f"--model {path}: no such directory")
    check_model(path, weights=False)
    usable_device(o.device)
    random_weights = not any(path.glob("*.safetensors"))
    if random_weights:
        model = VLM.from_config(path, o.seed, dtype, o.device)
    else:
        model = VLM.from_pretrained(path, dtype, o.device)
    use_threads(o.threads, model)
    model.model.gradient_checkpointing = o.checkpointing
    return model, Processor.from_pretrained(path), random_weights


def practice(o):
    """The questions to practise on, and the bases that they are asked of: of one's own, or those of
    a world."""
    if o.kb and o.world:
        raise ValueError("--world does nothing beside --kb: the questions are those of --data")
    if o.kb and not o.data:
        raise ValueError("--kb names bases: give --data with the questions to practise on")
    with first_rank_first():
        if o.kb:
            bases = own_bases(o)
        else:
            world = o.world or embedded_world("train", "train", 0, 3000)
            bases = world_bases(world)
    if o.data:
        for file in o.data:
            if is_step_file(file):
                raise ValueError(f"--data {file} holds steps, on which --mode offline trains: give "
                                 "questions")
        rows = practice_rows(o.data, o.images or None)
    else:
        rows = practice_rows([Path(world) / "questions.jsonl"])
    if o.mode == "online":
        check_hops(rows)
    return rows, bases


def own_bases(o):
    """The bases of --kb: the router needs all three."""
    bases = load_bases(o.kb)
    for name in BASES:
        if name not in bases:
            raise ValueError(f"--kb: the router needs the knowledge base {name!r}, too: give "
                             f"{name}=DIR")
    return bases


def offline(o):
    """The trajectories of the step files that --data names."""
    if o.world:
        raise ValueError("--world does nothing beside --mode offline: give --data step files")
    if o.kb and not o.val:
        raise ValueError("--kb does nothing beside --mode offline, but for questions of --val")
    return offline_rows(o.data, o.drop)


def training_run(o, model, processor, prompts, bases=None):
    """The folder of a run of this model, new or continued, as a context. bases: those of --kb,
    where they are open already."""
    if o.val and not o.val_every:
        raise ValueError(f"--val {o.val} does nothing with --val-every 0: give a number of updates")
    own_data = o.kb or isinstance(o, GrpoOptions) and o.recipe
    if o.val_every and own_data and not (o.val or o.val_world):
        tell("nothing is validated, and no best checkpoint chosen: name a file with --val")
        o = replace(o, val_every=0)
    validate, best_by = None, None
    if o.val_every:
        validate, best_by = validation(o, processor, prompts, bases)
    save = partial(write_model, origin=o.model, prompts=prompts)
    return open_run(o, model, save=save, load=read_model, validate=validate, best_by=best_by)


def with_rate(o, model):
    """The options with a learning rate. ValueError where none is named and the default would
    destroy the model."""
    if o.learning_rate is not None:
        return o
    weights = sum(p.numel() for p in model.parameters())
    adapter = isinstance(o, GrpoOptions) and o.lora_rank > 0
    if weights > LARGE and not adapter:
        raise ValueError(f"--learning-rate: name one. The default, {DEFAULT_RATE:g}, is for models "
                         f"of a million weights, and all {weights:,} of this one are trained; the "
                         "released recipe has 1e-6")
    return replace(o, learning_rate=DEFAULT_RATE)


def validation(o, processor, prompts, bases):
    """(validate, the score that chooses the best checkpoint): on the steps or the questions of
    --val, or on the questions of a world. bases: those of --kb, where they are open already."""
    if o.val and is_step_file(o.val):
        if not isinstance(o, GrpoOptions) or o.mode != "offline":
            raise ValueError(f"--val {o.val} holds steps, which are judged in train.py grpo --mode "
                             "offline alone: give it questions")
        if o.kb or o.val_world:
            raise ValueError(f"--kb and --val-world do nothing beside --val {o.val}, which holds "
                             "steps: leave them out")
        rows, odd = clean_rows(steps_to_train_on(o.val), ())
        if odd["no_picture"]:
            tell(f"--val {o.val}: left out {odd['no_picture']} rows whose picture is missing")
        steps = [step for row in rows[:o.val_questions] for step in row]
        rewards = partial(rewards_of, o, encoder_of(o, steps))
        make_router = partial(router_of, o, processor=processor, bases=dict.fromkeys(BASES))
        return on_steps(make_router, steps, rewards), "reward"

    if o.val and not (o.kb or o.val_world):
        raise ValueError(f"--val {o.val} holds questions: name the bases that they are asked of "
                         "with --kb or --val-world")
    if o.val and o.kb and o.val_world:
        raise ValueError("--val-world does nothing beside --val and --kb: leave one of them out")
    with first_rank_first():
        if o.val and o.kb:
            bases = bases or own_bases(o)
        else:
            world = Path(o.val_world or embedded_world("val", "val", 0, 260))
            bases = world_bases(world)
    if o.val:
        rows = practice_rows([o.val], o.images or None, o.val_questions)
    else:
        rows = practice_rows([world / "questions.jsonl"], limit=o.val_questions)
    make_router = partial(router_of, o, processor=processor, bases=bases, prompts=prompts)
    return on_questions(make_router, rows), "f1_recall"


# ---------------------------------------------------------------------------------- show and export

def show(o):
    """Prints a trajectory with the whole group of every step, the arithmetic of Eq. 1 to 3 on real
    outputs; with --mode outcome the trajectories of a question by state (Eq. 7). No training."""
    if o.mode == "offline":
        raise ValueError("--mode offline has no trajectory to show: give online or outcome")
    model, processor, _ = load_model(o)
    rows, bases = practice(o)
    if o.question >= len(rows):
        raise ValueError(f"--question {o.question}: there are questions 0 to {len(rows) - 1}")
    router = router_of(o, model, processor, bases, prompts_in(o.model), temperature=o.temperature)
    generator = torch.Generator(o.device).manual_seed(o.seed)
    run = SimpleNamespace(state={}, generator=generator, now=time.time)     # what a source needs
    if o.mode == "outcome":
        show_states(o, Outcome(o, run, router, rows), rows[o.question])
        return
    source, rng = Online(o, run, router, rows), random.Random(o.seed)
    live = source.start(o.question)
    print(f"{live.row['question']}   gold: {' | '.join(map(str, golds_of(live.row)))}")
    while live.request is not None:
        kind = live.request.kind
        groups = source.advance([live], o.group if live.golds() else 1, rng)
        for group in groups:
            set_advantages(o, group)
            golds = " | ".join(map(str, group.golds))
            print(f"\n{kind} step, {len(group.prompt_ids)} prompt tokens, gold: {golds}")
            for line in group.lines():
                print(f"  {line}")
        if not groups:
            print(f"\n{kind} step: it cannot be judged, so one output is followed")
        if isinstance(live.request, Search):
            source.search([live])
            for hits in live.request.evidence.values():
                for hit in hits:
                    print(f"  evidence {hit.score:.3f}  {hit.text}")


def show_states(o, source, row):
    """Prints G trajectories of a question, state by state: the answers to a prompt, what the
    trajectory of each earned in the end (R), and the advantage that follows from it."""
    print(f"{row['question']}   gold: {' | '.join(map(str, golds_of(row)))}")
    groups, counts = source.ask([row])
    print(f"{o.group} trajectories, mean reward {counts['reward']:.3f}, credit by {o.credit}")
    shared = [group for group in groups if len(group.candidates) > 1]
    for group in shared:
        prompt = group.as_row()["prompt"].strip().replace("\n", " / ")
        print(f"\nstate, {len(group.candidates)} answered it: {shortened(prompt, 200)}")
        for line in group.lines():
            print(f"  {line}")
    print(f"\n{len(groups) - len(shared)} states that one trajectory alone came to")


def shortened(text, length):
    """A text, or its end where it is longer."""
    return text if len(text) <= length else f"… {text[-length:]}"


def export(o):
    """A checkpoint -> a model directory without optimizer, ready for infer.py and transformers."""
    source, out = Path(o.run) / o.which, Path(o.out)
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
    files = source if (source / "tokenizer.json").exists() else origin
    with replacing(out) as new:
        if out.is_dir():
            keep_others(out, new)
        write_model(new, model, files, prompts_in(source), getattr(torch, o.dtype))
    weights = sum(p.numel() for p in model.parameters())
    print(f"{o.out}: {weights:,} weights in {o.dtype}, step {step} of {o.run}")


# --------------------------------------------------------------------------------- the command line

COMMANDS = {"sft": (SftOptions, sft), "grpo": (GrpoOptions, grpo), "show": (ShowOptions, show),
            "export": (ExportOptions, export)}


def command(words):
    """One of COMMANDS with its flags; without any word, what the commands do."""
    name, *flags = words or ["--help"]
    if name in ("-h", "--help"):
        print("usage: train.py COMMAND [options]; train.py COMMAND --help lists them\n")
        for name, (options, _) in COMMANDS.items():
            print(f"  {name:8}{options.__doc__}")
        return
    if name not in COMMANDS:
        raise ValueError(f"{name}: no such command; usage: train.py {{{','.join(COMMANDS)}}}")
    options, function = COMMANDS[name]
    parser = OneLineParser(prog=f"train.py {name}", description=options.__doc__)
    add_flags(parser, options)
    args = parser.parse_args(flags)
    complete(vars(args))
    function(from_flags(options, args))


def main(argv=None):
    code = run_command("train.py", command, argv,
                       stopped="stopped; the same command continues from the last checkpoint")
    leave_ranks(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
