"""R1-Router at work: a question and its picture go in, routed steps and an answer come out;
many questions give a score.

    question, picture -> a method asks for a model call -> prompt of a step -> VLM.generate
                                                        -> parse_step -> a step, or what is wrong
                                or for a search         -> KnowledgeBase.search -> evidence
                      -> Trajectory -> result row (JSONL) -> scores and costs -> table
                                                          -> steps to train on

In reading order: 1 the methods, 2 options, and a question on its way, 3 the Router, which advances
many questions together, 4 the command line. The step language is in parts/steps.py, the metric in
parts/score.py, what a trajectory is in parts/trajectory.py, evaluation in parts/evaluate.py.

Shapes: N prompts of a batch, n samples of a prompt, T prompt tokens, L new tokens.

Deviations from the paper and the released code, and why:
  * a malformed step is counted and shown, and asked again only if `retries` says so (released: five
    silent retries, then "none"); a malformed routing step ends the routing, and the final answer is
    asked with what is known;
  * greedy by default, seeded where sampled (released: temperature 1, top-k 20, unseeded), and
    outputs are read as they are (released: in lower case). --recipe released has the rest of its
    settings, docs/recipe.md compares them;
  * a prompt that the model has no room for is counted and not asked; it is never cut, for a cut
    loses the question.
"""
import json
import math
import os
import random
import sys
import time
from argparse import SUPPRESS
from collections import Counter, deque
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path

import torch

from model import VLM
from parts import recipes
from parts.batches import in_budget
from parts.chat import Processor
from parts.evaluate import evaluate_routers, questions_of, report, score_files, world_of
from parts.questions import HERE, ROUTING, embedded_world, load_questions
from parts.score import answer_scores                       # noqa: F401, a public name
from parts.show import Chat, greeting, knows_follow_ups, print_trace
from parts.stepfiles import demonstrations, load_prompts, load_steps, with_demonstrations
from parts.steps import (BASES, BASE_OF, NONE, PROMPTS, AnswerStep, RouteStep, StepError,
                         answer_problem, conversation, final_problem, parse_step, route_problem)
from parts.trajectory import COSTS, Candidate, Step, Trajectory, result_row
from parts.vision import load_picture
from plumbing.files import run_command
from plumbing.options import (OneLineParser, add_flags, check_options, flag_of, from_flags,
                              option)
from plumbing.weights import check_model, usable_device, use_threads
from retrieve import load_bases, world_bases

# --------------------------------------------------------------------------------------- 1 methods

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


# A method is a generator for one question, written as if that question were alone: `yield` hands an
# Ask or a Search to the Router, which batches those of many questions, and gives the reply. The
# answer of the last step is the final answer. Its first argument is what METHODS names below.

def routed(prefix, row, options):
    """The paper's loop: sub-question and route, evidence, intermediate answer, until None or
    `max_steps`.

    prefix: "", or "fewshot " for the system prompts with demonstrations. What was asked before the
    question, `former`, stands in the prompts like sub-questions already answered.
    """
    history = list(row.get("former") or ())
    for _ in range(options.max_steps):
        step = yield ask_route(prefix + "route", row, history)
        if step.route in (None, NONE):             # malformed, or nothing more is needed
            break
        query = step.parsed.query
        evidence = yield Search(query, step.parsed.bases, options.k)
        reading = yield ask_answer(prefix + "answer", row, query, evidence)
        history.append((query, reading.answer))
    yield ask_final(prefix + "final", row, history)


def at_random(prefix, row, options):
    """A baseline of routing: the model's own sub-questions, each sent to one base chosen at random.

    The choices depend on the seed and the question's text alone, not on the batch. The steps and
    the result row keep the routes that the model named.
    """
    rng = random.Random(f"{options.seed} {row['question']}")
    method = routed(prefix, row, options)
    reply = None
    while True:
        try:
            request = method.send(reply)
        except StopIteration:
            return
        if isinstance(request, Search):
            request = replace(request, bases=(rng.choice(BASES),))
        reply = yield request


