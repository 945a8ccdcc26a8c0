"""The embedded world: published formats, disjoint names, facts that the corpora really hold, and pictures that show
what they should."""
import hashlib
import json
import random
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import conftest
from conftest import ROOT
from lab import world
from parts.chat import Processor
from parts.steps import PREFIX, answer_problem, final_problem, route_problem


def run(*words):
    return conftest.run("lab.world", *words)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small training world with practice files, and its model shell."""
    out = tmp_path_factory.mktemp("world")
    done = run("--split", "train", "--seed", 5, "--countries", 60, "--questions", 130, "--practice", 20,
               "--out", out / "w", "--shell", out / "shell")
    assert done.returncode == 0, done.stderr
    return out


def rows(path):
    return [json.loads(line) for line in open(path)]


def names_in(text):
    return {n for n in re.findall(r"[A-Z][a-z]{5}", text) if n[:3] in world.FIRST and n[3:] in world.SECOND}


def test_splits_share_no_name_whatever_the_seed():
    spaces = {split: set(world.name_space(split)) for split in world.SHARES}
    assert all(len(s) > 6 * 300 for s in spaces.values()) and len(spaces["train"]) > 6 * 1200
    assert not spaces["train"] & spaces["val"]
    assert not spaces["train"] & spaces["test"] and not spaces["val"] & spaces["test"]
    w = world.World("test", 3, 40)
    assert names_in(json.dumps(w.corpora)) <= spaces["test"]


def test_same_seed_same_world_other_seed_other_world(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run("--seed", seed, "--countries", 20, "--questions", 26, "--out", tmp_path / name).returncode == 0
    files = ["text.jsonl", "image.jsonl", "table.jsonl", "questions.jsonl", "steps.jsonl"]
    same = [(tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files]
    other = [(tmp_path / "a" / f).read_bytes() == (tmp_path / "c" / f).read_bytes() for f in files]
    assert all(same) and not any(other[:1] + other[2:])
    photo = next((tmp_path / "a" / "photos").iterdir()).name
    assert (tmp_path / "a" / "photos" / photo).read_bytes() == (tmp_path / "b" / "photos" / photo).read_bytes()


def test_every_hop_is_stated_by_exactly_the_base_that_it_names(made):
    """Each gold answer stands, with the name asked about, in a passage of its own base and of no other."""
    corpora = {base: [d["text"] for d in rows(made / "w" / f"{base}.jsonl")] for base in ("text", "table")}
    seen = set()
    for q in rows(made / "w" / "questions.jsonl"):
        seen.add((q["kind"], len(q["hops"])))
        for hop in q["hops"]:
            base = hop["retriever"].split()[0]
            if hop["retriever"] == "text image retriever":
                assert q["image"] and hop["answer"] in " ".join(d["text"] for d in rows(made / "w" / "image.jsonl"))
                continue
            name, = names_in(hop["query"])
            states = {b: [t for t in corpora[b] if name in t and re.search(rf"\b{hop['answer']}\b", t)] for b in corpora}
            assert states[base] and not states["table" if base == "text" else "text"], hop
    assert {h for _, h in seen} == {0, 1, 2} and len({k for k, _ in seen}) == 13


def test_chains_lead_from_hop_to_hop(made):
    """The second hop asks about what the first one found; the last hop's answer is the question's."""
    two = [q for q in rows(made / "w" / "questions.jsonl") if len(q["hops"]) == 2 and q["kind"] != "compare"]
    assert len(two) > 30
    for q in two:
        assert q["hops"][0]["answer"] in q["hops"][1]["query"] and q["hops"][1]["answer"] == q["answer"][0]
        assert q["hops"][0]["answer"] not in q["question"]
    for q in (q for q in rows(made / "w" / "questions.jsonl") if q["kind"] == "compare"):
        numbers = {q["hops"][i]["query"].split()[-1].strip("?"): int(q["hops"][i]["answer"]) for i in (0, 1)}
        assert q["answer"] == [max(numbers, key=numbers.get)]


@pytest.mark.parametrize("hops, kinds", [(3, world.THREE_HOPS), (4, world.FOUR_HOPS)])
def test_deeper_questions_have_that_depth(tmp_path, hops, kinds):
    assert run("--hops", hops, "--countries", 30, "--questions", 24, "--out", tmp_path).returncode == 0
    got = rows(tmp_path / "questions.jsonl")
    assert {len(q["hops"]) for q in got} == {hops} and {q["kind"] for q in got} == set(kinds)
    for q in got:
        assert q["kind"].split("-") == [h["retriever"].replace("text image", "image").split()[0] for h in q["hops"]]


def test_without_the_depth_study_every_file_is_what_it_was(made):
    """The sum was computed with the code from before there were --rich and --peel; the shipped weights depend on it."""
    files = ("baselines", "compare", "copy", "describe", "fresh", "image", "questions", "steps", "table", "text", "weak")
    assert hashlib.sha256(b"".join((made / "w" / f"{f}.jsonl").read_bytes() for f in files)).hexdigest() == (
        "60b377da24c116872c56e2542d09a04cd215cbf00b14aa504a4df39f494e736d")
    vocabulary = lambda path: json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert vocabulary(made / "shell") == vocabulary(ROOT / "weights" / "tiny")


@pytest.mark.parametrize("chain, thoughts", [
    (("flag", "leader", "age"), [
        "need country",
        "What is the age of the leader of {1}? need leader",
        "What is the age of {2}? need age",
        "enough"]),
    (("winner", "star", "birthplace", "area"), [
        "need winner",
        "What is the area of the country where the star of {1} was born? need star",
        "What is the area of the country where {2} was born? need birthplace",
        "What is the area of {3}? need area",
        "enough"]),
    (("capital", "mayor", "birthplace"), [
        "need capital",
        "Where was the leader of {1} born? need leader",
        "Where was {2} born? need birthplace",
        "enough"]),
])
def test_a_peeled_thought_is_the_question_with_its_inside_answered(chain, thoughts):
    """Written out by hand; {1}, {2}, {3} are the answers of the hops, looked up in the facts one after the other."""
    w, rng = world.World("train", 0, 20, rich=True), random.Random(0)
    q = w.question("deep", [chain], rng)
    first = q["photo"] or next(e for e, v in w.facts[chain[0]].items() if e in q["question"])
    values = [first]
    for move in chain:
        values.append(w.facts[move][values[-1]])
    said = lambda peel: [s["thought"] for s in world.gold_steps(w, q, rng, peel) if s["step_type"] == "ret"]
    assert said(True) == [t.format(*values) for t in thoughts]
    assert said(False) == [t.split("? ")[-1] for t in thoughts] and q["answer"] == values[-1]


def signatures(path):
    """Each question's sub-questions without their names: its composition, in words."""
    return [tuple(re.sub(r"[A-Z][a-z]{5}\b", "X", h["query"]) for h in q["hops"]) for q in rows(path / "questions.jsonl")]


