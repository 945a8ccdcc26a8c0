"""R1-Router at work: a question and its picture go in, routed steps and an answer come out; many of them give a score.

    question, picture -> a method asks for a model call -> step prompt -> VLM.generate -> parse_step -> a step or its fault
                                or for a search         -> KnowledgeBase.search -> evidence -> the next prompt
                      -> Trajectory -> result row (JSONL) -> scores and costs -> table

In reading order: 1 the step language (prompts, renderers, parser), 2 the published metric, 3 the methods and the Router
that advances many questions together, 4 result rows and their evaluation, 5 input files, 6 what people see, 7 the
command line.

Shapes: N prompts of a batch, G samples of a prompt, T prompt tokens, L new tokens, K passages.

Deviations from the paper and the released code, and why:
  * the parser is strict: each tag once, in order, nothing outside; the released code takes the first match of a regular
    expression, so that text outside the tags is free;
  * a malformed step is counted and shown, and asked again only if `retries` says so (released: five silent retries, then
    "none"); a malformed routing step ends the routing, and the final answer is asked with what is known;
  * greedy by default, seeded where sampled (released: temperature 1, unseeded);
  * the `problem` strings of the published training files serve training and inference alike; the released inference code
    words the final prompt a little differently;
  * a prompt that the model has no room for is counted and not asked; it is never cut, since cutting loses the question;
  * the tokens of the metric follow nltk 3.10, which splits at dashes too, as the published figures that we test with do.
"""
import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import torch

from model import VLM, Processor
from retrieve import Hit, KnowledgeBase, open_image, read_docs

HERE = Path(__file__).resolve().parent


# ------------------------------------------------------------------------------------------------ 1 the step language

BASES = ("text", "image", "table")
ROUTES = {"text": "Text Retriever", "image": "Text Image Retriever", "table": "Table Retriever"}  # name in a routing step
BASE_OF = {name.lower(): base for base, name in ROUTES.items()}
PREFIX = {"text": "ter", "image": "tir", "table": "tar"}  # label of a base's evidence lines
NONE = "None"      # as sub-question and as route: nothing more is needed
IMAGE = "<image>"  # stands at the end of a problem with a picture

PROMPTS = {
    "route": "You plan how a question gets answered, one step at a time. You see the question, its picture if it has one, "
             "and what earlier sub-questions have found. Think about what is still missing. Then write one sub-question "
             "that a single search can settle, and name where to search: Text Retriever for passages of an encyclopedia, "
             "Text Image Retriever for captioned pictures, which are compared with the question's picture too, or Table "
             "Retriever for rows of tables. If nothing is missing, write None in both places. Reply in exactly this form: "
             "<think> your thoughts</think><sub-question> one question or None</sub-question>"
             "<ret> one retriever or None</ret>",
    "answer": "You answer a question from evidence. Each line of evidence names the knowledge base that it comes from; "
              "some lines may not matter. Think about which lines and which parts of the picture settle the question, "
              "then answer as briefly as it can be said. Reply in exactly this form: "
              "<think> your thoughts</think><answer> the answer</answer>",
    "final": "You give the final answer to a question. Earlier sub-questions and their answers are listed below it, if "
             "there were any. Think about what they and the picture say, then answer as briefly as it can be said. Reply "
             "in exactly this form: <think> your thoughts</think><answer> the answer</answer>",
    "cot": "You answer a question from what you know and from its picture. Think step by step: split the question, settle "
           "each part in turn, and check the result. Then answer as briefly as it can be said. Reply in exactly this form: "
           "<think> your thoughts, step by step</think><answer> the answer</answer>",
}
EVIDENCE_HEADER = ("According to the related information searched, `ter` means this info is from text retriever, `tir` means "
                   "this info is from text image retriever, `tar` means this info is from table retriever:")


def _history(question, history):
    pairs = (f"Sub-question{i}: {query}\nAnswer{i}: {answer}\n" for i, (query, answer) in enumerate(history, 1))
    return f"Origin question: {question}\n{''.join(pairs)}"


def route_problem(question, history, image):
    """Prompt of a routing step. `history`: pairs (sub-question, answer) so far; `image`: whether the question has a picture."""
    return _history(question, history) + (IMAGE if image else "")


