"""A question under way: where its trajectory stands, and by which gold hops it is judged.

A gold hop is {"query", "retriever", "answer"}. It is open until it was asked for and answered
rightly, and while nothing it names is still to be found by a hop before it. Open hops may be asked
for in any order and wording: a sub-question stands for the open hop
that is nearest to it in meaning, if it is near enough.

A fact may lie in one of several bases. Then there is a hop for each base to look in, with the same
query, and the answer "unknown" where it is not.
"""
import re

import torch

from parts.questions import golds_of, load_questions
from parts.score import answer_scores
from parts.steps import UNKNOWN


def practice_rows(files, images=None, limit=None):
    """The questions of some files; of each file the first `limit`. ValueError for the first row
    that does not fit."""
    rows = []
    for file in files:
        some, faults = load_questions(file, images, limit)
        if faults:
            raise ValueError(faults[0])
        for row in some:
            row["file"] = str(file)
        rows += some
    return rows


def check_hops(rows):
    """ValueError for a question whose steps cannot be judged: without gold hops and their answers.
    """
    for row in rows:
        where = f"{row['file']}:{row['line']}"
        if row.get("hops") is None:
            raise ValueError(f"{where}: no gold hops, by which steps are judged; --mode outcome "
                             "needs none")
        for hop in row["hops"]:
            if not isinstance(hop.get("answer"), str):
                raise ValueError(f"{where}: a hop without 'answer', a text")


class Live:
    """A question under way. It is a prompt as parts/groups.py takes them: conversation(), golds(),
    label()."""

    def __init__(self, router, serial, number, row, only_ready=True):
        """serial: its number among all that are opened; number: of its row in the file."""
        self.question = router.open(serial, row)
        self.prompts = router.prompts
        self.number, self.row, self.only_ready = number, row, only_ready
        self.open_hops = list(row["hops"])
        self.hop = None                         # the one that the last sub-question stands for
        self.outputs = []                       # texts that were followed

    @property
    def request(self):
        """What it waits for: infer.Ask, infer.Search, or None at its end."""
        return self.question.request

    def conversation(self):
        return self.question.conversation(self.prompts)

    def hops(self):
        """The gold hops that a sub-question is measured by."""
        return askable(self.open_hops) if self.only_ready else self.open_hops

    def golds(self):
        """The gold steps that would be right now; [] where nothing can be judged."""
        if self.request.kind == "final":
            return [{"step_type": "ans", "answer": golds_of(self.row)}]
        if self.request.kind == "answer":
            return [{"step_type": "ans", "answer": self.hop["answer"]}] if self.hop else []
        return route_golds(self.hops())

    def label(self):
        """The gold base of a routing step, "answer" of another."""
        return gold_base(self.hops()) if self.request.kind == "route" else "answer"

    def key(self):
        """The kind of its prompt, for parts.groups.Interest."""
        return f"{self.row.get('kind')} {self.request.kind} {len(self.open_hops)}"

    def follow(self, step):
        """Goes on with the candidate that the step follows."""
        self.outputs.append(step.candidates[step.followed].text if step.candidates else None)
        if step.kind == "answer" and self.hop:
            _, recall, _ = answer_scores(step.answer, [self.hop["answer"]])
            if recall == 1:
                self.open_hops = still_open(self.open_hops, self.hop)
        self.question.send(step)


def gold_base(hops):
    """The gold base of the first of these hops as labels have it: "text retriever", ..., "none"."""
    return hops[0]["retriever"].strip().lower() if hops else "none"


def route_golds(hops):
    """The gold steps of a routing step, as a step file has them: any of the open hops is right, or
    none where no hop is open."""
    golds = []
    for hop in hops or [{"query": "none", "retriever": "none"}]:
        answer = {"query": hop["query"], "retriever": [hop["retriever"]]}
        golds.append({"step_type": "ret", "answer": answer})
    return golds


def askable(hops):
    """The open hops that can be asked for by now: no answer that one before them has yet to find is
    part of their query. Who asks for such an answer all the same has made it up."""
    free = []
    for i, hop in enumerate(hops):
        answers = [str(before["answer"]) for before in hops[:i]]
        if not any(names(hop["query"], answer) for answer in answers if answer.strip()):
            free.append(hop)
    return free


def still_open(hops, answered):
    """The open hops after one of them was answered. Where a fact was found, other places to look
    for it are not open any more."""
    rest = [hop for hop in hops if hop is not answered]
    if answered["answer"] != UNKNOWN:
        rest = [hop for hop in rest
                if (hop["query"], hop["answer"]) != (answered["query"], UNKNOWN)]
    return rest


def asked_last(hops, retrievers):
    """The hops that a question to these retrievers can stand for: those of other bases, then those
    of the asked ones, for of equally near hops the last counts. That something is unknown is known
    of the base that was asked, and of no other."""
    asked = [name.lower() for name in retrievers]
    right = [hop for hop in hops if hop["retriever"].strip().lower() in asked]
    others = [hop for hop in hops if hop not in right and hop["answer"] != UNKNOWN]
    return others + right


def names(query, answer):
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", query) is not None


def nearest_hops(queries_and_hops, match, encoder):
    """For each (sub-question, open hops) the hop that it stands for: the nearest in meaning, None
    where none is as near as `match`. One call of the encoder for all."""
    texts = []
    for query, hops in queries_and_hops:
        texts += [query, *(hop["query"] for hop in hops)]
    texts = list(dict.fromkeys(texts))          # each once, so that equal texts are equally near
    vectors = {}                                                                    # text -> (dim,)
    if texts:
        vectors = dict(zip(texts, torch.as_tensor(encoder.encode_queries(texts))))
    nearest = []
    for query, hops in queries_and_hops:
        best, best_hop = 0.0, None
        for hop in hops:
            similarity = float(vectors[query] @ vectors[hop["query"]])
            if best_hop is None or similarity >= best:          # of equal ones the last
                best, best_hop = similarity, hop
        nearest.append(best_hop if best >= match else None)
    return nearest
