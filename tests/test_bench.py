"""lab/bench.py at its toy scale: every part runs, asserts equal results, and ends with the JSON
line that programs read."""
import json
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from lab import bench

PROMISED = {  # part: what its table must speak of, and how many of its lines have a ratio to a peer
    "model": ({"tiny forward", "tiny prefill", "tiny training step"}, 3),
    "rollout": ({"tiny rollout, 4 x 4 x 6", "tiny rollout, 16 x 1 x 6"}, 2),
    "update": ({"tiny update, a row a sample", "tiny update, shared prefix",
                "tiny update, memory at V 20000"}, 3),
    "retrieve": ({"encoder", "build", "disk", "memory", "search against hnswlib",
                  "50 queries one by one"}, 7),
    "router": ({"4 questions in batch", "time in the model", "time in search",
                "time in the rest"}, 1),
}
REAL = [  # words, and what is measured
    ("model", {"3b decoding, batch 1", "3b decoding, batch 64",
               "3b share of the memory bandwidth, batch 1"}),
    ("update", {"3b update, 1 x 4, seconds", "3b update, 1 x 4, arithmetic",
                "3b update, 1 x 4, memory"}),
    ("update --lora 2", {"3b LoRA 2 update, 1 x 4, memory"})]


def check(output, part, names, ratios):
    """The table, then one line of JSON with positive figures; returns the figures of the part."""
    title, *table, last = output.strip().splitlines()
    assert title == part
    result = json.loads(last)
    assert set(result) == {"command", "shapes", "load", "figures", "ratio", "machine"}
    assert {"cpu", "cores", "threads", "torch", "device", "load"} <= set(result["machine"])
    figures = result["figures"][part]
    assert len(figures) == len(table) and names <= set(figures)
    for name, f in figures.items():
        assert any(name in line for line in table)
        assert f["value"] > 0 and f["unit"]
        assert ("met" in f) == ("goal" in f)
        if "ratio" in f:
            assert f["ratio"] > 0 and f["peer_value"] > 0 and f["peer"]
            assert result["ratio"][f"{part} {name}"] == f["ratio"]
    assert len(result["ratio"]) == ratios
    return figures


@pytest.mark.parametrize("part", ["rollout", "update", "retrieve", "router"])
def test_a_part_at_toy_scale(part, capsys, tiny):
    if part == "router" and not any(tiny.glob("*.safetensors")):
        pytest.skip("no weights/tiny: make weights makes it")
    bench.main([part, "--quick"])
    check(capsys.readouterr().out, part, *PROMISED[part])


def test_the_model_part_needs_torch_and_transformers_only():
    """As a program, where neither hnswlib nor the files above model.py can be imported."""
    blocked = ("hnswlib", "faiss", "retrieve", "infer", "train")
    code = (f"import sys; sys.modules.update(dict.fromkeys({blocked})); "
            "from lab import bench; bench.main(['model', '--quick'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check(done.stdout, "model", *PROMISED["model"])


@pytest.mark.parametrize("words, expected", REAL, ids=["decoding", "update", "adapter"])
def test_what_is_measured_of_real_shapes(words, expected, monkeypatch, capsys):
    """The same lines of code on sizes that fit a test, in half precision as on a GPU."""
    monkeypatch.setitem(bench.SHAPES, "3b", bench.SHAPES["tiny"])
    part, *more = words.split()
    scale = "--shape 3b --dtype bfloat16 --quick --new 4"
    bench.main([part, *more, *scale.split()])
    ratios = 4 if part == "model" else 0
    check(capsys.readouterr().out, part, expected, ratios)


def test_unequal_results_are_not_timed(monkeypatch, capsys):
    """transformers with one weight changed: one line, code 2, no figures."""
    def changed(o, config, make=bench.both_models):
        ours, peer = make(o, config)
        peer.model.language_model.norm.weight.data[0] += 1
        return ours, peer

    monkeypatch.setattr(bench, "both_models", changed)
    for part in ("model", "update"):
        assert bench.main([part, "--quick"]) == 2
        printed = capsys.readouterr()
        assert printed.out == part + "\n"
        assert "not equal" in printed.err and printed.err.count("\n") == 1


@pytest.mark.parametrize("words, expected", [
    ("modle", "unknown part 'modle'"), ("model --device cuda", "no CUDA device"),
    ("model --runs 0", "--runs is 0"), ("update --lora 4", "--lora 4"),
    ("router --quick --model nowhere", "nowhere"),
    ("rollout --quick", "the peer transformers is missing")])
def test_mistakes_are_told_in_one_line(words, expected, monkeypatch, capsys):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    # import then fails as if it were not installed
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert bench.main(words.split()) == 2
    message = capsys.readouterr().err
    assert message.startswith("lab.bench: ") and expected in message and message.count("\n") == 1


def test_ratios_and_goals_by_hand():
    """Ours needs 1, 2, 4 seconds (median 2), the peer 3, 8, 5 (median 5): 5 / 2 times as fast;
    rounds 3, 4, 1.25."""
    times = {"a": [1, 2, 4], "b": [3, 8, 5]}
    f = bench.compared("x", times, "a", "b", 10, "items/s", at_least=2.5)
    assert f["value"] == 5 and f["peer_value"] == 2
    assert f["ratio"] == 2.5 and f["rounds"] == [1.25, 4]
    assert f["met"] and f["goal"] == ">= 2.5"
    assert not bench.figure("x", 81.0, "GB", at_most=80)["met"]
    assert "goal" not in bench.figure("x", 1.0, "s")


def test_turns_alternate():
    """Two rounds behind one that warms up; every other round runs backwards."""
    calls = []
    ways = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = bench.in_turns(ways, 2)
    assert "".join(calls) == "ba" + "ab" + "ba"
    assert len(times["a"]) == len(times["b"]) == 2


def test_peak_memory_sees_what_was_freed():
    """80 MB are allocated and freed inside the block, 40 MB stay: the peak is about 120.

    Both are above 32 MB: whatever the process freed before, malloc maps such blocks anew
    (mallopt(3)).
    """
    with bench.PeakMemory("cpu") as peak:
        block = torch.ones(10_000_000)
        torch.ones(20_000_000)
    assert block.nbytes == 40e6 and 115e6 < peak.bytes < 135e6


def test_what_was_freed_before_hides_nothing():
    """160 blocks of 100 kB, too small to be mapped, are freed; the same again inside the block is a
    growth of 16 MB."""
    def blocks():
        return [torch.ones(25_000) for _ in range(160)]

    # a block behind them keeps the heap from shrinking by itself
    last = (blocks(), torch.ones(25_000))[1]
    with bench.PeakMemory("cpu") as peak:
        again = blocks()
    assert len(again) == 160 and last.nbytes == 1e5 and 13e6 < peak.bytes < 20e6


def test_recall_by_hand():
    """Four unit vectors in the plane; the two nearest to (1, 0) are rows 0 and 1, to (0, 1) rows 2
    and 1."""
    vectors = torch.tensor([[1, 0], [.8, .6], [0, 1], [-1, 0]]).numpy()
    queries = torch.tensor([[1., 0], [0, 1]]).numpy()
    truth = bench.exact(vectors, queries, 2)
    assert [set(row) for row in truth.tolist()] == [{0, 1}, {1, 2}]
    assert bench.recall_of([[0, 1], [3, 2]], truth) == 0.75

    def rows_at(ef):
        return [[0, 1], [2, 1]] if ef >= 20 else [[3, 1], [2, 1]]
    assert bench.least_ef(rows_at, truth, 0.9) == 22
