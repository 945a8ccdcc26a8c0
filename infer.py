"""R1-Router at work: a question and its picture go in, routed steps and an answer come out, many of them give a score.

    question, picture -> a method asks for a model call -> step prompt -> VLM.generate -> parse_step -> step or fault
                                or for a search         -> KnowledgeBase.search -> evidence -> the next prompt
                      -> Trajectory -> result row (JSONL) -> scores and costs -> table
                                                          -> steps to train on

In reading order: 1 the methods and the Router that advances many questions together, 2 result rows, and steps from
them, 3 files of questions, results and steps, 4 what people see, 5 the command line. The step language is in steps.py,
the metric in score.py.

Shapes: N prompts of a batch, G samples of a prompt, T prompt tokens, L new tokens.

Deviations from the paper and the released code, and why:
  * a malformed step is counted and shown, and asked again only if `retries` says so (released: five silent retries,
    then "none"); a malformed routing step ends the routing, and the final answer is asked with what is known;
  * greedy by default, seeded where sampled (released: temperature 1, unseeded);
  * a prompt that the model has no room for is counted and not asked; it is never cut, for a cut loses the question.
"""
import fcntl
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
import zlib
from collections import Counter, deque
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path

import torch
from PIL import Image

from encode import checksum
from model import VLM, Processor, inside, load_picture, read_json, usable_device
from retrieve import MAX_ROW, KnowledgeBase, OneLineParser, code_of, load_or_build, sole_writer, stop_on_sigterm
from score import (ROUTING, answer_scores, check_names, exact_match, gold_routes, golds_of, overview, plans_of,
                   predicted, print_results, printable, score_row, score_table, write_table, write_whole)
from steps import (BASE_OF, BASES, NONE, PREFIX, PROMPTS, ROUTES, AnswerStep, RouteStep, StepError,
                   answer_problem, conversation, final_problem, parse_step, render_answer, render_route, route_problem)

HERE = Path(__file__).resolve().parent

# ------------------------------------------------------------------------------------------------- 1 methods and Router

@dataclass(frozen=True)
class Ask:
    """What a method wants of the model: one step. It gets a Step back."""
    kind: str                                      # "route", "answer" or "final"
    problem: str
    prompt: str                                    # key of the system prompt
    query: str                                     # what was searched for, or the question
    evidence: dict = field(default_factory=dict)   # base -> hits that the problem quotes


@dataclass(frozen=True)
class Search:
    """What a method wants of the knowledge bases. It gets {base: tuple of Hit} back."""
    query: str
    bases: tuple
    k: int


# A method is a generator for one question, written as if that question were alone: it yields what it needs next and
# gets the reply. The Router runs many at once and batches what they ask for. The last step holds the final answer.

def routed(prefix, row, options):
    """The paper's loop: sub-question and route, evidence, intermediate answer, until None or `max_steps`.

    `prefix` of its system prompts: "" or "fewshot ", those with demonstrations. An exchange before the question,
    `former`, stands in the prompts as a sub-question that is already answered.
    """
    question, image, history = row["question"], row.get("image") is not None, list(row.get("former") or ())
    for _ in range(options.max_steps):
        step = yield Ask("route", route_problem(question, history, image), prefix + "route", question)
        if step.route in (None, NONE):  # malformed, or nothing more is needed
            break
        base = BASE_OF[step.route.lower()]
        read = yield from looked_up(step.parsed.query, (base,), options.k, image, prompt=prefix + "answer")
        history.append((step.parsed.query, read.answer))
    yield Ask("final", final_problem(question, history, image), prefix + "final", question)


def given_route(row, options):
    """The ceiling: gold sub-questions and routes; search and answers are live."""
    if row.get("hops") is None:
        raise ValueError(f"{row['question'][:60]!r} has no gold hops: method oracle needs them in the question file")
    question, image, history = row["question"], row.get("image") is not None, []
    for hop in row["hops"]:
        read = yield from looked_up(hop["query"], (BASE_OF[hop["retriever"].strip().lower()],), options.k, image)
        history.append((hop["query"], read.answer))
    yield Ask("final", final_problem(question, history, image), "final", question)


def looked_up(query, bases, k, image, question=None, prompt="answer"):
    """One search of the bases, and one answer from what they return to `question`, or else to the query itself.

    The reply is the answering step.
    """
    evidence = yield Search(query, bases, k)
    passages = {base: [hit.text for hit in hits] for base, hits in evidence.items()}
    return (yield Ask("answer", answer_problem(question or query, passages, image), prompt, query, evidence))


def read_once(bases, row, options):
    """The question itself goes once to each of the bases."""
    k = options.k if len(bases) == 1 else options.static_k
    return (yield from looked_up(in_full(row), bases, k, row.get("image") is not None))


def drafted(row, options):
    """Retrieval guided by a draft: the question goes to all bases, the model drafts an answer, and the question goes to
    them again together with the draft.

    Two rounds of Iter-RetGen (Shao et al. 2023, arXiv 2305.15294). IRCoT (Trivedi et al. 2023, arXiv 2212.10509) is of
    the same family; it searches with each sentence of a chain of thought. The last answer reads the second evidence
    alone, which is as much as `static` reads.
    """
    draft = yield from read_once(BASES, row, options)
    query = " ".join([in_full(row), getattr(draft.parsed, "thought", ""), draft.answer])
    yield from looked_up(query, BASES, options.static_k, row.get("image") is not None, in_full(row))


def in_full(row):
    """The question, behind the exchange before it if there was one: what is searched for where no step can rephrase."""
    return " ".join([*(text for pair in row.get("former") or () for text in pair), row["question"]])


def without_search(prompt, row, options):
    """The model alone."""
    problem = final_problem(row["question"], row.get("former") or (), row.get("image") is not None)
    yield Ask("final", problem, prompt, row["question"])


METHODS = {  # name -> (generator, bases that it needs)
    "router": (partial(routed, ""), BASES), "fewshot": (partial(routed, "fewshot "), BASES),
    "oracle": (given_route, BASES), "iterative": (drafted, BASES),
    "direct": (partial(without_search, "final"), ()), "cot": (partial(without_search, "cot"), ()),
    "static": (partial(read_once, BASES), BASES), **{base: (partial(read_once, (base,)), (base,)) for base in BASES}}


