"""Published step files: read, cleaned, mixed, written."""
import json
import math
import os
import random
import re
import shutil
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from parts.questions import golds_of, plans_of, predicted
from parts.score import exact_match
from parts.steps import (BASE_OF, IMAGE, NONE, PREFIX, PROMPTS, ROUTES, answer_problem,
                         conversation, final_problem, render_answer, render_route, route_problem)
from plumbing.old import MAX_ROW, as_text, inside, read_rows, write_whole
from plumbing.run import tell


def in_budget(items, size, budget):
    """Items sorted by size and cut into batches: rows x the longest row keeps the budget. An item that is larger than
    the budget stands alone."""
    batches = []
    for item in sorted(items, key=size):                          # so the last one is the longest
        if not batches or (len(batches[-1]) + 1) * size(item) > budget:
            batches.append([])
        batches[-1].append(item)
    return batches


def steps_of(row, prompts):
    """The steps of a published step file from a result row of a method in ROUTING, none of whose steps is malformed.

    The problems are those that the model was given, byte for byte; the answers are its own.
    """
    question, image, history, steps = row["question"], row.get("image") is not None, list(row.get("former") or ()), []

    def add(kind, problem, said, answer):
        steps.append({"step_type": "ret" if kind == "route" else "ans", "problem": problem, "system": prompts[kind],
                      "answer": answer, "thought": said["thought"]})

    for plan in plans_of(row):
        query, route = plan["query"], plan["retriever"][0]
        add("route", route_problem(question, history, image), plan,
            {"query": NONE.lower() if route == NONE else query, "retriever": [route.lower()]})
        if route != NONE:
            evidence = {base: plan.get(prefix, ()) for base, prefix in PREFIX.items()}
            add("answer", answer_problem(query, evidence, image), plan["answer"], plan["answer"]["answer"])
            history.append((query, plan["answer"]["answer"]))
    add("final", final_problem(question, history, image), row["llm_answer"], [row["llm_answer"]["answer"]])
    return steps


def step_output(step):
    """The right output of a step of a published step file, as text."""
    thought, answer = step.get("thought", ""), step["answer"]
    if step["step_type"] == "ret":
        query, base = answer["query"].strip(), BASE_OF.get(answer["retriever"][0].strip().lower())
        asks = base and query.lower() != NONE.lower()           # none of either is meant of both
        return render_route(thought, query if asks else NONE, ROUTES[base] if asks else NONE)
    return render_answer(thought, (answer[0] if isinstance(answer, list) else answer).strip())


def step_kinds(steps):
    """Kinds of the steps of a published trajectory: "route" for ret, "answer" for ans, "final" for the last one."""
    kinds = ["route" if step["step_type"] == "ret" else "answer" for step in steps]
    return kinds[:-1] + ["final"]


def with_demonstrations(prompts, trajectories):
    """{"fewshot route", "fewshot answer", "fewshot final"}: system prompts, each followed by what is asked and replied
    at its kind of step in the `trajectories` of a step file. Their pictures are not shown, the marker is."""
    texts = {kind: prompts[kind] for kind in ("route", "answer", "final")}
    for steps in trajectories:
        for kind, step in zip(step_kinds(steps), steps):
            texts[kind] += f"\n\nExample:\n{step['problem']}\nReply:\n{step_output(step)}"
    return {f"fewshot {kind}": text for kind, text in texts.items()}


