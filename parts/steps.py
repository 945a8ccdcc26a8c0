"""The step language: what a step's prompt says, and what the model answers in.

    question, history, evidence -> the problem of a step, to the byte as published weights saw it
    thought, sub-question, retriever -> the text of a step
                                     -> parse_step -> RouteStep, AnswerStep or StepError

A routing step     <think> ...</think><sub-question> a question, or None</sub-question>
                   <ret> a retriever, or None</ret>; with `several` also a list with commas
An answering step  <think> ...</think><answer> ...</answer>

Deviations from the released code, and why:
  * the parser is strict: each tag once, in order, nothing outside; the released code takes the
    first match of a regular expression, so that text outside the tags is free;
  * None as sub-question or as retriever means None in both; the released code takes an output that
    names only one of them for malformed in inference, and compares the two apart in training;
  * the problems of the published training files serve training and inference alike; the released
    inference code words the final problem a little differently.
"""
import re
from dataclasses import dataclass

BASES = ("text", "image", "table")
ROUTES = {"text": "Text Retriever", "image": "Text Image Retriever", "table": "Table Retriever"}
BASE_OF = {name.lower(): base for base, name in ROUTES.items()}
PREFIX = {"text": "ter", "image": "tir", "table": "tar"}    # label of a base's evidence lines
UNKNOWN = "unknown"     # the answer where the evidence does not say
NONE = "None"       # as sub-question and as route: nothing more is needed
IMAGE = "<image>"   # stands at the end of a problem with a picture

PROMPTS = {
    "route": "You plan how a question gets answered, one step at a time. You see the question, "
             "its picture if it has one, and what earlier sub-questions have found. Think about "
             "what is still missing. Then write one sub-question that a single search can "
             "settle, and name where to search: Text Retriever for passages of an encyclopedia, "
             "Text Image Retriever for captioned pictures, which are compared with the "
             "question's picture too, or Table Retriever for rows of tables. If nothing is "
             "missing, write None in both places. Reply in exactly this form: <think> your "
             "thoughts</think><sub-question> one question or None</sub-question><ret> one "
             "retriever or None</ret>",
    "answer": "You answer a question from evidence. Each line of evidence names the knowledge "
              "base that it comes from; some lines may not matter. Think about which lines and "
              "which parts of the picture settle the question, then answer as briefly as it can "
              "be said. Reply in exactly this form: <think> your thoughts</think><answer> the "
              "answer</answer>",
    "final": "You give the final answer to a question. Earlier sub-questions and their answers "
             "are listed below it, if there were any. Think about what they and the picture say, "
             "then answer as briefly as it can be said. Reply in exactly this form: <think> your "
             "thoughts</think><answer> the answer</answer>",
    "cot": "You answer a question from what you know and from its picture. Think step by step: "
           "split the question, settle each part in turn, and check the result. Then answer as "
           "briefly as it can be said. Reply in exactly this form: <think> your thoughts, step "
           "by step</think><answer> the answer</answer>",
}

# -------------------------------------------------------------------------- what a step is asked

EVIDENCE_HEADER = (
    "According to the related information searched, `ter` means this info is from text retriever, "
    "`tir` means this info is from text image retriever, `tar` means this info is from table "
    "retriever:")
ASK = "\n\n Give me the answer(with the format <answer></answer>) to the Question: "
FINISH = "Now, give me the final answer of the origin question: "


def problem_so_far(question, history):
    """The question, and the sub-questions with their answers: how a routing and a final problem
    begin."""
    lines = [f"Origin question: {question}\n"]
    for i, (query, answer) in enumerate(history, 1):
        lines.append(f"Sub-question{i}: {query}\nAnswer{i}: {answer}\n")
    return "".join(lines)


def route_problem(question, history, image):
    """Problem of a routing step. history: pairs (sub-question, answer) so far; image: whether there
    is a picture."""
    return problem_so_far(question, history) + (IMAGE if image else "")


def answer_problem(sub_question, evidence, image):
    """Problem of an answering step. evidence: base -> its passages, best first, put in as is."""
    lines = []
    for base in BASES:
        for i, passage in enumerate(evidence.get(base, ())):
            lines.append(f"{PREFIX[base]}-{i}: {passage}\n")
    return EVIDENCE_HEADER + "".join(lines) + ASK + sub_question + (IMAGE if image else "")