@dataclass(frozen=True)
class RouterOptions:
    """How questions are answered."""
    method: str = "router"      # a key of METHODS
    k: int = 2                  # passages of the base that a sub-question is routed to
    static_k: int | None = None  # passages of each base where all are asked at once: by default a third of k
    max_steps: int = 4          # sub-questions at most
    max_new_tokens: int = 96    # of a step
    temperature: float = 0.0    # 0 is greedy
    top_k: int = 0              # 0: no limit
    top_p: float = 1.0          # 1: no limit
    samples: int = 1            # candidates of a step, all from the same history
    follow: object = None       # (candidates, random.Random) -> index of the one to go on with; the first by default
    retries: int = 0            # times that a malformed step is asked again
    batch_size: int = 64        # prompts of a model call; four times as many questions are open at once
    call_tokens: int = 65536    # token budget of a model call: prompts, and room for all that may be written
    prompts: dict | None = None  # system prompts that replace those of PROMPTS
    shown: list | None = None   # trajectories of a step file (`load_steps`) that fewshot shows; by default our own
    seed: int = 0

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}: give one of {', '.join(METHODS)}")
        if self.static_k is None:
            object.__setattr__(self, "static_k", math.ceil(self.k / len(BASES)))  # the same evidence budget
        for name in ("k", "static_k", "max_steps", "max_new_tokens", "samples", "batch_size", "call_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least 1")
        if self.retries < 0:
            raise ValueError(f"retries is {self.retries}: give at least 0")
        if wrong := [name for name, prompt in (self.prompts or {}).items() if not isinstance(prompt, str)]:
            raise ValueError(f"the system prompt {wrong[0]!r} is no text")
        if not -2 ** 63 <= self.seed < 2 ** 63:
            raise ValueError(f"seed is {self.seed}: give a number of at most 18 digits")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}: give 0 (greedy) or more")
        if self.temperature == 0 and (self.samples > 1 or self.retries):
            raise ValueError("temperature 0 gives the same output each time: raise it, or keep samples 1, retries 0")


@dataclass(frozen=True)
class Candidate:
    """One sampled output of a step."""
    text: str
    token_ids: tuple   # L ids, the end of turn included
    logps: tuple       # their L log-probabilities when they were sampled
    parsed: RouteStep | AnswerStep | StepError


@dataclass(frozen=True)
class Step:
    """One prompt and what came of it."""
    kind: str            # "route", "answer" or "final"
    query: str           # the question that it is about
    conversation: list
    prompt_ids: tuple    # T ids, those of pictures included
    candidates: tuple    # G of them; none where the prompt was too long to be asked
    followed: int        # index of the candidate that the trajectory went on with
    evidence: dict       # base -> hits that the prompt quotes

    @property
    def parsed(self):
        return self.candidates[self.followed].parsed if self.candidates else StepError("prompt too long", "")

    @property
    def route(self):
        """The route, "None" included; None where the step is malformed or not a routing step."""
        return self.parsed.route if isinstance(self.parsed, RouteStep) else None

    @property
    def answer(self):
        """The answer; "" where the step is malformed or not an answering step."""
        return self.parsed.answer if isinstance(self.parsed, AnswerStep) else ""


COSTS = ("retrievals", "model_calls", "prompt_tokens", "generated_tokens", "malformed", "too_long",
         "seconds_model", "seconds_search")


@dataclass(frozen=True)
class Trajectory:
    """All that happened to a question. Time in a batch is shared equally among its rows."""
    row: dict                # of the question file
    method: str
    steps: tuple
    answer: str              # "" where the final step is malformed
    retrievals: int          # bases searched
    model_calls: int
    prompt_tokens: int
    generated_tokens: int    # of all candidates
    malformed: int           # steps whose followed candidate was no step, those asked again included
    too_long: int            # prompts not asked for want of room
    seconds_model: float
    seconds_search: float


@dataclass
class Question:
    """A question on its way: its generator, what that waits for, and what has been counted."""
    place: int
    row: dict
    talk: object
    request: Ask | Search | None = None
    retried: int = 0
    steps: list = field(default_factory=list)
    cost: Counter = field(default_factory=Counter)

    def conversation(self, prompts):
        """The chat that asks for the step which the method waits for."""
        return conversation(prompts[self.request.prompt], self.request.problem, self.row.get("image"))

    def go_on(self, reply):
        """Hands the method its reply and keeps its next request; None when it has finished."""
        try:
            self.request, self.retried = self.talk.send(reply), 0
        except StopIteration:
            self.request = None