def by_gold_hops(prefix, row, options):
    """The ceiling: gold sub-questions and routes; search and answers are live."""
    if row.get("hops") is None:
        raise ValueError(f"{row['question'][:60]!r} has no gold hops: method oracle needs them in "
                         "the question file")
    history = []
    for hop in row["hops"]:
        query, base = hop["query"], BASE_OF[hop["retriever"].strip().lower()]
        evidence = yield Search(query, (base,), options.k)
        reading = yield ask_answer(prefix + "answer", row, query, evidence)
        history.append((query, reading.answer))
    yield ask_final(prefix + "final", row, history)


def read_once(bases, row, options):
    """The question itself goes once to each of the bases."""
    query = in_full(row)
    k = options.k if len(bases) == 1 else options.passages_each
    evidence = yield Search(query, bases, k)
    yield ask_answer("answer", row, query, evidence)


def drafted(bases, row, options):
    """Retrieval guided by a draft: the question goes to all bases, the model drafts an answer, and
    the question goes to them again together with the draft.

    Two rounds of Iter-RetGen (Shao et al. 2023, arXiv 2305.15294). IRCoT (Trivedi et al. 2023,
    arXiv 2212.10509) is of the same family; it searches with each sentence of a chain of thought.
    The last answer reads the second evidence only, so no more than `static` reads.
    """
    question = in_full(row)
    evidence = yield Search(question, bases, options.passages_each)
    draft = yield ask_answer("answer", row, question, evidence)
    thought = getattr(draft.parsed, "thought", "")             # a malformed draft has none
    query = f"{question} {thought} {draft.answer}"
    evidence = yield Search(query, bases, options.passages_each)
    yield ask_answer("answer", row, query, evidence, question)


def without_search(prompt, row, options):
    """The model alone."""
    yield ask_final(prompt, row, row.get("former") or ())


def ask_route(prompt, row, history):
    """Asks which sub-question is next, and where to search."""
    problem = route_problem(row["question"], history, has_picture(row))
    return Ask("route", problem, prompt, row["question"])


def ask_answer(prompt, row, query, evidence, question=None):
    """Asks what the hits say about the query, or about `question` where one is given."""
    passages = {base: [hit.text for hit in hits] for base, hits in evidence.items()}
    problem = answer_problem(question or query, passages, has_picture(row))
    return Ask("answer", problem, prompt, query, evidence)


def ask_final(prompt, row, history):
    """Asks for the final answer."""
    problem = final_problem(row["question"], history, has_picture(row))
    return Ask("final", problem, prompt, row["question"])


def has_picture(row):
    return row.get("image") is not None


def in_full(row):
    """The question, behind the exchange before it if there was one: what is searched for where no
    step can rephrase."""
    texts = []
    for question, answer in row.get("former") or ():
        texts += [question, answer]
    return " ".join([*texts, row["question"]])


METHODS = {     # name -> (function, its first argument, bases that it needs)
    "router": (routed, "", BASES),
    "fewshot": (routed, "fewshot ", BASES),
    "random": (at_random, "", BASES),
    "oracle": (by_gold_hops, "", BASES),
    "iterative": (drafted, BASES, BASES),
    "direct": (without_search, "final", ()),
    "cot": (without_search, "cot", ()),
    "static": (read_once, BASES, BASES),
    "text": (read_once, ("text",), ("text",)),
    "image": (read_once, ("image",), ("image",)),
    "table": (read_once, ("table",), ("table",)),
}


# ------------------------------------------------------------------------ 2 options and a question

