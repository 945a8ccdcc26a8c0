"""What the tiny models of the embedded world are trained on, as step files: gold and weak
demonstrations with fresh names, baselines, and practice tasks.

    world, its questions -> steps with fresh names    -> fresh, weak, baselines
    world                -> single steps of one skill -> copy, absent, verdict, compare, describe

What all of it is for: docs/world.md.
"""
import math
import random
import re

from lab.world import (MOVES, NAME, RETRIEVERS, ans_step, as_text, compare_question, describe,
                       final_step, gold_steps, look_question, make_hop, random_flag, step_row,
                       take_photo, write_lines, yes_no)
from parts.steps import PREFIX, UNKNOWN


# Deeper questions and other -k have numbers that the questions to train on seldom reach: a label
# like "Answer3:" is one token, which a model that never saw it cannot read.
EVIDENCE_LINES = (1, 2, 2, 2, 3, 4, 5, 5)
LABEL = re.compile(r"(Sub-question|Answer)(\d+):")
LABELS = 9                  # that are one token (lab/tiny.py)


def later_numbers(steps, rng):
    """The same steps, in every second trajectory with a history that begins at 2 to 5."""
    shift = rng.choice((0, 0, 0, 0, 1, 2, 3, 4))
    numbers = [int(number) for step in steps for _, number in LABEL.findall(step["problem"])]
    shift = max(0, min(shift, LABELS - max(numbers, default=0)))

    def later(match):
        return f"{match[1]}{int(match[2]) + shift}:"

    return [{**step, "problem": LABEL.sub(later, step["problem"])} for step in steps]


def fresh_names(steps, world, rng):
    """The same steps with every name replaced by another one of the split: what cannot be
    remembered has to be read."""
    new = {}

    def swap(match):
        name = match.group()
        if name not in world.own_names:
            return name
        while name not in new:
            candidate = rng.choice(world.names)
            if candidate not in new.values():
                new[name] = candidate
        return new[name]

    def rename(value):
        if isinstance(value, str):
            return NAME.sub(swap, value)
        if isinstance(value, list):
            return [rename(item) for item in value]
        if isinstance(value, dict):
            return {key: item if key == "system" else rename(item) for key, item in value.items()}
        return value

    return rename(steps)


# ---------------------------------------------------------------------------------- demonstrations

def weak_steps(world, q, rng, k=2):
    """Deliberately poor demonstrations: bases at random, every second sub-question useless or an
    early stop; the answers stay right.

    What is left to learn by reinforcement is exactly when, where and what to retrieve; reading is
    taught, or no reward has a signal. The useless half is one third too vague (the whole question),
    one third an early stop, one third some hop of the question, whether it is its turn or not. Of a
    question in which a base has no answer only the reading is taught, not that another is asked.
    """
    steps = gold_steps(world, q, rng, k)
    if any(hop["answer"] == UNKNOWN for hop in q["hops"]):
        return [step for step in steps if step["step_type"] == "ans"]
    for step in steps:
        if step["step_type"] != "ret":
            continue
        query, thought = step["answer"]["query"], step["thought"]
        stops = step["answer"]["retriever"] == ["none"]
        if rng.random() < 0.5:
            u = rng.random()
            hop = rng.choice(q["hops"]) if q["hops"] else None
            stops = 1 / 3 <= u < 2 / 3
            if stops:
                query, thought = "none", "enough"
            elif u < 1 / 3 or hop is None:
                query, thought = q["question"], "need fact"
            else:
                query, thought = hop["query"], "need " + hop["need"]
        retriever = "none" if stops else rng.choice(list(RETRIEVERS.values()))
        step["answer"] = {"query": query, "retriever": [retriever]}
        step["thought"] = thought
    return steps


def baseline_steps(world, q, rng, k=2):
    """The same question for pipelines that do not route: from the weights alone, one base asked
    once, all three asked once."""
    thought = q["thought"]
    if len(q["hops"]) == 1:
        thought = q["hops"][0]["quote"] + " " + q["answer"]
    mode = rng.choice(["direct", "static", "static", "text", "image", "table"])
    if mode == "direct":
        return [final_step(q, [])]
    evidence = []
    each = math.ceil(k / 3) if mode == "static" else k
    for base in RETRIEVERS if mode == "static" else (mode,):
        evidence += world.evidence(base, q["question"], rng, each, q["photo"])
    return [ans_step(q["question"], evidence, q["answer"], thought, q["photo"])]


