"""The embedded world: published formats, disjoint names, facts that the corpora really hold, and
pictures that show what they should."""
import hashlib
import json
import random
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, made, run
from lab import world
from parts.chat import Processor
from parts.steps import PREFIX, answer_problem, final_problem, route_problem

BASE_OF = {"text retriever": "text", "text image retriever": "image", "table retriever": "table"}
BASE_OF_PREFIX = {prefix: base for base, prefix in PREFIX.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A training world with practice files; its model shell lies in `shell` beside it."""
    out = tmp_path_factory.mktemp("world")
    made("lab.world", "--split", "train", "--seed", 5, "--countries", 60, "--questions", 130,
         "--practice", 20, "--out", out / "w", "--shell", out / "shell")
    return out / "w"


def rows(path):
    return [json.loads(line) for line in open(path)]


def names_in(text):
    names = re.findall(r"[A-Z][a-z]{5}", text)
    return {name for name in names if name[:3] in world.FIRST and name[3:] in world.SECOND}


def without_names(text):
    return re.sub(r"[A-Z][a-z]{5}\b", "X", text)


def texts_of(folder):
    """{base: the texts of its documents}."""
    texts = {}
    for base in BASE_OF.values():
        texts[base] = [doc["text"] for doc in rows(folder / f"{base}.jsonl")]
    return texts


# --------------------------------------------------------------------------- names and seeds

def test_splits_share_no_name_whatever_the_seed():
    names = {split: set(world.name_space(split)) for split in world.SHARES}
    assert all(len(space) > 6 * 300 for space in names.values())
    assert len(names["train"]) > 6 * 1200
    assert not names["train"] & names["val"]
    assert not names["train"] & names["test"] and not names["val"] & names["test"]
    w = world.World("test", 3, 40)
    assert names_in(json.dumps(w.corpora)) <= names["test"]


def test_same_seed_same_world_other_seed_other_world(tmp_path):
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    for out, seed in ((a, 1), (b, 1), (c, 2)):
        made("lab.world", "--seed", seed, "--countries", 20, "--questions", 26, "--out", out)
    for name in ("text", "image", "table", "questions", "steps"):
        data = (a / f"{name}.jsonl").read_bytes()
        assert data == (b / f"{name}.jsonl").read_bytes()
        if name != "image":                                     # captions have no facts
            assert data != (c / f"{name}.jsonl").read_bytes()
    photo = next((a / "photos").iterdir())
    assert photo.read_bytes() == (b / "photos" / photo.name).read_bytes()


def test_an_ordinary_world_is_what_it_was(folder):
    """The sum was computed with the code from before there were dials; figures depend on it."""
    names = ("image", "questions", "steps", "table", "text")
    data = b"".join((folder / f"{name}.jsonl").read_bytes() for name in names)
    expected = "648a02d6828fad91472b0eafffa63206024bf3bfae310540f0ceb023f228e177"
    assert hashlib.sha256(data).hexdigest() == expected
    vocabularies = []
    for model in (folder.parent / "shell", ROOT / "weights" / "tiny"):
        tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
        vocabularies.append(tokenizer["model"]["vocab"])
    assert vocabularies[0] == vocabularies[1]


def test_every_name_is_two_tokens_and_every_number_one(folder):
    processor = Processor.from_pretrained(folder.parent / "shell")
    for split in world.SHARES:
        for name in world.name_space(split)[::97]:
            assert len(processor.encode(" " + name)) == 2
    for number in range(10, 100):
        assert len(processor.encode(f" {number}")) == 1
    text = "Any other text, naïve or 日本, survives: \t[x] <think>."
    assert processor.tokenizer.decode(processor.encode(text)) == text


# -------------------------------------------------------------------------- questions and facts

def test_every_hop_is_stated_by_exactly_the_base_that_it_names(folder):
    """Each gold answer stands, with the name asked about, in a passage of its own base and of no
    other."""
    texts, kinds, depths = texts_of(folder), set(), set()
    for question in rows(folder / "questions.jsonl"):
        kinds.add(question["kind"])
        depths.add(len(question["hops"]))
        for hop in question["hops"]:
            base, answer = BASE_OF[hop["retriever"]], hop["answer"]
            if base == "image":
                assert question["image"] and answer in " ".join(texts["image"])
                continue
            [name] = names_in(hop["query"])
            for other in ("text", "table"):
                about = [text for text in texts[other] if name in text]
                stated = any(re.search(rf"\b{answer}\b", text) for text in about)
                assert stated == (other == base), hop
    assert depths == {0, 1, 2} and len(kinds) == 13


def test_chains_lead_from_hop_to_hop(folder):
    """The second hop asks about what the first one found; the last hop's answer is the
    question's."""
    chains = 0
    for question in rows(folder / "questions.jsonl"):
        if len(question["hops"]) != 2:
            continue
        first, second = question["hops"]
        if question["kind"] == "compare":
            numbers = {}
            for hop in (first, second):
                numbers[hop["query"].split()[-1].strip("?")] = int(hop["answer"])
            assert question["answer"] == [max(numbers, key=numbers.get)]
            continue
        chains += 1
        assert first["answer"] in second["query"] and first["answer"] not in question["question"]
        assert second["answer"] == question["answer"][0]
    assert chains > 30


@pytest.mark.parametrize("hops, kinds", [(3, world.THREE_HOPS), (4, world.FOUR_HOPS)])
def test_deeper_questions_have_that_depth(tmp_path, hops, kinds):
    made("lab.world", "--hops", hops, "--countries", 30, "--questions", 24, "--out", tmp_path)
    questions = rows(tmp_path / "questions.jsonl")
    assert {len(question["hops"]) for question in questions} == {hops}
    assert {question["kind"] for question in questions} == set(kinds)
    for question in questions:
        bases = [BASE_OF[hop["retriever"]] for hop in question["hops"]]
        assert question["kind"].split("-") == bases


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
    """Written out by hand; {1}, {2}, {3} are the answers of the hops, looked up in the facts one
    after the other."""
    w, rng = world.World("train", 0, 20, rich=True), random.Random(0)
    q = w.question("deep", [chain], rng)
    values = [q["photo"] or next(name for name in w.facts[chain[0]] if name in q["question"])]
    for move in chain:
        values.append(w.facts[move][values[-1]])
    assert q["answer"] == values[-1]
    for peel in (True, False):
        steps = world.gold_steps(w, q, rng, peel=peel)
        written = [step["thought"] for step in steps if step["step_type"] == "ret"]
        expected = [thought.format(*values) for thought in thoughts]
        if not peel:
            expected = [thought.split("? ")[-1] for thought in thoughts]
        assert written == expected


def signatures(folder):
    """Each question's sub-questions without their names: its composition, in words."""
    questions = rows(folder / "questions.jsonl")
    return [tuple(without_names(hop["query"]) for hop in row["hops"]) for row in questions]


def three_in_a_row(folder):
    threes = set()
    for moves in signatures(folder):
        threes |= {moves[i:i + 3] for i in range(len(moves) - 2)}
    return threes


def trained_questions(folder):
    """The questions of the demonstrations, without names."""
    demonstrations = rows(folder / "fresh.jsonl")
    return {without_names(row["steps"][0]["problem"]) for row in demonstrations}


def test_held_out_compositions_are_not_trained_on_but_their_parts_are(tmp_path):
    """Three moves in a row that one file has at three hops, the other has at no depth."""
    common = ["--split", "train", "--countries", 40, "--rich", "--peel", "--practice", 1]
    for name, words in (("mix", "--questions 900"),
                        ("train", "--hops 3 --compositions train --questions 500"),
                        ("held", "--hops 3 --compositions held --questions 300"),
                        ("train4", "--hops 4 --compositions train --questions 300")):
        made("lab.world", *common, *words.split(), "--out", tmp_path / name)
    train, held = three_in_a_row(tmp_path / "train"), three_in_a_row(tmp_path / "held")
    assert len(train) == 34 and len(held) == 17                 # by hand: 51 chains of three moves
    others = three_in_a_row(tmp_path / "train4") | three_in_a_row(tmp_path / "mix")
    assert not held & (train | others)
    pairs = {moves for moves in signatures(tmp_path / "mix") if len(moves) == 2}
    for moves in held:
        assert moves[:2] in pairs and moves[1:] in pairs
    # what is trained on says the same: the thoughts of fresh.jsonl hold no held-out question
    unseen = trained_questions(tmp_path / "held")
    seen = trained_questions(tmp_path / "train") | trained_questions(tmp_path / "mix")
    assert unseen and not unseen & seen


def test_a_world_with_more_relations_states_each_fact_in_the_base_of_its_move(tmp_path):
    made("lab.world", "--rich", "--hops", 5, "--countries", 40, "--questions", 40,
         "--out", tmp_path)
    texts = texts_of(tmp_path)
    for question in rows(tmp_path / "questions.jsonl"):
        hops = question["hops"]
        assert len(hops) == 5 and hops[-1]["answer"] == question["answer"][0]
        for hop in hops[1:]:
            [name] = names_in(hop["query"])
            fact = re.compile(rf"\b{name} [^A-Z]*{hop['answer']}\b")
            stated = [base for base in texts if any(map(fact.search, texts[base]))]
            assert stated == [BASE_OF[hop["retriever"]]], hop


# ------------------------------------------------------------------------------------------ dials

def dialled(out, *words):
    """A world with dials: its questions and the texts of its bases."""
    made("lab.world", "--seed", 3, "--countries", 100, "--questions", 390, *words, "--out", out)
    return rows(out / "questions.jsonl"), texts_of(out)


def stated_in(texts, hop, value):
    """The bases with a passage that states this value of what a hop asks for."""
    [name] = names_in(hop["query"])
    fact = re.compile(rf"\b{name} [^A-Z\[]*(\[sep\] )?{value}\b")
    return [base for base in ("text", "table") if any(map(fact.search, texts[base]))]


def test_what_is_moved_is_found_in_the_other_base_and_only_there(tmp_path):
    questions, texts = dialled(tmp_path, "--moved", 0.3)
    moved = [question for question in questions if question["kind"] == "moved"]
    assert 0.25 < len(moved) / len(questions) < 0.5
    for question in questions:
        hops = question["hops"]
        assert hops[-1:] == [] or hops[-1]["answer"] != "unknown"
        tries = [hop for hop in hops if hop["answer"] == "unknown"]
        assert bool(tries) == (question["kind"] == "moved")
        for hop in tries:                               # the usual base, then the other one
            there = hops[hops.index(hop) + 1]
            assert there["query"] == hop["query"] and there["retriever"] != hop["retriever"]
            assert stated_in(texts, hop, there["answer"]) == [BASE_OF[there["retriever"]]]


def test_what_is_unanswerable_stands_nowhere(tmp_path):
    questions, texts = dialled(tmp_path, "--unanswerable", 0.2)
    seen = 0
    w = world.World("test", 3, 100, dials=world.Dials(unanswerable=0.2))
    for question in questions:
        unknown = question["kind"] == "unanswerable"
        assert unknown == (question["answer"] == ["unknown"])
        if unknown:
            seen += 1
            first, second = question["hops"][-2:]
            assert first["query"] == second["query"] and first["retriever"] != second["retriever"]
            [name] = names_in(first["query"])
            [move] = [move for move in w.facts if world.MOVES[move].ask.format(name)
                      == first["query"] and name in w.facts[move]]
            assert stated_in(texts, first, w.facts[move][name]) == []
    assert 0.15 < seen / len(questions) < 0.4


def test_a_guessable_question_names_its_answer(tmp_path):
    questions, _ = dialled(tmp_path, "--guessable", 0.5)
    verdicts = []
    for question in questions:
        asked, _, options = question["question"].partition("? Is it ")
        named = re.split(", | or ", options.strip("?"))
        if question["kind"] == "yes-no":
            [stated] = named
            verdicts.append(question["answer"] == ["yes"])
            assert (stated == question["hops"][-1]["answer"]) == verdicts[-1]
        elif question["kind"] == "options":
            assert len(set(named)) == 3 and question["answer"][0] in named
            assert question["answer"] == [question["hops"][-1]["answer"]]
        else:
            assert not options
    assert 0.35 < np.mean(verdicts) < 0.65
    kinds = [question["kind"] for question in questions]
    share = sum(kind in ("yes-no", "options") for kind in kinds) / len(kinds)
    assert 0.35 < share < 0.5                           # half of what has a chain of moves


def test_each_relation_has_a_wording_that_only_held_asks_in(tmp_path):
    wordings = {}
    for name in ("usual", "several", "held"):
        questions, _ = dialled(tmp_path / name, "--wordings", name)
        some = [question for question in questions if question["kind"] not in ("look", "compare")]
        wordings[name] = {without_names(question["question"]) for question in some}
    assert not wordings["held"] & (wordings["several"] | wordings["usual"])
    assert wordings["usual"] < wordings["several"]
    assert "Name the population of X." in wordings["several"] | wordings["held"]


def test_numbers_of_history_and_evidence_go_beyond_those_of_two_hops(folder):
    """Of trajectories with a history half begin at Answer1; there are 1 to 5 lines of evidence."""
    first, lines = [], set()
    for row in rows(folder / "fresh.jsonl"):
        history = re.findall(r"Answer(\d):", row["steps"][-1]["problem"])
        if history:
            first.append(int(history[0]))
            assert [int(number) - first[-1] for number in history] == list(range(len(history)))
        for step in row["steps"]:
            found = re.findall(r"t[eia]r-\d: ", step["problem"])
            lines |= {len(found)} if found else set()
    assert lines == {1, 2, 3, 4, 5} and set(first) == {1, 2, 3, 4, 5}
    assert 0.35 < first.count(1) / len(first) < 0.65


def test_a_wrong_base_does_not_say(folder):
    for row in rows(folder / "absent.jsonl"):
        [step] = row["steps"]
        [name] = names_in(step["problem"].rsplit("Question: ", 1)[1])
        assert step["answer"] == "unknown" and step["thought"].startswith(f"{name} no ")


def test_a_verdict_says_whether_the_known_answer_is_the_stated_one(folder):
    answers = []
    for row in rows(folder / "verdict.jsonl"):
        [step] = row["steps"]
        known = re.search(r"Answer1: (\w+)", step["problem"])[1]
        stated = re.search(r"Is it (\w+)\?", step["problem"])[1]
        assert step["answer"] == ["yes" if known == stated else "no"]
        answers += step["answer"]
    assert 0.2 < answers.count("yes") / len(answers) < 0.8


# --------------------------------------------------------------------------------- demonstrations

def test_problems_are_those_that_the_router_renders(folder):
    """Two files that do not import one another write the same prompts: each problem of steps.jsonl
    is rebuilt by infer.py from its predecessors."""
    count = 0
    for row in rows(folder / "steps.jsonl"):
        image, history, steps = bool(row["images"]), [], row["steps"]
        problem = steps[0]["problem"].removesuffix("<image>")
        question = problem.removeprefix("Origin question: ").split("\n")[0]
        for i, step in enumerate(steps):
            count += 1
            if step["step_type"] == "ret":
                expected = route_problem(question, history, image)
            elif i + 1 == len(steps):
                expected = final_problem(question, history, image)
            else:
                route = steps[i - 1]["answer"]
                evidence = {}
                for prefix, text in re.findall(r"(t[eia]r)-\d: (.*)\n", step["problem"]):
                    evidence.setdefault(BASE_OF_PREFIX[prefix], []).append(text)
                expected = answer_problem(route["query"], evidence, image)
                assert list(evidence) == [BASE_OF[route["retriever"][0]]]
                history.append((route["query"], step["answer"]))
            assert step["problem"] == expected
    assert count > 400


def test_evidence_of_gold_steps_holds_what_the_thought_quotes(folder):
    checked = 0
    for row in rows(folder / "fresh.jsonl"):
        for step in row["steps"]:
            answer = step["answer"]
            if step["step_type"] == "ans" and isinstance(answer, str):
                quote = step["thought"].removesuffix(" " + answer)
                assert quote in step["problem"] and answer in quote
                checked += 1
    assert checked > 100


def test_fresh_names_are_others_of_the_split_and_keep_the_question_whole(folder):
    fresh, gold = rows(folder / "fresh.jsonl"), rows(folder / "steps.jsonl")
    assert names_in(json.dumps(fresh)) <= set(world.name_space("train"))
    changed = []
    for fresh_row, gold_row in zip(fresh, gold):
        answer = gold_row["steps"][-1]["answer"]
        if names_in(answer[0]):
            changed.append(fresh_row["steps"][-1]["answer"] != answer)
    assert 0.75 < np.mean(changed) <= 1.0


def test_weak_demonstrations_are_weak_where_they_should_be(folder):
    """Routes are right by chance only, about half of the sub-questions are useless, answers stay
    right."""
    right_routes, same_lengths, numbers = [], [], 0
    for weak_row, gold_row in zip(rows(folder / "weak.jsonl"), rows(folder / "steps.jsonl")):
        for step, gold_step in zip(weak_row["steps"], gold_row["steps"]):
            weak, gold = step["answer"], gold_step["answer"]
            if step["step_type"] == "ret" and gold["query"] != "none":
                right_routes.append(weak["retriever"] == gold["retriever"])
                same_lengths.append(len(weak["query"]) == len(gold["query"]))
            if step["step_type"] == "ans" and str(gold).isdigit():
                assert weak == gold
                numbers += 1
    assert 0.15 < np.mean(right_routes) < 0.45 and 0.4 < np.mean(same_lengths) < 0.85
    assert numbers


def test_a_weak_model_is_not_taught_to_ask_again(tmp_path):
    """Of a question in which a base has no answer there are reading steps alone."""
    made("lab.world", "--split", "train", "--countries", 40, "--questions", 130, "--moved", 0.3,
         "--practice", 1, "--out", tmp_path / "w")
    asked_again = 0
    for weak_row, gold_row in zip(rows(tmp_path / "w" / "weak.jsonl"),
                                  rows(tmp_path / "w" / "steps.jsonl")):
        again = any(step["answer"] == "unknown" for step in gold_row["steps"])
        asked_again += again
        if again:
            assert {step["step_type"] for step in weak_row["steps"]} == {"ans"}
        else:
            assert len(weak_row["steps"]) == len(gold_row["steps"])
    assert asked_again > 10


# --------------------------------------------------------------------------------------- pictures

@pytest.mark.parametrize("across", [True, False])
def test_a_flag_shows_what_its_description_says(across):
    """Pixels by hand: the middle of each stripe's free part has the stripe's colour, the centre has
    the emblem's."""
    flag = {"across": across, "stripes": ["red", "white", "blue"], "emblem": "green",
            "shape": "circle"}
    pixels = np.asarray(world.draw_flag(flag))                  # (height, width, 3)
    for along, colour in zip((8, 32, 56), flag["stripes"]):
        pixel = pixels[along, 4] if across else pixels[4, along]
        assert tuple(pixel) == world.COLOURS[colour]
    assert tuple(pixels[32, 32]) == world.COLOURS["green"]
    edge = "top" if across else "left"
    assert world.describe(flag) == f"flag {edge} red white blue green circle"


def test_photos_differ_from_their_flag_but_not_much(folder):
    pictures = [q["image"] for q in rows(folder / "questions.jsonl") if q["image"]]
    for name in pictures[:10]:
        photo = np.asarray(Image.open(folder / name), dtype=float)
        number = name.split("/")[1].split("-")[0]
        flag = np.asarray(Image.open(folder / "flags" / f"{number}.png"), dtype=float)
        assert photo.shape == flag.shape and 3 < np.abs(photo - flag).mean() < 60


# ------------------------------------------------------------------------------ flags and folders

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
    done = run("lab.world", *words, "--out", tmp_path / "w")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "w").exists()