@dataclass(frozen=True)
class RouterOptions:
    """How questions are answered. Those with a help text are flags of infer.py."""
    method: str = option("router", choices=tuple(METHODS))
    k: int = option(2, "passages of each base that a sub-question is routed to", least=1)
    static_k: int = option(None, least=1)       # passages of each base where all are asked at once
    max_steps: int = option(4, "sub-questions at most; questions of four hops need 5, the last to "
                            "say that nothing is missing", least=1)
    max_new_tokens: int = option(96, "longest output of a step, in tokens", least=1)
    temperature: float = option(0.0, "of sampling; 0, the default, is greedy")
    top_k: int = option(0, "sample among so many of the likeliest tokens; 0: among all")
    top_p: float = 1.0                          # 1: no limit
    lower_case: bool = option(False, "read outputs in lower case: so are sub-questions, searches, "
                              "answers")
    several: bool = option(False, "a routing step may name several retrievers, with commas "
                           "between, and each is searched")
    samples: int = option(1, least=1)           # candidates of a step, all from the same history
    follow: object = None       # (candidates, random.Random) -> index of the one to go on with
    retries: int = option(0)                    # times that a malformed step is asked again
    batch_size: int = option(64, "prompts of a model call; four times as many questions are open "
                             "at once", least=1)
    call_tokens: int = option(65536, least=1)   # budget of a model call: prompts, room for outputs
    prompts: dict = None        # system prompts that replace those of PROMPTS
    shown: list = None          # trajectories that fewshot shows (load_steps); by default our own
    seed: int = option(0, "of sampling, and of the question that is shown where none is given",
                       least=-2 ** 63, most=2 ** 63 - 1)

    def __post_init__(self):
        check_options(self)
        for name, prompt in (self.prompts or {}).items():
            if not isinstance(prompt, str):
                raise ValueError(f"the system prompt {name!r} is no text")
        if self.temperature == 0 and (self.samples > 1 or self.retries > 0):
            raise ValueError("temperature 0 gives the same output each time: raise it, or keep "
                             "samples 1, retries 0")

    @property
    def passages_each(self):
        """Passages of each base where all are asked at once: by default a third of k, so that as
        much is read as of one base."""
        return self.static_k or math.ceil(self.k / len(BASES))


@dataclass
class Question:
    """A question on its way: its method, what that waits for, and what it has cost so far."""
    place: int
    row: dict
    method: object                        # under way: what `routed` or another returned
    request: Ask | Search | None = field(init=False)    # None when it has finished
    retried: int = field(init=False)      # times that the request was asked again
    steps: list = field(default_factory=list)
    cost: Counter = field(default_factory=Counter)

    def conversation(self, prompts):
        """The chat that asks for the step which the method waits for."""
        system = prompts[self.request.prompt]
        return conversation(system, self.request.problem, self.row.get("image"))

    def send(self, reply):
        """Gives the method its reply (None at the start) and takes its next request."""
        self.retried = 0
        try:
            self.request = self.method.send(reply)
        except StopIteration:
            self.request = None


# ------------------------------------------------------------------------------------ 3 the Router

