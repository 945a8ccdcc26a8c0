"""The embedded world: countries, people, cups and flags that nobody can know beforehand, in the
published file formats.

What flows through this file:
    seed -> a small world of facts -> three corpora and pictures
                                   -> questions with their gold hops -> step files to train on

A question is a chain of moves through the world (photo -> country -> leader -> age). Each move is
one fact, each fact lies in exactly one of the three knowledge bases, so every question has a known
best route. The names of the three splits come from disjoint parts of the name space: whoever
answers a test question has read it in the evidence and cannot have remembered it.

Four dials make a world harder: facts that no base has, facts in another base than usual, questions
that name their answer among others, and several wordings of a question.

This file knows the world and the step language, and nothing of models. It meets the scripts through
files on disk, and everything particular to the world is data written here.
"""
import json
import math
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from parts.steps import (ASK, EVIDENCE_HEADER, IMAGE, PREFIX, ROUTES, UNKNOWN, final_problem,
                         route_problem)
from plumbing.files import replacing, run_command
from plumbing.options import OneLineParser, add_flags, check_options, from_flags, option

# ------------------------------------------------------------------------------------------- names
# A name is two syllables, Bak + dol. Each syllable is one token of the tiny model, so copying an
# unseen name is copying two tokens in order.


def all_syllables():
    """Every consonant, vowel, consonant, in an order that is fixed once and for all."""
    syllables = []
    for first in "bdfgklmnprstvz":
        for vowel in "aeiou":
            syllables += [first + vowel + last for last in "klmnrst"]
    random.Random(77).shuffle(syllables)
    return syllables


FIRST = [syllable.capitalize() for syllable in all_syllables()[:120]]
SECOND = all_syllables()[120:240]
NAME = re.compile(r"[A-Z][a-z]{5}")
# name (i, j) belongs to the split that holds (i + j) mod 10
SHARES = {"train": range(0, 6), "val": range(6, 8), "test": range(8, 10)}


def name_space(split):
    """All names of a split, in a fixed order."""
    names = []
    for i, first in enumerate(FIRST):
        for j, second in enumerate(SECOND):
            if (i + j) % 10 in SHARES[split]:
                names.append(first + second)
    return names


# ------------------------------------------------------------------------------------------- moves

class Move(NamedTuple):
    """One fact that leads from an entity to a value: how it is asked for, and how its passage
    states it."""
    source: str               # type of the entity: photo, country, person, cup
    target: str               # type of the value: one of these, a name, a number
    base: str                 # the knowledge base that holds the fact
    ask: str                  # the question about {}
    stands_for: str | None    # the noun phrase for the value in a longer question
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
IN_TEXT = ("capital", "language")
IN_TABLE = ("population", "area", "currency")
OF_PERSON = ("age", "height")
OF_CUP = ("winner", "year")
# kind of question -> the chains of moves it is drawn from; kinds of two and more hops are named
# after their bases
ONE_AND_TWO_HOPS = {
    "text": [(m,) for m in (*IN_TEXT, "leader")],
    "birth": [("birthplace",)],
    "table": [(m,) for m in (*IN_TABLE, *OF_PERSON)],
    "cup": [(m,) for m in OF_CUP],
    "image": [("flag",)],
    "image-text": [("flag", m) for m in (*IN_TEXT, "leader")],
    "image-table": [("flag", m) for m in IN_TABLE],
    "text-table": [("birthplace", m) for m in IN_TABLE] + [("leader", m) for m in OF_PERSON],
    "text-text": [("birthplace", m) for m in (*IN_TEXT, "leader")] + [("leader", "birthplace")] * 2,
    "table-text": [("winner", m) for m in (*IN_TEXT, "leader")],
    "table-table": [("winner", m) for m in IN_TABLE],
    "compare": [],          # two look-ups of the same kind, then a comparison
    "look": [],             # the picture alone answers: nothing is to be retrieved
}
THREE_HOPS = {
    "image-text-table": [("flag", "leader", m) for m in OF_PERSON],
    "image-text-text": [("flag", "leader", "birthplace")],
    "table-text-table": [("winner", "leader", m) for m in OF_PERSON],
    "table-text-text": [("winner", "leader", "birthplace")],
    "text-text-table": [("birthplace", "leader", m) for m in OF_PERSON]
                       + [("leader", "birthplace", m) for m in IN_TABLE],
    "text-text-text": [("leader", "birthplace", m) for m in IN_TEXT]
                      + [("birthplace", "leader", "birthplace")],
}
FOUR_HOPS = {
    "image-text-text-table": [("flag", "leader", "birthplace", m) for m in IN_TABLE],
    "image-text-text-text": [("flag", "leader", "birthplace", m) for m in IN_TEXT],
    "table-text-text-table": [("winner", "leader", "birthplace", m) for m in IN_TABLE],
    "table-text-text-text": [("winner", "leader", "birthplace", m) for m in IN_TEXT],
}
KINDS = {**ONE_AND_TWO_HOPS, **THREE_HOPS, **FOUR_HOPS}