def test_held_out_compositions_are_not_trained_on_but_their_parts_are(tmp_path):
    """Three moves in a row that one file has at three hops, the other has at no depth."""
    common = ["--split", "train", "--countries", 40, "--rich", "--peel", "--practice", 1]
    for name, more in {"mix": ("--questions", 900), "train": ("--hops", 3, "--compositions", "train", "--questions", 500),
                       "held": ("--hops", 3, "--compositions", "held", "--questions", 300),
                       "train4": ("--hops", 4, "--compositions", "train", "--questions", 300)}.items():
        done = run(*common, *more, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    three = lambda name: {s[i:i + 3] for s in signatures(tmp_path / name) for i in range(len(s) - 2)}
    assert len(three("train")) == 34 and len(three("held")) == 17               # by hand: 51 chains of three moves
    assert not three("held") & (three("train") | three("train4") | three("mix"))
    pairs = {s for s in signatures(tmp_path / "mix") if len(s) == 2}
    assert {s[i:i + 2] for s in three("held") for i in (0, 1)} <= pairs
    # what is trained on says the same: the thoughts of fresh.jsonl hold no held-out question
    asked = lambda name: {re.sub(r"[A-Z][a-z]{5}\b", "X", row["steps"][0]["problem"])
                          for row in rows(tmp_path / name / "fresh.jsonl")}
    assert asked("held") and not asked("held") & (asked("train") | asked("mix"))


def test_a_world_with_more_relations_states_each_fact_in_the_base_of_its_move(tmp_path):
    assert run("--rich", "--hops", 5, "--countries", 40, "--questions", 40, "--out", tmp_path).returncode == 0
    texts = {b: [d["text"] for d in rows(tmp_path / f"{b}.jsonl")] for b in ("text", "image", "table")}
    for q in rows(tmp_path / "questions.jsonl"):
        assert len(q["hops"]) == 5 and q["hops"][-1]["answer"] == q["answer"][0]
        for hop in q["hops"][1:]:
            base, (name,) = hop["retriever"].split()[0], names_in(hop["query"])
            stated = [b for b in texts if any(re.search(rf"\b{name} [^A-Z]*{hop['answer']}\b", t) for t in texts[b])]
            assert stated == [base], hop


def test_problems_are_those_that_the_router_renders(made):
    """Two files that do not import one another write the same prompts: each problem of steps.jsonl is rebuilt by
    infer.py from its predecessors."""
    base_of = {"text retriever": "text", "text image retriever": "image", "table retriever": "table"}
    count = 0
    for row in rows(made / "w" / "steps.jsonl"):
        image, history, steps = bool(row["images"]), [], row["steps"]
        question = steps[0]["problem"].removesuffix("<image>").removeprefix("Origin question: ").split("\n")[0]
        for i, s in enumerate(steps):
            if s["step_type"] == "ret":
                assert s["problem"] == route_problem(question, history, image)
            elif i + 1 == len(steps):
                assert s["problem"] == final_problem(question, history, image)
            else:
                asked = steps[i - 1]["answer"]
                lines = re.findall(r"(t[eia]r)-\d: (.*)\n", s["problem"])
                evidence = {}
                for prefix, text in lines:
                    evidence.setdefault({v: k for k, v in PREFIX.items()}[prefix], []).append(text)
                assert s["problem"] == answer_problem(asked["query"], evidence, image)
                assert list(evidence) == [base_of[asked["retriever"][0]]]
                history.append((asked["query"], s["answer"]))
            count += 1
    assert count > 400


def test_evidence_of_gold_steps_holds_what_the_thought_quotes(made):
    checked = 0
    for row in rows(made / "w" / "fresh.jsonl"):
        for s in row["steps"]:
            if s["step_type"] == "ans" and isinstance(s["answer"], str):
                quote = s["thought"].removesuffix(" " + s["answer"])
                assert quote in s["problem"] and s["answer"] in quote
                checked += 1
    assert checked > 100


def test_fresh_names_are_others_of_the_split_and_keep_the_question_whole(made):
    fresh, gold = rows(made / "w" / "fresh.jsonl"), rows(made / "w" / "steps.jsonl")
    assert names_in(json.dumps(fresh)) <= set(world.name_space("train"))
    answers = [(f["steps"][-1]["answer"], g["steps"][-1]["answer"]) for f, g in zip(fresh, gold)]
    changed = [f != g for f, g in answers if names_in(g[0])]
    assert 0.75 < sum(changed) / len(changed) <= 1.0


def test_weak_demonstrations_are_weak_where_they_should_be(made):
    """Routes are right by chance only, about half of the sub-questions are useless, answers stay right."""
    weak, gold = rows(made / "w" / "weak.jsonl"), rows(made / "w" / "steps.jsonl")
    pairs = [(w, g) for a, b in zip(weak, gold) for w, g in zip(a["steps"], b["steps"])]
    asked = [(w["answer"], g["answer"]) for w, g in pairs if w["step_type"] == "ret" and g["answer"]["query"] != "none"]
    right_route = np.mean([w["retriever"] == g["retriever"] for w, g in asked])
    same_words = np.mean([len(w["query"]) == len(g["query"]) for w, g in asked])
    assert 0.15 < right_route < 0.45 and 0.4 < same_words < 0.85
    numbers = [(w["answer"], g["answer"]) for w, g in pairs if w["step_type"] == "ans" and str(g["answer"]).isdigit()]
    assert numbers and all(w == g for w, g in numbers)


@pytest.mark.parametrize("across", [True, False])
def test_a_flag_shows_what_its_description_says(across):
    """Pixels by hand: the middle of each stripe's free part has the stripe's colour, the centre has the emblem's."""
    flag = {"across": across, "stripes": ["red", "white", "blue"], "emblem": "green", "shape": "circle"}
    pixels = np.asarray(world.draw_flag(flag))
    at = lambda along, other: tuple(pixels[along, other] if across else pixels[other, along])
    assert [at(y, 4) for y in (8, 32, 56)] == [world.COLOURS[c] for c in flag["stripes"]]
    assert tuple(pixels[32, 32]) == world.COLOURS["green"]
    edge = "top" if across else "left"
    assert world.describe(flag) == f"flag {edge} red white blue green circle"


def test_photos_differ_from_their_flag_but_not_much(made):
    questions = [q for q in rows(made / "w" / "questions.jsonl") if q["image"]]
    for q in questions[:10]:
        photo = np.asarray(Image.open(made / "w" / q["image"]), dtype=float)
        number = q["image"].split("/")[1].split("-")[0]
        flag = np.asarray(Image.open(made / "w" / "flags" / f"{number}.png"), dtype=float)
        difference = np.abs(photo - flag).mean()
        assert photo.shape == flag.shape and 3 < difference < 60


def test_every_name_is_two_tokens_and_every_number_one(made):
    processor = Processor.from_pretrained(made / "shell")
    for split in world.SHARES:
        assert {len(processor.encode(" " + n)) for n in world.name_space(split)[::97]} == {2}
    assert {len(processor.encode(f" {n}")) for n in range(10, 100)} == {1}
    text = "Any other text, naïve or 日本, survives: \t[x] <think>."
    assert processor.tokenizer.decode(processor.encode(text)) == text


@pytest.mark.parametrize("words, message", [
    (("--split", "val", "--countries", 481), "six names each are needed"),
    (("--questions", 0), "--questions is 0"),
    (("--kinds", "text", "colour"), "colour unknown"),
    (("--hops", 5), "five hops need --rich"),
    (("--compositions", "held", "--rich"), "at least --hops 3"),
    (("--practice", -5), "--practice is -5"),
    (("--shell", "m", "--shape", 0, 4, 4, 2, 320), "--shape 0"),
    (("--shell", "m", "--shape", 96, 4, 3, 2, 320), "key/value heads that divide"),
])
def test_what_cannot_be_made_is_refused_in_one_line(tmp_path, words, message):
    done = run(*words, "--out", tmp_path / "w")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_a_world_over_an_older_one_leaves_nothing_of_it(tmp_path):
    """The larger world's practice files and all its pictures go; what the user keeps beside them stays."""
    words = ["--questions", 13, "--out", tmp_path / "w"]
    assert run("--countries", 40, "--practice", 8, *words).returncode == 0
    (tmp_path / "w" / "results.jsonl").write_text("mine")
    for place in ("w", "fresh"):
        assert run("--countries", 12, "--seed", 3, *words[:-1], tmp_path / place).returncode == 0
    (tmp_path / "fresh" / "results.jsonl").write_text("mine")
    all_of = lambda place: {f.relative_to(tmp_path / place): f.read_bytes() for f in (tmp_path / place).rglob("*.*")}
    assert all_of("w") == all_of("fresh")
    (tmp_path / "w" / "flags" / "france.png").write_text("mine")
    before = all_of("w")
    refused = run("--countries", 12, "--seed", 4, *words)
    assert refused.returncode == 2 and "france.png" in refused.stderr and all_of("w") == before


def test_a_world_that_is_being_replaced_is_no_whole_world(made, tmp_path, monkeypatch):
    """Killed on its way, it must not pass for whole by the older one's questions."""
    shutil.copytree(made / "w", tmp_path / "w")
    monkeypatch.setattr(world, "draw_flag", lambda flag: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        world.write_world(tmp_path / "w", "test", 5, 13, 12, [("text", world.KINDS["text"])])
    assert not (tmp_path / "w" / "questions.jsonl").exists() and (tmp_path / "w" / "text.jsonl").exists()