class Router:
    """Answers questions with a model, its processor and {"text", "image", "table"} -> KnowledgeBase.

    `run` does all of it. Who wants to choose what is sampled next, as training does, calls `open`, `search`, `sample`
    and `step` as `run` does.
    """

    def __init__(self, vlm, processor, bases, **options):
        self.vlm, self.processor, self.bases, self.options = vlm, processor, bases, RouterOptions(**options)
        self.prompts = PROMPTS | (self.options.prompts or {})
        self.prompts |= with_demonstrations(self.prompts, self.options.shown or demonstrations())
        self.method, needed = METHODS[self.options.method]
        missing = [base for base in needed if base not in bases]
        if missing:
            raise ValueError(f"method {self.options.method} needs the knowledge base {missing[0]!r}: "
                             f"give --kb {missing[0]}=DIR")
        self.room = vlm.config.max_positions - self.options.max_new_tokens
        if self.room < 1:
            raise ValueError(f"max_new_tokens {self.options.max_new_tokens} leaves no room for a prompt: "
                             f"the model has {vlm.config.max_positions} positions")

    def run(self, questions, on_done=None, generator=None):
        """Answers question rows; Trajectories in the same order.

        A row is {"question"}, optionally with "image": path or PIL, and "former": [(question, answer)] that it follows.

        All open questions advance together: a tick is one search of each base, then the model calls in batches of
        prompts of similar length. `on_done(trajectory)` is called as each question finishes. `generator` is torch's, on
        the model's device; one is seeded from the options where none is given.
        """
        rng = random.Random(self.options.seed)
        generator = generator or torch.Generator(next(self.vlm.parameters()).device).manual_seed(self.options.seed)
        waiting, open_, finished = deque(enumerate(questions)), [], {}
        while waiting or open_:
            while waiting and len(open_) < 4 * self.options.batch_size:
                open_.append(self.open(*waiting.popleft()))
            self.search([q for q in open_ if isinstance(q.request, Search)])
            asking = sorted((q for q in open_ if isinstance(q.request, Ask)), key=lambda q: len(q.request.problem))
            for start in range(0, len(asking), self.options.batch_size):
                self._ask(asking[start:start + self.options.batch_size], rng, generator)
            for q in [q for q in open_ if q.request is None]:
                finished[q.place] = self._trajectory(q)
                if on_done:
                    on_done(finished[q.place])
            open_ = [q for q in open_ if q.request is not None]
        return [finished[place] for place in sorted(finished)]

    def open(self, place, row):
        """A Question that waits for its first reply; `place` tells it from the others that are searched with it."""
        if not isinstance(row, dict):
            raise ValueError(f"question {place + 1} is {str(row)[:40]!r}: expected a row {{'question': ...}}")
        if not isinstance(row.get("question"), str) or not row["question"].strip():
            raise ValueError(f"question {place + 1} is empty: give it some words")
        q = Question(place, row, self.method(row, self.options))
        q.go_on(None)
        return q

    def _trajectory(self, q):
        return Trajectory(q.row, self.options.method, tuple(q.steps), q.steps[-1].answer,
                          **{name: q.cost[name] for name in COSTS})

    def search(self, questions):
        """One search of each base for all questions that wait for it; they go on with what was found."""
        found = {q.place: {} for q in questions}
        for base in BASES:
            asking = [q for q in questions if base in q.request.bases]
            if not asking:
                continue
            start = time.perf_counter()
            k = asking[0].request.k  # the same for all: a method has one k
            hits = self.bases[base].search([_base_query(q, base) for q in asking], k)
            seconds = (time.perf_counter() - start) / len(asking)
            for q, some in zip(asking, hits):
                found[q.place][base] = tuple(some)
                q.cost["retrievals"] += 1
                q.cost["seconds_search"] += seconds
        for q in questions:
            q.go_on(found[q.place])

    def _ask(self, questions, rng, generator):
        """One model call for a batch of questions; each gets its Step and goes on, or is asked again."""
        start = time.perf_counter()
        outputs = self.sample([q.conversation(self.prompts) for q in questions], generator)
        seconds = (time.perf_counter() - start) / len(questions)
        for q, (prompt_ids, candidates) in zip(questions, outputs):
            followed = self.options.follow(candidates, rng) if self.options.follow and candidates else 0
            step = self.step(q, prompt_ids, candidates, followed)
            q.cost["seconds_model"] += seconds
            if candidates and isinstance(step.parsed, StepError) and q.retried < self.options.retries:
                q.retried += 1  # the request stays, so the next tick asks again
            else:
                q.steps.append(step)
                q.go_on(step)

    def step(self, q, prompt_ids, candidates, followed):
        """The Step that a question made with these candidates, one of them followed; counts what it cost."""
        ask = q.request
        candidates = tuple(_expected(ask.kind, candidate) for candidate in candidates)
        step = Step(ask.kind, ask.query, q.conversation(self.prompts), prompt_ids, candidates, followed, ask.evidence)
        if candidates:
            q.cost["model_calls"] += 1
            q.cost["prompt_tokens"] += len(prompt_ids)
            q.cost["generated_tokens"] += sum(len(candidate.token_ids) for candidate in candidates)
            q.cost["malformed"] += isinstance(step.parsed, StepError)
        else:
            q.cost["too_long"] += 1
        return step

    def noise(self, talks, generator, n=None):
        """Uniform numbers (N, n, max_new_tokens) in [0, 1) for N conversations: all that is random in their outputs."""
        shape = len(talks), n or self.options.samples, self.options.max_new_tokens
        return torch.rand(shape, generator=generator, device=generator.device)

    def sample(self, talks, generator, n=None, noise=None):
        """n outputs (by default `samples`) for each of N conversations: N pairs (prompt ids, candidates).

        No candidates where the prompt leaves no room for an answer. A conversation that stands in the list several
        times, as the first step of a group of trajectories does, is read once for all its samples. `noise` is drawn
        where none is given; what a conversation gets from its part of it does not depend on the others in the list, but
        for rounding.
        """
        n = n or self.options.samples
        noise = self.noise(talks, generator, n) if noise is None else noise
        once, places, outputs = {}, {}, {}
        for place, talk in enumerate(talks):
            once[repr(talk)] = talk
            places.setdefault(repr(talk), []).append(place)
        for count in sorted(set(map(len, places.values()))):
            keys = [key for key in once if len(places[key]) == count]
            own = torch.stack([noise[places[key]].flatten(0, 1) for key in keys])            # (keys, count * n, L)
            for key, (ids, candidates) in zip(keys, self._generate([once[key] for key in keys], own)):
                outputs[key] = ids, iter(candidates)
        return [(outputs[key][0], tuple(islice(outputs[key][1], n))) for key in map(repr, talks)]

    def _generate(self, talks, noise):
        """`sample` for N different conversations, in model calls that keep the token budget. noise (N, n, L): n outputs
        each."""
        o, n = self.options, noise.shape[1]
        prompts = [self.processor.prompt(talk) for talk in talks]
        outputs = [(tuple(ids), ()) for ids, _, _ in prompts]     # no candidates where the prompt leaves no room
        fitting = [i for i, (ids, _) in enumerate(outputs) if len(ids) <= self.room]
        for part in in_budget(fitting, lambda i: len(outputs[i][0]) + n * o.max_new_tokens, o.call_tokens):
            batch = self.processor.batch([prompts[i] for i in part])
            batch = {name: tensor.to(noise.device) for name, tensor in batch.items() if tensor is not None}
            samples = self.vlm.generate(**batch, n=n, max_new_tokens=o.max_new_tokens, temperature=o.temperature,
                                        top_k=o.top_k, top_p=o.top_p, eos_ids=self.processor.eos_ids,
                                        noise=noise[part].flatten(0, 1))
            rows = zip(samples.tokens.cpu(), samples.mask.cpu(), samples.logps.cpu())    # (L,) each, n a prompt
            for i in part:
                outputs[i] = outputs[i][0], tuple(self._candidate(*row) for row in islice(rows, n))
        return outputs

    def _candidate(self, tokens, keep, logps):
        ids = tuple(tokens[keep].tolist())
        text = self.processor.decode(ids)
        return Candidate(text, ids, tuple(logps[keep].tolist()), parse_step(text))


def in_budget(items, size, budget):
    """Items sorted by size and cut into batches: rows x the longest row keeps the budget. An item that is larger than
    the budget stands alone."""
    batches = []
    for item in sorted(items, key=size):                          # so the last one is the longest
        if not batches or (len(batches[-1]) + 1) * size(item) > budget:
            batches.append([])
        batches[-1].append(item)
    return batches


def _base_query(q, base):
    """What a question asks a base: its picture goes along to the base of pictures."""
    image = q.row.get("image")
    return {"text": q.request.query, "image": image} if base == "image" and image is not None else q.request.query


def _expected(kind, candidate):
    """The candidate; a step of the other kind than was asked for counts as malformed."""
    wanted, other = (RouteStep, AnswerStep) if kind == "route" else (AnswerStep, RouteStep)
    if isinstance(candidate.parsed, other):
        fault = StepError(f"{other.__name__} where {wanted.__name__} was asked for", candidate.text)
        return replace(candidate, parsed=fault)
    return candidate


# ------------------------------------------------------------------------------------------- 2 results, steps from them

def result_row(trajectory):
    """A Trajectory as a published result row: the question row, `plan_1`, `plan_2`, ..., `llm_answer`; and its costs.

    A plan is {thought, query, retriever: [names], ter|tir|tar: [passages], answer: {thought, answer}}; a malformed step
    has `fault` and `text` in place of its thought.
    """
    plans, said = [], {}
    for step in trajectory.steps:
        fault = isinstance(step.parsed, StepError)
        said = {"fault": step.parsed.reason, "text": step.parsed.text} if fault else {"thought": step.parsed.thought}
        if step.kind == "route":
            query, route = (NONE, NONE) if fault else (step.parsed.query, step.route)
            plans.append(said | {"query": query, "retriever": [route]})
            continue
        said["answer"] = step.answer
        if step.kind == "answer":
            if not plans or "answer" in plans[-1]:  # methods without routing steps
                plans.append({"query": step.query, "retriever": [ROUTES[base] for base in step.evidence]})
            for base, hits in step.evidence.items():
                plans[-1] |= {PREFIX[base]: [hit.text for hit in hits],
                              PREFIX[base] + "_scores": [round(float(hit.score), 4) for hit in hits]}
            if step is not trajectory.steps[-1]:
                plans[-1]["answer"] = said
    row = {**trajectory.row, "method": trajectory.method, **{f"plan_{i}": plan for i, plan in enumerate(plans, 1)}}
    return row | {"llm_answer": said, "cost": {name: round(getattr(trajectory, name), 6) for name in COSTS}}