def demonstrations():
    """Trajectories for an untrained model: two hops from a picture, two in text and table, and none."""
    def plan(thought, query=NONE, base=None, evidence=(), found_thought="", found=""):
        asked = {"thought": thought, "query": query, "retriever": [ROUTES.get(base, NONE)]}
        answer = {"thought": found_thought, "answer": found}
        return asked | ({PREFIX[base]: list(evidence), "answer": answer} if base else {})

    def row(question, image, *plans, thought, answer):
        numbered = {f"plan_{i}": plan for i, plan in enumerate(plans, 1)}
        return {"question": question, "image": image, **numbered, "llm_answer": {"thought": thought, "answer": answer}}

    rows = [
        row("Which river flows through the city where this tower stands?", "tower.jpg",
            plan("The tower in the picture has to be recognised first, to know its city.",
                 "In which city does this tower stand?", "image", ["The Eiffel Tower in Paris at dusk."],
                 "The caption of the picture that looks like this one names the city.", "Paris"),
            plan("The city is Paris. Its river is missing.", "Which river flows through Paris?", "text",
                 ["Paris is the capital of France and lies on the Seine.", "Lyon lies where two rivers meet."],
                 "The first passage says that Paris lies on the Seine.", "Seine"),
            plan("City and river are known, nothing is missing."),
            thought="The tower stands in Paris, through which the Seine flows.", answer="Seine"),
        row("How many metres high is the highest mountain of Japan?", None,
            plan("The mountain has to be named before its height can be looked up.",
                 "Which is the highest mountain of Japan?", "text", ["Mount Fuji is the highest mountain of Japan."],
                 "The passage names the mountain.", "Mount Fuji"),
            plan("The height of Mount Fuji is a number of a table.", "How many metres high is Mount Fuji?", "table",
                 ["[Title] Mountains of Japan[Header] name[sep] metres[Rows][Row] Mount Fuji[sep] 3776"],
                 "The row of Mount Fuji says 3776.", "3776"),
            plan("The height is known, nothing is missing."),
            thought="Mount Fuji, the highest mountain of Japan, is 3776 metres high.", answer="3776"),
        row("How many minutes do two hours have?", None,
            plan("This needs no search: an hour has 60 minutes."),
            thought="Two hours have 2 times 60 minutes, which are 120.", answer="120")]
    return [steps_of(row, PROMPTS) for row in rows]


def load_steps(path, limit=None):
    """Trajectories of a published step file: lists of {"step_type", "problem", "system", "answer"}."""
    def check(row, number):
        try:
            for step in row["steps"]:
                if not isinstance(step["problem"], str) or not isinstance(step["system"], str):
                    raise TypeError("a problem or system prompt that is no text")
                step_output(step)
            return row["steps"]
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"no row of a step file ({type(error).__name__}: {error}): expected {{'images', 'steps'}} "
                             "with 'step_type', 'problem', 'system', 'answer' in each step") from None
    return read_rows(path, check, limit)[0]


def load_prompts(path):
    """System prompts {"route", "answer", "final"} of a prompts.json or of a published step file (.jsonl)."""
    if Path(path).suffix == ".jsonl":
        prompts = {}
        for steps in load_steps(path):
            for kind, step in zip(step_kinds(steps), steps):
                prompts.setdefault(kind, step["system"])
    else:
        try:
            prompts = json.loads(Path(path).read_text(encoding="utf-8"))
            as_text(prompts)
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: cannot be read ({error}): give a prompts.json or a .jsonl of steps") from None
    if not isinstance(prompts, dict) or not all(k in PROMPTS and isinstance(v, str) for k, v in prompts.items()):
        raise ValueError(f"{path}: expected system prompts as strings under the names {', '.join(PROMPTS)}")
    return prompts


def write_steps(path, rows, prompts, keep):
    """Result rows of methods in ROUTING as a published step file, pictures named from its folder; how many were kept.

    `keep` "correct" is rejection sampling: only trajectories whose answer is a gold answer and nothing else, for a
    recall of 1 alone would teach to dump ("yes no"). Those with a malformed step have no place in such a file.
    """
    kept = []
    for row in rows:
        well_formed = not row["cost"]["malformed"] and not row["cost"]["too_long"]
        if well_formed and (keep == "all" or exact_match(predicted(row), golds_of(row))):
            images = [picture_beside(row["image"], Path(path))] if row.get("image") else []
            kept.append(json.dumps({"images": images, "steps": steps_of(row, prompts)}, ensure_ascii=False) + "\n")
    if not kept:
        raise ValueError(f"{path} was not written: none of {len(rows)} trajectories is well formed" +
                         (" and correct: raise --temperature, or --keep all" if keep == "correct" else ""))
    write_whole(path, "".join(kept))
    return len(kept)


def picture_beside(image, path):
    """The name of a picture from the folder of the step file at `path`. Readers of such files take no picture from
    outside that folder: one that lies elsewhere gets a link (or else a copy) in a folder beside the file."""
    image, folder = Path(image).resolve(), path.parent.resolve()
    if not inside(image, folder):
        links = folder / f"{path.stem}-pictures"
        links.mkdir(parents=True, exist_ok=True)
        link = links / f"{zlib.crc32(str(image).encode()):08x}-{image.name}"
        link.unlink(missing_ok=True)
        try:
            os.link(image, link)
        except OSError:  # another disk
            shutil.copyfile(image, link)
        image = link
    return os.path.relpath(image, folder)