def all_chains(hops):
    """Every chain of that many moves: each starts where the one before it ended, and none is asked
    for twice. No chain starts at a city: it would ask for a leader in the same words as one that
    starts at a country."""
    if hops == 1:
        return [(name,) for name, move in MOVES.items() if move.source != "city"]
    chains = []
    for chain in all_chains(hops - 1):
        reached = MOVES[chain[-1]].target
        for name, move in MOVES.items():
            if move.source == reached and move.need not in needs(chain):
                chains.append((*chain, name))
    return chains


def needs(chain):
    """What the moves of a chain are called, in order."""
    return tuple(MOVES[name].need for name in chain)


def rich_kinds():
    """Kinds of all chains of one to five moves, named after the bases that they go through."""
    kinds = {"compare": [], "look": []}
    for hops in range(1, 6):
        for chain in all_chains(hops):
            bases = [MOVES[name].base for name in chain]
            kinds.setdefault("-".join(bases), []).append(chain)
    return kinds


def held_out_compositions():
    """A third of the compositions of three moves, by what the moves are called."""
    chains = all_chains(3)
    return {needs(chain) for chain in random.Random(0).sample(chains, len(chains) // 3)}


# In a world with more relations the questions go all ways there are. For the depth study a third of
# the compositions of three hops is held out: their moves, and their moves two by two, are known
# from training, the three together are not.
RICH_KINDS = rich_kinds()
HELD_OUT = held_out_compositions()


def held_out(chain):
    """Whether a chain has a held-out composition in it, whatever comes before and after."""
    return any(needs(chain[i:i + 3]) in HELD_OUT for i in range(len(chain) - 2))


# Other wordings of a question, of a relation and what it belongs to. Each relation has one of them
# that only --wordings held asks in.
WORDINGS = ("Name the {} of {}.", "Tell me the {} of {}.", "{1}: which {0}?")

RETRIEVERS = {base: name.lower() for base, name in ROUTES.items()}
OTHER_BASE = {"text": "table", "table": "text"}     # where the facts of a base can be moved to


def as_text(move, entity, value, base):
    """A fact as a passage of that base states it: as usual, or in the style of the other base."""
    move = MOVES[move]
    if base == move.base:
        return move.fact.format(entity, value)
    owner = f"{entity} cup" if move.source == "cup" else entity
    if base == "text":
        return f"{owner} has {move.need} {value}"
    return f"{owner} {move.need}[sep] {value}"

def as_passages(base, facts):
    """Facts (move, entity, value) of one entity as passages of a base: a sentence each, or the rows
    of one table, flattened as Open-WikiTable's are."""
    texts = [as_text(move, entity, value, base) for move, entity, value in facts]
    if base != "table":
        return [f"{text}." for text in texts]
    rows = "".join(f"[Row] {text}" for text in texts)
    title = MOVES[facts[0][0]].source if facts else ""
    return [f"[Title] {title}[Header] fact[sep] value[Rows]{rows}"] if facts else []


# ------------------------------------------------------------------------------------------- flags

COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220), "green": (20, 160, 60),
           "yellow": (245, 220, 40), "white": (250, 250, 250), "black": (15, 15, 15),
           "orange": (250, 140, 20), "purple": (140, 40, 170)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
SIDE = 64                                                       # pixels of a picture's side


def random_flag(rng):
    """Three stripes across or down, and an emblem in a fourth colour."""
    *stripes, emblem = rng.sample(list(COLOURS), 4)
    across = rng.random() < 0.5
    return {"across": across, "stripes": stripes, "emblem": emblem, "shape": rng.choice(SHAPES)}


def draw_flag(flag, shift=(0, 0), scale=1.0):
    """A flag of SIDE x SIDE pixels; the emblem can be moved by `shift` pixels and scaled."""
    picture = Image.new("RGB", (SIDE, SIDE))
    draw = ImageDraw.Draw(picture)
    for i, colour in enumerate(flag["stripes"]):
        low, high = i * SIDE / 3, (i + 1) * SIDE / 3
        stripe = [0, low, SIDE, high] if flag["across"] else [low, 0, high, SIDE]
        draw.rectangle(stripe, fill=COLOURS[colour])
    x, y = SIDE / 2 + shift[0], SIDE / 2 + shift[1]
    r = SIDE * 0.24 * scale
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
    corners = []
    for k in range(10):                                         # a star: five points, five notches
        distance = r * (1.2 if k % 2 == 0 else 0.5)
        angle = -math.pi / 2 + k * math.pi / 5
        corners.append((x + distance * math.cos(angle), y + distance * math.sin(angle)))
    return corners


def take_photo(flag, rng):
    """A flag as a camera sees it: emblem moved and scaled, other light, noise."""
    shift = (rng.uniform(-4, 4), rng.uniform(-4, 4))
    picture = draw_flag(flag, shift, rng.uniform(0.85, 1.15))
    noise = np.random.default_rng(rng.getrandbits(32)).standard_normal((SIDE, SIDE, 3)) * 12
    pixels = np.asarray(picture, dtype=np.float32) * rng.uniform(0.8, 1.1) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def edge_of(flag):
    """Where its first stripe lies."""
    return "top" if flag["across"] else "left"


def describe(flag):
    """The picture in words, as the model's thought spells it out before it answers."""
    stripes = " ".join(flag["stripes"])
    return f"flag {edge_of(flag)} {stripes} {flag['emblem']} {flag['shape']}"


def look_question(flag, rng):
    """A question that the picture alone answers -> (question, answer)."""
    return rng.choice([("What colour is the emblem?", flag["emblem"]),
                       ("What shape is the emblem?", flag["shape"]),
                       (f"What colour is the {edge_of(flag)} stripe?", flag["stripes"][0])])


# ------------------------------------------------------------------------------------------- world


@dataclass(frozen=True)
class Dials:
    """What makes a world harder. Each is a flag."""
    unanswerable: float = option(0.0, "share of the facts of text and tables that no base has: the "
                                 f"answer is {UNKNOWN!r}", most=0.5)
    moved: float = option(0.0, "share of the facts of text and tables that lie in the other of the "
                          "two bases", most=0.5)
    guessable: float = option(0.0, "share of the questions with look-ups and a known answer that "
                              "name it: yes or no, or one of three", most=1)
    wordings: str = option("usual", "of questions with look-ups: usual; several: each relation in "
                           "two more; held: in one that several never uses",
                           choices=("usual", "several", "held"))


class World:
    """Facts of one world, facts[move][entity] = value, and the base that holds each,
    places[move, entity]; entities by type, flags by country, corpora by base."""

    def __init__(self, split, seed, countries, rich=False, dials=Dials()):
        self.dials = dials
        self.rng = random.Random(f"{split} world {seed}")
        self.names = name_space(split)
        self.own_names = set(self.names)
        if 6 * countries > len(self.names):
            raise ValueError(f"--countries {countries}: six names each are needed, the {split} "
                             f"split holds {len(self.names)}; take at most {len(self.names) // 6}")
        self.facts = self.draw_facts(countries)
        if rich:
            more = random.Random(f"{split} relations {seed}")
            cities = self.facts["capital"].values()
            owners = {"star": self.countries, "assistant": self.countries, "mayor": cities}
            for move, entities in owners.items():
                self.facts[move] = dict(zip(entities, more.sample(self.people, countries)))
        self.places = self.draw_places(random.Random(f"{split} places {seed}"))
        self.flags = {country: random_flag(self.rng) for country in self.countries}
        self.corpora = {base: self.corpus(base) for base in RETRIEVERS}
        self.mentions = {base: {} for base in RETRIEVERS}   # base -> name -> passages that have it
        populations = {self.facts["population"][country] for country in self.countries
                       if self.places["population", country] == "table"}
        if not all(self.corpora.values()) or len(populations) < 2:
            raise ValueError(f"--countries {countries}: too few for a world with these dials: a "
                             "base is empty, or no two populations can be compared")
        for base, docs in self.corpora.items():
            for doc in docs:
                for name in set(NAME.findall(doc["text"])):
                    self.mentions[base].setdefault(name, []).append(doc["text"])

    def draw_facts(self, countries):
        """As many people and cups as countries, and a value for each of their relations."""
        rng = self.rng
        pool = iter(rng.sample(self.names, 6 * countries))

        def names():
            return [next(pool) for _ in range(countries)]

        def numbers(low, high):
            return [str(rng.randint(low, high)) for _ in range(countries)]

        def shuffled(values):
            return rng.sample(values, len(values))

        self.countries, self.people, self.cups = names(), names(), names()
        return {
            "capital": dict(zip(self.countries, names())),
            "language": dict(zip(self.countries, names())),
            "leader": dict(zip(self.countries, shuffled(self.people))),
            "birthplace": dict(zip(self.people, shuffled(self.countries))),
            "winner": dict(zip(self.cups, shuffled(self.countries))),
            "year": dict(zip(self.cups, numbers(10, 99))),
            "population": dict(zip(self.countries, numbers(10, 49))),
            "area": dict(zip(self.countries, numbers(50, 99))),
            "currency": dict(zip(self.countries, names())),
            "age": dict(zip(self.people, numbers(10, 49))),
            "height": dict(zip(self.people, numbers(50, 99))),
            "flag": {country: country for country in self.countries},
        }

    def draw_places(self, rng):
        """The base that holds each fact: the usual one, another one for the share `moved`, and None
        for the share `unanswerable`."""
        places = {}
        for move, values in self.facts.items():
            usual = MOVES[move].base
            for entity in values:
                places[move, entity] = usual
                u = rng.random()
                if usual in OTHER_BASE and u < self.dials.unanswerable:
                    places[move, entity] = None
                elif usual in OTHER_BASE and u > 1 - self.dials.moved:
                    places[move, entity] = OTHER_BASE[usual]
        return places

    def passages(self, base, moves, entity):
        """Those of an entity's facts that lie in the base, as its passages."""
        return as_passages(base, [(move, entity, self.facts[move][entity]) for move in moves
                            if self.places[move, entity] == base])

    def corpus(self, base):
        """Documents of a base: in the text base a passage has one fact, in the table base the facts
        of one entity, in the image base a flag and its caption."""
        docs = []
        if base == "image":
            for i, country in enumerate(self.countries):
                [caption] = self.passages("image", ("flag",), country)
                docs.append({"id": f"image-{i}", "text": caption, "image": f"flags/{i}.png"})
            return docs
        texts = []
        if base == "text":
            for country in self.countries:
                texts += self.passages(base, (*IN_TEXT, "leader"), country)
            for move in ("birthplace", *MORE_RELATIONS):
                for entity in self.facts.get(move, ()):
                    texts += self.passages(base, (move,), entity)
        else:
            for entities, moves in ((self.countries, IN_TABLE), (self.people, OF_PERSON),
                                    (self.cups, OF_CUP)):
                for entity in entities:
                    texts += self.passages(base, moves, entity)
        for (move, entity), place in self.places.items():
            if place == base and MOVES[move].base != base:
                texts += self.passages(base, (move,), entity)
        return [{"id": f"{base}-{i}", "text": text} for i, text in enumerate(texts)]

    def evidence(self, base, query, rng, k=2, photo=None):
        """Lines that a search would bring, for prompts to train on: passages that share the query's
        names first, most shared words on top.

        The real search is in retrieve.py; this stand-in only has to give prompts of the same look,
        so ties are broken at random.
        """
        if base == "image" and photo is not None:
            passages = self.passages(base, ("flag",), photo)
        else:
            passages = self.best_passages(base, query, rng)[:k]
        while len(passages) < k:
            passages.append(rng.choice(self.corpora[base])["text"])
        if base != "image" and rng.random() < 0.1:          # of pictures only the rank tells
            rng.shuffle(passages)
        return [f"{PREFIX[base]}-{i}: {text}" for i, text in enumerate(passages)]

    def best_passages(self, base, query, rng):
        """Passages with a name of the query, those that share most words with it first."""
        names = NAME.findall(query)
        words = set(re.findall(r"\w+", query))
        candidates = set()
        for name in names:
            candidates.update(self.mentions[base].get(name, ()))
        scores = {}
        for passage in sorted(candidates):
            shared = words & set(re.findall(r"\w+", passage))
            scores[passage] = sum(3 if word in names else 1 for word in shared) + rng.random()
        return sorted(scores, key=scores.get, reverse=True)

    def question(self, kind, chains, rng):
        """A question of a kind, drawn from its chains of moves: {question, answer, kind, hops,
        photo, thought}. photo: a country or None; thought: that of the final answer."""
        if kind == "compare":
            return self.comparison(rng)
        if kind == "look":
            country = rng.choice(self.countries)
            question, answer = look_question(self.flags[country], rng)
            return {"question": question, "answer": answer, "kind": kind, "hops": [],
                    "photo": country, "thought": describe(self.flags[country])}
        chain = rng.choice(chains)
        entities = {"photo": self.countries, "country": self.countries,
                    "person": self.people, "cup": self.cups}
        entity = rng.choice(entities[MOVES[chain[0]].source])
        photo = entity if chain[0] == "flag" else None
        question, hops, value = self.ask(chain, entity, rng), [], entity
        for i, name in enumerate(chain):
            rest = ask_chain(chain[i:], value)
            tries = self.look_ups(name, value)
            hops += [{**hop, "rest": rest} for hop in tries]
            if len(tries) > 1:
                kind = "moved"
            value = tries[-1]["answer"]
            if value == UNKNOWN:
                kind = "unanswerable"
                break
        q = {"question": question, "answer": value, "kind": kind, "hops": hops, "photo": photo,
             "thought": "final answer"}
        others = sorted(set(self.facts[chain[-1]].values()) - {value})
        wanted = self.dials.guessable and rng.random() < self.dials.guessable
        return guessable(q, others, rng) if wanted and value != UNKNOWN and len(others) > 1 else q

    def look_ups(self, move, entity):
        """The gold hops of a move: one, or where the usual base has not got the fact, which nobody
        can know before, another one to the base where it may be."""
        usual, place = MOVES[move].base, self.places[move, entity]
        bases = (usual,) if place == usual else (usual, OTHER_BASE[usual])
        value = self.facts[move][entity]
        return [make_hop(move, entity, value if base == place else UNKNOWN, base)
                for base in bases]

    def ask(self, chain, entity, rng):
        """One question for a chain of moves that starts at an entity, in its usual wording; or with
        several, half of the time in another one; or in the one that is held out for its move."""
        if self.dials.wordings == "usual":
            return ask_chain(chain, entity)
        move, owner = MOVES[chain[-1]], entity
        held = [one.need for one in MOVES.values()].index(move.need) % len(WORDINGS)
        others = [wording for i, wording in enumerate(WORDINGS) if i != held]
        if move.source in ("photo", "cup"):
            owner = "this flag" if move.source == "photo" else f"the {entity} cup"
        for name in chain[:-1]:
            owner = MOVES[name].stands_for.format(owner)
        if self.dials.wordings == "held":
            return WORDINGS[held].format(move.need, owner)
        if rng.random() < 0.5:
            return ask_chain(chain, entity)
        return rng.choice(others).format(move.need, owner)

    def comparison(self, rng):
        """A question that compares two countries of different populations."""
        people = {country: number for country, number in self.facts["population"].items()
                  if self.places["population", country] == "table"}
        a, b = rng.sample(list(people), 2)
        while people[a] == people[b]:
            b = rng.choice([country for country in people if country != a])
        return compare_question(a, b, people[a], people[b])


def ask_chain(chain, entity):
    """One question for a chain of moves that starts at an entity: from the inside to the outside,
    each move's noun phrase takes the entity's place in the next."""
    for name in chain[:-1]:
        entity = MOVES[name].stands_for.format(entity)
    return MOVES[chain[-1]].ask.format(entity)


def guessable(q, others, rng):
    """The question with its answer named: yes or no, or one of three; `others` are like it."""
    if rng.random() < 0.5:
        return yes_no(q, others, rng)
    a, b, c = rng.sample([q["answer"], *rng.sample(others, 2)], 3)
    return {**q, "question": f"{q['question']} Is it {a}, {b} or {c}?", "kind": "options"}


def yes_no(q, others, rng):
    """The question, asking whether its answer is a stated value: half of the time it is."""
    stated = q["answer"] if rng.random() < 0.5 else rng.choice(others)
    return {**q, "question": f"{q['question']} Is it {stated}?", "kind": "yes-no",
            "answer": "yes" if stated == q["answer"] else "no",
            "thought": f"{q['answer']} is it {stated}"}


def make_hop(move, entity, value, base):
    """One look-up: its sub-question, base and answer, what it is called, and the fact that its
    evidence states, or that it states none."""
    need = MOVES[move].need
    quote = f"{entity} no {need}" if value == UNKNOWN else as_text(move, entity, value, base)
    return {"query": MOVES[move].ask.format(entity), "base": base, "answer": value, "need": need,
            "quote": quote}


def compare_question(a, b, people_a, people_b):
    """Which of two countries has more people? The final thought lays the numbers side by side
    before it names the winner."""
    hops = [make_hop("population", a, people_a, "table"),
            make_hop("population", b, people_b, "table")]
    more, winner = (people_a, a) if int(people_a) >= int(people_b) else (people_b, b)
    thought = f"{people_a} {a} {people_b} {b} more {more} {winner}"
    return {"question": f"Which country has more people, {a} or {b}?", "answer": winner,
            "kind": "compare", "hops": hops, "photo": None, "thought": thought}


# -------------------------------------------------------------------------------------- step files
# The problems are those of the step language; the system prompts are a word each, since a tiny
# model pays for every token.


def ret_step(q, history, query, retriever, thought):
    """A routing step: the question and what is known so far -> a sub-question and its retriever."""
    problem = route_problem(q["question"], history, q["photo"] is not None)
    return {"step_type": "ret", "problem": problem, "system": "plan",
            "answer": {"query": query, "retriever": [retriever]}, "thought": thought}


def ans_step(question, evidence, answer, thought, photo, system="read"):
    """An answering step: evidence lines and a sub-question -> its answer."""
    lines = "".join(f"{line}\n" for line in evidence)
    problem = EVIDENCE_HEADER + lines + ASK + question + (IMAGE if photo is not None else "")
    return {"step_type": "ans", "problem": problem, "system": system, "answer": answer,
            "thought": thought}


def final_step(q, history):
    """The last step: the question and all that is known -> the list of accepted final answers."""
    problem = final_problem(q["question"], history, q["photo"] is not None)
    return {"step_type": "ans", "problem": problem, "system": "answer", "answer": [q["answer"]],
            "thought": q["thought"]}


def gold_steps(world, q, rng, k=2, peel=False):
    """The steps of a question as they should be: ask, read, ask, read, ..., nothing more is needed,
    answer.

    A peeled thought first says what is left of the question once the answers so far have taken the
    place of their phrases. Each step is then the step of a shallower question, whatever the depth
    it began with.
    """
    steps, history = [], []
    for hop in q["hops"]:
        evidence = world.evidence(hop["base"], hop["query"], rng, k, q["photo"])
        thought = f"need {hop['need']}"
        if peel and history and "rest" in hop:
            thought = f"{hop['rest']} {thought}"
        quote = f"{hop['quote']} {hop['answer']}"
        steps.append(ret_step(q, history, hop["query"], RETRIEVERS[hop["base"]], thought))
        steps.append(ans_step(hop["query"], evidence, hop["answer"], quote, q["photo"]))
        history.append((hop["query"], hop["answer"]))
    return steps + [ret_step(q, history, "none", "none", "enough"), final_step(q, history)]


# ------------------------------------------------------------------------------------------- files


def write_lines(path, rows):
    """Writes JSON lines, whole or not at all."""
    with replacing(path) as new:
        with open(new, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


class Photos:
    """Photos are taken when they are first asked for: up to four of a country."""

    def __init__(self, world, out):
        self.world, self.out, self.paths = world, out, set()
        self.number = {country: i for i, country in enumerate(world.countries)}
        (out / "photos").mkdir(exist_ok=True)

    def of(self, country, rng):
        path = f"photos/{self.number[country]}-{rng.randrange(4)}.jpg"
        if path not in self.paths:
            photo = take_photo(self.world.flags[country], random.Random(path))
            photo.save(self.out / path, quality=90)
            self.paths.add(path)
        return path


def choose_kinds(kinds, names, hops, compositions):
    """The named kinds, or those of that depth -> [(kind, its chains of moves)], of all
    compositions, those to train on or those held out."""
    unknown = [name for name in names if name not in kinds]
    if unknown:
        raise ValueError(f"--kinds: {', '.join(unknown)} unknown; there are {', '.join(kinds)}")
    chosen = []
    for kind, chains in kinds.items():
        depth = max(2, len(chains[0]) if chains else 0)
        if kind not in names if names else depth != hops:
            continue
        wanted = list(chains)
        if compositions != "all":
            wanted = [chain for chain in chains if held_out(chain) == (compositions == "held")]
        if wanted or not chains and compositions != "held":
            chosen.append((kind, wanted))
    if names:
        chosen.sort(key=lambda item: names.index(item[0]))
    if not chosen:
        raise ValueError(f"--hops {hops} --compositions {compositions}: no such question; five "
                         "hops need --rich, held-out compositions at least --hops 3")
    return chosen


# Of a world, by folder. lab/practice.py writes the practice files.
PICTURES = {"flags": r"\d+\.png", "photos": r"\d+-\d\.jpg", "practice": r"\d+\.jpg"}
PRACTICE_FILES = ("fresh", "weak", "baselines", "describe", "copy", "compare", "verdict", "absent")


def make_room(out):
    """Where an older world stands, its questions go first, so that it is no whole world while
    another is written, then its practice files and pictures. ValueError where something else
    stands, with nothing changed."""
    pictures, foreign = [], []
    for folder, pattern in PICTURES.items():
        for file in (out / folder).glob("*"):
            own = re.fullmatch(pattern, file.name)
            (pictures if own else foreign).append(file)
    if out.is_dir() and not (out / "flags").is_dir():
        foreign += out.iterdir()
    if foreign:
        raise ValueError(f"--out {out}: holds other files ({foreign[0].name}) and no world: name "
                         "another folder, nothing was overwritten")
    for name in ("questions", *PRACTICE_FILES):
        (out / f"{name}.jsonl").unlink(missing_ok=True)
    for file in pictures:
        file.unlink()


def write_world(out, split, seed, questions, countries, kinds, dials=Dials(), rich=False,
                peel=False):
    """Writes one world: corpora, pictures, steps.jsonl and questions.jsonl.

    Returns the world and its questions with their photos.
    """
    world = World(split, seed, countries, rich, dials)
    make_room(out)
    (out / "flags").mkdir(parents=True, exist_ok=True)
    for i, country in enumerate(world.countries):
        draw_flag(world.flags[country]).save(out / "flags" / f"{i}.png")
    for base, docs in world.corpora.items():
        write_lines(out / f"{base}.jsonl", docs)
    photos, rng, rows = Photos(world, out), random.Random(f"{split} questions {seed}"), []
    for i in range(questions):
        q = world.question(*kinds[i % len(kinds)], rng)
        rows.append((q, photos.of(q["photo"], rng) if q["photo"] else None))
    rng.shuffle(rows)
    steps = [step_row(gold_steps(world, q, rng, peel=peel), image) for q, image in rows]
    write_lines(out / "steps.jsonl", steps)
    ids = [f"{split}-{seed}-{i}" for i in range(questions)]
    lines = [question_row(name, q, image) for name, (q, image) in zip(ids, rows)]
    write_lines(out / "questions.jsonl", lines)         # the last file: where it is, all is there
    return world, rows


def step_row(steps, image):
    """A line of a step file."""
    return {"images": [image] if image else [], "steps": steps}


def question_row(name, q, image):
    """A line of questions.jsonl."""
    hops = []
    for hop in q["hops"]:
        retriever = RETRIEVERS[hop["base"]]
        hops.append({"query": hop["query"], "retriever": retriever, "answer": hop["answer"]})
    return {"id": name, "question": q["question"], "answer": [q["answer"]], "image": image,
            "kind": q["kind"], "hops": hops}


# ------------------------------------------------------------------------------------ command line


@dataclass(frozen=True)
class WorldOptions(Dials):
    """Write one embedded world: three corpora, pictures, questions and training steps."""
    split: str = option("test", "which part of the name space", choices=tuple(SHARES))
    seed: int = option(0, "another seed, another world", least=-math.inf)
    questions: int = option(500, "number of questions, the kinds in turn", least=1)
    countries: int = option(None, "countries, as many people and cups; by default 1200 for train, "
                            "300 otherwise", least=2)
    hops: int = option(2, "2: the standard mix of none to two hops; 3, 4 or, with --rich, 5: only "
                       "that depth", least=2, most=5)
    kinds: tuple = option((), "only these kinds of question, whatever --hops says: "
                          + ", ".join(KINDS), nargs="+", metavar="KIND")
    rich: bool = option(False, "a world with more relations, and questions of all chains in it")
    compositions: str = option("all", "of three and more hops: all, those to train on, or those "
                               "held out (depth study)", choices=("all", "train", "held"))
    peel: bool = option(False, "thoughts say what is left of the question after the answers so far")
    practice: int = option(None, "also write what a tiny model trains on: fresh names, weak "
                           "demonstrations, N of each practice task", least=1, metavar="N")
    shell: str = option("", "write the tiny model's directory without weights there, and no world "
                        "unless --out is given", metavar="DIR")
    out: str = option(None, "directory of the world; by default data/world, unless --shell is "
                      "given", metavar="DIR")

    def __post_init__(self):
        check_options(self)


def command(words):
    """Writes what the flags ask for."""
    p = OneLineParser(prog="lab.world", description=WorldOptions.__doc__)
    add_flags(p, WorldOptions)
    p.add_argument("--shape", type=int, nargs=5, default=(128, 4, 4, 2, 320), metavar="N",
                   help="of --shell: hidden size, layers, heads, key/value heads, feed-forward "
                        "[128 4 4 2 320]")
    args = p.parse_args(words)
    o = from_flags(WorldOptions, args)
    if o.out == "":
        raise ValueError("--out is empty: name a folder")
    if o.shell:
        from lab.tiny import write_shell        # here, since tiny.py reads this world's words
        write_shell(Path(o.shell), *args.shape)
    if o.shell and o.out is None:
        return
    out = Path(o.out or "data/world")
    kinds = choose_kinds(RICH_KINDS if o.rich else KINDS, o.kinds, o.hops, o.compositions)
    countries = o.countries or (1200 if o.split == "train" else 300)
    world, rows = write_world(out, o.split, o.seed, o.questions, countries, kinds, dials=o,
                              rich=o.rich, peel=o.peel)
    if o.practice:
        from lab.practice import write_practice     # here, since practice.py reads this file
        write_practice(out, world, rows, o.seed, o.practice, o.peel)
    passages = ", ".join(f"{len(docs)} {base} passages" for base, docs in world.corpora.items())
    retrievals = sum(len(q["hops"]) for q, _ in rows) / len(rows)
    print(f"{out}: {len(world.countries)} countries, {passages}, {len(rows)} questions needing "
          f"{retrievals:.2f} retrievals each")


def main(argv=None):
    return run_command("lab.world", command, argv)


if __name__ == "__main__":
    sys.exit(main())