def evaluate(trajectories):
    """Scores and costs of Trajectories or result rows of one method, as one object (`score.overview`)."""
    return overview(score_table([row if isinstance(row, dict) else result_row(row) for row in trajectories]))


def steps_of(row, prompts):
    """The steps of a published step file from a result row of a method in ROUTING, none of whose steps is malformed.

    The problems are those that the model was given, byte for byte; the answers are its own.
    """
    question, image, history, steps = row["question"], row.get("image") is not None, list(row.get("former") or ()), []

    def add(kind, problem, said, answer):
        steps.append({"step_type": "ret" if kind == "route" else "ans", "problem": problem, "system": prompts[kind],
                      "answer": answer, "thought": said["thought"]})

    for plan in plans_of(row):
        query, route = plan["query"], plan["retriever"][0]
        add("route", route_problem(question, history, image), plan,
            {"query": NONE.lower() if route == NONE else query, "retriever": [route.lower()]})
        if route != NONE:
            evidence = {base: plan.get(prefix, ()) for base, prefix in PREFIX.items()}
            add("answer", answer_problem(query, evidence, image), plan["answer"], plan["answer"]["answer"])
            history.append((query, plan["answer"]["answer"]))
    add("final", final_problem(question, history, image), row["llm_answer"], [row["llm_answer"]["answer"]])
    return steps


def step_output(step):
    """The right output of a step of a published step file, as text."""
    thought, answer = step.get("thought", ""), step["answer"]
    if step["step_type"] == "ret":
        query, base = answer["query"].strip(), BASE_OF.get(answer["retriever"][0].strip().lower())
        asks = base and query.lower() != NONE.lower()           # none of either is meant of both
        return render_route(thought, query if asks else NONE, ROUTES[base] if asks else NONE)
    return render_answer(thought, (answer[0] if isinstance(answer, list) else answer).strip())


def step_kinds(steps):
    """Kinds of the steps of a published trajectory: "route" for ret, "answer" for ans, "final" for the last one."""
    kinds = ["route" if step["step_type"] == "ret" else "answer" for step in steps]
    return kinds[:-1] + ["final"]


def with_demonstrations(prompts, trajectories):
    """{"fewshot route", "fewshot answer", "fewshot final"}: system prompts, each followed by what is asked and replied
    at its kind of step in the `trajectories` of a step file. Their pictures are not shown, the marker is."""
    texts = {kind: prompts[kind] for kind in ("route", "answer", "final")}
    for steps in trajectories:
        for kind, step in zip(step_kinds(steps), steps):
            texts[kind] += f"\n\nExample:\n{step['problem']}\nReply:\n{step_output(step)}"
    return {f"fewshot {kind}": text for kind, text in texts.items()}


def demonstrations():
    """Trajectories for an untrained model: two hops from a picture, two in text and table, and none."""
    def plan(thought, query=NONE, base=None, evidence=(), found_thought="", found=""):
        asked = {"thought": thought, "query": query, "retriever": [ROUTES.get(base, NONE)]}
        answer = {"thought": found_thought, "answer": found}
        return asked | ({PREFIX[base]: list(evidence), "answer": answer} if base else {})

    def row(question, image, *plans, thought, answer):
        numbered = {f"plan_{i}": plan for i, plan in enumerate(plans, 1)}
        return {"question": question, "image": image, **numbered, "llm_answer": {"thought": thought, "answer": answer}}

    rows = [
        row("Which river flows through the city where this tower stands?", "tower.jpg",
            plan("The tower in the picture has to be recognised first, to know its city.",
                 "In which city does this tower stand?", "image", ["The Eiffel Tower in Paris at dusk."],
                 "The caption of the picture that looks like this one names the city.", "Paris"),
            plan("The city is Paris. Its river is missing.", "Which river flows through Paris?", "text",
                 ["Paris is the capital of France and lies on the Seine.", "Lyon lies where two rivers meet."],
                 "The first passage says that Paris lies on the Seine.", "Seine"),
            plan("City and river are known, nothing is missing."),
            thought="The tower stands in Paris, through which the Seine flows.", answer="Seine"),
        row("How many metres high is the highest mountain of Japan?", None,
            plan("The mountain has to be named before its height can be looked up.",
                 "Which is the highest mountain of Japan?", "text", ["Mount Fuji is the highest mountain of Japan."],
                 "The passage names the mountain.", "Mount Fuji"),
            plan("The height of Mount Fuji is a number of a table.", "How many metres high is Mount Fuji?", "table",
                 ["[Title] Mountains of Japan[Header] name[sep] metres[Rows][Row] Mount Fuji[sep] 3776"],
                 "The row of Mount Fuji says 3776.", "3776"),
            plan("The height is known, nothing is missing."),
            thought="Mount Fuji, the highest mountain of Japan, is 3776 metres high.", answer="3776"),
        row("How many minutes do two hours have?", None,
            plan("This needs no search: an hour has 60 minutes."),
            thought="Two hours have 2 times 60 minutes, which are 120.", answer="120")]
    return [steps_of(row, PROMPTS) for row in rows]


# -------------------------------------------------------------------------------------------------------------- 3 files

PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".JPEG", ".webp", ".JPG", ".PNG", ".WEBP")
OF_A_RUN = r"plan_\d+|llm_answer|cost|method|run|former"  # fields that a run adds: those of an earlier one are dropped
WORLD_ENCODERS = {"text": "lexical", "image": "pixel", "table": "lexical"}


def read_rows(path, check, limit=None):
    """JSONL, or its first `limit` rows -> (what `check(row, number)` returns, faults); a bad row becomes a fault."""
    if limit is not None and limit < 1:
        raise ValueError(f"{path}: its first {limit} rows are none: give at least 1")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}): give a JSONL file") from None
    rows, faults = [], []
    for number, line in [(i, line) for i, line in enumerate(lines, 1) if line.strip()][:limit]:
        try:
            if len(line) > MAX_ROW:
                raise ValueError(f"a row of {len(line)} characters: {MAX_ROW} at most")
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"expected an object, found {type(row).__name__}")
            rows.append(check(row, number))
        except (json.JSONDecodeError, RecursionError) as error:  # lists in lists in lists
            faults.append(f"{path}:{number}: not JSON ({getattr(error, 'msg', error)}): expected one object a line")
        except ValueError as error:
            faults.append(f"{path}:{number}: {error}")
    if not rows:
        raise ValueError(faults[0] if faults else f"{path}: no rows")
    return rows, faults


def as_text(row):
    """The bytes of a row as it is written. ValueError for half of a surrogate pair, which is no text."""
    return json.dumps(row, ensure_ascii=False).encode()


def load_questions(path, images=None, limit=None):
    """Question rows of any of the published sets or of a world -> (rows, faults).

    `image` becomes a path that opens, found in the folder `images` (by image_id) or beside the file, or None; `set`
    (the file's name, or its folder's where that says more) and `line` are added; what an earlier run added is dropped.
    """
    path, seen = Path(path), {}
    name = path.absolute().parent.name if path.stem == "questions" else path.stem

    def check(row, number):
        if not isinstance(row.get("question"), str) or not row["question"].strip():
            raise ValueError("empty question: give it some words")
        if row.get("id") is not None and (first := seen.setdefault(str(row["id"]), number)) != number:
            raise ValueError(f"id {str(row['id'])[:40]!r} stands in line {first} already: a question counts once")
        golds_of(row)
        gold_routes(row)
        as_text(row)
        image = picture_of(row, path.parent, images)
        row = {name: value for name, value in row.items() if not re.fullmatch(OF_A_RUN, name)}
        row |= {"image": image, "set": name, "line": number}
        check_names(row)
        return row
    return read_rows(path, check, limit)


