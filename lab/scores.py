"""What the study keeps of a test: its result rows in a few numbers.

    result rows -> summary_of_test: which answers are right, abstention, latency
                -> summary_of_steps: what the rewards of steps say of the final answer
"""
import json

import numpy as np

from parts.questions import golds_of, predicted
from parts.score import answer_scores, exact_match
from parts.steps import UNKNOWN


def rows_of(path):
    """The rows of a JSONL file that a run or a plan has written; none where there is no file."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def summary_of_test(rows):
    """{"right": a digit for each question, 1 where its answer has all gold words; "abstention";
    "latency"} of result rows."""
    rows = sorted(rows, key=line_of)
    right = "".join(str(int(recall_of(row) == 1)) for row in rows)
    return {"right": right, "abstention": abstention(rows), "latency": latency(rows)}


def line_of(row):
    return row["line"]


def recall_of(row):
    _, recall, _ = answer_scores(predicted(row), golds_of(row))
    return recall


def abstention(rows):
    """Precision, recall and F1 of saying that the answer is unknown. None where it never is."""
    said = [exact_match(predicted(row), [UNKNOWN]) == 1 for row in rows]
    true = [golds_of(row) == [UNKNOWN] for row in rows]
    both = sum(s and t for s, t in zip(said, true))
    if not any(true):
        return None
    precision, recall = both / max(1, sum(said)), both / sum(true)
    return {"precision": precision, "recall": recall, "said": sum(said), "true": sum(true),
            "f1": 2 * both / (sum(said) + sum(true))}


def latency(rows):
    """{stage: [p50, p95]} of the seconds of a question, in the model, in search, in both."""
    stages = {}
    for stage, names in (("model", ["seconds_model"]), ("search", ["seconds_search"]),
                         ("both", ["seconds_model", "seconds_search"])):
        seconds = [sum(row["cost"][name] for name in names) for row in rows]
        stages[stage] = [float(f"{number:.3g}") for number in np.percentile(seconds, (50, 95))]
    return stages


def summary_of_steps(rows):
    """Of rows of sampled trajectories, for each kind of step: {"n", "right": share of steps with
    full reward, "corr": correlation of the reward with the final answer's recall, "end_if_right",
    "end_if_wrong": mean recall behind a step with and without full reward}.

    Kinds: the first routing step, later ones, stopping (a routing step that asks for nothing),
    intermediate answers; and whole trajectories: "no wrong base" among those that were asked, "no
    wrong answer".
    """
    from lab.report import step_rewards             # here, since it takes torch with it
    from parts.pretrained import load_encoder
    queries = []
    for row in rows:
        queries += [{"text": hop["query"]} for hop in row["hops"]]
    encoder, _ = load_encoder("lexical").fitted(queries)
    pairs = {}                                      # kind -> [(reward, recall of the final answer)]
    for row in rows:
        end, bases, answers = recall_of(row), [1.0], [1.0]
        *judged, _ = step_rewards(row, encoder)
        for place, (route, answer) in enumerate(judged):
            kind = "later route" if place else "first route"
            if row[f"plan_{place + 1}"]["retriever"] == ["None"]:
                kind = "stop"
            else:
                bases.append(route.route or 0.0)
            pairs.setdefault(kind, []).append((route.total, end))
            if answer:
                answers.append(answer.total)
                pairs.setdefault("answer", []).append((answer.total, end))
        pairs.setdefault("no wrong base", []).append((min(bases), end))
        pairs.setdefault("no wrong answer", []).append((min(answers), end))
    return {kind: relation(*np.array(some, dtype=float).T) for kind, some in sorted(pairs.items())}


def relation(rewards, ends):
    """Two arrays (n,) -> how the one predicts the other."""
    full = rewards > 0.999
    varied = rewards.std() > 0 and ends.std() > 0
    return {"n": len(rewards), "right": float(full.mean()),
            "corr": float(np.corrcoef(rewards, ends)[0, 1]) if varied else None,
            "end_if_right": float(ends[full].mean()) if full.any() else None,
            "end_if_wrong": float(ends[~full].mean()) if not full.all() else None}