# ----------------------------------------------------------------------------------- practice tasks

def random_value(world, move, rng):
    """A value that a move could lead to."""
    return str(rng.randint(10, 99)) if MOVES[move].target == "number" else rng.choice(world.names)


def copy_task(world, rng):
    """Practice in reading: facts in one order, said again in another, then one value.

    Copying an unseen name is the hard part of reading.
    """
    there = [move for move in MOVES if move in world.facts and move != "flag"]
    facts, evidence = [], []
    for move in rng.choices(there, k=rng.randint(2, 5)):
        number = MOVES[move].target == "number"
        value = str(rng.randint(10, 99)) if number else rng.choice(world.names)
        facts.append((move, rng.choice(world.names), value))
    texts = [as_text(*one, MOVES[one[0]].base) for one in facts]
    for i, (move, _, _) in enumerate(facts):
        evidence.append(f"{PREFIX[MOVES[move].base]}-{i}: {texts[i]}.")
    move, entity, value = rng.choice(facts)
    thought = " ".join(rng.sample(texts, len(texts)))
    return [ans_step(MOVES[move].ask.format(entity), evidence, value, thought, None, "copy")]


def absent_task(world, rng):
    """Practice in reading what a wrong base brings: it does not say."""
    move = rng.choice([move for move in world.facts if move != "flag"])
    entity = rng.choice(list(world.facts[move]))
    base = rng.choice([base for base in RETRIEVERS if base != world.places[move, entity]])
    hop = make_hop(move, entity, UNKNOWN, base)
    evidence = world.evidence(base, hop["query"], rng, rng.choice(EVIDENCE_LINES))
    return [ans_step(hop["query"], evidence, UNKNOWN, f"{hop['quote']} {UNKNOWN}", None)]


def verdict_task(world, rng):
    """Practice in saying yes or no: the last step of a question that states its answer."""
    move = rng.choice([move for move in world.facts if move != "flag"])
    value, other = random_value(world, move, rng), random_value(world, move, rng)
    entity = rng.choice(world.names)
    hop = make_hop(move, entity, value, MOVES[move].base)
    q = {"question": hop["query"], "answer": value, "photo": None}
    return [final_step(yes_no(q, [other], rng), [(hop["query"], value)])]


def compare_task(world, rng):
    """Practice in comparing: the last step of a comparison with random numbers and names."""
    a, b = rng.sample(world.names, 2)
    people_a, people_b = rng.sample(range(10, 50), 2)
    q = compare_question(a, b, str(people_a), str(people_b))
    return [final_step(q, [(hop["query"], hop["answer"]) for hop in q["hops"]])]


# ------------------------------------------------------------------------------------------- files

def write_practice(out, world, rows, seed, amount, peel=False):
    """Writes what a tiny model is trained on beside steps.jsonl: the same steps and weak ones with
    fresh names, and practice tasks."""
    rng = random.Random(f"practice {seed}")
    (out / "practice").mkdir(exist_ok=True)

    def renamed(make, *more):
        for q, image in rows:
            steps = make(world, q, rng, rng.choice(EVIDENCE_LINES), *more)
            if rng.random() < 0.9:
                steps = fresh_names(steps, world, rng)
            yield step_row(later_numbers(steps, rng), image)

    def descriptions():
        for i in range(amount):
            flag = random_flag(rng)
            take_photo(flag, rng).save(out / "practice" / f"{i}.jpg", quality=90)
            question, answer = look_question(flag, rng)
            q = {"question": question, "answer": answer, "photo": "", "thought": describe(flag)}
            yield step_row([final_step(q, [])], f"practice/{i}.jpg")

    def practised(task, count):
        for _ in range(count):
            yield step_row(task(world, rng), None)

    write_lines(out / "fresh.jsonl", renamed(gold_steps, peel))
    write_lines(out / "weak.jsonl", renamed(weak_steps))
    write_lines(out / "baselines.jsonl", renamed(baseline_steps))
    write_lines(out / "describe.jsonl", descriptions())
    write_lines(out / "copy.jsonl", practised(copy_task, 3 * amount))
    write_lines(out / "compare.jsonl", practised(compare_task, amount))
    write_lines(out / "verdict.jsonl", practised(verdict_task, 2 * amount))
    write_lines(out / "absent.jsonl", practised(absent_task, amount))
