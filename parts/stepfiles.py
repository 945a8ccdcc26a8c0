"""Step files: the published form of trajectories, read, checked, shown as examples, written.

    steps.jsonl -> read_steps -> trajectories of StepExample -> supervised training
                                                             -> prompts of offline Step-GRPO
                                                             -> system prompts, demonstrations
    result rows of our own router -> write_steps -> steps.jsonl

A row is {"images": [path], "steps": [step]}, a step is {"step_type": "ret" | "ans", "problem",
"system", "answer"}. Ours have a "thought" too, which published files lack. The last answer is a
list of accepted texts.

parts/fewshot.jsonl is such a file: the three trajectories that method fewshot shows by default.
"""
import json
import math
import os
import re
import shutil
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from parts.questions import golds_of, plans_of, predicted
from parts.score import exact_match
from parts.steps import (BASE_OF, IMAGE, NONE, PREFIX, PROMPTS, ROUTES, answer_problem,
                         conversation, final_problem, gold_route, render_answer, render_route,
                         route_problem)
from plumbing.files import as_text, inside, read_json, read_jsonl, say, write_text
from plumbing.ranks import tell

FEWSHOT = Path(__file__).with_name("fewshot.jsonl")
NO_INFORMATION = re.compile(
    r"\b(no|not|does not|doesn't|cannot|can't) (\w+ly )?"
    r"(provide|contain|mention|include|specify|state|specified|provided|mentioned|available|"
    r"enough|sufficient|specific|relevant|direct|be determined|information)", re.I)


@dataclass(frozen=True)
class StepExample:
    """One step of a step file: what is asked, and what is right."""
    kind: str           # "ret": a routing step, "ans": an answering step
    system: str         # system prompt
    problem: str        # the user's turn
    answer: object      # ret: {"query", "retriever": [name]}; ans: a text, or a list of texts
    thought: str = ""
    image: str = None   # path of its picture

    @property
    def role(self):
        """Which system prompt it has: "route", "answer", or "final"."""
        if self.kind == "ret":
            return "route"
        return "final" if isinstance(self.answer, list) else "answer"

    def label(self):
        """The gold retriever of a routing step, "none" included, or "answer"."""
        if self.kind == "ans":
            return "answer"
        _, retriever = gold_route(self.answer)
        return retriever

    def conversation(self):
        """The chat that the processor takes; a problem that ends with <image> shows the picture."""
        image = self.image if self.problem.endswith(IMAGE) else None
        return conversation(self.system, self.problem, image)

    def as_published(self):
        """The step as a row of a step file has it."""
        return {"step_type": self.kind, "problem": self.problem, "system": self.system,
                "answer": self.answer, "thought": self.thought}

    def golds(self):
        """The gold steps by which an output is judged: here one, itself."""
        return [self.as_published()]


def step_output(step):
    """The right output of a StepExample as text, the target of supervised training."""
    if step.kind == "ans":
        answer = step.answer[0] if isinstance(step.answer, list) else step.answer
        return render_answer(step.thought, answer.strip())
    _, retriever = gold_route(step.answer)
    if retriever == "none":
        return render_route(step.thought, NONE, NONE)
    return render_route(step.thought, step.answer["query"].strip(), ROUTES[BASE_OF[retriever]])


# ---------------------------------------------------------------------------------------- reading

def example_of(step, image):
    """A step of a row, as JSON has it -> StepExample. ValueError says what does not fit."""
    if not isinstance(step, dict):
        raise ValueError(f"step {str(step)[:60]!r}: expected an object")
    problem, system = step.get("problem"), step.get("system")
    thought = step.get("thought", "")               # published files have none
    for name, text in (("problem", problem), ("system", system), ("thought", thought)):
        if not isinstance(text, str):
            raise ValueError(f"{name} is {str(text)[:60]!r}: expected a text")
    kind, answer = step.get("step_type"), step.get("answer")
    if kind not in ("ret", "ans"):
        raise ValueError(f"step_type {kind!r}: expected ret or ans")
    if kind == "ret" and not is_route(answer):
        raise ValueError(f"step_type 'ret' with answer {str(answer)[:60]!r}: expected "
                         '{"query": text, "retriever": [name]}')
    if kind == "ans" and not is_answer(answer):
        raise ValueError(f"step_type 'ans' with answer {str(answer)[:60]!r}: expected a text, or a "
                         "list of texts")
    return StepExample(kind, system, problem, answer, thought, image)


def is_route(answer):
    """Whether this is the answer of a routing step, with a retriever that is known."""
    if not isinstance(answer, dict) or not isinstance(answer.get("query"), str):
        return False
    names = answer.get("retriever")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        return False
    _, retriever = gold_route(answer)
    return retriever == "none" or retriever in BASE_OF


def is_answer(answer):
    """Whether this is the answer of an answering step: a text, or a list that begins with one."""
    if isinstance(answer, list):
        return len(answer) > 0 and isinstance(answer[0], str)
    return isinstance(answer, str) and answer != ""