def answer_problem(sub_question, evidence, image):
    """Prompt of an answering step. `evidence`: base name -> its K passages, best first; passages are kept as they are, newlines included."""
    lines = "".join(f"{PREFIX[base]}-{i}: {text}\n" for base in BASES for i, text in enumerate(evidence.get(base, ())))
    ask = f"\n\n Give me the answer(with the format <answer></answer>) to the Question: {sub_question}"
    return EVIDENCE_HEADER + lines + ask + (IMAGE if image else "")


def final_problem(question, history, image):
    """Prompt of the final step, arguments as of `route_problem`."""
    return f"{_history(question, history)}Now, give me the final answer of the origin question: {question}" + (IMAGE if image else "")


def conversation(system, problem, image=None):
    """A problem as the chat that the processor takes; where there is an `image` (path or PIL.Image), it takes the place of the marker at the end."""
    if image is not None:
        problem = [{"type": "text", "text": problem.removesuffix(IMAGE)}, {"type": "image", "image": image}]
    return [{"role": "system", "content": system}, {"role": "user", "content": problem}]


def render_route(thought, query, route):
    """The routing step that `parse_step` reads back, as supervised targets have it."""
    return f"<think> {thought}</think><sub-question> {query}</sub-question><ret> {route}</ret>"


def render_answer(thought, answer):
    """The answering step that `parse_step` reads back, as supervised targets have it."""
    return f"<think> {thought}</think><answer> {answer}</answer>"


@dataclass(frozen=True)
class RouteStep:
    thought: str
    query: str   # the sub-question, or "None"
    route: str   # a value of ROUTES, or "None"


@dataclass(frozen=True)
class AnswerStep:
    thought: str
    answer: str


@dataclass(frozen=True)
class StepError:
    reason: str  # what is wrong, in a few words
    text: str    # the whole output


_TAG = re.compile(r"</?(?:think|sub-question|ret|answer)>", re.IGNORECASE)
_ROUTE_TAGS = ["<think>", "</think>", "<sub-question>", "</sub-question>", "<ret>", "</ret>"]
_ANSWER_TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


def parse_step(text):
    """Reads one model output: RouteStep, AnswerStep, or StepError with the reason. Never raises.

    Strict, because a reward pays for form: each tag of one kind of step exactly once and in order, only blanks outside, a known retriever, nothing
    empty but the thought. Case of tags and retrievers does not matter. `None` as sub-question or as retriever means `None` in both.
    """
    tags = [tag.lower() for tag in _TAG.findall(text)]
    wanted = _ROUTE_TAGS if set(tags) - set(_ANSWER_TAGS) else _ANSWER_TAGS
    if tags != wanted:
        return StepError(_tag_fault(tags, wanted), text)
    parts = [part.strip() for part in _TAG.split(text)]  # outside, inside, outside, inside, ..., outside
    if any(parts[0::2]):
        return StepError("text outside the tags", text)
    if wanted is _ANSWER_TAGS:
        thought, answer = parts[1::2]
        return AnswerStep(thought, answer) if answer else StepError("empty answer", text)
    thought, query, name = parts[1::2]
    base = BASE_OF.get(name.lower())
    if base is None and name.lower() != "none":
        return StepError(f"unknown retriever {name[:40]!r}", text)
    if base is None or query.lower() == "none":
        return RouteStep(thought, NONE, NONE)
    return RouteStep(thought, query, ROUTES[base]) if query else StepError("empty sub-question", text)


def _tag_fault(tags, wanted):
    """Names the first thing by which the tags of an output differ from the `wanted` ones."""
    if not tags:
        return "no tags"
    for tag in tags:
        if tag not in wanted:
            return f"{tag} in a routing step"
        if tags.count(tag) > 1:
            return f"{tag} more than once"
    missing = [tag for tag in wanted if tag not in tags]
    return f"no {missing[0]}" if missing else "tags out of order"


# ------------------------------------------------------------------------------------------------ 2 the published metric

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())} | {"none": "0"}


def _contractions():
    """The VQA evaluation's list, as a rule: a listed contraction that has lost exactly one of its apostrophes gets it back."""
    stems = {
        "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
        "'ve": "could might must not should they we what where who would you",
        "'d": "he how it someone something there they where who you",
        "'ll": "how it somebody someone something they what who why you",
        "'s": "he how somebody someone that there what when where who why",
        "'re": "there they what why you",
        "n't've": "could had might should would",
        "'d've": "he it she somebody someone something there they we who you y'all",
        "": "ma'am o'clock 'twas y'all y'all'll 'ow's'at",
    }
    words = [stem + tail for tail, group in stems.items() for stem in group.split()]
    table = {word[:i] + word[i + 1:]: word for word in words for i, letter in enumerate(word) if letter == "'"}
    return table | {"somebody'd": "somebodyd"}  # the list has this one the wrong way round, and so has the metric


