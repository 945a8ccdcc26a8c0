"""Question files and result rows."""
import math
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

from parts.steps import BASE_OF, NONE, PREFIX, ROUTES, StepError
from parts.vision import load_picture
from plumbing.old import as_text, inside, read_rows, sole_writer


# --------------------------------------------------------------------------------------------------- the result rows

ROUTING = ("router", "fewshot")  # methods whose model chooses the bases


def plans_of(row):
    """The plans of a result row in order."""
    names = (f"plan_{i}" for i in range(1, len(row) + 1))
    return [row[name] for name in names if name in row]


def golds_of(row):
    """Accepted answers of a question row: strings and ranges; infoseek's `answer_eval` goes before `answer`."""
    golds = row.get("answer") if row.get("answer_eval") is None else row["answer_eval"]
    golds = golds if isinstance(golds, list) else [golds]
    if not golds:
        raise ValueError("gold answer []: expected at least one")
    for gold in golds:
        ends = gold.get("range") if isinstance(gold, dict) else None
        is_range = isinstance(ends, list) and len(ends) == 2 and all(
            isinstance(end, (int, float)) and -1e300 < end < 1e300 for end in ends)
        if not is_range and not isinstance(gold, (str, int)) and not (isinstance(gold, float) and math.isfinite(gold)):
            raise ValueError(f"gold answer {gold!r}: expected 'answer' or 'answer_eval' with a string, a list of "
                             "strings, or {'range': [low, high]}")
    return golds


def check_names(row):
    """ValueError where something that rows are told apart by is no text."""
    for name in ("set", "kind", "method"):
        if not isinstance(row.get(name), (str, type(None))):
            raise ValueError(f"{name} {str(row[name])[:40]!r} is of type {type(row[name]).__name__}: expected a string")


def predicted(row):
    """The answer in a result row of ours or of others: `llm_answer` is a string or {thought, answer}."""
    answer = row.get("llm_answer", ...)
    answer = answer.get("answer") if isinstance(answer, dict) else answer
    if not isinstance(answer, (str, int, float, type(None))):
        raise ValueError("no llm_answer: expected a string or {'thought', 'answer'}")
    return "" if answer is None else str(answer)


def gold_routes(row):
    """Routes of a row's gold hops with None at the end; None where the row has no hops."""
    if row.get("hops") is None:
        return None
    try:
        asked = [(hop["query"].strip(), hop["retriever"].strip().lower()) for hop in row["hops"]]
        return [ROUTES[BASE_OF[retriever]] for _, retriever in asked] + [NONE]
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"hops {row['hops']!r}: expected a list of {{'query', 'retriever', 'answer'}} with a "
                         f"retriever of {', '.join(BASE_OF)}") from None

HERE = Path(__file__).resolve().parents[1]  # the folder of the project


COSTS = ("retrievals", "model_calls", "prompt_tokens", "generated_tokens", "malformed", "too_long",
         "seconds_model", "seconds_search")


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


# -------------------------------------------------------------------------------------------------------------- 3 files

PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".JPEG", ".webp", ".JPG", ".PNG", ".WEBP")
OF_A_RUN = r"plan_\d+|llm_answer|cost|method|run|former"  # fields that a run adds: those of an earlier one are dropped


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


def embedded_world(name, split, seed, questions):
    """The folder data/`name` with a world of its own, written by world.py on first use: of several processes that come
    at once by one, while the others wait. Its last file is questions.jsonl."""
    folder = HERE / "data" / name
    whole = (folder / "questions.jsonl").is_file
    with nullcontext() if whole() else sole_writer(folder, check=lambda _: None):
        if not whole():
            print(f"writing the embedded world to {folder} ...", file=sys.stderr)
            command = [sys.executable, "-m", "lab.world", "--split", split, "--seed", str(seed)]
            command += ["--questions", str(questions), "--out", str(folder)]
            if subprocess.run(command, cwd=HERE, stdout=subprocess.DEVNULL).returncode:
                raise ValueError(f"world.py could not write {folder}: see its message above")
    return folder


def world_of(args):
    """The folder of the world that the flags name, or of the embedded one."""
    return Path(args.world or HERE / "data" / "demo")