def image_of(row, folder):
    """The path of a row's picture, or None. ValueError for a second one, and for one of this
    machine that lies outside the folder of the file: a file from elsewhere must not show it.

    Published files name their authors' paths, which do not exist here: those pass, and `clean_rows`
    leaves such rows out.
    """
    names = row.get("images") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"images is {str(names)[:60]!r}: expected a list of paths")
    if len(names) > 1:
        raise ValueError(f"{len(names)} pictures: a row shows one")
    if not names:
        return None
    path = str(folder / names[0])
    if os.path.exists(path) and not inside(path, folder):
        raise ValueError(f"picture {path} leads out of the file's folder: put it, or a hard link, "
                         "there")
    return path


def read_steps(path, limit=None):
    """A step file, or its first `limit` rows -> (trajectories, faults).

    A trajectory is a list of StepExample; a fault is a line that says which row does not fit and
    why. ValueError where the file cannot be read or no row fits.
    """
    folder = Path(path).parent

    def trajectory_of(row, number):
        as_text(row)
        image = image_of(row, folder)
        steps = row.get("steps")
        if not isinstance(steps, list) or not steps:
            raise ValueError('expected {"images": [path], "steps": [{"step_type": "ret" or "ans", '
                             '"problem", "system", "answer"}]}')
        return [example_of(step, image) for step in steps]

    return read_jsonl(path, trajectory_of, limit)


def is_step_file(path):
    """Whether the first row of a JSONL file has steps, as a step file's rows do."""
    def has_steps(row, number):
        return "steps" in row

    [answer], _ = read_jsonl(path, has_steps, limit=1)
    return answer


def load_steps(path, limit=None):
    """The trajectories of a step file, to be shown as examples. How many rows do not fit, and the
    first of them, is said on stderr."""
    trajectories, faults = read_steps(path, limit)
    if faults:
        say(f"left out {len(faults)} rows that do not fit: {faults[0]}")
    return trajectories


def steps_to_train_on(path):
    """The trajectories of a step file that fits in every row; ValueError for the first that does
    not."""
    trajectories, faults = read_steps(path)
    if faults:
        raise ValueError(faults[0])
    return trajectories


# ---------------------------------------------------------------------- prompts and demonstrations

def system_prompts(trajectories):
    """{"route", "answer", "final"} -> the system prompt that most steps of that role have; of
    several that are as frequent the first. Roles that no step has are missing."""
    counts = {"route": Counter(), "answer": Counter(), "final": Counter()}
    for steps in trajectories:
        for step in steps:
            counts[step.role][step.system] += 1
    prompts = {}
    for role, count in counts.items():
        if count:
            prompts[role] = max(count, key=count.get)       # the first of those that have most
    return prompts


def load_prompts(path):
    """System prompts by role, from a prompts.json or from a step file (.jsonl)."""
    if Path(path).suffix == ".jsonl":
        return system_prompts(load_steps(path))
    prompts = read_json(path)
    for name, prompt in prompts.items():
        if name not in PROMPTS or not isinstance(prompt, str):
            raise ValueError(f"{path}: {name!r}: expected system prompts as strings under the "
                             f"names {', '.join(PROMPTS)}")
        try:
            as_text(prompt)
        except ValueError as error:
            raise ValueError(f"{path}: {name!r} is no text ({error})") from None
    return prompts


def demonstrations():
    """The trajectories that method fewshot shows by default: two hops from a picture, two in text
    and table, and none."""
    return load_steps(FEWSHOT)


def with_demonstrations(prompts, trajectories):
    """{"fewshot route", "fewshot answer", "fewshot final"}: the system prompts, each followed by
    the problems and right outputs of the steps of its role. Their pictures are not shown, the
    marker <image> is."""
    texts = {role: prompts[role] for role in ("route", "answer", "final")}
    for steps in trajectories:
        for step in steps:
            texts[step.role] += f"\n\nExample:\n{step.problem}\nReply:\n{step_output(step)}"
    return {f"fewshot {role}": text for role, text in texts.items()}


# ------------------------------------------------------------------------------------ for training

def clean_rows(rows, drop):
    """Leaves out trajectories that are odd in a way that `drop` names -> (rows, how many are odd in
    each way).

    no_picture: its file is missing (such a row cannot be asked as it was meant, it is always left
    out); repeats: a sub-question comes twice; no_information: an intermediate gold answer says that
    there is none.
    """
    counts = {"no_picture": 0, "repeats": 0, "no_information": 0}
    clean = []
    for steps in rows:
        odd = oddities(steps)
        for name in odd:
            counts[name] += 1
        if not odd & {*drop, "no_picture"}:
            clean.append(steps)
    if not clean:
        or_drop = ", or --drop leaves all out" if drop else ""
        raise ValueError("no row is left to train on: every picture is missing (paths are relative "
                         f"to the step file){or_drop}")
    return clean, counts