class Router:
    """Answers questions with a model, its processor and {"text", "image", "table"} -> base.

    `run` does all of it. Who wants to choose what is sampled next, as training does, calls `open`,
    `search`, `sample` and `step` as `run` does.
    """

    def __init__(self, vlm, processor, bases, **options):
        """options: fields of RouterOptions. ValueError where one does not fit, where the method
        needs a base that is missing, or where the model has no room for a prompt."""
        self.vlm, self.processor, self.bases = vlm, processor, bases
        self.options = RouterOptions(**options)
        self.prompts = PROMPTS | (self.options.prompts or {})
        self.prompts |= with_demonstrations(self.prompts, self.options.shown or demonstrations())
        _, _, needed = METHODS[self.options.method]
        for base in needed:
            if base not in bases:
                raise ValueError(f"method {self.options.method} needs the knowledge base {base!r}: "
                                 f"give --kb {base}=DIR")
        positions = vlm.config.max_position_embeddings
        self.room = positions - self.options.max_new_tokens     # tokens that a prompt may have
        if self.room < 1:
            raise ValueError(f"max_new_tokens {self.options.max_new_tokens} leaves no room for a "
                             f"prompt: the model has {positions} positions, lower --max-new-tokens")

    def run(self, questions, on_done=None, generator=None):
        """Answers question rows; Trajectories in the same order.

        A row is {"question"}, optionally with "image": path or PIL, and "former": [(question,
        answer)] that it follows.

        All open questions advance together: a tick is one search of each base, then the model calls
        in batches of prompts of similar length. `on_done(trajectory)` is called as each question
        finishes. `generator` is torch's, on the model's device; where none is given, one is seeded
        from the options.
        """
        o = self.options
        rng = random.Random(o.seed)
        if generator is None:
            device = next(self.vlm.parameters()).device
            generator = torch.Generator(device).manual_seed(o.seed)
        waiting = deque(enumerate(questions))
        open_questions = []
        trajectories = {}                                       # place -> Trajectory
        while waiting or open_questions:
            while waiting and len(open_questions) < 4 * o.batch_size:
                place, row = waiting.popleft()
                open_questions.append(self.open(place, row))
            self.search([q for q in open_questions if isinstance(q.request, Search)])
            asking = [q for q in open_questions if isinstance(q.request, Ask)]
            asking.sort(key=lambda q: len(q.request.problem))
            for start in range(0, len(asking), o.batch_size):
                self._ask(asking[start:start + o.batch_size], rng, generator)
            for q in open_questions:
                if q.request is None:
                    trajectories[q.place] = self._trajectory(q)
                    if on_done:
                        on_done(trajectories[q.place])
            open_questions = [q for q in open_questions if q.request is not None]
        return [trajectories[place] for place in sorted(trajectories)]

    def open(self, place, row):
        """A Question that waits for its first reply; `place` tells it from the others that are
        searched with it."""
        if not isinstance(row, dict):
            raise ValueError(f"question {place + 1} is {str(row)[:40]!r}: expected a row "
                             "{'question': ...}")
        if not isinstance(row.get("question"), str) or not row["question"].strip():
            raise ValueError(f"question {place + 1} is empty: give it some words")
        method, argument, _ = METHODS[self.options.method]
        q = Question(place, row, method(argument, row, self.options))
        q.send(None)
        return q

    def _trajectory(self, q):
        """What a finished question amounts to."""
        costs = {name: q.cost[name] for name in COSTS}
        return Trajectory(q.row, self.options.method, tuple(q.steps), q.steps[-1].answer, **costs)

    def search(self, questions):
        """One search of each base for all questions that wait for it, which then go on."""
        evidence = {q.place: {} for q in questions}             # place -> {base: hits}
        for base in BASES:
            searching = [q for q in questions if base in q.request.bases]
            if not searching:
                continue
            start = time.perf_counter()
            queries = [_query_of(q, base) for q in searching]
            k = searching[0].request.k              # the same for all: each method has one k
            results = self.bases[base].search(queries, k)
            seconds = (time.perf_counter() - start) / len(searching)
            for q, hits in zip(searching, results):
                evidence[q.place][base] = tuple(hits)
                q.cost["retrievals"] += 1
                q.cost["seconds_search"] += seconds
        for q in questions:
            q.send(evidence[q.place])

    def _ask(self, questions, rng, generator):
        """Samples the steps of a batch of questions. Each question gets its Step and goes on, or
        waits to be asked again."""
        o = self.options
        start = time.perf_counter()
        outputs = self.sample([q.conversation(self.prompts) for q in questions], generator)
        seconds = (time.perf_counter() - start) / len(questions)
        for q, (prompt_ids, candidates) in zip(questions, outputs):
            followed = o.follow(candidates, rng) if o.follow and candidates else 0
            step = self.step(q, prompt_ids, candidates, followed)
            q.cost["seconds_model"] += seconds
            malformed = candidates and isinstance(step.parsed, StepError)
            if malformed and q.retried < o.retries:
                q.retried += 1                                  # the next tick asks the same again
            else:
                q.steps.append(step)
                q.send(step)

    def step(self, q, prompt_ids, candidates, followed):
        """The Step of a question: these candidates, and the index of the one that is followed. What
        it cost is counted."""
        ask = q.request
        candidates = tuple(_expected(ask.kind, candidate) for candidate in candidates)
        step = Step(ask.kind, ask.query, q.conversation(self.prompts), prompt_ids, candidates,
                    followed, ask.evidence)
        if not candidates:
            q.cost["too_long"] += 1
            return step
        q.cost["model_calls"] += 1
        q.cost["prompt_tokens"] += len(prompt_ids)
        q.cost["generated_tokens"] += sum(len(candidate.token_ids) for candidate in candidates)
        q.cost["malformed"] += isinstance(step.parsed, StepError)
        return step

    def noise(self, conversations, generator, n=None):
        """Uniform numbers (N, n, max_new_tokens) in [0, 1): all that is random in the outputs of N
        conversations."""
        shape = len(conversations), n or self.options.samples, self.options.max_new_tokens
        return torch.rand(shape, generator=generator, device=generator.device)

    def sample(self, conversations, generator, n=None, noise=None):
        """n outputs (by default `samples`) for each of N conversations: N pairs (prompt ids,
        candidates). No candidates where the prompt leaves no room for an answer.

        A conversation that stands in the list several times, as the first step of a group of
        trajectories does, is read once for all its samples. Its outputs depend on its part of
        `noise`, drawn where none is given, and but for rounding not on the others in the list.
        """
        n = n or self.options.samples
        if noise is None:
            noise = self.noise(conversations, generator, n)
        places_of = {}                                          # conversation -> where it stands
        for place, key in enumerate(map(repr, conversations)):
            places_of.setdefault(key, []).append(place)
        outputs = [None] * len(conversations)
        # A model call has equally many outputs of each of its prompts, so those that stand in the
        # list equally often go together.
        for count in sorted(set(map(len, places_of.values()))):
            alike = [places for places in places_of.values() if len(places) == count]
            prompts = [conversations[places[0]] for places in alike]
            numbers = [noise[places].flatten(0, 1) for places in alike]     # (count * n, L) each
            generated = self._generate(prompts, torch.stack(numbers))
            for places, (ids, candidates) in zip(alike, generated):
                for i, place in enumerate(places):
                    outputs[place] = ids, candidates[i * n:(i + 1) * n]
        return outputs

    def _generate(self, conversations, noise):
        """`sample` for N different conversations, in model calls that keep the token budget. noise
        (N, n, L): n outputs each."""
        o, n = self.options, noise.shape[1]
        prompts = [self.processor.prompt(one) for one in conversations]
        outputs = [(tuple(ids), ()) for ids, _, _ in prompts]
        fitting = [i for i, (ids, _) in enumerate(outputs) if len(ids) <= self.room]

        def size(i):                                            # of a prompt and all its outputs
            return len(prompts[i][0]) + n * o.max_new_tokens

        for part in in_budget(fitting, size, o.call_tokens):
            batch = self.processor.batch([prompts[i] for i in part])
            inputs = {name: tensor.to(noise.device) for name, tensor in batch.items()
                      if tensor is not None}                    # None: no picture in this batch
            samples = self.vlm.generate(
                **inputs, n=n, max_new_tokens=o.max_new_tokens, temperature=o.temperature,
                top_k=o.top_k, top_p=o.top_p, eos_ids=self.processor.eos_ids,
                noise=noise[part].flatten(0, 1))
            candidates = map(self._candidate, samples.tokens.cpu(), samples.mask.cpu(),
                             samples.logps.cpu())               # n of each prompt, in order
            for i in part:
                prompt_ids, _ = outputs[i]
                outputs[i] = prompt_ids, tuple(islice(candidates, n))
        return outputs

    def _candidate(self, tokens, mask, logps):
        """One sampled row of a model call: tokens, mask and log-probabilities (L,)."""
        ids = tuple(tokens[mask].tolist())
        text = self.processor.decode(ids)
        if self.options.lower_case:
            text = text.lower()
        parsed = parse_step(text, self.options.several)
        return Candidate(text, ids, tuple(logps[mask].tolist()), parsed)