def picture_of(row, folder, images):
    """The path of a question's picture as text, or None; ValueError where it is missing or is no picture.

    A file from outside must not show the model any other picture of this machine: links and `..` followed, the picture
    lies in `images`, or where that is not given in the file's `folder`.
    """
    name = row.get("image", row.get("image_id"))
    if not str(name).isprintable():
        raise ValueError(f"picture {name!r}: no name of a file")
    if row.get("image") is not None:
        path = Path(images or folder) / str(row["image"])
    elif row.get("image_id") is None:
        return None
    elif images is None:
        raise ValueError(f"image_id is {row['image_id']}: name the folder of the pictures with --images DIR")
    else:
        named = [Path(images) / f"{row['image_id']}{ending}" for ending in PICTURE_ENDINGS]
        path = next((path for path in named if path.is_file()), named[0])
    if not inside(path, images or folder):
        raise ValueError(f"picture {str(path)[-80:]} leads out of {images or folder}: name the folder of the pictures "
                         "with --images DIR")
    load_picture(path)
    return str(path)


def load_steps(path, limit=None):
    """Trajectories of a published step file: lists of {"step_type", "problem", "system", "answer"}."""
    def check(row, number):
        try:
            for step in row["steps"]:
                if not isinstance(step["problem"], str) or not isinstance(step["system"], str):
                    raise TypeError("a problem or system prompt that is no text")
                step_output(step)
            return row["steps"]
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"no row of a step file ({type(error).__name__}: {error}): expected {{'images', 'steps'}} "
                             "with 'step_type', 'problem', 'system', 'answer' in each step") from None
    return read_rows(path, check, limit)[0]


def load_prompts(path):
    """System prompts {"route", "answer", "final"} of a prompts.json or of a published step file (.jsonl)."""
    if Path(path).suffix == ".jsonl":
        prompts = {}
        for steps in load_steps(path):
            for kind, step in zip(step_kinds(steps), steps):
                prompts.setdefault(kind, step["system"])
    else:
        try:
            prompts = json.loads(Path(path).read_text(encoding="utf-8"))
            as_text(prompts)
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: cannot be read ({error}): give a prompts.json or a .jsonl of steps") from None
    if not isinstance(prompts, dict) or not all(k in PROMPTS and isinstance(v, str) for k, v in prompts.items()):
        raise ValueError(f"{path}: expected system prompts as strings under the names {', '.join(PROMPTS)}")
    return prompts


def load_bases(named):
    """["text=DIR", ...] -> {"text": KnowledgeBase, ...}."""
    bases = {}
    for item in named:
        name, _, folder = item.partition("=")
        if name not in BASES or not folder:
            raise ValueError(f"--kb {item}: expected NAME=DIR with a name of {', '.join(BASES)}")
        if name in bases:
            raise ValueError(f"--kb {item}: there is a base {name} before it: name each once")
        bases[name] = KnowledgeBase.load(folder)
    return bases


def world_bases(folder, names=BASES):
    """The bases of a world, kept in its folder kb: built on first use, and again when their corpus is another one."""
    bases = {}
    for name in names:
        corpus, home = Path(folder) / f"{name}.jsonl", Path(folder) / "kb" / name
        if not corpus.is_file():
            raise ValueError(f"{corpus}: no such file: --world takes a folder that world.py has written")
        bases[name] = load_or_build(home, corpus, WORLD_ENCODERS[name])
    return bases


def embedded_world(name, split, seed, questions):
    """The folder data/`name` with a world of its own, written by world.py on first use: of several processes that come
    at once by one, while the others wait. Its last file is questions.jsonl."""
    folder = HERE / "data" / name
    whole = (folder / "questions.jsonl").is_file
    with nullcontext() if whole() else sole_writer(folder, check=lambda _: None):
        if not whole():
            print(f"writing the embedded world to {folder} ...", file=sys.stderr)
            command = [sys.executable, str(HERE / "world.py"), "--split", split, "--seed", str(seed)]
            command += ["--questions", str(questions), "--out", str(folder)]
            if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
                raise ValueError(f"world.py could not write {folder}: see its message above")
    return folder


def hold(file, path):
    """Makes this process the only writer of an open file until it closes it or ends, however it ends (kill -9 too)."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{path}: another process writes there: wait for it, or name another --out") from None


@contextmanager
def appending(path):
    """A result file, open for rows at its end and held; it goes again where none came."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "a", encoding="utf-8") as out:
            hold(out, path)
            whole = os.path.getsize(path)
            try:
                yield out
            except OSError:
                if os.path.getsize(path) > whole:  # the last row may have been written in part
                    os.truncate(path, Path(path).read_bytes().rfind(b"\n") + 1)
                raise
            finally:
                if not os.path.getsize(path):
                    os.unlink(path)
    except OSError as error:
        if error.filename or isinstance(error, BrokenPipeError):
            raise
        raise OSError(f"{path}: {error.strerror}: make room, and the same command continues behind the last whole "
                      "row") from None


