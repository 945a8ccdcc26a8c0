"""The embedded world: countries, people, cups and flags that nobody can know beforehand, in the published file formats.

What flows through this file:
    seed -> a small world of facts -> three corpora and pictures
                                   -> questions with their gold hops -> step files to train on

A question is a chain of moves through the world (photo -> country -> leader -> age). Each move is one fact, each fact
lies in exactly one of the three knowledge bases, so every question has a known best route. The names of the three
splits come from disjoint parts of the name space: whoever answers a test question has read it in the evidence and
cannot have remembered it.

This file knows the world and nothing of models: it imports none of the other files and none imports it. They meet
through files on disk. Everything particular to the world is data written here (fresh names, practice tasks, the
tokenizer's words); train.py stays generic.
"""
import argparse
import json
import math
import random
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

# ---------------------------------------------------------------------------------------------------------------- names
# A name is two syllables, Bak + dol. Each syllable is one token, so copying an unseen name is copying two tokens in
# order.
_syllables = [a + v + b for a in "bdfgklmnprstvz" for v in "aeiou" for b in "klmnrst"]
random.Random(77).shuffle(_syllables)
FIRST, SECOND = [s.capitalize() for s in _syllables[:120]], _syllables[120:240]
# name (i, j) belongs to the split that holds (i + j) mod 10
SHARES = {"train": range(0, 6), "val": range(6, 8), "test": range(8, 10)}


def name_space(split):
    """All names of a split, in a fixed order."""
    return [a + b for i, a in enumerate(FIRST) for j, b in enumerate(SECOND) if (i + j) % 10 in SHARES[split]]


# ---------------------------------------------------------------------------------------------------------------- moves
class Move(NamedTuple):
    """One fact that leads from an entity to a value: how it is asked for, and how its passage states it."""
    source: str               # type of the entity: photo, country, person, cup
    target: str               # type of the value: one of these, a name, a number
    base: str                 # the knowledge base that holds the fact
    ask: str                  # the question about {}
    stands_for: str | None    # the noun phrase for the value in a longer question, where there is one
    fact: str                 # the fact as its passage states it, {0} entity, {1} value
    need: str                 # what the thought of a routing step calls it