def _query_of(q, base):
    """What a question asks a base: its picture goes along to the base of pictures."""
    if base == "image" and has_picture(q.row):
        return {"text": q.request.query, "image": q.row["image"]}
    return q.request.query


def _expected(kind, candidate):
    """The candidate; a step of the other kind than was asked for counts as malformed."""
    expected, other = (RouteStep, AnswerStep) if kind == "route" else (AnswerStep, RouteStep)
    if isinstance(candidate.parsed, other):
        reason = f"{other.__name__} where {expected.__name__} was asked for"
        return replace(candidate, parsed=StepError(reason, candidate.text))
    return candidate


# --------------------------------------------------------------------------------- 4 command line

MODES = ("score", "question", "chat", "eval")
ANSWERING = ("question", "chat", "eval")


def flag(default, text, *modes, **more):
    """An option that does something in these modes, in all where none are named. Beside the flag of
    another mode it is refused."""
    return option(default, text, modes=modes or MODES, **more)


@dataclass(frozen=True)
class Flags:
    """What infer.py is asked to do."""
    question: str = flag(None, "answer this question", "question")
    image: str = flag(None, "its picture", "question", "chat")
    chat: bool = flag(False, "questions and follow-ups from the terminal; :help says more", "chat")
    eval: tuple = flag((), "evaluate on the questions of these JSONL files instead of the world's",
                       "eval", nargs="+")
    score: tuple = flag((), "score the rows of existing result files; two that answer the same "
                        "questions are compared as well", "score", nargs="+")
    method: tuple = flag((), f"one or more of {', '.join(METHODS)} [router]", *ANSWERING, nargs="+")
    recipe: str = flag(None, "released: settings of the released inference in place of our "
                       "defaults; its sampling needs --temperature 1 beside it, else it is greedy",
                       *ANSWERING, choices=("released",))
    model: str = flag(str(HERE / "weights" / "tiny"), "model directory")
    world: str = flag(None, "a folder of lab.world: bases and questions [data/demo]")
    kb: tuple = flag((), "knowledge bases in place of a world's: text=DIR image=DIR table=DIR",
                     nargs="+", metavar="NAME=DIR")
    images: str = flag(None, "folder of the questions' pictures [that of their file]", "eval")
    limit: int = flag(None, "only the first rows of each file", "eval", "score", least=1)
    show: int = flag(0, "show the steps of so many questions of different kinds", "eval")
    out: str = flag(None, "write result rows there; the same command again continues", "eval")
    write_steps: str = flag(None, "write the steps of router or fewshot as a step file", "eval")
    keep: str = flag("correct", "which trajectories --write-steps writes", "eval",
                     choices=("correct", "all"))
    prompts: str = flag(None, "system prompts: a prompts.json or a step file [the model's own]",
                        *ANSWERING)
    demos: str = flag(None, "step file whose first rows fewshot shows [our own]", *ANSWERING)
    shots: int = flag(2, "how many rows of --demos fewshot shows", *ANSWERING, least=1)
    device: str = flag("cpu", "cpu, cuda, ...")
    dtype: str = flag("float32", "of the weights", choices=("float32", "bfloat16", "float16"))
    threads: int = flag(0, "CPU threads [1 for a small model, else as torch likes]", most=1024)
    json: bool = flag(False, "print JSON only")