def earlier_rows(path, run):
    """Rows that an interrupted run with the same settings left in its --out file; a torn last line is cut off."""
    data = Path(path).read_bytes() if Path(path).exists() else b""
    whole = data[:data.rfind(b"\n") + 1]
    try:
        rows = [json.loads(line) for line in whole.splitlines()]
        ours = all(row["run"] == run and row["llm_answer"] for row in rows) and (rows or not data or begins_row(data))
    except (ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise ValueError(f"{path}: holds other rows than this run's (settings, weights, questions): name another --out")
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return rows


def begins_row(data):
    """Whether a file holds the beginning of a row and no more, as a first row that was torn while it was written."""
    try:
        json.loads(data)
    except ValueError:
        return data.startswith(b'{"') and b"\n" not in data
    return False


def write_steps(path, rows, prompts, keep):
    """Result rows of methods in ROUTING as a published step file, pictures named from its folder; how many were kept.

    `keep` "correct" is rejection sampling: only trajectories whose answer is a gold answer and nothing else, for a
    recall of 1 alone would teach to dump ("yes no"). Those with a malformed step have no place in such a file.
    """
    kept = []
    for row in rows:
        well_formed = not row["cost"]["malformed"] and not row["cost"]["too_long"]
        if well_formed and (keep == "all" or exact_match(predicted(row), golds_of(row))):
            images = [picture_beside(row["image"], Path(path))] if row.get("image") else []
            kept.append(json.dumps({"images": images, "steps": steps_of(row, prompts)}, ensure_ascii=False) + "\n")
    if not kept:
        raise ValueError(f"{path} was not written: none of {len(rows)} trajectories is well formed" +
                         (" and correct: raise --temperature, or --keep all" if keep == "correct" else ""))
    write_whole(path, "".join(kept))
    return len(kept)


def picture_beside(image, path):
    """The name of a picture from the folder of the step file at `path`. Readers of such files take no picture from
    outside that folder: one that lies elsewhere gets a link (or else a copy) in a folder beside the file."""
    image, folder = Path(image).resolve(), path.parent.resolve()
    if not inside(image, folder):
        links = folder / f"{path.stem}-pictures"
        links.mkdir(parents=True, exist_ok=True)
        link = links / f"{zlib.crc32(str(image).encode()):08x}-{image.name}"
        link.unlink(missing_ok=True)
        try:
            os.link(image, link)
        except OSError:  # another disk
            shutil.copyfile(image, link)
        image = link
    return os.path.relpath(image, folder)


# ---------------------------------------------------------------------------------------------------- 4 what people see

def has_colour():
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def thumbnail(path, size=20):
    """A picture as `size` x `size` pixels of text: each character is two pixels, one above the other."""
    small = load_picture(path).resize((size, size), Image.Resampling.BOX)
    for y in range(0, size, 2):
        pairs = (small.getpixel((x, y)) + small.getpixel((x, y + 1)) for x in range(size))
        yield "".join("\x1b[38;2;{};{};{};48;2;{};{};{}m▀".format(*pair) for pair in pairs) + "\x1b[0m"


def print_line(name, text, code=""):
    """One line of a trace; `code` is an ANSI colour."""
    text = printable(text)
    print(f"  {name:<10}" + (f"\x1b[{code}m{text}\x1b[0m" if code and has_colour() else text))


def print_thought(said):
    if "fault" in said:
        print_line("malformed", f"{said['fault']}: {said['text'][:100]}", "31")
    else:
        print_line("think", said["thought"], "2")


def print_trace(row):
    """Shows one result row: question and picture, each step with its best evidence, the answer against the gold."""
    print(printable(row["question"]), f"  [{printable(row.get('kind', 'question'))}, {row['method']}]")
    if row.get("image"):
        print(*thumbnail(row["image"]), sep="\n") if has_colour() else print_line("picture", row["image"])
    for plan in plans_of(row):
        if "thought" in plan or "fault" in plan:
            print_thought(plan)
        asked = NONE if plan["retriever"] == [NONE] else f"{' + '.join(plan['retriever'])}: {plan['query']}"
        print_line("ask", asked, "36")
        for prefix in PREFIX.values():
            if plan.get(prefix):
                print_line("read", plan[prefix][0][:160], "2")
        if "answer" in plan:
            print_thought(plan["answer"])
            print_line("found", plan["answer"]["answer"])
    print_thought(row["llm_answer"])
    print_line("answer", predicted(row) or "(none)", "1")
    if row.get("answer") is not None:
        right = answer_scores(predicted(row), golds_of(row))[1] == 1
        print_line("gold", " | ".join(map(str, golds_of(row)[:5])))
        print_line("", "right" if right else "wrong", "32" if right else "31")
    print_line("time", f"{row['cost']['seconds_model']:.2f} s model, {row['cost']['seconds_search']:.3f} s search")
    print()


class Progress:
    """Questions done and time left, a line on stderr every few seconds."""

    def __init__(self, label, total):
        self.label, self.total, self.done, self.start = label, total, 0, time.monotonic()
        self.next = self.start + 5

    def step(self):
        self.done += 1
        now = time.monotonic()
        if now >= self.next:
            left = (now - self.start) / self.done * (self.total - self.done)
            print(f"{self.label}: {self.done} of {self.total} questions, {left:.0f} s left", file=sys.stderr)
            self.next = now + 5


CHAT_HELP = """A line is a question, which sees the question and answer before it. Commands:
  :image FILE   a picture for the questions that follow; :image alone takes it away
  :base NAME    ask text, image or table only; :base alone lets the model choose again
  :trace        show the steps of each answer, or stop showing them
  :new          forget the question before, as a new picture does too
  :help  :quit"""


class Chat:
    """Questions and commands from the terminal or a pipe. With `as_json`, a result row a question and nothing else.

    A follow-up has the exchange before it as `former` (see Router.run): a method that routes goes on from there.
    """

    def __init__(self, make_router, method, image, as_json):
        self.make_router, self.usual, self.as_json = make_router, method, as_json
        self.router, self.image, self.former, self.trace = make_router(method=method), None, (), False
        self.command("image", image or "")

    def run(self):
        """Until :quit, the end of the input, or Ctrl-C. A mistake is told in one line and the chat goes on."""
        sys.stdin.reconfigure(errors="replace")
        if not self.as_json:
            print(CHAT_HELP)
        try:
            while (line := input("> " if sys.stdin.isatty() else "").strip()).split()[:1] != [":quit"]:
                try:
                    if line.startswith(":"):
                        self.command(*line[1:].partition(" ")[::2])
                    elif line:
                        self.ask(line)
                except (ValueError, OSError) as error:
                    print(f"infer.py: {error}", file=sys.stderr)
        except (EOFError, KeyboardInterrupt) as end:
            if isinstance(end, KeyboardInterrupt) and code_of(end) != 130:         # SIGTERM
                raise
            print(file=sys.stderr)

    def command(self, name, value):
        value = value.strip()
        if name == "image":
            value = os.path.expanduser(value)
            if value:
                load_picture(value)
            self.image, self.former = value or None, ()
        elif name == "base":
            if value and value not in BASES:
                raise ValueError(f":base {value}: give one of {', '.join(BASES)}, or nothing")
            self.router = self.make_router(method=value or self.usual)
        elif name == "trace":
            self.trace = not self.trace
        elif name == "new":
            self.former = ()
        elif name == "help":
            print(CHAT_HELP)
        else:
            raise ValueError(f":{name}: no such command, :help names them")

    def ask(self, question):
        [trajectory] = self.router.run([{"question": question, "image": self.image, "former": self.former}])
        row = result_row(trajectory)
        self.former = [(question, trajectory.answer)] if trajectory.answer else ()
        if self.as_json:
            print(json.dumps(row, ensure_ascii=False), flush=True)
        elif self.trace:
            print_trace(row)
        else:
            print_line("answer", predicted(row) or f"(none: {row['llm_answer']['fault']})", "1")


# -------------------------------------------------------------------------------------------------- 5 command line

ROUTER_FLAGS = ("k", "max_steps", "max_new_tokens", "temperature", "seed", "batch_size")  # fields of RouterOptions


def parse_flags(argv):
    """The flags; those of the Router have its defaults."""
    p = OneLineParser(prog="infer.py", description="Answer questions by routed retrieval, or evaluate methods on many.")
    p.add_argument("--model", default=str(HERE / "weights" / "tiny"), help="model directory (default: weights/tiny)")
    p.add_argument("--world", metavar="DIR", help="a folder of world.py: bases, questions (default: data/demo)")
    p.add_argument("--kb", nargs="+", default=[], metavar="NAME=DIR", help="bases: text=DIR image=DIR table=DIR")
    p.add_argument("--question", help="answer this question")
    p.add_argument("--image", help="its picture")
    p.add_argument("--chat", action="store_true", help="questions and follow-ups from the terminal; :help says more")
    p.add_argument("--eval", nargs="+", metavar="FILE", help="evaluate the questions of JSONL files (the world's)")
    p.add_argument("--images", metavar="DIR", help="folder of their pictures")
    p.add_argument("--method", nargs="+", default=[], metavar="NAME", help=f"one or more of {', '.join(METHODS)}")
    p.add_argument("--out", metavar="FILE", help="write result rows there; the same command again continues")
    p.add_argument("--score", nargs="+", metavar="FILE", help="score the rows of existing result files")
    p.add_argument("--csv", metavar="FILE", help="write the table by set, kind and hops, with its intervals, as CSV")
    p.add_argument("--jsonl", metavar="FILE", help="write it as JSONL")
    p.add_argument("--write-steps", metavar="FILE", help="write the steps of router or fewshot as a file to train on")
    p.add_argument("--keep", choices=("correct", "all"), default="correct", help="of which trajectories (correct)")
    p.add_argument("--show", type=int, default=0, metavar="N", help="show the steps of N questions of different kinds")
    p.add_argument("--limit", type=int, metavar="N", help="only the first N questions of a file")
    for name in ROUTER_FLAGS:
        default = getattr(RouterOptions, name)
        flag = "-k" if name == "k" else "--" + name.replace("_", "-")
        more = "; questions of four hops need 5, the last to say that nothing is missing" * (name == "max_steps")
        p.add_argument(flag, type=type(default), default=default, metavar="N",
                       help=f"see RouterOptions ({default}){more}")
    p.add_argument("--prompts", metavar="FILE", help="system prompts: a prompts.json or a published step file (.jsonl)")
    p.add_argument("--demos", metavar="FILE", help="step file whose first rows fewshot shows (our own)")
    p.add_argument("--shots", type=int, default=2, metavar="N", help="how many rows of --demos (2)")
    p.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the weights")
    p.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; 1 is best for the tiny model")
    p.add_argument("--json", action="store_true", help="print JSON only")
    args = p.parse_args(argv)
    check_flags(args, {name for name, value in vars(args).items() if value != p.get_default(name)})
    check_files(args)
    return args


WITHOUT = {  # flag -> flags that would do nothing beside it
    "score": ("method", "out", "show", "write_steps", "keep", "eval", "images", "image",
              "question", "chat", "prompts", "demos", "shots", *ROUTER_FLAGS),
    "question": ("chat", "eval", "images", "out", "csv", "jsonl", "write_steps", "limit", "show"),
    "chat": ("eval", "images", "out", "csv", "jsonl", "write_steps", "limit", "show")}


def check_flags(args, given):
    """ValueError where a flag would be ignored, or has a number that means nothing. given: the names of those that are
    not as by default."""
    for flag, others in WITHOUT.items():
        if flag in given and (idle := [other for other in others if other in given]):
            raise ValueError(f"-{'-' * (len(idle[0]) > 1)}{idle[0].replace('_', '-')} does nothing beside --{flag}: "
                             f"leave it or leave out --{flag}")
    if args.image is not None and args.question is None and not args.chat:
        raise ValueError("--image is the picture of --question or --chat: give one of them")
    if args.chat and (len(args.method) > 1 or "oracle" in args.method):
        raise ValueError(f"--chat with --method {' '.join(args.method)}: give one method, and not oracle, which needs "
                         "gold hops")
    for name, least in (("threads", 0), ("show", 0), ("shots", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} is {getattr(args, name)}: give at least {least}")
    if args.threads > 1024:                                  # OpenMP ends the process where it cannot start so many
        raise ValueError(f"--threads is {args.threads}: give at most 1024")


def world_of(args):
    """The folder of the world that the flags name, or of the embedded one."""
    return Path(args.world or HERE / "data" / "demo")


def check_files(args):
    """ValueError where a file that is written is also another one of the command, or a file is evaluated twice."""
    written = ("out", "csv", "jsonl", "write_steps")
    files = []                                               # (flag, path), those that are written before the others
    for flag in (*written, "eval", "score", "prompts", "demos", "image"):
        paths = getattr(args, flag) or ()
        files += [(flag, os.path.realpath(path)) for path in ([paths] if isinstance(paths, str) else paths)]
    asked = [os.path.realpath(world_of(args) / f"{name}.jsonl") for name in (*BASES, "questions", "steps")]
    if own := [(flag, path) for flag, path in files if flag in written and path in asked]:
        raise ValueError(f"--{own[0][0].replace('_', '-')} {own[0][1]} is a file of the world: name another one")
    for i, (flag, path) in enumerate(files):
        for first, other in files[:i]:
            if path == other and (first in written or first == flag):
                raise ValueError(f"{path} is given twice (--{first.replace('_', '-')}, --{flag.replace('_', '-')}): "
                                 "name another file")


def answer_command(args):
    """Answers one question, or evaluates methods on many, or chats."""
    methods = args.method or ["router"]
    options = {name: getattr(args, name) for name in ROUTER_FLAGS}
    needed = {base for method in methods for base in METHODS[RouterOptions(method=method, **options).method][1]}
    if args.write_steps and not set(methods) <= set(ROUTING):
        raise ValueError(f"--write-steps with --method {' '.join(methods)}: only {' and '.join(ROUTING)} make steps")
    world = Path(args.world) if args.world else None if args.kb else embedded_world("demo", "test", 1000, 200)
    of_many = ("eval", "world", "method", "limit", "out", "show", "csv", "jsonl", "write_steps")
    many = any(getattr(args, name) for name in of_many) and args.question is None and not args.chat
    if many:
        questions, faults = many_questions(args, world)
        if "oracle" in methods and all(row.get("hops") is None for row in questions):
            raise ValueError("method oracle: no question of the file has gold hops, leave it out of --method")
    elif not args.chat:
        question = one_question(args, world)
    device = usable_device(args.device)
    trained_with = Path(args.model) / "prompts.json"
    prompts = load_prompts(args.prompts or trained_with) if args.prompts or trained_with.is_file() else {}
    shown = load_steps(args.demos, args.shots) if args.demos else None
    wanted = [base for base in BASES if args.chat or base in needed]
    bases = load_bases(args.kb) if args.kb else world_bases(world, wanted)
    vlm = VLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype), device=device)
    processor = Processor.from_pretrained(args.model)
    make_router = partial(Router, vlm, processor, bases, prompts=prompts, shown=shown, **options)
    routers = [make_router(method=method) for method in methods]
    if args.chat:
        Chat(make_router, methods[0], args.image, args.json).run()
    elif many:
        evaluate_command(routers, questions, faults, args)
    else:
        for router in routers:
            row = result_row(router.run([question])[0])
            print(json.dumps(row, ensure_ascii=False)) if args.json else print_trace(row)