_CONTRACTIONS = _contractions()
_TREEBANK = [(re.compile(pattern), replacement) for pattern, replacement in (  # only the rules that can still meet a normalised text
    (r"([«“‘„])", r" \1 "), (r" ''", r" `` "), (r"(?<!\w)(')(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)", r"\1 "),            # opening quotes
    (r"([^.])(\.)(['»”’ ]*)$", r"\1 \2 \3 "), (r"(:)(\D)", r" \1 \2"), (r"(:)$", r" \1 "), (r"\.{2,}", r" \g<0> "),  # periods, colons
    (r"[#$%&\u2012-\u2015]", r" \g<0> "), (r"([^'])' ", r"\1 ' "), (r"\*", " * "), (r"^|$", " "), (r"([»”’])", r" \1 "),  # signs, closing quotes
    (r"''", r" '' "), (r"\s+", " "), (r"([^' ])('s|'m|'d|') ", r"\1 \2 "), (r"([^' ])('ll|'re|'ve|n't) ", r"\1 \2 "),  # clitics
    *((rf"\b({a})({b})\b", r" \1 \2 ") for a, b in map(str.split, ("can not", "d 'ye", "gim me", "gon na", "got ta", "lem me", "more 'n"))),
    (r"\b(wan)(na)(?=\s)", r" \1 \2 "), (r" ('t)(is)\b", r" \1 \2 "), (r" ('t)(was)\b", r" \1 \2 "))]


def metric_tokens(text):
    """The published normalisation and Penn-Treebank tokens of an answer: str -> list of str."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_comma_number = re.search(r"\d,\d", text)
    kept = text
    for sign in _PUNCTUATION:
        beside_space = sign + " " in text or " " + sign in text
        kept = kept.replace(sign, "" if beside_space or has_comma_number else " ")
    kept = re.sub(r"\.(?!\d)", "", kept, count=32)  # 32 is a slip in the published code (a flag passed as the count) that scores depend on
    words = [_NUMBERS.get(word, word) for word in kept.lower().split()]
    text = " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("an", "the"))
    for pattern, replacement in _TREEBANK:
        text = pattern.sub(replacement, text)
    return [token for token in text.split() if token not in ",.?!:;'\""]


def _range_golds(low, high):
    """The numbers that the published code accepts for an infoseek range, as text: an even grid whose step depends on the width, and the integers."""
    width = high - low
    step = 1 if width >= 50 else 0.1 if width >= 5 else 0.01 if width >= 1 else 0.001
    grid = {str(round(low + i * step, 3)) for i in range(int(width / step) + 1)}
    return grid | {str(i) for i in range(int(low), int(high) + 1)}


def answer_scores(prediction, golds):
    """The published metric: (precision, recall, f1) against the gold with the best F1; the reported F1-Recall is the mean of `recall`.

    `golds`: a string, or a list of strings and of infoseek's `{"range": [low, high]}`. Recall rewards dumping ("yes no" is right on every yes/no
    question), so read it beside `exact_match`.
    """
    predicted = Counter(metric_tokens(prediction))
    best = (0.0, 0.0, 0.0)
    for gold in _gold_tokens(golds, predicted):
        shared = sum((predicted & Counter(gold)).values())
        if shared:
            precision, recall = shared / predicted.total(), shared / len(gold)
            best = max(best, (precision, recall, 2 * precision * recall / (precision + recall)), key=lambda scores: scores[2])
    return best


def exact_match(prediction, golds):
    """1.0 where the prediction's tokens are those of a gold, in order, after the published normalisation; else 0.0."""
    predicted = metric_tokens(prediction)
    return float(bool(predicted) and predicted in list(_gold_tokens(golds, predicted)))


def _gold_tokens(golds, predicted):
    """Tokens of each gold; of a range, which may accept 26,000 numbers, only those that the prediction holds, since no other can score."""
    for gold in [golds] if isinstance(golds, (str, dict)) else golds:
        if isinstance(gold, dict):
            accepted = _range_golds(*map(float, gold["range"]))
            yield from ([token] for token in predicted if token in accepted)
        else:
            yield metric_tokens(str(gold))
