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
import json
import math
import os
import random
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from model import VLM
from parts.chat import Processor
from parts.evaluate import answer_many, many_questions, report, score_command, score_table
from parts.questions import (COSTS, HERE, ROUTING, embedded_world, load_questions, result_row,
                             world_of)
from parts.score import answer_scores
from parts.show import Chat, print_trace
from parts.stepfiles import (demonstrations, in_budget, load_prompts, load_steps,
                             with_demonstrations, write_steps)
from parts.steps import (BASES, BASE_OF, NONE, PROMPTS, AnswerStep, RouteStep, StepError,
                         answer_problem, conversation, final_problem, parse_step, route_problem)
from parts.vision import load_picture
from plumbing.old import OneLineParser, code_of, printable, stop_on_sigterm, usable_device
from retrieve import load_bases, world_bases

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
