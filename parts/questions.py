"""Question files, and what question rows and result rows say, whoever wrote them.

    questions.jsonl -> load_questions -> rows that the Router answers
    a row -> golds_of, gold_routes; of a result row also plans_of, predicted

A question row has "question", and may have "image" or "image_id", "answer" or "answer_eval" (the
gold answers), "hops" (the gold sub-questions, each {"query", "retriever", "answer"}), "kind", "id".
"""
import math
import re
import subprocess
import sys
from pathlib import Path

from parts.steps import BASE_OF, NONE, ROUTES
from parts.vision import load_picture, smart_resize
from plumbing.files import as_text, inside, lock, read_jsonl, say

HERE = Path(__file__).resolve().parents[1]          # the folder of the project
ROUTING = ("router", "fewshot")                     # methods whose model chooses the bases
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".JPEG", ".webp", ".JPG", ".PNG", ".WEBP")
OF_A_RUN = re.compile(r"plan_\d+|llm_answer|cost|method|run|former")    # fields that a run adds


# ----------------------------------------------------------------------------------- what rows say

def golds_of(row):
    """Accepted answers of a question row: strings, numbers, and {"range": [low, high]}. infoseek's
    `answer_eval` goes before `answer`. ValueError where there is none."""
    golds = row.get("answer_eval")
    if golds is None:
        golds = row.get("answer")
    if not isinstance(golds, list):
        golds = [golds]
    if not golds:
        raise ValueError("gold answer []: expected at least one")
    for gold in golds:
        if not is_gold(gold):
            raise ValueError(f"gold answer {gold!r}: expected 'answer' or 'answer_eval' with a "
                             "string, a list of strings, or {'range': [low, high]}")
    return golds


def is_gold(gold):
    """Whether an answer can be compared with this: a string, a finite number, a range."""
    if isinstance(gold, float):
        return math.isfinite(gold)
    if not isinstance(gold, dict):
        return isinstance(gold, (str, int))
    ends = gold.get("range")
    if not isinstance(ends, list) or len(ends) != 2:
        return False
    return all(isinstance(end, (int, float)) and -1e300 < end < 1e300 for end in ends)


def gold_routes(row):
    """Routes of a row's gold hops with None at the end; None where the row has no hops."""
    hops = row.get("hops")
    if hops is None:
        return None
    routes = []
    try:
        for hop in hops:
            hop["query"].strip()
            routes.append(ROUTES[BASE_OF[hop["retriever"].strip().lower()]])
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"hops {hops!r}: expected a list of {{'query', 'retriever', 'answer'}} "
                         f"with a retriever of {', '.join(BASE_OF)}") from None
    return [*routes, NONE]


def check_names(row):
    """ValueError where something that rows are told apart by is no text."""
    for name in ("set", "kind", "method"):
        value = row.get(name)
        if not isinstance(value, (str, type(None))):
            raise ValueError(f"{name} {str(value)[:40]!r} is of type {type(value).__name__}: "
                             "expected a string")


def plans_of(row):
    """The plans of a result row in order: plan_1, plan_2, ..."""
    plans = []
    for i in range(1, len(row) + 1):
        if f"plan_{i}" in row:
            plans.append(row[f"plan_{i}"])
    return plans


def predicted(row):
    """The answer in a result row, as text: `llm_answer` is a string or {thought, answer}."""
    answer = row.get("llm_answer", ...)
    if isinstance(answer, dict):
        answer = answer.get("answer")
    if not isinstance(answer, (str, int, float, type(None))):
        raise ValueError("no llm_answer: expected a string or {'thought', 'answer'}")
    return "" if answer is None else str(answer)


# ---------------------------------------------------------------------------------- question files

def load_questions(path, images=None, limit=None):
    """The question rows of a file of any of the published sets or of a world, or its first `limit`
    -> (rows, faults).

    `image` becomes a path that opens, in the folder `images` (by image_id) or beside the file, or
    None. `set` (the file's name, or its folder's where that says more) and `line` are added. What
    an earlier run added is dropped.
    """
    path = Path(path)
    set_name = path.absolute().parent.name if path.stem == "questions" else path.stem
    line_of = {}                                                # id -> line

    def check(row, number):
        if "question" not in row and ("text" in row or "steps" in row):
            found = "a passage" if "text" in row else "steps"
            raise ValueError(f"{found} and no question: give a file of questions")
        if not isinstance(row.get("question"), str) or not row["question"].strip():
            raise ValueError("empty question: give it some words")
        if row.get("id") is not None:
            first = line_of.setdefault(str(row["id"]), number)
            if first != number:
                raise ValueError(f"id {str(row['id'])[:40]!r} stands in line {first} already: a "
                                 "question counts once")
        golds_of(row)
        gold_routes(row)
        as_text(row)
        image = picture_of(row, path.parent, images)
        question = {}
        for name, value in row.items():
            if not OF_A_RUN.fullmatch(name):
                question[name] = value
        question.update(image=image, set=set_name, line=number)
        check_names(question)
        return question

    return read_jsonl(path, check, limit)


def picture_of(row, folder, images):
    """The path of a question's picture as text, or None. ValueError where it is missing or is no
    picture that a model can be shown.

    A file from outside must not show the model any other picture of this machine: links and `..`
    followed, the picture lies in `images`, or where that is not given in the file's `folder`.
    """
    home = images or folder
    name = row.get("image", row.get("image_id"))
    if not str(name).isprintable():
        raise ValueError(f"picture {name!r}: no name of a file")
    if row.get("image") is not None:
        path = Path(home) / str(row["image"])
    elif row.get("image_id") is None:
        return None
    elif images is None:
        raise ValueError(f"image_id is {row['image_id']}: name the folder of the pictures with "
                         "--images DIR")
    else:
        path = picture_by_id(row["image_id"], Path(images))
    if not inside(path, home):
        raise ValueError(f"picture {str(path)[-80:]} leads out of {home}: name the folder of the "
                         "pictures with --images DIR")
    picture = load_picture(path)
    area = picture.height * picture.width
    smart_resize(picture.height, picture.width, 1, 1, area)     # refuses a shape too long
    return str(path)


def picture_by_id(image_id, folder):
    """The file of a folder that is named by an id and one of the usual endings."""
    candidates = [folder / f"{image_id}{ending}" for ending in PICTURE_ENDINGS]
    for path in candidates:
        if path.is_file():
            return path
    return candidates[0]                                        # missing, as its reader will say


# -------------------------------------------------------------------------------- embedded worlds

def embedded_world(name, split, seed, questions):
    """The folder data/`name` with a world of its own, written by lab.world on first use: of several
    processes that come at once by one, while the others wait."""
    folder = HERE / "data" / name
    last_file = folder / "questions.jsonl"                      # where it is, the world is whole
    if last_file.is_file():
        return folder
    with lock(folder):
        if not last_file.is_file():
            say(f"writing the embedded world to {folder} ...")
            command = [sys.executable, "-m", "lab.world", "--split", split, "--seed", str(seed),
                       "--questions", str(questions), "--out", str(folder)]
            done = subprocess.run(command, cwd=HERE, stdout=subprocess.DEVNULL)
            if done.returncode:
                raise ValueError(f"lab.world could not write {folder}: see its message above")
    return folder
