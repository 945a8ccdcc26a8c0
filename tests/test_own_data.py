"""Bases and questions of one's own: a folder of passages, captioned pictures and tables is built,
and all that trains with live retrieval trains on it."""
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import train
from conftest import made, run
from grpo import RewardOptions, group_advantages, similarity_table, step_reward
from model import VLM
from parts.chat import Processor
from parts.pretrained import load_encoder
from parts.stepfiles import is_step_file, read_steps
from training import WARM, rows_of

PASSAGES = [f"The {thing} of {place} is {answer}." for thing, place, answer in (
    ("capital", "Arvo", "Mirna"), ("capital", "Belt", "Osk"), ("capital", "Cando", "Pru"),
    ("leader", "Arvo", "Ada Vorn"), ("leader", "Belt", "Ben Tilk"), ("leader", "Cando", "Cy Dall"))]
QUESTIONS = (("What is the capital of Arvo?", "Mirna"), ("What is the capital of Belt?", "Osk"),
             ("Who is the leader of Cando?", "Cy Dall"), ("Who is the leader of Belt?", "Ben Tilk"))


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with three bases that were built of files of one's own, and questions: with final
    answers alone, with gold hops, and to validate on."""
    home = tmp_path_factory.mktemp("own")
    write_rows(home / "text.jsonl", [{"id": str(i), "text": text}
                                     for i, text in enumerate(PASSAGES)])
    colours = {"Arvo": (200, 0, 0), "Belt": (0, 200, 0), "Cando": (0, 0, 200)}
    pictures = []
    for place, colour in colours.items():
        Image.new("RGB", (64, 64), colour).save(home / f"{place}.png")
        pictures.append({"id": place, "text": f"flag of {place}.", "image": f"{place}.png"})
    write_rows(home / "image.jsonl", pictures)
    tables = [{"id": place, "text": f"[Title] {place}[Header] fact[sep] value[Rows][Row] area[sep] "
                                    f"{10 * len(place)}"} for place in colours]
    write_rows(home / "table.jsonl", tables)
    for base, encoder in (("text", "lexical"), ("image", "pixel"), ("table", "lexical")):
        made("retrieve.py", "build", home / f"{base}.jsonl", "--encoder", encoder,
             "--out", home / "kb" / base)

    answers, hops = [], []
    for question, answer in QUESTIONS:
        answers.append({"question": question, "answer": answer})
        hop = {"query": question, "retriever": "text retriever", "answer": answer}
        hops.append({**answers[-1], "hops": [hop]})
    flag = {"question": "Which country has this flag?", "answer": ["Arvo"], "image": "Arvo.png"}
    write_rows(home / "answers.jsonl", [*answers, flag])
    write_rows(home / "hops.jsonl", hops)
    write_rows(home / "val.jsonl", [flag, answers[0]])
    return home


def grpo(home, data, *words):
    bases = [f"{base}={home / 'kb' / base}" for base in ("text", "image", "table")]
    return ("grpo", "--model", WARM, "--threads", 1, "--kb", *bases, "--data", home / data,
            "--steps", 2, "--group", 4, "--log-every", 1, *words)


@pytest.mark.parametrize("data, words", [
    ("answers.jsonl", ("--mode", "outcome", "--questions", 3)),
    ("hops.jsonl", ("--mode", "online", "--prompts", 4, "--open-questions", 6)),
])
def test_live_training_runs_over_own_bases(own, tmp_path, data, words):
    done = run("train.py", *grpo(own, data, *words), "--val", own / "val.jsonl", "--val-every", 1,
               "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "r" / "log.jsonl")
    assert [row["step"] for row in rows if "reward" in row] == [1, 2]
    validations = [row["validation"] for row in rows if "validation" in row]
    assert [scores["n"] for scores in validations] == [2, 2]
    assert validations[0]["route_accuracy"] is None             # there are no gold hops to compare
    assert (tmp_path / "r" / "best" / "model.safetensors").is_file()
    samples = rows_of(tmp_path / "r" / "samples.jsonl")
    own_words = {question for question, _ in QUESTIONS} | {"Which country has this flag?"}
    assert any(words in row["prompt"] for row in samples for words in own_words)


def test_nothing_is_validated_where_own_data_name_no_questions_for_it(own, tmp_path):
    words = grpo(own, "answers.jsonl", "--mode", "outcome", "--questions", 2)
    done = made("train.py", *words, "--out", tmp_path / "r")
    assert "nothing is validated" in done.stderr and "validation after" not in done.stdout
    assert not (tmp_path / "r" / "best").exists()


def test_hops_are_not_read_where_final_answers_are_enough(world, tmp_path):
    """Whatever the hops of the questions say, or where they are missing, the run is the same; and
    --balance, which needs them, says so."""
    weights, said = [], []
    for name, change in (("with", {}), ("without", {"hops": None})):
        rows = [{**row, **change} for row in rows_of(world / "questions.jsonl")]
        home = tmp_path / name
        shutil.copytree(world, home, ignore=shutil.ignore_patterns("*.jsonl", "kb"))
        for base in ("text", "image", "table"):
            shutil.copy(world / f"{base}.jsonl", home)
        write_rows(home / "questions.jsonl", rows)
        for balance in ("--no-balance", "--balance"):
            done = made("train.py", "grpo", "--model", WARM, "--mode", "outcome", "--world", home,
                        "--questions", 3, "--group", 4, "--steps", 2, "--val-every", 0,
                        "--threads", 1, balance, "--out", home / f"run{balance}")
            weights.append((home / f"run{balance}" / "last" / "model.safetensors").read_bytes())
            said.append("not every question has gold hops" in done.stderr)
    even, balanced, even_without, balanced_without = weights
    assert even == even_without == balanced_without != balanced
    assert said == [False, False, False, True]


def test_validation_on_steps_chooses_the_best_checkpoint(world, tmp_path):
    """The rewards of greedy outputs; those of the last checkpoint are sampled and judged again, one
    by one."""
    words = ("grpo", "--model", WARM, "--mode", "offline", "--data", world / "steps.jsonl",
             "--val", world / "steps.jsonl", "--val-questions", 5, "--val-every", 1, "--steps", 2,
             "--prompts", 4, "--group", 4, "--threads", 1)
    made("train.py", *words, "--out", tmp_path / "r")
    rows = rows_of(tmp_path / "r" / "log.jsonl")
    scores = [row["validation"] for row in rows if "validation" in row]
    assert len(scores) == 2
    for score in scores:
        assert 0 < score["reward"] < 1 and score["too_long"] == 0
        assert set(score) == {"reward", "form", "similarity", "route", "answer", "too_long"}
    state = json.loads((tmp_path / "r" / "last" / "trainer.json").read_text())
    assert state["best"]["reward"] == max(score["reward"] for score in scores)

    folder = tmp_path / "r" / "last"
    vlm, processor = VLM.from_pretrained(folder), Processor.from_pretrained(folder)
    trajectories, _ = read_steps(world / "steps.jsonl", 5)
    steps = [step for steps in trajectories for step in steps]
    outputs = []
    for step in steps:
        batch = processor([step.conversation()])
        inputs = {name: tensor for name, tensor in batch.items() if tensor is not None}
        samples = vlm.generate(**inputs, temperature=0, max_new_tokens=64,
                               eos_ids=processor.eos_ids)
        outputs.append(processor.decode(samples.tokens[samples.mask].tolist()))
    queries = [{"text": step.answer["query"]} for step in steps if step.kind == "ret"]
    encoder, _ = load_encoder("lexical").fitted(queries)
    golds = [step.as_published() for step in steps]
    similarity = similarity_table(outputs, golds, encoder.encode_queries, "strict")
    rewards = [step_reward(output, gold, similarity, RewardOptions("strict")).total
               for output, gold in zip(outputs, golds)]
    assert sum(rewards) / len(rewards) == pytest.approx(scores[-1]["reward"], abs=1e-6)


def test_offline_training_is_validated_on_own_questions(own, world, tmp_path):
    bases = [f"{base}={own / 'kb' / base}" for base in ("text", "image", "table")]
    made("train.py", "grpo", "--model", WARM, "--mode", "offline", "--data", world / "steps.jsonl",
         "--kb", *bases, "--val", own / "val.jsonl", "--val-every", 1, "--steps", 1, "--prompts", 4,
         "--group", 2, "--threads", 1, "--out", tmp_path / "r")
    [scores] = [row["validation"] for row in rows_of(tmp_path / "r" / "log.jsonl")
                if "validation" in row]
    assert scores["n"] == 2 and scores["retrievals"] > 0


def test_the_folder_of_pictures_is_that_of_own_questions_alone(own, world, tmp_path):
    """Questions elsewhere than their pictures, and a world to validate on with pictures of its own.
    """
    questions = shutil.copy(own / "answers.jsonl", tmp_path)
    bases = grpo(own, "answers.jsonl", "--mode", "outcome", "--questions", 5, "--tries", 1)
    words = [questions if word == own / "answers.jsonl" else word for word in bases]
    done = run("train.py", *words, "--out", tmp_path / "r", "--val-world", world, "--val-every", 2,
               "--val-questions", 4)
    assert done.returncode == 2 and "Arvo.png" in done.stderr
    made("train.py", *words, "--out", tmp_path / "r", "--val-world", world, "--val-every", 2,
         "--val-questions", 4, "--images", own)


def test_one_question_is_shown_state_by_state(world):
    """All begin with the question, so its first state has all trajectories, and their advantages
    are those of the rewards that stand beside them."""
    done = made("train.py", "show", "--model", WARM, "--mode", "outcome", "--world", world,
                "--question", 3, "--group", 6, "--seed", 2, "--threads", 1)
    first = done.stdout.split("\nstate, ")[1]
    assert first.startswith("6 answered it: Origin question: ")
    pairs = re.findall(r"^  R ([\d.]+)  A ([+-][\d.]+) ", first, re.MULTILINE)
    rewards = torch.tensor([float(reward) for reward, _ in pairs])
    advantages = [float(advantage) for _, advantage in pairs]
    assert len(pairs) == 6
    assert group_advantages(rewards, torch.zeros(6)).tolist() == pytest.approx(advantages, abs=2e-3)


def test_a_large_model_is_not_trained_at_the_default_rate(monkeypatch):
    """The tiny model stands for a large one where the limit is lower than its weights."""
    model = SimpleNamespace(parameters=lambda: [torch.zeros(1000, 1001)])
    assert train.with_rate(train.GrpoOptions(), model).learning_rate == 3e-4
    monkeypatch.setattr(train, "LARGE", 1e6)
    with pytest.raises(ValueError, match="--learning-rate: name one.* all 1,001,000 of this one"):
        train.with_rate(train.GrpoOptions(), model)
    with pytest.raises(ValueError, match="--learning-rate: name one"):
        train.with_rate(train.SftOptions(), model)
    assert train.with_rate(train.GrpoOptions(learning_rate=1e-6), model).learning_rate == 1e-6
    assert train.with_rate(train.GrpoOptions(lora_rank=8), model).learning_rate == 3e-4


def test_step_files_are_told_from_question_files(world, own):
    assert is_step_file(world / "steps.jsonl") and not is_step_file(own / "answers.jsonl")
