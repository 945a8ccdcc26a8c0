"""The shipped models: small, loadable by transformers, and as good (or as weak) as their
TRAINING.md says, on worlds made here."""
import inspect

import pytest
import torch

from conftest import ROOT, made
from infer import Router
from model import VLM
from parts.chat import Processor
from parts.evaluate import evaluate
from parts.questions import load_questions
from parts.stepfiles import load_prompts, read_steps
from retrieve import world_bases

SHIPPED = ("tiny", "tiny-warm")
WEIGHTS = ROOT / "weights"


@pytest.fixture(scope="module")
def unseen(tmp_path_factory):
    """A test world of another seed than any figure in the README was made with."""
    out = tmp_path_factory.mktemp("held-out")
    made("lab.world", "--split", "test", "--seed", 90210, "--questions", 130, "--out", out)
    return out


def scores(name, world, method="router"):
    path = WEIGHTS / name
    rows, faults = load_questions(world / "questions.jsonl")
    assert len(rows) == 130 and not faults
    router = Router(VLM.from_pretrained(path), Processor.from_pretrained(path),
                    world_bases(world), method=method, prompts=load_prompts(path / "prompts.json"))
    return evaluate(router.run(rows))


def test_both_models_fit_in_six_megabytes_and_say_how_they_were_made():
    files = [file for name in SHIPPED for file in (WEIGHTS / name).iterdir()]
    assert sum(file.stat().st_size for file in files) <= 6_000_000
    for name in SHIPPED:
        text = (WEIGHTS / name / "TRAINING.md").read_text()
        assert "train.py sft" in text and "seed" in text and "F1-Recall" in text


@pytest.mark.parametrize("name", SHIPPED)
def test_transformers_loads_it_and_gives_the_same_logits(name, unseen):
    transformers = pytest.importorskip("transformers")
    path = WEIGHTS / name
    network = transformers.Qwen2_5_VLForConditionalGeneration
    theirs = network.from_pretrained(path, dtype=torch.float32).eval()
    ours, processor = VLM.from_pretrained(path), Processor.from_pretrained(path)
    trajectories, faults = read_steps(unseen / "steps.jsonl")
    assert not faults
    conversations = [step.conversation() for steps in trajectories[:6] for step in steps]
    batch = processor(conversations)
    assert batch["pixel_values"] is not None
    inputs = dict(batch)
    inputs["attention_mask"] = batch["attention_mask"].long()
    if "mm_token_type_ids" in inspect.signature(theirs.forward).parameters:     # newer ones
        inputs["mm_token_type_ids"] = (batch["input_ids"] == ours.config.image_token_id).int()
    with torch.no_grad():
        expected = theirs(**inputs).logits                                      # (B, T, V)
        difference = (ours(**batch) - expected)[batch["attention_mask"]].abs().max()
    assert difference < 1e-4 * expected.abs().max()
    words = "What is the capital of the country with this flag?"
    assert transformers.AutoTokenizer.from_pretrained(path).encode(words) == processor.encode(words)


def test_the_trained_model_routes_reads_and_answers_in_a_new_world(unseen):
    router, static = scores("tiny", unseen), scores("tiny", unseen, "static")
    assert router["f1_recall"] >= 0.93 and router["route_accuracy"] >= 0.99
    assert router["malformed"] <= 0.02
    gold = router["gold_retrievals"]
    assert abs(router["retrievals"] - gold) <= 0.03 * gold
    assert router["f1_recall"] - static["f1_recall"] >= 0.30
    # where one look-up is enough, a static pipeline is as good: the gap is depth
    assert static["by_hops"]["1"] >= 0.9


def test_the_weak_model_reads_but_does_not_route(unseen):
    weak = scores("tiny-warm", unseen)
    assert weak["f1_recall"] <= 0.55 and weak["route_accuracy"] <= 0.85
    # with gold routes and sub-questions it can answer
    assert scores("tiny-warm", unseen, "oracle")["f1_recall"] >= 0.85