def files_in(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.*")}


def test_a_world_over_an_older_one_leaves_nothing_of_it(tmp_path):
    """The larger world's practice files and all its pictures go; what the user keeps beside them
    stays."""
    w, fresh = tmp_path / "w", tmp_path / "fresh"
    made("lab.world", "--countries", 40, "--practice", 8, "--questions", 13, "--out", w)
    (w / "results.jsonl").write_text("mine")
    for out in (w, fresh):
        made("lab.world", "--countries", 12, "--seed", 3, "--questions", 13, "--out", out)
    (fresh / "results.jsonl").write_text("mine")
    assert files_in(w) == files_in(fresh)
    (w / "flags" / "france.png").write_text("mine")
    before = files_in(w)
    refused = run("lab.world", "--countries", 12, "--seed", 4, "--questions", 13, "--out", w)
    assert refused.returncode == 2 and "france.png" in refused.stderr and files_in(w) == before


def test_a_world_that_is_being_replaced_is_no_whole_world(folder, tmp_path, monkeypatch):
    """Killed on its way, it must not pass for whole by the older one's questions."""
    w = shutil.copytree(folder, tmp_path / "w")
    monkeypatch.setattr(world, "draw_flag", lambda flag: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        world.write_world(w, "test", 5, 13, 12, [("text", world.KINDS["text"])])
    assert not (w / "questions.jsonl").exists() and (w / "text.jsonl").exists()