def evaluate_command(routers, questions, faults, args):
    """Evaluates each router's method on the same questions; `faults`: rows that were left out when they were read."""
    tables, left_out, answered = [], [], []
    for router, show in zip(routers, [args.show] + [0] * len(routers)):  # the first method's steps are shown
        rows, failed = answer_many(router, questions, args, show)
        if not rows:
            raise ValueError(failed[0])
        tables.append(score_table(rows))
        left_out.append([*faults, *failed])
        answered += rows
    report(tables, left_out, args)
    if args.write_steps:
        kept = write_steps(args.write_steps, answered, routers[0].prompts, args.keep)
        print(f"{args.write_steps}: steps of {kept} of {len(answered)} trajectories", file=sys.stderr)


def one_question(args, world):
    """The question of the flags, or one of the world's that have a picture and two hops, chosen by the seed."""
    if args.question is not None:
        if not args.question.strip():
            raise ValueError("--question is empty: give it some words")
        if args.image is not None:
            load_picture(args.image)
        return {"question": args.question, "image": args.image}
    if world is None:
        raise ValueError("nothing to answer: give --question or --eval beside --kb")
    rows, _ = load_questions(world / "questions.jsonl")
    rows = [row for row in rows if row["image"] and len(row.get("hops", ())) == 2] or rows
    return rows[args.seed % len(rows)]