def oddities(steps):
    """The names of what is odd in a trajectory, a set."""
    odd = set()
    queries = []
    for step in steps:
        if step.image and not Path(step.image).is_file():
            odd.add("no_picture")
        if step.role == "answer" and NO_INFORMATION.search(step.answer):
            odd.add("no_information")
        if step.role == "route":
            query = step.answer["query"].strip().lower()
            if query != "none" and query in queries:
                odd.add("repeats")
            queries.append(query)
    return odd


def offline_rows(paths, drop):
    """The trajectories of step files that offline Step-GRPO trains on; says what is odd in them."""
    if not paths:
        raise ValueError("--data: name at least one step file")
    rows = []
    for path in paths:
        rows += steps_to_train_on(path)
    clean, counts = clean_rows(rows, drop)
    odd = ", ".join(f"{count} {name}" for name, count in counts.items())
    tell(f"{len(rows)} rows: {odd}; {len(clean)} are trained on")
    return clean


def read_sources(specs):
    """["a.jsonl=3", "b.jsonl"] -> [(name, trajectories, share)], for a Mixture."""
    sources = []
    for spec in specs:
        name, _, share = spec.rpartition("=") if "=" in spec else (spec, "", "1")
        try:
            if not 0 < float(share) < math.inf:
                raise ValueError(f"the share is {share}: give a positive number")
            rows, counts = clean_rows(steps_to_train_on(name), ())
        except ValueError as error:
            raise ValueError(f"--data {spec}: {error}") from None
        if counts["no_picture"]:
            tell(f"--data {spec}: left out {counts['no_picture']} rows whose picture is missing")
        sources.append((name, rows, float(share)))
    if not sources:
        raise ValueError("--data: name at least one step file")
    return sources


# ---------------------------------------------------------------------------------------- writing

def steps_of(row, prompts):
    """The steps of a result row of a method in ROUTING, none of whose steps is malformed, as
    StepExamples.

    The problems are those that the model was given, byte for byte; the answers are its own.
    """
    question = row["question"]
    image = row.get("image") is not None
    history = list(row.get("former") or ())
    steps = []
    for plan in plans_of(row):
        query, names = plan["query"], plan["retriever"]
        problem = route_problem(question, history, image)
        done = names == [NONE]
        lower = [name.lower() for name in names]
        gold = {"query": "none" if done else query, "retriever": lower}
        steps.append(StepExample("ret", prompts["route"], problem, gold, plan["thought"]))
        if done:
            continue
        evidence = {base: plan.get(prefix, ()) for base, prefix in PREFIX.items()}
        problem = answer_problem(query, evidence, image)
        thought, answer = plan["answer"]["thought"], plan["answer"]["answer"]
        steps.append(StepExample("ans", prompts["answer"], problem, answer, thought))
        history.append((query, answer))
    problem = final_problem(question, history, image)
    thought, answer = row["llm_answer"]["thought"], row["llm_answer"]["answer"]
    steps.append(StepExample("ans", prompts["final"], problem, [answer], thought))
    return steps


def write_steps(path, rows, prompts, keep):
    """Result rows of methods in ROUTING -> a step file; returns how many it holds. Pictures are
    named from its folder.

    keep "correct" is rejection sampling: only trajectories whose answer is a gold answer and
    nothing else, for a recall of 1 alone would teach to dump ("yes no"); "all" keeps the others
    too. Trajectories with a malformed step have no place in such a file.
    """
    lines = []
    for row in rows:
        if row["cost"]["malformed"] or row["cost"]["too_long"]:
            continue
        if keep == "correct" and not exact_match(predicted(row), golds_of(row)):
            continue
        images = [picture_beside(row["image"], Path(path))] if row.get("image") else []
        steps = [step.as_published() for step in steps_of(row, prompts)]
        lines.append(json.dumps({"images": images, "steps": steps}, ensure_ascii=False) + "\n")
    if not lines:
        wanted = "well formed"
        if keep == "correct":
            wanted += " and correct: raise --temperature, or --keep all"
        raise ValueError(f"{path} was not written: none of {len(rows)} trajectories is {wanted}")
    write_text(path, "".join(lines))
    return len(lines)


def picture_beside(image, path):
    """The name of a picture from the folder of the step file at `path`.

    Readers of such files take no picture from outside that folder: one that lies elsewhere gets a
    link (or else a copy) in a folder beside the file.
    """
    image, folder = Path(image).resolve(), path.parent.resolve()
    if inside(image, folder):
        return os.path.relpath(image, folder)
    links = folder / f"{path.stem}-pictures"
    links.mkdir(parents=True, exist_ok=True)
    link = links / f"{zlib.crc32(str(image).encode()):08x}-{image.name}"
    link.unlink(missing_ok=True)
    try:
        os.link(image, link)
    except OSError:                                         # another disk
        shutil.copyfile(image, link)
    return os.path.relpath(link, folder)