# ----------------------------------------------------------------------------------------------- step files as examples


@dataclass(frozen=True)
class StepExample:
    """One step of a published Step-GRPO file: what is asked, and what is right."""
    kind: str                                             # "ret" or "ans"
    system: str
    problem: str
    answer: object               # {"query", "retriever"} of a routing step, text or list of accepted texts otherwise
    thought: str
    images: tuple                                         # paths

    @property
    def final(self):
        return isinstance(self.answer, list)

    def conversation(self):
        """The chat that the processor takes: a picture stands where the problem ends with its marker."""
        image = self.images[0] if self.images and self.problem.endswith(IMAGE) else None
        return conversation(self.system, self.problem, image)

    def as_published(self):
        """The step as a published row has it, for the reward and for the text of the right output."""
        return {"step_type": self.kind, "answer": self.answer, "thought": self.thought}

    def target(self):
        """The right output as text."""
        return step_output(self.as_published())


def gold_base(answer):
    """The base of a routing step's gold answer, "none" included; None where it names none that is known."""
    named = answer.get("retriever") if isinstance(answer, dict) else None
    name = named[0].strip().lower() if isinstance(named, list) and named and isinstance(named[0], str) else None
    if name and str(answer.get("query")).strip().lower() == "none":     # said of either, it is meant of both
        return "none"
    return name if name in (*BASE_OF, "none") else None


def read_steps(path):
    """Read a step file into a list of trajectories, each a list of StepExample. ValueError names file and line of a row
    that does not fit, or that shows a picture of this machine from outside the file's folder."""
    path, rows = Path(path), []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")        # splitlines() would break rows at U+2028, too
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: not readable ({e})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            if len(line) > MAX_ROW:
                raise ValueError(f"a row of {len(line)} characters: {MAX_ROW} at most")
            row = json.loads(line)
            as_text(row)
            if not isinstance(row.get("images") or [], list):
                raise TypeError("images is no list")
            images = tuple(str(path.parent / i) for i in row.get("images") or ())
            if len(images) > 1:
                raise ValueError(f"{len(images)} pictures: a row shows one")
            # published files name their authors' paths, which nobody else has: such rows are counted and left out
            if outside := [i for i in images if os.path.exists(i) and not inside(i, path.parent)]:
                raise ValueError(f"picture {outside[0]} leads out of the file's folder: put it, or a hard link, there")
            steps = [StepExample(s["step_type"], s["system"], s["problem"], s["answer"], s.get("thought", ""), images)
                     for s in row["steps"]]
            fits = lambda s: (s.kind == "ret" and gold_base(s.answer) is not None or
                              s.kind == "ans" and bool(s.answer) and not isinstance(s.answer, dict))
            bad = [s for s in steps if not fits(s)]
            if bad or not steps:
                raise KeyError(f"step_type {bad[0].kind!r} with answer {str(bad[0].answer)[:60]!r}" if bad else "steps")
            if not all(isinstance(text, str) for s in steps for text in (s.target(), s.problem, s.system, s.thought)):
                raise TypeError("a problem, system prompt or thought that is no text")
            rows.append(steps)
        except (json.JSONDecodeError, RecursionError, KeyError, TypeError, AttributeError, IndexError) as e:
            raise ValueError(f"{path}, line {number}: expected {{\"images\", \"steps\": [{{\"step_type\": ret|ans, "
                             f"\"problem\", \"system\", \"answer\"}}]}} ({type(e).__name__}: {e})") from None
        except ValueError as e:
            raise ValueError(f"{path}, line {number}: {e}") from None
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