def parse_flags(words):
    """(mode, Flags, RouterOptions). ValueError where a flag would do nothing, contradicts the
    recipe, or names a file that another flag names for something else."""
    parser = OneLineParser(prog="infer.py", description="Answer questions by routed retrieval, or "
                           "evaluate methods on many.")
    add_flags(parser, Flags)
    add_flags(parser, RouterOptions)
    parser.add_argument("words", nargs="*", help=SUPPRESS)
    args = parser.parse_args(words)
    if args.words:
        raise ValueError(f"{args.words[0]!r} stands alone: a question goes behind --question, "
                         "files of questions behind --eval")
    del args.words
    flags = from_flags(Flags, args)
    modes_of = {f.name: ANSWERING for f in fields(RouterOptions)}
    modes_of |= {f.name: f.metadata["modes"] for f in fields(Flags)}
    mode = mode_of(flags, vars(args), modes_of)
    for name in vars(args):
        if mode not in modes_of[name] and name != "image":      # which has a message of its own
            raise ValueError(f"{flag_of(name)} does nothing beside --{mode}: leave it or leave out "
                             f"--{mode}")
    if flags.image is not None and flags.question is None and not flags.chat:
        raise ValueError("--image is the picture of --question or --chat: give one of them")
    if flags.chat and (len(flags.method) > 1 or "oracle" in flags.method):
        raise ValueError(f"--chat with --method {' '.join(flags.method)}: give one method, and not "
                         "oracle, which needs gold hops")
    check_files(flags)
    if flags.recipe:
        recipes.follow(recipes.ANSWERING, vars(args))
    return mode, flags, from_flags(RouterOptions, args)


def mode_of(flags, given, modes_of):
    """The mode that a flag names. Where none does: an evaluation if a given flag is of no use to a
    single question, or names a world or a method; else a question of the embedded world."""
    if flags.score:
        return "score"
    if flags.question is not None:
        return "question"
    if flags.chat:
        return "chat"
    for name in given:
        if name in ("world", "method") or "question" not in modes_of[name]:
            return "eval"
    return "question"