def final_problem(question, history, image):
    """Problem of the final step, arguments as of `route_problem`."""
    return problem_so_far(question, history) + FINISH + question + (IMAGE if image else "")


def conversation(system, problem, image=None):
    """A problem as the chat that the processor takes. An `image` (path or PIL) takes the place of
    the marker at the problem's end."""
    content = problem
    if image is not None:
        text = problem.removesuffix(IMAGE)
        content = [{"type": "text", "text": text}, {"type": "image", "image": image}]
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]


# ----------------------------------------------------------------------- what a step answers in


def render_route(thought, query, route):
    """A routing step as supervised targets have it; `parse_step` reads it back."""
    return f"<think> {thought}</think><sub-question> {query}</sub-question><ret> {route}</ret>"


def render_answer(thought, answer):
    """An answering step as supervised targets have it; `parse_step` reads it back."""
    return f"<think> {thought}</think><answer> {answer}</answer>"


def gold_route(answer):
    """(sub-question, retriever) of the gold answer of a routing step, in lower case. If either says
    none, both mean none."""
    query = answer["query"].strip().lower()
    retriever = answer["retriever"][0].strip().lower()
    return ("none", "none") if "none" in (query, retriever) else (query, retriever)


@dataclass(frozen=True)
class RouteStep:
    """What to ask where; `query` and `route` are both "None" where nothing more is needed."""
    thought: str
    query: str
    route: str      # a value of ROUTES, several of them with ", " between, or "None"

    @property
    def names(self):
        """The retrievers as a row lists them: ["Text Retriever"], or ["None"]."""
        return self.route.split(", ")

    @property
    def bases(self):
        """The bases to search: ("text",), or () where nothing more is needed."""
        return tuple(BASE_OF[name.lower()] for name in self.names if name != NONE)


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


TAG = re.compile(r"</?(?:think|sub-question|ret|answer)>", re.IGNORECASE)
ROUTE_TAGS = ["<think>", "</think>", "<sub-question>", "</sub-question>", "<ret>", "</ret>"]
ANSWER_TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


def parse_step(text, several=False):
    """Reads one model output: RouteStep, AnswerStep, or StepError with the reason. Never raises.

    Strict, because a reward pays for form: each tag of one kind of step exactly once and in order,
    only blanks outside, a known retriever, nothing empty but the thought. The case of tags and
    retrievers does not matter. `None` as sub-question or as retriever means `None` in both.

    several: the retriever may be a list with commas. One that begins with None is None; a later
    None ends the list; a base counts once.
    """
    tags = [tag.lower() for tag in TAG.findall(text)]
    expected = ANSWER_TAGS if set(tags) <= set(ANSWER_TAGS) else ROUTE_TAGS
    if tags != expected:
        return StepError(tag_fault(tags, expected), text)
    pieces = [piece.strip() for piece in TAG.split(text)]
    outside, inside = pieces[::2], pieces[1::2]     # they take turns; the first lies outside
    if any(outside):
        return StepError("text outside the tags", text)
    if expected == ANSWER_TAGS:
        thought, answer = inside
        return AnswerStep(thought, answer) if answer else StepError("empty answer", text)
    thought, query, retriever = inside
    names = [retriever]
    if several:
        names = [name.strip() for name in retriever.split(",")]
    for name in names:
        if name.lower() not in (*BASE_OF, "none"):
            return StepError(f"unknown retriever {name[:40]!r}", text)
    routes = routes_of(names)
    if not routes:
        return RouteStep(thought, NONE, NONE)
    if not query:
        return StepError("empty sub-question", text)
    if query.lower() == "none":
        return RouteStep(thought, NONE, NONE)
    return RouteStep(thought, query, ", ".join(routes))


def routes_of(names):
    """The values of ROUTES that a list of retrievers, in any case, has before its first None; each
    once."""
    routes = []
    for name in names:
        if name.lower() == "none":
            break
        route = ROUTES[BASE_OF[name.lower()]]
        if route not in routes:
            routes.append(route)
    return routes


def tag_fault(tags, expected):
    """The first thing by which the tags of an output differ from those of a step."""
    if not tags:
        return "no tags"
    for tag in tags:
        if tag not in expected:
            return f"{tag} in a routing step"
        if tags.count(tag) > 1:
            return f"{tag} more than once"
    for tag in expected:
        if tag not in tags:
            return f"no {tag}"
    return "tags out of order"