MOVES = {
    "flag":       Move("photo", "country", "image", "Which country has this flag?",
                        "the country with this flag", "flag of {1}", "country"),
    "capital":    Move("country", "city", "text", "What is the capital of {}?",
                        "the capital of {}", "{0} has capital {1}", "capital"),
    "language":   Move("country", "name", "text", "What is the language of {}?",
                        None, "{0} has language {1}", "language"),
    "leader":     Move("country", "person", "text", "Who is the leader of {}?",
                        "the leader of {}", "{0} has leader {1}", "leader"),
    "birthplace": Move("person", "country", "text", "Where was {} born?",
                        "the country where {} was born", "{0} was born in {1}", "birthplace"),
    "population": Move("country", "number", "table", "What is the population of {}?",
                        None, "{0} population[sep] {1}", "population"),
    "area":       Move("country", "number", "table", "What is the area of {}?",
                        None, "{0} area[sep] {1}", "area"),
    "currency":   Move("country", "name", "table", "What is the currency of {}?",
                        None, "{0} currency[sep] {1}", "currency"),
    "age":        Move("person", "number", "table", "What is the age of {}?",
                        None, "{0} age[sep] {1}", "age"),
    "height":     Move("person", "number", "table", "What is the height of {}?",
                        None, "{0} height[sep] {1}", "height"),
    "winner":     Move("cup", "country", "table", "Which country won the {} cup?",
                        "the country that won the {} cup", "{0} cup winner[sep] {1}", "winner"),
    "year":       Move("cup", "number", "table", "When was the {} cup?",
                        None, "{0} cup year[sep] {1}", "year"),
    # MORE_RELATIONS, which only a world made with --rich has
    "star":       Move("country", "person", "text", "Who is the star of {}?",
                        "the star of {}", "{0} has star {1}", "star"),
    "assistant":  Move("country", "person", "text", "Who is the assistant of {}?",
                        "the assistant of {}", "{0} has assistant {1}", "assistant"),
    "mayor":      Move("city", "person", "text", "Who is the leader of {}?",
                        "the leader of {}", "{0} has leader {1}", "leader"),
}
MORE_RELATIONS = ("star", "assistant", "mayor")
IN_TEXT, IN_TABLE, OF_PERSON = ("capital", "language"), ("population", "area", "currency"), ("age", "height")
# kind of question -> the chains of moves it is drawn from; kinds of two and more hops are named after their bases
ONE_AND_TWO_HOPS = {
    "text": [(m,) for m in (*IN_TEXT, "leader")],
    "birth": [("birthplace",)],
    "table": [(m,) for m in (*IN_TABLE, *OF_PERSON)],
    "cup": [("winner",), ("year",)],
    "image": [("flag",)],
    "image-text": [("flag", m) for m in (*IN_TEXT, "leader")],
    "image-table": [("flag", m) for m in IN_TABLE],
    "text-table": [("birthplace", m) for m in IN_TABLE] + [("leader", m) for m in OF_PERSON],
    "text-text": [("birthplace", m) for m in (*IN_TEXT, "leader")] + [("leader", "birthplace")] * 2,
    "table-text": [("winner", m) for m in (*IN_TEXT, "leader")],
    "table-table": [("winner", m) for m in IN_TABLE],
    "compare": [],                                             # two look-ups of the same kind, then a comparison
    "look": [],                                                # the picture alone answers: nothing is to be retrieved
}
THREE_HOPS = {
    "image-text-table": [("flag", "leader", m) for m in OF_PERSON],
    "image-text-text": [("flag", "leader", "birthplace")],
    "table-text-table": [("winner", "leader", m) for m in OF_PERSON],
    "table-text-text": [("winner", "leader", "birthplace")],
    "text-text-table": [("birthplace", "leader", m) for m in OF_PERSON]
                       + [("leader", "birthplace", m) for m in IN_TABLE],
    "text-text-text": [("leader", "birthplace", m) for m in IN_TEXT] + [("birthplace", "leader", "birthplace")],
}
FOUR_HOPS = {
    "image-text-text-table": [("flag", "leader", "birthplace", m) for m in IN_TABLE],
    "image-text-text-text": [("flag", "leader", "birthplace", m) for m in IN_TEXT],
    "table-text-text-table": [("winner", "leader", "birthplace", m) for m in IN_TABLE],
    "table-text-text-text": [("winner", "leader", "birthplace", m) for m in IN_TEXT],
}
KINDS = {**ONE_AND_TWO_HOPS, **THREE_HOPS, **FOUR_HOPS}


def all_chains(hops):
    """Every chain of that many moves: each starts where the one before it ended, and none is asked for twice. No chain
    starts at a city: it would ask for a leader in the same words as one that starts at a country."""
    if hops == 1:
        return [(m,) for m in MOVES if MOVES[m].source != "city"]
    return [(*chain, m) for chain in all_chains(hops - 1) for m in MOVES
            if MOVES[m].source == MOVES[chain[-1]].target and MOVES[m].need not in needs(chain)]


def needs(chain):
    """What the moves of a chain are called, in order."""
    return tuple(MOVES[m].need for m in chain)


def by_bases(chains):
    """Kinds of questions, named after the bases that their chains go through."""
    kinds = {}
    for chain in chains:
        kinds.setdefault("-".join(MOVES[m].base for m in chain), []).append(chain)
    return kinds


