"""What became of a question: the candidates of each step, the steps, the whole trajectory, and its
row in a result file.

Shapes: T tokens of a prompt, n candidates of a step, L tokens of a candidate.
"""
from dataclasses import dataclass

from parts.steps import NONE, PREFIX, ROUTES, AnswerStep, RouteStep, StepError

COSTS = ("retrievals", "model_calls", "prompt_tokens", "generated_tokens", "malformed", "too_long",
         "seconds_model", "seconds_search")     # of a Trajectory; a result row has them as "cost"


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
    candidates: tuple    # n of them; none where the prompt was too long to be asked
    followed: int        # index of the candidate that the trajectory went on with
    evidence: dict       # base -> hits that the prompt quotes

    @property
    def parsed(self):
        if not self.candidates:
            return StepError("prompt too long", "")
        return self.candidates[self.followed].parsed

    @property
    def route(self):
        """The route, "None" included, as RouteStep has it; None where the step is malformed or not
        a routing step."""
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
    malformed: int           # steps whose followed candidate was no step, retried ones included
    too_long: int            # prompts not asked for want of room
    seconds_model: float
    seconds_search: float


def result_row(trajectory):
    """A Trajectory as a published result row: the question row, `plan_1`, `plan_2`, ...,
    `llm_answer`; and its `cost`.

    A plan is {thought, query, retriever: [names], ter|tir|tar: [passages], answer: {thought,
    answer}}; a malformed step has `fault` and `text` in place of its thought.
    """
    plans = []
    for step in trajectory.steps:
        malformed = isinstance(step.parsed, StepError)
        if malformed:
            output = {"fault": step.parsed.reason, "text": step.parsed.text}
        else:
            output = {"thought": step.parsed.thought}
        if step.kind == "route":
            parsed = RouteStep("", NONE, NONE) if malformed else step.parsed
            plans.append({**output, "query": parsed.query, "retriever": parsed.names})
            continue
        output["answer"] = step.answer
        if step.kind == "answer":
            if not plans or "answer" in plans[-1]:              # a method without routing steps
                routes = [ROUTES[base] for base in step.evidence]
                plans.append({"query": step.query, "retriever": routes})
            plans[-1].update(evidence_fields(step.evidence))
            if step is not trajectory.steps[-1]:
                plans[-1]["answer"] = output
    row = {**trajectory.row, "method": trajectory.method}
    for i, plan in enumerate(plans, 1):
        row[f"plan_{i}"] = plan
    row["llm_answer"] = output                                  # that of the last step
    row["cost"] = {name: round(getattr(trajectory, name), 6) for name in COSTS}
    return row


def evidence_fields(evidence):
    """{base: hits} -> the passages and scores of a plan: {"ter": [...], "ter_scores": [...]}."""
    columns = {}
    for base, hits in evidence.items():
        columns[PREFIX[base]] = [hit.text for hit in hits]
        columns[PREFIX[base] + "_scores"] = [round(float(hit.score), 4) for hit in hits]
    return columns
