"""The shipped models: small, loadable by transformers, and as good (or as weak) as their TRAINING.md says, on worlds
made here."""
import inspect
import subprocess
import sys

import pytest
import torch

import infer
from conftest import ROOT
from model import VLM
from parts.chat import Processor
from parts.evaluate import evaluate
from parts.questions import load_questions
from parts.stepfiles import load_prompts, read_steps
from retrieve import world_bases

SHIPPED = ("tiny", "tiny-warm")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A test world of its own: another seed than any figure in the README was made with."""
    out = tmp_path_factory.mktemp("held-out")
    words = ["--split", "test", "--seed", "90210", "--questions", "130", "--out", str(out)]
    done = subprocess.run([sys.executable, "-m", "lab.world", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def scores(name, world, method="router"):
    path = ROOT / "weights" / name
    rows, faults = load_questions(world / "questions.jsonl")
    assert len(rows) == 130 and not faults
    router = infer.Router(VLM.from_pretrained(path), Processor.from_pretrained(path), world_bases(world),
                          method=method, prompts=load_prompts(path / "prompts.json"))
    return evaluate(router.run(rows))


def test_both_models_fit_in_six_megabytes_and_say_how_they_were_made():
    files = [f for name in SHIPPED for f in (ROOT / "weights" / name).iterdir()]
    assert sum(f.stat().st_size for f in files) <= 6_000_000
    for name in SHIPPED:
        told = (ROOT / "weights" / name / "TRAINING.md").read_text()
        assert "train.py sft" in told and "seed" in told and "F1-Recall" in told


@pytest.mark.parametrize("name", SHIPPED)
def test_transformers_loads_it_and_gives_the_same_logits(name, world):
    transformers = pytest.importorskip("transformers")
    path = ROOT / "weights" / name
    theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    ours, processor = VLM.from_pretrained(path), Processor.from_pretrained(path)
    steps = [s for row in read_steps(world / "steps.jsonl")[:6] for s in row]
    batch = processor([s.conversation() for s in steps])
    assert batch["pixel_values"] is not None
    newer = "mm_token_type_ids" in inspect.signature(theirs.forward).parameters
    extra = {"mm_token_type_ids": (batch["input_ids"] == ours.config.image_token_id).int()} if newer else {}
    with torch.no_grad():
        expected = theirs(**{k: v.long() if v.dtype == torch.bool else v for k, v in batch.items()}, **extra).logits
        difference = (ours(**batch) - expected)[batch["attention_mask"]].abs().max()
    assert difference < 1e-4 * expected.abs().max()
    words = "What is the capital of the country with this flag?"
    assert transformers.AutoTokenizer.from_pretrained(path).encode(words) == processor.encode(words)


def test_the_trained_model_routes_reads_and_answers_in_a_new_world(world):
    router, static = scores("tiny", world), scores("tiny", world, "static")
    assert router["f1_recall"] >= 0.93 and router["route_accuracy"] >= 0.99 and router["malformed"] <= 0.02
    assert abs(router["retrievals"] - router["gold_retrievals"]) <= 0.03 * router["gold_retrievals"]
    assert router["f1_recall"] - static["f1_recall"] >= 0.30
    # where one look-up is enough, a static pipeline is as good: the gap is depth
    assert static["by_hops"]["1"] >= 0.9


def test_the_weak_model_reads_but_does_not_route(world):
    weak = scores("tiny-warm", world)
    assert weak["f1_recall"] <= 0.55 and weak["route_accuracy"] <= 0.85
    # with gold routes and sub-questions it can answer
    assert scores("tiny-warm", world, "oracle")["f1_recall"] >= 0.85