def check_files(flags):
    """ValueError where a file that is written is also another one of the command, or a file is
    evaluated twice."""
    written = ("out", "write_steps")
    of_world = [os.path.realpath(world_of(flags) / f"{stem}.jsonl")
                for stem in (*BASES, "questions", "steps")]
    first = {}                                              # path -> the flag that named it first
    for name in (*written, "eval", "score", "prompts", "demos", "image"):
        paths = getattr(flags, name) or ()
        if isinstance(paths, str):
            paths = (paths,)
        for path in map(os.path.realpath, paths):
            if name in written and path in of_world:
                raise ValueError(f"{flag_of(name)} {path} is a file of the world: name another one")
            if first.get(path) in (*written, name):
                both = f"{flag_of(first[path])}, {flag_of(name)}"
                raise ValueError(f"{path} is given twice ({both}): name another file")
            first.setdefault(path, name)


def command(words):
    """Scores result files, chats, answers one question, or evaluates methods on many."""
    mode, flags, options = parse_flags(words)
    if mode == "score":
        tables, left_out, comparison = score_files(flags.score, flags.limit)
        report(tables, left_out, flags.json, comparison)
        return
    methods = flags.method or ("router",)
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}: give one of {', '.join(METHODS)}")
    if flags.write_steps and not set(methods) <= set(ROUTING):
        raise ValueError(f"--write-steps with --method {' '.join(methods)}: only "
                         f"{' and '.join(ROUTING)} make steps")
    world = Path(flags.world) if flags.world else None
    if world and not world.is_dir():
        raise ValueError(f"--world {world}: no such folder: a world has text.jsonl, image.jsonl, "
                         "table.jsonl and questions.jsonl")
    if world is None and not flags.kb:
        world = embedded_world("demo", "test", 1000, 200)

    if mode == "chat":
        make_router = router_maker(flags, options, world, BASES)
        hello = "" if flags.json else greeting(flags.model, make_router(methods[0]).bases, world)
        follow_ups = knows_follow_ups(flags.model)
        Chat(make_router, methods[0], flags.image, flags.json, hello, follow_ups).run()
        return
    if mode == "question":
        question = one_question(flags, options.seed, world)
    else:
        questions = questions_of(methods, flags, world)
    needed = [base for base in BASES if any(base in METHODS[method][2] for method in methods)]
    make_router = router_maker(flags, options, world, needed)
    routers = [make_router(method) for method in methods]
    if mode == "eval":
        evaluate_routers(routers, questions, flags)
        return
    for router in routers:
        [trajectory] = router.run([question])
        row = result_row(trajectory)
        if flags.json:
            print(json.dumps(row, ensure_ascii=False))
        else:
            print_trace(row)


def router_maker(flags, options, world, needed):
    """Loads model and bases -> make_router(method), which makes a Router of them."""
    device = usable_device(flags.device)
    prompts = {}
    trained_with = Path(flags.model) / "prompts.json"
    if flags.prompts or trained_with.is_file():
        prompts = load_prompts(flags.prompts or trained_with)
    shown = load_steps(flags.demos, flags.shots) if flags.demos else None
    bases = load_bases(flags.kb) if flags.kb else world_bases(world, needed)
    check_model(flags.model)
    vlm = VLM.from_pretrained(flags.model, dtype=getattr(torch, flags.dtype), device=device)
    use_threads(flags.threads, vlm)
    processor = Processor.from_pretrained(flags.model)

    def make_router(method):
        chosen = replace(options, method=method, prompts=prompts, shown=shown)
        return Router(vlm, processor, bases, **vars(chosen))

    return make_router


def one_question(flags, seed, world):
    """The question of the flags, or one of the world's that have a picture and two hops, chosen by
    the seed."""
    if flags.question is not None:
        if not flags.question.strip():
            raise ValueError("--question is empty: give it some words")
        if flags.image is not None:
            load_picture(flags.image)
        return {"question": flags.question, "image": flags.image}
    if world is None:
        raise ValueError("nothing to answer: give --question or --eval beside --kb")
    rows, _ = load_questions(world / "questions.jsonl")
    good = [row for row in rows if row["image"] and len(row.get("hops") or ()) == 2] or rows
    return good[seed % len(good)]


def main(argv=None):
    return run_command("infer.py", command, argv,
                       stopped="stopped; with --out, the same command continues")


if __name__ == "__main__":
    sys.exit(main())