class Mixture:
    """Endless batches from several files, each file drawn in proportion to its share and without repetition within an
    epoch.

    Batch (pool, i) depends on the seed alone, so a run continues at the same place. Examples of a pool are sorted by
    length before they are cut into batches, so that little is padded; the order of the batches is shuffled again.
    """
    POOL = 1024

    def __init__(self, sources, length, tokens, seed):
        """sources: list of (name, examples, share); length(example): its tokens; tokens: budget of a batch."""
        total = sum(share for _, _, share in sources)
        self.sources = [(name, examples, max(1, round(self.POOL * share / total))) for name, examples, share in sources]
        self.length, self.tokens, self.seed, self.orders = length, tokens, seed, {}

    def drawn(self, name, examples, i):
        """The i-th draw from a file: every epoch is another permutation."""
        epoch, place = divmod(i, len(examples))
        if self.orders.get(name, (None, None))[0] != epoch:
            order = list(range(len(examples)))
            random.Random(f"{self.seed} {name} {epoch}").shuffle(order)
            self.orders[name] = epoch, order
        return examples[self.orders[name][1][place]]

    def batches(self, pool):
        """The batches of a pool, each a list of StepExample."""
        drawn = [self.drawn(name, examples, pool * count + i)
                 for name, examples, count in self.sources for i in range(count)]
        batches = in_budget(drawn, self.length, self.tokens)
        random.Random(f"{self.seed} pool {pool}").shuffle(batches)
        return batches


def prompts_of(examples):
    """The system prompts that steps were written with, for prompts.json: the most frequent one of route, answer and
    final steps."""
    counts = {"route": Counter(), "answer": Counter(), "final": Counter()}
    for e in examples:
        counts["route" if e.kind == "ret" else "final" if e.final else "answer"][e.system] += 1
    return {kind: seen.most_common(1)[0][0] for kind, seen in counts.items() if seen}


def read_sources(specs):
    """["a.jsonl=3", "b.jsonl"] -> [(name, steps, share)]."""
    sources = []
    for spec in specs:
        name, _, share = spec.rpartition("=") if "=" in spec else (spec, "", "1")
        try:
            if not 0 < float(share) < math.inf:
                raise ValueError(f"the share is {share}: give a positive number")
            rows, counts = clean_rows(read_steps(name), ())
            if counts["no_picture"]:
                tell(f"--data {spec}: left out {counts['no_picture']} rows whose picture is missing")
            sources.append((name, [step for row in rows for step in row], float(share)))
        except ValueError as e:
            raise ValueError(f"--data {spec}: {e}") from None
    if not sources:
        raise ValueError("--data: name at least one step file")
    return sources


def offline_rows(o):
    """The rows of the step files, without those that --drop leaves out; says what was found."""
    if not o.data:
        raise ValueError("--data: name at least one step file")
    rows = [row for name in o.data for row in read_steps(name)]
    kept, counts = clean_rows(rows, o.drop)
    found = ", ".join(f"{n} {name}" for name, n in counts.items())
    tell(f"{len(rows)} rows: {found}; {len(kept)} are trained on")
    return kept


def gold_label(step):
    """"answer", or the gold route of a routing step."""
    return "answer" if step.kind == "ans" else gold_base(step.answer)


def clean_rows(rows, drop):
    """Count what is odd in published rows, and leave out what `drop` names.

    no_picture: its file is missing (such a row cannot be asked as it was meant, it is always left out); repeats: a
    sub-question comes twice; no_information: an intermediate gold says that there is none.
    """
    def faults(row):
        queries = [s.answer["query"].strip().lower() for s in row if s.kind == "ret"]
        asked = [query for query in queries if query != "none"]
        return {"no_picture": any(not Path(i).is_file() for s in row for i in s.images),
                "repeats": len(set(asked)) < len(asked),
                "no_information": any(NO_INFORMATION.search(s.answer) for s in row if isinstance(s.answer, str))}
    found = [faults(row) for row in rows]
    kept = [row for row, f in zip(rows, found) if not any(f[name] for name in {*drop, "no_picture"})]
    if not kept:
        raise ValueError("no row is left to train on: every picture is missing (paths are relative to the step file)"
                         + ", or --drop leaves all out" * bool(drop))
    return kept, {name: sum(f[name] for f in found) for name in ("no_picture", "repeats", "no_information")}


NO_INFORMATION = re.compile(r"\b(no|not|does not|doesn't|cannot|can't) (\w+ly )?(provide|contain|mention|"
                            r"include|specify|state|specified|provided|mentioned|available|enough|sufficient|specific|"
                            r"relevant|direct|be determined|information)", re.I)
