"""The step language: what a step's prompt says, and what the model answers in.

    question, history, evidence -> the problem of a step         (what published weights were trained on, to the byte)
    thought, sub-question, base -> the text of a step -> parse_step -> RouteStep, AnswerStep or StepError

A routing step     <think> ...</think><sub-question> a question, or None</sub-question><ret> a base, or None</ret>
An answering step  <think> ...</think><answer> ...</answer>

Deviations from the released code, and why:
  * the parser is strict: each tag once, in order, nothing outside; the released code takes the first match of a
    regular expression, so that text outside the tags is free;
  * the `problem` strings of the published training files serve training and inference alike; the released inference
    code words the final prompt a little differently.
"""
import re
from dataclasses import dataclass

BASES = ("text", "image", "table")
ROUTES = {"text": "Text Retriever", "image": "Text Image Retriever", "table": "Table Retriever"}  # as steps name them
BASE_OF = {name.lower(): base for base, name in ROUTES.items()}
PREFIX = {"text": "ter", "image": "tir", "table": "tar"}  # label of a base's evidence lines
NONE = "None"      # as sub-question and as route: nothing more is needed
IMAGE = "<image>"  # stands at the end of a problem with a picture

PROMPTS = {
    "route": "You plan how a question gets answered, one step at a time. You see the question, its picture if it has "
             "one, and what earlier sub-questions have found. Think about what is still missing. Then write one "
             "sub-question that a single search can settle, and name where to search: Text Retriever for passages of "
             "an encyclopedia, Text Image Retriever for captioned pictures, which are compared with the question's "
             "picture too, or Table Retriever for rows of tables. If nothing is missing, write None in both places. "
             "Reply in exactly this form: <think> your thoughts</think><sub-question> one question or None"
             "</sub-question><ret> one retriever or None</ret>",
    "answer": "You answer a question from evidence. Each line of evidence names the knowledge base that it comes "
              "from; some lines may not matter. Think about which lines and which parts of the picture settle the "
              "question, then answer as briefly as it can be said. Reply in exactly this form: "
              "<think> your thoughts</think><answer> the answer</answer>",
    "final": "You give the final answer to a question. Earlier sub-questions and their answers are listed below it, "
             "if there were any. Think about what they and the picture say, then answer as briefly as it can be "
             "said. Reply in exactly this form: <think> your thoughts</think><answer> the answer</answer>",
    "cot": "You answer a question from what you know and from its picture. Think step by step: split the question, "
           "settle each part in turn, and check the result. Then answer as briefly as it can be said. Reply in "
           "exactly this form: <think> your thoughts, step by step</think><answer> the answer</answer>",
}
EVIDENCE_HEADER = (
    "According to the related information searched, `ter` means this info is from text retriever, `tir` means this "
    "info is from text image retriever, `tar` means this info is from table retriever:")


def _known(question, history):
    """The question and what is known so far, the beginning of the routing and the final prompt."""
    pairs = (f"Sub-question{i}: {query}\nAnswer{i}: {answer}\n" for i, (query, answer) in enumerate(history, 1))
    return f"Origin question: {question}\n{''.join(pairs)}"


def route_problem(question, history, image):
    """Prompt of a routing step; `history`: pairs (sub-question, answer) so far, `image`: whether there is a picture."""
    return _known(question, history) + (IMAGE if image else "")


def answer_problem(sub_question, evidence, image):
    """Prompt of an answering step; `evidence`: base name -> its passages, best first, which stay as they are."""
    lines = "".join(f"{PREFIX[base]}-{i}: {text}\n" for base in BASES for i, text in enumerate(evidence.get(base, ())))
    ask = f"\n\n Give me the answer(with the format <answer></answer>) to the Question: {sub_question}"
    return EVIDENCE_HEADER + lines + ask + (IMAGE if image else "")


def final_problem(question, history, image):
    """Prompt of the final step, arguments as of `route_problem`."""
    ask = f"Now, give me the final answer of the origin question: {question}"
    return _known(question, history) + ask + (IMAGE if image else "")


def conversation(system, problem, image=None):
    """A problem as the chat that the processor takes; an `image` (path or PIL) replaces the marker at the end."""
    if image is not None:
        problem = [{"type": "text", "text": problem.removesuffix(IMAGE)}, {"type": "image", "image": image}]
    return [{"role": "system", "content": system}, {"role": "user", "content": problem}]


def render_route(thought, query, route):
    """A routing step as supervised targets have it; `parse_step` reads it back."""
    return f"<think> {thought}</think><sub-question> {query}</sub-question><ret> {route}</ret>"


def render_answer(thought, answer):
    """An answering step as supervised targets have it; `parse_step` reads it back."""
    return f"<think> {thought}</think><answer> {answer}</answer>"


@dataclass(frozen=True)
class RouteStep:
    """What to ask where; `query` and `route` are both "None" where nothing more is needed."""
    thought: str
    query: str
    route: str   # a value of ROUTES, or "None"


@dataclass(frozen=True)
class AnswerStep:
    """An intermediate or the final answer."""
    thought: str
    answer: str


@dataclass(frozen=True)
class StepError:
    """A model output that is no step: what is wrong in a few words, and the whole output."""
    reason: str
    text: str


_TAG = re.compile(r"</?(?:think|sub-question|ret|answer)>", re.IGNORECASE)
_ROUTE_TAGS = ["<think>", "</think>", "<sub-question>", "</sub-question>", "<ret>", "</ret>"]
_ANSWER_TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


def parse_step(text):
    """Reads one model output: RouteStep, AnswerStep, or StepError with the reason. Never raises.

    Strict, because a reward pays for form: each tag of one kind of step exactly once and in order, only blanks outside,
    a known retriever, nothing empty but the thought. The case of tags and retrievers does not matter. `None` as
    sub-question or as retriever means `None` in both.
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
    """The first thing by which the tags of an output differ from the `wanted` ones."""
    if not tags:
        return "no tags"
    for tag in tags:
        if tag not in wanted:
            return f"{tag} in a routing step"
        if tags.count(tag) > 1:
            return f"{tag} more than once"
    missing = [tag for tag in wanted if tag not in tags]
    return f"no {missing[0]}" if missing else "tags out of order"