# In a world with more relations the questions go all ways there are. For the depth study a third of the compositions of
# three hops is held out: their moves, and their moves two by two, are known from training, the three together are not.
RICH_KINDS = {"compare": [], "look": [], **by_bases(c for n in range(1, 6) for c in all_chains(n))}
HELD_OUT = set(map(needs, random.Random(0).sample(all_chains(3), len(all_chains(3)) // 3)))


def held_out(chain):
    """Whether a chain has a held-out composition in it, whatever comes before and after."""
    return any(needs(chain[i:i + 3]) in HELD_OUT for i in range(len(chain) - 2))


RETRIEVERS = {"text": "text retriever", "image": "text image retriever", "table": "table retriever"}
PREFIXES = {"text": "ter", "image": "tir", "table": "tar"}

# ---------------------------------------------------------------------------------------------------------------- flags
COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220), "green": (20, 160, 60), "yellow": (245, 220, 40),
           "white": (250, 250, 250), "black": (15, 15, 15), "orange": (250, 140, 20), "purple": (140, 40, 170)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
SIDE = 64                                                      # pixels of a picture's side


def random_flag(rng):
    """Three stripes across or down, and an emblem in a fourth colour."""
    *stripes, emblem = rng.sample(list(COLOURS), 4)
    return {"across": rng.random() < 0.5, "stripes": stripes, "emblem": emblem, "shape": rng.choice(SHAPES)}


def draw_flag(flag, shift=(0, 0), scale=1.0):
    """Draw a flag of SIDE x SIDE pixels; the emblem can be moved by `shift` pixels and scaled."""
    picture = Image.new("RGB", (SIDE, SIDE))
    draw = ImageDraw.Draw(picture)
    for i, colour in enumerate(flag["stripes"]):
        a, b = i * SIDE / 3, (i + 1) * SIDE / 3
        draw.rectangle([0, a, SIDE, b] if flag["across"] else [a, 0, b, SIDE], fill=COLOURS[colour])
    x, y, r = SIDE / 2 + shift[0], SIDE / 2 + shift[1], SIDE * 0.24 * scale
    fill, shape = COLOURS[flag["emblem"]], flag["shape"]
    if shape == "circle":
        draw.ellipse([x - r, y - r, x + r, y + r], fill=fill)
    elif shape == "cross":
        draw.rectangle([x - r * 0.35, y - r, x + r * 0.35, y + r], fill=fill)
        draw.rectangle([x - r, y - r * 0.35, x + r, y + r * 0.35], fill=fill)
    else:
        draw.polygon(polygon(shape, x, y, r), fill=fill)
    return picture


def polygon(shape, x, y, r):
    """Corners of an emblem around (x, y)."""
    if shape == "square":
        s = r * 0.85
        return [(x - s, y - s), (x + s, y - s), (x + s, y + s), (x - s, y + s)]
    if shape == "triangle":
        return [(x, y - r), (x - r, y + r), (x + r, y + r)]
    if shape == "diamond":
        return [(x, y - r * 1.2), (x - r * 1.2, y), (x, y + r * 1.2), (x + r * 1.2, y)]
    turn = [(r * (1.2 if k % 2 == 0 else 0.5), -math.pi / 2 + k * math.pi / 5) for k in range(10)]
    return [(x + d * math.cos(a), y + d * math.sin(a)) for d, a in turn]


def take_photo(flag, rng):
    """A flag as a camera sees it: emblem moved and scaled, other light, noise."""
    picture = draw_flag(flag, (rng.uniform(-4, 4), rng.uniform(-4, 4)), rng.uniform(0.85, 1.15))
    noise = np.random.default_rng(rng.getrandbits(32)).standard_normal((SIDE, SIDE, 3)) * 12
    seen = np.asarray(picture, dtype=np.float32) * rng.uniform(0.8, 1.1) + noise
    return Image.fromarray(seen.clip(0, 255).astype(np.uint8))


def describe(flag):
    """The picture in words, as the model's thought spells it out before it answers."""
    return f"flag {'top' if flag['across'] else 'left'} {' '.join(flag['stripes'])} {flag['emblem']} {flag['shape']}"


def look_question(flag, rng):
    """A question that the picture alone answers -> (question, answer)."""
    edge = "top" if flag["across"] else "left"
    return rng.choice([("What colour is the emblem?", flag["emblem"]), ("What shape is the emblem?", flag["shape"]),
                       (f"What colour is the {edge} stripe?", flag["stripes"][0])])


# ---------------------------------------------------------------------------------------------------------------- world


class World:
    """Facts of one world: facts[move][entity] = value, entities by type, flags by country, and their corpora."""

    def __init__(self, split, seed, countries, rich=False):
        self.rng = rng = random.Random(f"{split} world {seed}")
        self.names = name_space(split)
        self.known = set(self.names)
        if 6 * countries > len(self.names):
            raise ValueError(f"--countries {countries}: six names each are needed, the {split} split holds "
                             f"{len(self.names)}; take at most {len(self.names) // 6}")
        pool = iter(rng.sample(self.names, 6 * countries))
        draw = lambda: [next(pool) for _ in range(countries)]
        C, P, K = self.countries, self.people, self.cups = draw(), draw(), draw()
        shuffled = lambda values: rng.sample(values, len(values))
        number = lambda low, high: [str(rng.randint(low, high)) for _ in range(countries)]
        self.facts = {
            "capital": dict(zip(C, draw())), "language": dict(zip(C, draw())), "leader": dict(zip(C, shuffled(P))),
            "birthplace": dict(zip(P, shuffled(C))),
            "winner": dict(zip(K, shuffled(C))), "year": dict(zip(K, number(10, 99))),
            "population": dict(zip(C, number(10, 49))), "area": dict(zip(C, number(50, 99))),
            "currency": dict(zip(C, draw())),
            "age": dict(zip(P, number(10, 49))), "height": dict(zip(P, number(50, 99))),
            "flag": {c: c for c in C},
        }
        if rich:
            more = random.Random(f"{split} relations {seed}")
            for move, entities in (("star", C), ("assistant", C), ("mayor", self.facts["capital"].values())):
                self.facts[move] = dict(zip(entities, more.sample(P, countries)))
        self.flags = {c: random_flag(rng) for c in C}
        self.corpora = {base: self.corpus(base) for base in RETRIEVERS}
        self.mentions = {base: {} for base in RETRIEVERS}       # base -> name -> passages that mention it
        for base, docs in self.corpora.items():
            for doc in docs:
                for name in {n for n in re.findall(r"[A-Z][a-z]{5}", doc["text"])}:
                    self.mentions[base].setdefault(name, []).append(doc["text"])

    def corpus(self, base):
        """Documents of a base: in the text base a fact a passage, in the table base the facts of an entity as the rows
        of a table, in the image base a flag with its caption."""
        fact = lambda move, entity: MOVES[move].fact.format(entity, self.facts[move][entity])
        if base == "image":
            return [{"id": f"image-{i}", "text": fact("flag", c) + ".", "image": f"flags/{i}.png"}
                    for i, c in enumerate(self.countries)]
        if base == "text":
            texts = [fact(m, c) + "." for c in self.countries for m in (*IN_TEXT, "leader")]
            texts += [fact("birthplace", p) + "." for p in self.people]
            texts += [fact(m, entity) + "." for m in MORE_RELATIONS for entity in self.facts.get(m, ())]
        else:
            table = lambda title, entity, moves: (f"[Title] {title}[Header] fact[sep] value[Rows]"
                                                  + "".join(f"[Row] {fact(m, entity)}" for m in moves))
            texts = [table("country", c, IN_TABLE) for c in self.countries]
            texts += [table("person", p, OF_PERSON) for p in self.people]
            texts += [table("cup", k, ("winner", "year")) for k in self.cups]
        return [{"id": f"{base}-{i}", "text": t} for i, t in enumerate(texts)]

    def evidence(self, base, query, rng, k=2, photo=None):
        """What a search would bring, for prompts to train on: passages that share the query's names first, most shared
        words on top.

        The real search is in retrieve.py; this stand-in only has to give prompts of the same look, so ties are broken
        at random.
        """
        if base == "image" and photo is not None:
            found = [MOVES["flag"].fact.format("", photo) + "."]
        else:
            names = re.findall(r"[A-Z][a-z]{5}", query)
            words = lambda text: set(re.findall(r"\w+", text))
            found = {d for n in names for d in self.mentions[base].get(n, ())}
            score = {d: sum(3 if w in names else 1 for w in words(query) & words(d)) + rng.random()
                     for d in sorted(found)}
            found = sorted(score, key=score.get, reverse=True)[:k]
        while len(found) < k:
            found.append(rng.choice(self.corpora[base])["text"])
        if base != "image" and rng.random() < 0.1:              # of pictures the rank is all there is to go by
            rng.shuffle(found)
        return [f"{PREFIXES[base]}-{i}: {text}" for i, text in enumerate(found)]

    def question(self, kind, chains, rng):
        """Draw a question of a kind from its chains of moves: {question, answer, kind, hops, photo, thought}. photo: a
        country or None; thought: that of the final answer."""
        if kind == "compare":
            a, b = rng.sample(self.countries, 2)
            while self.facts["population"][a] == self.facts["population"][b]:
                b = rng.choice([c for c in self.countries if c != a])
            return compare_question(a, b, self.facts["population"][a], self.facts["population"][b])
        if kind == "look":
            country = rng.choice(self.countries)
            question, answer = look_question(self.flags[country], rng)
            return {"question": question, "answer": answer, "kind": kind, "hops": [], "photo": country,
                    "thought": describe(self.flags[country])}
        chain = rng.choice(chains)
        entities = {"photo": self.countries, "country": self.countries, "person": self.people, "cup": self.cups}
        entity = rng.choice(entities[MOVES[chain[0]].source])
        photo = entity if chain[0] == "flag" else None
        hops = []
        for i, name in enumerate(chain):
            value = self.facts[name][entity]
            hops.append({**make_hop(MOVES[name], entity, value), "left": ask_chain(chain[i:], entity)})
            entity = value
        return {"question": hops[0]["left"], "answer": value, "kind": kind, "hops": hops, "photo": photo,
                "thought": "final answer"}


def ask_chain(chain, entity):
    """One question for a chain of moves that starts at an entity: from the inside to the outside, each move's noun
    phrase takes the entity's place in the next."""
    for name in chain[:-1]:
        entity = MOVES[name].stands_for.format(entity)
    return MOVES[chain[-1]].ask.format(entity)


def make_hop(move, entity, value):
    """One look-up: its sub-question, base and answer, what it is called, and the fact that its evidence states."""
    return {"query": move.ask.format(entity), "base": move.base, "answer": value, "need": move.need,
            "quote": move.fact.format(entity, value)}


def compare_question(a, b, people_a, people_b):
    """Which of two countries has more people? The final thought lays the numbers side by side before it names the
    winner."""
    hops = [make_hop(MOVES["population"], a, people_a), make_hop(MOVES["population"], b, people_b)]
    more, winner = max((people_a, a), (people_b, b), key=lambda x: int(x[0]))
    return {"question": f"Which country has more people, {a} or {b}?", "answer": winner, "kind": "compare",
            "hops": hops, "photo": None, "thought": f"{people_a} {a} {people_b} {b} more {more} {winner}"}


# ----------------------------------------------------------------------------------------------------------- step files
# The problem strings are the published ones of Step-GRPO files; the system prompts are a word each, since a
# tiny model pays for every token. infer.py renders the same strings; a test compares the two.
INTRO = ("According to the related information searched, `ter` means this info is from text retriever, "
         "`tir` means this info is from text image retriever, `tar` means this info is from table retriever:")
ASK = "\n\n\n Give me the answer(with the format <answer></answer>) to the Question: "
FINISH = "Now, give me the final answer of the origin question: "


def ret_step(q, history, query, retriever, thought):
    """A routing step: the question and what is known so far -> a sub-question and its retriever."""
    image = "<image>" if q["photo"] is not None else ""
    problem = f"Origin question: {q['question']}\n{pairs(history)}{image}"
    return {"step_type": "ret", "problem": problem, "system": "plan",
            "answer": {"query": query, "retriever": [retriever]}, "thought": thought}


def ans_step(question, evidence, answer, thought, photo, system="read"):
    """An answering step: evidence lines and a sub-question -> its answer."""
    image = "<image>" if photo is not None else ""
    problem = INTRO + "\n".join(evidence) + ASK + question + image
    return {"step_type": "ans", "problem": problem, "system": system, "answer": answer, "thought": thought}


def final_step(q, history):
    """The last step: the question and all that is known -> the final answer, as a list of accepted ones."""
    image = "<image>" if q["photo"] is not None else ""
    problem = f"Origin question: {q['question']}\n{pairs(history)}{FINISH}{q['question']}{image}"
    return {"step_type": "ans", "problem": problem, "system": "answer", "answer": [q["answer"]],
            "thought": q["thought"]}


def pairs(history):
    """The history as a prompt lists it."""
    return "".join(f"Sub-question{i}: {query}\nAnswer{i}: {answer}\n" for i, (query, answer) in enumerate(history, 1))


def gold_steps(world, q, rng, peel=False):
    """The steps of a question as they should be: ask, read, ask, read, ..., nothing more is needed, answer.

    A peeled thought first says what is left of the question once the answers so far have taken the place of their
    phrases. Each step is then the step of a shallower question, whatever the depth it began with.
    """
    steps, history = [], []
    for hop in q["hops"]:
        evidence = world.evidence(hop["base"], hop["query"], rng, photo=q["photo"])
        said = f"{hop['quote']} {hop['answer']}"
        left = f"{hop['left']} " if peel and history and "left" in hop else ""
        steps.append(ret_step(q, history, hop["query"], RETRIEVERS[hop["base"]], f"{left}need {hop['need']}"))
        steps.append(ans_step(hop["query"], evidence, hop["answer"], said, q["photo"]))
        history.append((hop["query"], hop["answer"]))
    return steps + [ret_step(q, history, "none", "none", "enough"), final_step(q, history)]


def weak_steps(world, q, rng):
    """Deliberately poor demonstrations: bases at random, every second sub-question useless or an early stop; the
    answers stay right.

    What is left to learn by reinforcement is exactly when, where and what to retrieve; reading is taught, or no reward
    has a signal. The useless half is one third too vague (the whole question), one third an early stop, one third some
    hop of the question, whether it is its turn or not.
    """
    steps = gold_steps(world, q, rng)
    for step in steps:
        if step["step_type"] != "ret":
            continue
        query, thought, stop = step["answer"]["query"], step["thought"], step["answer"]["retriever"] == ["none"]
        if rng.random() < 0.5:
            u, hop = rng.random(), rng.choice(q["hops"]) if q["hops"] else None
            stop = 1 / 3 <= u < 2 / 3
            if stop:
                query, thought = "none", "enough"
            elif u < 1 / 3 or hop is None:
                query, thought = q["question"], "need fact"
            else:
                query, thought = hop["query"], "need " + hop["need"]
        step["answer"] = {"query": query, "retriever": ["none" if stop else rng.choice(list(RETRIEVERS.values()))]}
        step["thought"] = thought
    return steps


def baseline_steps(world, q, rng):
    """The same question for pipelines that do not route: from the weights alone, one base asked once, all three asked
    once."""
    ask = lambda base, k: world.evidence(base, q["question"], rng, k, q["photo"])
    thought = q["hops"][-1]["quote"] + " " + q["answer"] if len(q["hops"]) == 1 else q["thought"]
    mode = rng.choice(["direct", "static", "static", "text", "image", "table"])
    if mode == "direct":
        return [final_step(q, [])]
    evidence = [line for base in RETRIEVERS for line in ask(base, 1)] if mode == "static" else ask(mode, 2)
    return [ans_step(q["question"], evidence, q["answer"], thought, q["photo"], system="read")]


def copy_task(world, rng):
    """Practice in reading: facts in one order, said again in another, then one value.

    Copying an unseen name is the hard part of reading.
    """
    moves = rng.choices([m for m in MOVES if m in world.facts and m != "flag"], k=rng.randint(2, 5))
    facts = []
    for move in moves:
        value = str(rng.randint(10, 99)) if MOVES[move].target == "number" else rng.choice(world.names)
        facts.append((move, rng.choice(world.names), value))
    said = [MOVES[m].fact.format(entity, value) for m, entity, value in facts]
    evidence = [f"{PREFIXES[MOVES[m].base]}-{i}: {text}." for i, ((m, _, _), text) in enumerate(zip(facts, said))]
    move, entity, value = rng.choice(facts)
    thought = " ".join(rng.sample(said, len(said)))
    return [ans_step(MOVES[move].ask.format(entity), evidence, value, thought, None, system="copy")]


def compare_task(world, rng):
    """Practice in comparing: the last step of a comparison with numbers and names drawn at random."""
    a, b = rng.sample(world.names, 2)
    q = compare_question(a, b, *map(str, rng.sample(range(10, 50), 2)))
    return [final_step(q, [(h["query"], h["answer"]) for h in q["hops"]])]


def fresh_names(steps, world, rng):
    """The same steps with every name replaced by another one of the split: what cannot be remembered has to be read."""
    new = {}

    def swap(match):
        name = match.group()
        if name not in world.known:
            return name
        while name not in new:
            candidate = rng.choice(world.names)
            if candidate not in new.values():
                new[name] = candidate
        return new[name]

    def rename(x):
        if isinstance(x, str):
            return re.sub(r"[A-Z][a-z]{5}", swap, x)
        if isinstance(x, list):
            return [rename(y) for y in x]
        return {k: rename(y) for k, y in x.items()} if isinstance(x, dict) else x
    return [{k: rename(v) if k != "system" else v for k, v in s.items()} for s in steps]


# ---------------------------------------------------------------------------------------------------------------- files


def write_lines(path, rows):
    """Write JSON lines beside the file, then rename."""
    new = path.with_name(path.name + ".new")
    with open(new, "w", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    new.replace(path)


class Photos:
    """Photos are taken when they are first asked for: up to four of a country."""
    def __init__(self, world, out):
        self.world, self.out, self.number, self.taken = world, out, {c: i for i, c in enumerate(world.countries)}, set()
        (out / "photos").mkdir(exist_ok=True)

    def of(self, country, rng):
        path = f"photos/{self.number[country]}-{rng.randrange(4)}.jpg"
        if path not in self.taken:
            take_photo(self.world.flags[country], random.Random(path)).save(self.out / path, quality=90)
            self.taken.add(path)
        return path


def choose_kinds(there, names, hops, compositions):
    """The named kinds, or those of that depth -> [(kind, its chains of moves)], of all compositions, those to train on
    or those held out."""
    depth = lambda kind: len(there[kind][0]) if there[kind] else 0
    names = names or [k for k in there if max(depth(k), 2) == hops]
    if unknown := [k for k in names if k not in there]:
        raise ValueError(f"--kinds: {', '.join(unknown)} unknown; there are {', '.join(there)}")
    wanted = lambda chain: compositions == "all" or held_out(chain) == (compositions == "held")
    chosen = [(k, [c for c in there[k] if wanted(c)]) for k in names]
    chosen = [(k, chains) for k, chains in chosen if chains or not there[k] and compositions != "held"]
    if not chosen:
        raise ValueError(f"--hops {hops} --compositions {compositions}: no such question; five hops need --rich, "
                         "held-out compositions at least --hops 3")
    return chosen


PICTURES = {"flags": r"\d+\.png", "photos": r"\d+-\d\.jpg", "practice": r"\d+\.jpg"}      # of a world, by folder


def make_room(out):
    """Where an older world stands, its questions go first, so that it is no whole world while another is written, then
    its practice files and pictures. ValueError where something else stands, with nothing changed."""
    pictures = [file for folder in PICTURES for file in (out / folder).glob("*")]
    foreign = [file for file in pictures if not re.fullmatch(PICTURES[file.parent.name], file.name)]
    if foreign or out.is_dir() and any(out.iterdir()) and not (out / "flags").is_dir():
        raise ValueError(f"--out {out}: holds other files ({(foreign or [*out.iterdir()])[0].name}) and no world: name "
                         "another folder, nothing was overwritten")
    for name in ("questions", "fresh", "weak", "baselines", "describe", "copy", "compare"):
        (out / f"{name}.jsonl").unlink(missing_ok=True)
    for file in pictures:
        file.unlink()


def write_world(out, split, seed, questions, countries, kinds, rich=False, peel=False):
    """Write one world: corpora, pictures, questions.jsonl and steps.jsonl.

    Returns the world and its questions with their photos.
    """
    world = World(split, seed, countries, rich)
    make_room(out)
    (out / "flags").mkdir(parents=True, exist_ok=True)
    for i, c in enumerate(world.countries):
        draw_flag(world.flags[c]).save(out / "flags" / f"{i}.png")
    for base, docs in world.corpora.items():
        write_lines(out / f"{base}.jsonl", docs)
    photos, rng, rows = Photos(world, out), random.Random(f"{split} questions {seed}"), []
    for i in range(questions):
        q = world.question(*kinds[i % len(kinds)], rng)
        rows.append((q, photos.of(q["photo"], rng) if q["photo"] else None))
    rng.shuffle(rows)
    write_lines(out / "steps.jsonl", (
        {"images": [image] if image else [], "steps": gold_steps(world, q, rng, peel)} for q, image in rows))
    write_lines(out / "questions.jsonl", (                     # the last file: where it is, the world is whole
        {"id": f"{split}-{seed}-{i}", "question": q["question"], "answer": [q["answer"]], "image": image,
         "kind": q["kind"],
         "hops": [{"query": h["query"], "retriever": RETRIEVERS[h["base"]], "answer": h["answer"]} for h in q["hops"]]}
        for i, (q, image) in enumerate(rows)))
    return world, rows


def write_practice(out, world, rows, seed, amount, peel=False):
    """Write what a tiny model is trained on beside steps.jsonl: the same steps and weak ones with fresh names, and
    practice tasks."""
    rng = random.Random(f"practice {seed}")
    (out / "practice").mkdir(exist_ok=True)

    def renamed(make):
        for q, image in rows:
            steps = make(world, q, rng)
            if rng.random() < 0.9:
                steps = fresh_names(steps, world, rng)
            yield {"images": [image] if image else [], "steps": steps}

    def descriptions():
        for i in range(amount):
            flag = random_flag(rng)
            take_photo(flag, rng).save(out / "practice" / f"{i}.jpg", quality=90)
            question, answer = look_question(flag, rng)
            q = {"question": question, "answer": answer, "photo": "", "thought": describe(flag)}
            yield {"images": [f"practice/{i}.jpg"], "steps": [final_step(q, [])]}
    write_lines(out / "fresh.jsonl", renamed(lambda *of: gold_steps(*of, peel)))
    write_lines(out / "weak.jsonl", renamed(weak_steps))
    write_lines(out / "baselines.jsonl", renamed(baseline_steps))
    write_lines(out / "describe.jsonl", descriptions())
    write_lines(out / "copy.jsonl", ({"images": [], "steps": copy_task(world, rng)} for _ in range(3 * amount)))
    write_lines(out / "compare.jsonl", ({"images": [], "steps": compare_task(world, rng)} for _ in range(amount)))


def main():
    p = argparse.ArgumentParser(
        description="Write one embedded world: three corpora, pictures, questions and training steps.")
    p.add_argument("--split", choices=list(SHARES), default="test", help="which part of the name space (default test)")
    p.add_argument("--seed", type=int, default=0, help="another seed, another world (default 0)")
    p.add_argument("--questions", type=int, default=500, help="number of questions, the kinds in turn (default 500)")
    p.add_argument("--countries", type=int,
                   help="countries, as many people and cups (default 1200 for train, 300 otherwise)")
    p.add_argument("--hops", type=int, choices=(2, 3, 4, 5), default=2,
                   help="2: the standard mix of none to two hops (default); 3, 4 or, with --rich, 5: only that depth")
    p.add_argument("--kinds", nargs="+", metavar="KIND",
                   help=f"only these kinds of question, whatever --hops says: {', '.join(KINDS)}")
    p.add_argument("--rich", action="store_true", help="a world with more relations, and questions of all chains in it")
    p.add_argument("--compositions", choices=("all", "train", "held"), default="all",
                   help="of three and more hops: all (default), those to train on, or those held out (depth study)")
    p.add_argument("--peel", action="store_true",
                   help="thoughts say what is left of the question after the answers so far")
    p.add_argument("--practice", type=int, metavar="N",
                   help="also write what a tiny model trains on: fresh names, weak demonstrations, "
                        "N of each practice task")
    p.add_argument("--shell", type=Path, metavar="DIR",
                   help="write the tiny model's directory without weights there (and no world unless --out is given)")
    p.add_argument("--shape", type=int, nargs=5, default=(128, 4, 4, 2, 320), metavar="N",
                   help="of --shell: hidden size, layers, heads, key/value heads, feed-forward")
    p.add_argument("--out", metavar="DIR", help="directory of the world (default data/world, unless --shell is given)")
    p.error = lambda message: p.exit(2, f"world.py: {message}\n")
    a = p.parse_args()
    try:
        hidden, layers, heads, kv_heads, inner = a.shape
        if min(a.shape) < 1 or hidden % (8 * heads) or heads % kv_heads:
            raise ValueError(f"--shape {' '.join(map(str, a.shape))}: give numbers of at least 1, a hidden size that "
                             "is a multiple of 8 for each head, and key/value heads that divide the heads")
        if a.practice is not None and a.practice < 1:
            raise ValueError(f"--practice {a.practice}: give at least 1")
        if a.shell:
            from lab.tiny import write_shell             # here, since tiny.py reads this world's words
            write_shell(a.shell, *a.shape)
        if a.out is not None or not a.shell:
            out = Path("data/world" if a.out is None else a.out)
            if not a.out and a.out is not None:
                raise ValueError("--out is empty: name a folder")
            kinds = choose_kinds(RICH_KINDS if a.rich else KINDS, a.kinds, a.hops, a.compositions)
            countries = (1200 if a.split == "train" else 300) if a.countries is None else a.countries
            if a.questions < 1 or countries < 2:
                raise ValueError(f"--questions {a.questions} and --countries {countries}: at least 1 question and "
                                 "2 countries are needed")
            world, rows = write_world(out, a.split, a.seed, a.questions, countries, kinds, a.rich, a.peel)
            if a.practice:
                write_practice(out, world, rows, a.seed, a.practice, a.peel)
            passages = ", ".join(f"{len(d)} {b} passages" for b, d in world.corpora.items())
            print(f"{out}: {len(world.countries)} countries, {passages}, {len(rows)} questions "
                  f"needing {sum(len(q['hops']) for q, _ in rows) / len(rows):.2f} retrievals each")
    except (OSError, ValueError) as e:
        p.error(str(e))


if __name__ == "__main__":
    main()