def many_questions(args, world):
    """The questions of --eval or of the world, and the rows left out."""
    if args.eval is None and world is None:
        raise ValueError("nothing to evaluate: give --eval FILE beside --kb")
    questions, faults, sets = [], [], {}
    for file in args.eval or [world / "questions.jsonl"]:
        rows, wrong = load_questions(file, args.images, args.limit)
        if sets.setdefault(rows[0]["set"], file) != file:
            raise ValueError(f"--eval: {sets[rows[0]['set']]} and {file} have one name, but it tells sets apart: "
                             "rename one")
        questions, faults = questions + rows, faults + wrong
    return questions, faults


def answer_many(router, questions, args, show):
    """Result rows of all questions, written to --out as they come, and the faults of those that could not be answered.

    Rows of an earlier run are taken from --out. The first `show` questions of different kinds are answered and shown
    before the others.
    """
    method, rows, faults, run = router.options.method, {}, {}, settings_mark(router, args)
    with appending(args.out) if args.out else open(os.devnull, "a") as out:
        if args.out:
            rows = {row_key(row): row for row in earlier_rows(args.out, run) if row["method"] == method}
            refuse_others(args.out, rows, questions)
        progress = Progress(method, sum(row_key(question) not in rows for question in questions))

        def keep(trajectory):
            row = result_row(trajectory) | {"run": run}
            rows[row_key(row)] = row
            print(json.dumps(row, ensure_ascii=False), file=out, flush=True)
            progress.step()

        def answer(some):
            """Runs what is still open. Where a row makes that fail, each half is run, down to the row alone."""
            some = [question for question in some if row_key(question) not in rows.keys() | faults.keys()]
            if not some:
                return
            try:
                router.run(some, keep)
            except ValueError as error:
                if len(some) == 1:
                    faults[row_key(some[0])] = f"{some[0]['set']}:{some[0]['line']}: {error}"
                else:
                    answer(some[:len(some) // 2])
                    answer(some[len(some) // 2:])

        first = different_kinds(questions, show)
        answer(first)
        for question in first if not args.json else ():
            if row_key(question) in rows:
                print_trace(rows[row_key(question)])
        answer(questions)
    return [rows[row_key(question)] for question in questions if row_key(question) in rows], list(faults.values())


def row_key(row):
    """Which question of a run a row is."""
    return row["set"], row["line"]


def refuse_others(path, rows, questions):
    """ValueError where a kept row {row_key: row} answers another question than the file has there now."""
    for question in questions:
        row = rows.get(row_key(question))
        fields = ("question", "image", "answer", "answer_eval", "hops")
        if row and any(row.get(name) != question.get(name) for name in fields):
            raise ValueError(f"{path}: its answer to line {question['line']} of {question['set']} is that to another "
                             "question: name another --out")


def different_kinds(questions, n):
    """The first n questions, those that open a new kind before the others, with and without a picture in turn."""
    kinds, new, others = set(), ([], []), []
    for question in questions:
        fresh = question.get("kind") not in kinds
        (new[question["image"] is None] if fresh else others).append(question)
        kinds.add(question.get("kind"))
    turns = [question for pair in zip_longest(*new) for question in pair if question]
    return (turns + others)[:n]


def mark_of(args, name):
    """What tells a base of the world from all others: its corpus, or, where somebody else built it, the base."""
    corpus, manifest = world_of(args) / f"{name}.jsonl", world_of(args) / "kb" / name / "manifest.json"
    built = read_json(manifest) if manifest.is_file() else {"corpus": None}
    return built.get("sha256") if "corpus" not in built else checksum(corpus) if corpus.is_file() else None


def settings_mark(router, args):
    """A short mark of all that the answers depend on, so that rows of another run are not taken for this one's."""
    o = router.options
    weights = [[str(file), file.stat().st_mtime] for file in sorted(Path(args.model).glob("*.safetensors"))]
    bases = [base.mark for base in router.bases.values()] if args.kb else [mark_of(args, name) for name in BASES]
    settings = [weights, bases, args.eval, args.world, args.kb, args.images, args.dtype, router.prompts,
                o.k, o.static_k, o.max_steps, o.max_new_tokens, o.temperature, o.seed]
    return f"{zlib.crc32(json.dumps(settings).encode()):08x}"


def score_command(args):
    """Scores existing result files, a line a method; the set of others' rows is named after their file.

    Whose rows were left out cannot be told of all: they are counted in the first line.
    """
    methods, faults, seen = {}, [], {}
    for file in args.score:
        def check(row, number):
            row = {"set": Path(file).stem, "line": number, **row}
            score_row(row)
            as_text(row)
            return row
        rows, wrong = read_rows(file, check, args.limit)
        faults += wrong
        for row in rows:
            method = row.get("method") or "given"
            if seen.setdefault((method, str(row_key(row))), row) is not row:
                raise ValueError(f"{file}: line {row['line']} of set {row['set']!r} is there twice for method "
                                 f"{method!r}: score files of different runs one at a time")
            methods.setdefault(method, []).append(row)
    report([score_table(rows) for rows in methods.values()], [faults] + [[]] * (len(methods) - 1), args)


def report(tables, left_out, args):
    """Tables, the rows left out, and a JSON object a method as the last lines."""
    for flag, path in (("csv", args.csv), ("jsonl", args.jsonl)):
        if path:
            write_table(path, [row for table in tables for row in table], flag)
    if not args.json:
        print_results(tables)
    for fault in dict.fromkeys(fault for faults in left_out for fault in faults):
        print(f"infer.py: left out: {printable(fault)}", file=sys.stderr)
    for table, faults in zip(tables, left_out):
        print(json.dumps(overview(table) | {"left_out": len(faults)}, ensure_ascii=False))


def main(argv=None):
    """Runs a command. Exit code 0 where there is a result, even if rows were left out; 2 after a user's mistake, 130
    after Ctrl-C, 141 where nobody reads what is printed (| head), 143 after SIGTERM."""
    try:
        args = parse_flags(argv)
        if args.threads > 0:
            torch.set_num_threads(args.threads)
        score_command(args) if args.score else answer_command(args)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed to nowhere
        return 141
    except (ValueError, OSError) as error:
        print(f"infer.py: {printable(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("\ninfer.py: stopped; with --out, the same command continues", file=sys.stderr)
        return code_of(stop)
    return 0


if __name__ == "__main__":
    stop_on_sigterm()
    sys.exit(main())
