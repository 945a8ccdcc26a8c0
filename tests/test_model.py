"""model.py against transformers: network, positions, sampling, pictures, chat, checkpoints and adapters, on small
random float32 models."""
import copy
import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from unicodedata import normalize

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

import model
from conftest import ROOT
from oracles import (CONTROL, ENDOFTEXT, FIRST_CONTROL, IM_END, IM_START, IMAGE_PAD, LAYOUTS, TAGS, VISION_END,
                     VISION_START, deviation, full_tokenizer, hf_greedy, hf_inputs, hf_logits, make_batch, make_config,
                     make_model, new_keys, plain_tokenizer, rewrite, save_checkpoint, split_rows)
from parts.chat import Processor
from parts.lora import LoRALinear, add_lora, load_adapter, lora_disabled, merge_lora, save_adapter

CLOSE = 1e-4  # of the largest logit

VARIANTS = {
    "4 heads on 2, tied": dict(),
    "4 heads on 1, untied": dict(text=dict(num_key_value_heads=1), tied=False),
    "4 heads of their own, patch 8": dict(text=dict(num_key_value_heads=4),
                                          vision=dict(patch_size=8, window_size=48, fullatt_block_indexes=[2])),
    "2 heads of 32 on 1, untied": dict(text=dict(num_attention_heads=2, num_key_value_heads=1), tied=False),
    "3 heads of 32 on 1, no full block": dict(text=dict(hidden_size=96, num_attention_heads=3, num_key_value_heads=1),
                                              vision=dict(num_heads=1, fullatt_block_indexes=[])),
}
BATCHES = {  # an int is that many words, (h, w) a picture of h x w patches; a window is 4 x 4 patches, or 6 x 6
    "words": [[9]],
    "one picture": [[4, (8, 8), 5]],
    "pictures of several sizes in a row": [[3, (6, 10), 2, (4, 4), (14, 2), 6]],
    "nothing but the smallest picture": [[(2, 2)]],
    "padded words": [[9], [3], [1]],
    "padded, with and without pictures": [[5, (6, 10), 3], [7], [(4, 4), 2, (14, 6), 9], [2]],
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors here are so small that a second thread would only be waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make_pair(folder, seed=0, **options):
    """A random checkpoint, as transformers has it (.hf) and as we load it from the same directory (.vlm)."""
    hf = make_model(make_config(**options), seed)
    path = save_checkpoint(hf, folder / "checkpoint")
    return SimpleNamespace(hf=hf, vlm=model.VLM.from_pretrained(path).eval(), config=hf.config, path=path)


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("variant"), **VARIANTS[request.param])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def processor(tiny):
    return Processor.from_pretrained(tiny.path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(transformers' model, its directory) for the tests that damage or rewrite a copy. Window and patch have their
    default sizes, so that the sparse layout really leaves them out."""
    hf = make_model(make_config(vision=dict(window_size=112)), seed=1)
    return hf, save_checkpoint(hf, tmp_path_factory.mktemp("source") / "checkpoint")


@pytest.fixture
def damaged(checkpoint, tmp_path):
    """A copy of the checkpoint, free to be spoilt."""
    return shutil.copytree(checkpoint[1], tmp_path / "damaged")


PICTURES = make_batch(make_config(), [[5, (6, 10), 3], [(4, 4), 2, (10, 6), 4], [8]], seed=5)
REAL = PICTURES["attention_mask"]  # (B, T)


@torch.no_grad()
def our_logits(vlm, batch):
    return vlm(**batch)


def assert_same_logits(vlm, hf, batch=PICTURES):
    """Ours against transformers' at all tokens that are not padding."""
    real = batch["attention_mask"]
    assert deviation(our_logits(vlm, batch)[real], hf_logits(hf, batch)[real]) < CLOSE


def refusal(path, **options):
    """The one-line message with which loading fails."""
    with pytest.raises(ValueError) as error:
        model.VLM.from_pretrained(path, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


# ---- the network -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_logits_equal_transformers(pair, rows):
    batch = make_batch(pair.config, rows)
    ours, theirs = our_logits(pair.vlm, batch), hf_logits(pair.hf, batch)  # (B, T, V)
    real = batch["attention_mask"]
    assert deviation(ours[real], theirs[real]) < CLOSE
    for i, row in enumerate(split_rows(batch)):  # each row of the batch is what it is alone
        alone = hf_logits(pair.hf, row)[0]  # (t, V)
        assert deviation(ours[i][real[i]], alone) < CLOSE
        assert deviation(our_logits(pair.vlm, row)[0], alone) < CLOSE


def test_inputs_are_what_transformers_takes(tiny):
    """The mask may be transformers' integers, and an unpadded batch may leave it out."""
    row = make_batch(tiny.config, [[4, (4, 6), 5]])
    expected = our_logits(tiny.vlm, row)
    assert torch.equal(our_logits(tiny.vlm, {**row, "attention_mask": row["attention_mask"].long()}), expected)
    assert deviation(our_logits(tiny.vlm, {**row, "attention_mask": None}), expected) < 1e-6


def test_windows_matter(tiny):
    """What the comparison above rests on: the same weights with one window over the whole picture answer otherwise."""
    batch = make_batch(tiny.config, BATCHES["one picture"])
    wide = make_model(make_config(vision=dict(window_size=448)))
    assert deviation(hf_logits(wide, batch), hf_logits(tiny.hf, batch)) > 100 * CLOSE


@pytest.mark.parametrize("change", ["a picture too many", "a picture too few", "a token too few", "no picture",
                                    "a patch too few", "no patches"])
def test_pictures_and_tokens_must_match(tiny, change):
    batch = make_batch(tiny.config, [[4, (4, 4), 2, (4, 6), 5]])
    if change == "a picture too many":
        batch["image_grid_thw"] = torch.cat([batch["image_grid_thw"], torch.tensor([[1, 2, 2]])])
        batch["pixel_values"] = torch.cat([batch["pixel_values"], batch["pixel_values"][:4]])
    elif change == "a picture too few":
        batch["image_grid_thw"], batch["pixel_values"] = batch["image_grid_thw"][:1], batch["pixel_values"][:16]
    elif change == "a token too few":
        cut = (batch["input_ids"][0] == IMAGE_PAD).nonzero()[-1].item()
        batch["input_ids"][0, cut] = 7
    elif change == "a patch too few":
        batch["pixel_values"] = batch["pixel_values"][:-1]
    elif change == "no patches":
        batch["pixel_values"] = None
    else:
        batch["image_grid_thw"] = batch["pixel_values"] = None
    with pytest.raises(ValueError, match="image tokens|pixel_values holds .* the grids of image_grid_thw make 40"):
        tiny.vlm(**batch)


@pytest.mark.parametrize("rows", list(BATCHES)[1:4] + list(BATCHES)[5:])  # those with pictures
def test_positions_equal_transformers(tiny, rows):
    batch = make_batch(tiny.config, BATCHES[rows])
    theirs, delta = tiny.hf.model.get_rope_index(**hf_inputs(batch))
    ours, after = tiny.vlm.positions(batch["input_ids"], batch["attention_mask"], batch["image_grid_thw"])
    real = batch["attention_mask"]
    assert torch.equal(ours[:, real], theirs[:, real])
    assert torch.equal(after, delta.flatten() + real.sum(1))  # transformers keeps position minus length


def test_positions_by_hand(tiny):
    # One padding token, two words, the start marker, a picture of 4 x 8 patches (2 x 4 tokens), the end marker, a word.
    # Words count 0, 1, 2; the picture starts at 3 in all three axes; its longer side is 4, so the text goes on at 3 + 4
    # = 7, and the next token would be 9.
    ids = torch.tensor([[ENDOFTEXT, 10, 11, VISION_START] + 8 * [IMAGE_PAD] + [VISION_END, 12]])
    mask = torch.tensor([[False] + 13 * [True]])
    ours, after = tiny.vlm.positions(ids, mask, torch.tensor([[1, 4, 8]]))
    time = [0, 1, 2] + [3, 3, 3, 3, 3, 3, 3, 3] + [7, 8]
    height = [0, 1, 2] + [3, 3, 3, 3, 4, 4, 4, 4] + [7, 8]
    width = [0, 1, 2] + [3, 4, 5, 6, 3, 4, 5, 6] + [7, 8]
    assert ours[:, 0, 1:].tolist() == [time, height, width]
    assert after.tolist() == [9]


# ---- generation ------------------------------------------------------------------------------------------------------
GREEDY = dict(temperature=0.0)


@torch.no_grad()
def naive_greedy(vlm, batch, new_tokens, eos_ids=()):
    """No cache, no batch: read the whole row again for each token. -> a list of tokens for each row, the end token
    included."""
    answers = []
    for row in split_rows(batch):
        answer = []
        while len(answer) < new_tokens and not (answer and answer[-1] in eos_ids):
            logits = vlm(row["input_ids"], None, row["pixel_values"], row["image_grid_thw"])  # (1, t, V)
            answer.append(logits[0, -1].argmax().item())
            row["input_ids"] = torch.cat([row["input_ids"], torch.tensor([[answer[-1]]])], dim=1)
        answers.append(answer)
    return answers


def cut(tokens, eos_ids):
    """Rows of transformers' output up to and including the first end token."""
    ends = [[i + 1 for i, token in enumerate(row) if token in eos_ids] for row in tokens.tolist()]
    return [row[:end[0]] if end else row for row, end in zip(tokens.tolist(), ends)]


def sampled(samples):
    """The tokens under the mask; checks that a row's mask is one run from its start."""
    assert samples.tokens.shape == samples.mask.shape == samples.logps.shape
    assert samples.mask.dtype == torch.bool and samples.logps.dtype == torch.float32
    lengths = samples.mask.sum(1)
    assert torch.equal(samples.mask, torch.arange(samples.mask.shape[1]) < lengths[:, None])
    return [row[mask].tolist() for row, mask in zip(samples.tokens, samples.mask)]


@pytest.mark.parametrize("rows", ["words", "padded words", "padded, with and without pictures"])
def test_greedy_equals_transformers(pair, rows):
    batch = make_batch(pair.config, BATCHES[rows], seed=2)
    free = hf_greedy(pair.hf, batch, 16)
    assert sampled(pair.vlm.generate(**batch, max_new_tokens=16, **GREEDY)) == free.tolist()
    eos = (free[0, 5].item(), free[-1, 2].item())  # rows end at different times, some perhaps never
    expected = cut(hf_greedy(pair.hf, batch, 16, eos), eos)
    assert sampled(pair.vlm.generate(**batch, max_new_tokens=16, eos_ids=eos, **GREEDY)) == expected
    assert naive_greedy(pair.vlm, batch, 16, eos) == expected


@pytest.fixture
def shapes(monkeypatch):
    """What each decode step saw: (rows, key slots)."""
    seen, extend = [], model.KVCache.extend

    def noted(cache, T, valid=None):
        extend(cache, T, valid)
        seen.append((cache.valid.shape[0] * cache.valid.shape[1], cache.bias.shape[-1]))
    monkeypatch.setattr(model.KVCache, "extend", noted)
    return seen


def test_rows_leave_the_batch(tiny, shapes):
    """Sixteen prompts that end at many different times; each is right, and three equal samples of each are too."""
    rng = random.Random(0)
    rows = [[rng.randint(1, 12)] + rng.choice([[], [(4, 4), 2], [(2, 6), 1]]) for _ in range(16)]
    batch = make_batch(tiny.config, rows, seed=3)
    free = hf_greedy(tiny.hf, batch, 20)
    eos = tuple(free.flatten().bincount().topk(8).indices.tolist())
    expected = cut(free, eos)
    assert len({len(row) for row in expected}) > 5  # the case is what it claims to be
    assert sampled(tiny.vlm.generate(**batch, max_new_tokens=20, eos_ids=eos, **GREEDY)) == expected
    ends = len(shapes)
    tripled = sampled(tiny.vlm.generate(**batch, n=3, max_new_tokens=20, eos_ids=eos, **GREEDY))
    assert tripled == [row for row in expected for _ in range(3)]
    for n, steps in ((1, shapes[:ends]), (3, shapes[ends:])):
        left = [count for count, _ in steps]
        assert left == sorted(left, reverse=True) and left[0] <= 16 * n and len(set(left)) > 2


def test_static_shapes_give_the_same_tokens(tiny, shapes):
    """The step that CUDA records, run plainly: rows leave, yet every step looks at the whole room; tokens are those of
    transformers, samples and log-probabilities those of the growing step."""
    batch = make_batch(tiny.config, BATCHES["padded, with and without pictures"] * 2, seed=3)
    free = hf_greedy(tiny.hf, batch, 20)
    eos = tuple(free.flatten().bincount().topk(8).indices.tolist())
    ours = tiny.vlm.generate(**batch, n=2, max_new_tokens=20, eos_ids=eos, static=True, **GREEDY)
    assert sampled(ours) == [row for row in cut(free, eos) for _ in range(2)]
    assert {slots for _, slots in shapes} == {batch["input_ids"].shape[1] + 20}
    assert len({rows for rows, _ in shapes}) > 1  # the case is what it claims to be
    options = dict(n=3, max_new_tokens=12, eos_ids=range(0, 280, 9))
    static, plain = (tiny.vlm.generate(**batch, generator=seeded(0), static=on, **options) for on in (True, False))
    assert sampled(static) == sampled(plain)
    assert (static.logps - plain.logps).abs().max() < 1e-5


def test_the_growing_step_looks_at_what_is_there(tiny, shapes):
    tiny.vlm.generate(**make_batch(tiny.config, [[6], [3]]), max_new_tokens=4, **GREEDY)
    assert shapes == [(2, 7), (2, 8), (2, 9)]


class Tape(TorchDispatchMode):
    """A CUDA graph for the CPU: it notes every operation with its operands, leaves the memory as it was, and runs the
    same operations on the same memory as often as it is replayed."""
    taped = []

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.replays = [], [], 0
        self.taped.append(self)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation._schema.is_mutable:
            self.before.append((args[0], args[0].clone()))
        out = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, out))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, before in reversed(self.before):
            tensor.copy_(before)

    def replay(self):
        self.replays += 1
        for operation, args, kwargs, out in self.calls:
            again = operation(*args, **kwargs)
            for old, new in [(out, again)] if isinstance(out, torch.Tensor) else zip(out, again):
                if old is not None and old.data_ptr() != new.data_ptr():  # neither a view nor changed in place
                    old.copy_(new)


def test_a_recorded_step_can_be_replayed(tiny, monkeypatch):
    """What `generate` does on CUDA, with a tape as the graph: one recorded step continues for all later ones, without a
    look at the host, until rows leave and the smaller step is recorded anew."""
    batch = make_batch(tiny.config, BATCHES["padded, with and without pictures"] * 2, seed=3)
    free = hf_greedy(tiny.hf, batch, 20)
    eos = tuple(free.flatten().bincount().topk(8).indices.tolist())
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", lambda tape: tape)
    monkeypatch.setattr(Tape, "taped", [])
    samples = tiny.vlm.generate(**batch, n=2, max_new_tokens=20, eos_ids=eos, **GREEDY)
    assert sampled(samples) == [row for row in cut(free, eos) for _ in range(2)]
    assert len(Tape.taped) > 1 and sum(tape.replays for tape in Tape.taped) > 5
    names = {operation.name() for tape in Tape.taped for operation, *_ in tape.calls}
    assert not names & {"aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh", "aten::is_nonzero"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_generation_on_cuda(tiny):
    vlm = model.VLM.from_pretrained(tiny.path, device="cuda")
    batch = make_batch(tiny.config, BATCHES["padded, with and without pictures"], seed=2)
    expected = hf_greedy(tiny.hf, batch, 16).repeat_interleave(2, 0)
    batch = {name: value.to("cuda") for name, value in batch.items()}
    assert torch.equal(vlm.generate(**batch, n=2, max_new_tokens=16, **GREEDY).tokens.cpu(), expected)


def test_greedy_after_a_first_end_token(tiny):
    """An answer of one token, for every row, is one column."""
    batch = make_batch(tiny.config, [[6], [3]])
    first = hf_greedy(tiny.hf, batch, 1)
    samples = tiny.vlm.generate(**batch, max_new_tokens=9, eos_ids=tuple(first.flatten().tolist()), **GREEDY)
    assert samples.tokens.tolist() == first.tolist() and samples.mask.all()


@pytest.mark.parametrize("options", [dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-4)], ids=str)
def test_narrow_sampling_is_greedy(tiny, options):
    batch = make_batch(tiny.config, BATCHES["padded, with and without pictures"])
    free = hf_greedy(tiny.hf, batch, 8)
    samples = tiny.vlm.generate(**batch, n=2, max_new_tokens=8, generator=seeded(0), **options)
    assert torch.equal(samples.tokens, free.repeat_interleave(2, 0))


def test_a_seed_repeats(tiny):
    batch = make_batch(tiny.config, BATCHES["padded, with and without pictures"])

    def run(seed):
        return tiny.vlm.generate(**batch, n=4, max_new_tokens=10, eos_ids=range(0, 280, 7), generator=seeded(seed))
    first, again, other = run(1), run(1), run(2)
    assert sampled(first) == sampled(again) != sampled(other)
    assert torch.equal(first.logps, again.logps)
    assert len(first.tokens) == 4 * 4
    assert len({tuple(row) for row in sampled(first)}) > 8  # samples of one prompt differ


def with_answers(batch, samples, n):
    """Every prompt n times, each followed by its sample: inputs for a forward pass that knows nothing of generation,
    and (B*n, T+L) bool, True at sampled tokens. The rows are padded on both sides."""
    answers = torch.where(samples.mask, samples.tokens, ENDOFTEXT)
    prompts = {key: batch[key].repeat_interleave(n, 0) for key in ("input_ids", "attention_mask")}
    pictures = [row for row in split_rows(batch) for _ in range(n) if row["pixel_values"] is not None]
    full = dict(input_ids=torch.cat([prompts["input_ids"], answers], 1),
                attention_mask=torch.cat([prompts["attention_mask"], samples.mask], 1),
                pixel_values=torch.cat([row["pixel_values"] for row in pictures]),
                image_grid_thw=torch.cat([row["image_grid_thw"] for row in pictures]))
    targets = torch.cat([torch.zeros_like(prompts["attention_mask"]), samples.mask], 1)
    return full, targets


def sample_mixed(tiny, temperature=1.0, n=3, **options):
    batch = make_batch(tiny.config, BATCHES["padded, with and without pictures"], seed=4)
    samples = tiny.vlm.generate(**batch, n=n, max_new_tokens=12, temperature=temperature, eos_ids=range(0, 280, 9),
                                generator=seeded(0), **options)
    assert 2 < samples.mask.sum(1).float().mean() < 12
    return samples, *with_answers(batch, samples, n)


@pytest.mark.parametrize("options", [dict(), dict(top_k=5), dict(top_p=0.7)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probs_equal_transformers(tiny, temperature, options):
    """They are those of the distribution at the temperature, before top-k and top-p: what training recomputes."""
    samples, full, targets = sample_mixed(tiny, temperature, **options)
    logps = (hf_logits(tiny.hf, full) / temperature).log_softmax(-1)[:, :-1]  # (B, T-1, V)
    expected = logps.gather(2, full["input_ids"][:, 1:, None])[..., 0][targets[:, 1:]]
    assert (samples.logps[samples.mask] - expected).abs().max() < 1e-4


FILTERS = {"all": dict(), "top_k 5": dict(top_k=5), "top_p 0.6": dict(top_p=0.6), "both": dict(top_k=12, top_p=0.8)}


@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
def test_samples_follow_the_distribution(tiny, options):
    """Frequencies of 2,000 first tokens at temperature 0.7 against transformers' filtered softmax."""
    batch = make_batch(tiny.config, [[6, (4, 4), 3]])
    scores = hf_logits(tiny.hf, batch)[:, -1] / 0.7  # (1, V)
    scores = TopKLogitsWarper(options["top_k"])(None, scores) if "top_k" in options else scores
    scores = TopPLogitsWarper(options["top_p"])(None, scores) if "top_p" in options else scores
    n, probs = 2000, scores.softmax(-1)[0]
    samples = tiny.vlm.generate(**batch, n=n, max_new_tokens=1, temperature=0.7, generator=seeded(0), **options)
    seen = samples.tokens[:, 0].bincount(minlength=len(probs)).float()
    assert seen[probs == 0].sum() == 0
    often = n * probs >= 5  # Pearson's test wants at least five expected in a cell; the rest is one cell
    expected = n * torch.cat([probs[often], probs[~often].sum()[None]])  # (cells,)
    observed = torch.cat([seen[often], seen[~often].sum()[None]])
    cells = int((expected > 0).sum())
    chi2 = ((observed - expected).square() / expected.clamp(min=1e-9)).sum().item()
    assert 2 < cells
    assert chi2 < cells + 5 * (2 * cells) ** 0.5  # the mean of chi-square and five standard deviations


@pytest.mark.parametrize("name, value", [("temperature", -1.0), ("temperature", float("nan")),
                                         ("temperature", 1e-310), ("temperature", float("inf")), ("top_p", 0.0),
                                         ("top_p", 1.5), ("top_k", -1), ("n", 0), ("max_new_tokens", 0)])
def test_generate_refuses(tiny, name, value):
    with pytest.raises(ValueError, match=f"{name} {value}"):
        tiny.vlm.generate(**make_batch(tiny.config, [[3]]), **{name: value})


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_log_probs_refuse(tiny, temperature):
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match=f"temperature {temperature}"):
        tiny.vlm.log_probs(ids, torch.ones_like(ids), temperature=temperature)


@pytest.mark.parametrize("n", [1, 3])
def test_a_chunk_appended_to_the_cache(tiny, n):
    """A prompt is read into the cache, then two chunks of several words (the second ragged, padded on the left) behind
    each of its n copies; the logits at the chunks are those of transformers for the whole row."""
    prompts = make_batch(tiny.config, BATCHES["padded, with and without pictures"], seed=6)
    rows = 4 * n
    lengths = [[[5]] * rows, [[1 + i % 4] for i in range(rows)]]
    chunks = [make_batch(tiny.config, words, seed) for words, seed in zip(lengths, (7, 8))]
    with torch.no_grad():
        cache, _, after = tiny.vlm.prefill(**prompts)
        cache.share(n, 16)
        after, ours = after.repeat_interleave(n), []
        for chunk in chunks:
            real = chunk["attention_mask"]
            cache.extend(real.shape[1], real)
            positions = after[:, None] + real.cumsum(1) - 1  # (rows, t): each real token one further
            embedded = tiny.vlm.model.embed_tokens(chunk["input_ids"])  # (rows, t, C)
            hidden = tiny.vlm.model(embedded, positions.expand(3, -1, -1), cache=cache)
            after = after + real.sum(1)
            ours.append(tiny.vlm.head(hidden))
    prompts = {name: [row[name] for row in split_rows(prompts) for _ in range(n)] for name in prompts}
    for i in range(rows):
        words = [chunk["input_ids"][i][chunk["attention_mask"][i]] for chunk in chunks]
        whole = {name: values[i] for name, values in prompts.items()}
        whole["input_ids"] = torch.cat([whole["input_ids"][0], *words])[None]  # (1, t + both chunks)
        whole["attention_mask"] = torch.ones_like(whole["input_ids"], dtype=torch.bool)
        theirs = hf_logits(tiny.hf, whole)[0, -sum(map(len, words)):]
        mine = torch.cat([logits[i][chunk["attention_mask"][i]] for logits, chunk in zip(ours, chunks)])
        assert deviation(mine, theirs) < CLOSE


def test_a_sampled_picture_token_is_only_a_token(tiny, tmp_path):
    """Nothing stops a model from sampling <|image_pad|>. What generate returns, log_probs must be able to score."""
    hf = make_model(make_config(tied=False), seed=3)
    hf.lm_head.weight.data[IMAGE_PAD] = 3 * hf.lm_head.weight.data[:FIRST_CONTROL].abs().max(0).values
    vlm = model.VLM.from_pretrained(save_checkpoint(hf, tmp_path / "talks in pictures"))
    batch = make_batch(hf.config, [[3, (4, 4), 4]] * 8, seed=1)
    samples = vlm.generate(**batch, max_new_tokens=12, temperature=2.0, generator=seeded(0))
    full, targets = with_answers(batch, samples, 1)
    again = vlm.log_probs(**full, targets_mask=targets, temperature=2.0)
    assert (again[targets[:, 1:]] - samples.logps[samples.mask]).abs().max() < 1e-4


# ---- log-probabilities with gradient ---------------------------------------------------------------------------------
def gradients(network, loss):
    """{published name: gradient} of a scalar; works for transformers' network and for ours."""
    network.zero_grad()
    loss.backward()
    found = {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}
    network.zero_grad()
    return new_keys(found)


def assert_gradients_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    largest = max(gradient.abs().max() for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() < 1e-4 * max(gradient.abs().max(), 1e-3 * largest), name


def plain_log_probs(logits, batch, temperature):
    """The whole (B, T, V) log-softmax, then a gather -> (B, T-1)."""
    return (logits[:, :-1] / temperature).log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_gradients_equal_the_plain_way(pair, temperature):
    """Values and the gradient of every weight, the vision tower's included, against our own logits and against
    transformers'."""
    batch = make_batch(pair.config, [[5, (6, 10), 9], [12], [(4, 4), 2, (14, 6), 9]], seed=9)
    length = batch["input_ids"].shape[1]
    targets = batch["attention_mask"] & (torch.arange(length) > length - 10)
    weights = torch.randn(targets[:, 1:].shape, generator=seeded(0)) * targets[:, 1:]
    ours = pair.vlm.log_probs(**batch, targets_mask=targets, temperature=temperature)
    assert ours.shape == weights.shape and ours.dtype == torch.float32 and not ours[~targets[:, 1:]].any()
    plain = plain_log_probs(pair.vlm(**batch), batch, temperature) * targets[:, 1:]
    theirs = plain_log_probs(pair.hf(**hf_inputs(batch)).logits, batch, temperature) * targets[:, 1:]
    assert (ours - plain).abs().max() < 1e-5
    assert (ours - theirs).abs().max() < 1e-4
    assert_gradients_equal(gradients(pair.vlm, (ours * weights).sum()), gradients(pair.hf, (theirs * weights).sum()))


def test_log_probs_take_the_mask_of_the_targets_too(tiny):
    batch = make_batch(tiny.config, [[9], [6]])
    targets = batch["attention_mask"].clone()
    targets[:, :4] = False
    whole = tiny.vlm.log_probs(batch["input_ids"], targets, batch["attention_mask"])
    assert torch.equal(tiny.vlm.log_probs(batch["input_ids"], targets[:, 1:], batch["attention_mask"]), whole)
    nothing = tiny.vlm.log_probs(batch["input_ids"], torch.zeros_like(targets), batch["attention_mask"])
    assert torch.equal(nothing, torch.zeros(2, 8))


def test_log_probs_of_all_tokens_pictures_included(tiny):
    """The mask may cover a prompt's pictures: they stand where the grids say, and their ids have log-probabilities."""
    ours = tiny.vlm.log_probs(**PICTURES, targets_mask=REAL)
    both = REAL[:, 1:] & REAL[:, :-1]                   # a row's first token is given nothing
    theirs = plain_log_probs(hf_logits(tiny.hf, PICTURES), PICTURES, 1.0)
    assert (PICTURES["input_ids"] == IMAGE_PAD).any() and (ours - theirs)[both].abs().max() < 1e-4


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_the_head_in_chunks(tiny, chunk):
    """Chunks of 1, 7 and all of 20 positions: the same values, entropies and gradients as one log-softmax over
    everything."""
    generator = seeded(0)
    hidden = torch.randn(20, 64, generator=generator, requires_grad=True)
    targets = torch.randint(0, 304, (20,), generator=generator)
    logps, entropy = tiny.vlm.token_log_probs(hidden, targets, 0.8, entropy=True, chunk_elements=304 * chunk)
    plain = torch.distributions.Categorical(logits=tiny.hf.lm_head(hidden) / 0.8)
    assert (logps - plain.log_prob(targets)).abs().max() < 1e-5 * logps.abs().max()
    assert (entropy - plain.entropy()).abs().max() < 1e-5
    ours, = torch.autograd.grad(logps.sum(), hidden)
    theirs, = torch.autograd.grad(plain.log_prob(targets).sum(), hidden)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_sampled_log_probs_equal_the_recomputed_ones(tiny):
    samples, full, targets = sample_mixed(tiny, temperature=0.7)
    again = tiny.vlm.log_probs(**full, targets_mask=targets, temperature=0.7)
    assert (again[targets[:, 1:]] - samples.logps[samples.mask]).abs().max() < 1e-4
    assert not samples.logps[~samples.mask].any()


def test_a_group_in_one_row_equals_separate_rows(tiny):
    """Prefix sharing, with and without pictures and padding: values, entropies, and gradients against transformers on
    separate rows."""
    n, rows = 3, BATCHES["padded, with and without pictures"]
    samples, full, targets = sample_mixed(tiny, temperature=0.9, n=n)
    prompts = make_batch(tiny.config, rows, seed=4)
    ours, entropy = tiny.vlm.group_log_probs(samples.tokens, samples.mask, **prompts, temperature=0.9, entropy=True)
    plain = torch.distributions.Categorical(logits=tiny.hf(**hf_inputs(full)).logits[:, :-1] / 0.9)
    theirs = plain.log_prob(full["input_ids"][:, 1:])[targets[:, 1:]]
    assert (ours[samples.mask] - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert (entropy[samples.mask] - plain.entropy()[targets[:, 1:]]).abs().max() < 1e-4
    assert not ours[~samples.mask].any() and not entropy[~samples.mask].any()
    separate = tiny.vlm.log_probs(**full, targets_mask=targets, temperature=0.9)
    assert (ours[samples.mask] - separate[targets[:, 1:]]).abs().max() < 1e-5 * theirs.abs().max()
    weights = torch.randn(len(theirs), generator=seeded(0))
    expected = gradients(tiny.hf, (theirs * weights).sum())
    assert_gradients_equal(gradients(tiny.vlm, (ours[samples.mask] * weights).sum()), expected)


def test_masks_of_a_group(tiny):
    """Numbers do as well as truths; a response that does not start at its row's beginning is refused."""
    tokens, prompts = torch.tensor([[5, 6, 7], [8, 9, 4]]), make_batch(tiny.config, [[4]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    ours = tiny.vlm.group_log_probs(tokens, mask, **prompts)
    assert torch.equal(ours, tiny.vlm.group_log_probs(tokens, mask.bool(), **prompts)) and not ours[0, 2] and ours[1, 2]
    for wrong in ([0, 1, 1], [1, 0, 1]):
        with pytest.raises(ValueError, match="one run from its beginning"):
            tiny.vlm.group_log_probs(tokens, torch.tensor([wrong, [1, 1, 1]]).bool(), **prompts)


def test_gradient_checkpointing_changes_nothing(tiny):
    """The same gradients; each layer is computed once more in the backward pass."""
    batch, calls = make_batch(tiny.config, [[5, (4, 4), 3], [7]]), []
    hook = tiny.vlm.model.layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))

    def run():
        return gradients(tiny.vlm, tiny.vlm(**batch)[batch["attention_mask"]].square().mean())
    plain, once = run(), len(calls)
    tiny.vlm.model.gradient_checkpointing = True
    try:
        assert_gradients_equal(run(), plain)
    finally:
        tiny.vlm.model.gradient_checkpointing = False
        hook.remove()
    assert (once, len(calls)) == (1, 3)


# ---- adapters --------------------------------------------------------------------------------------------------------
def fresh(tiny):
    """A model of its own to put adapters on."""
    return model.VLM.from_pretrained(tiny.path)


def with_adapter(tiny, rank=4, alpha=12, targets=("q_proj", "v_proj", "down_proj")):
    """Our model with an adapter whose two factors are both random, as after training."""
    vlm = fresh(tiny)
    generator = seeded(0)
    for weight in add_lora(vlm, rank=rank, alpha=alpha, targets=targets):
        weight.data.normal_(0, 0.1, generator=generator)
    return vlm


def peft_model(tiny, **options):
    """transformers' network with peft's adapter, both factors random."""
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny.path)
    options = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    adapted = get_peft_model(hf, LoraConfig(**options)).eval()
    generator = seeded(1)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data.normal_(0, 0.1, generator=generator)
    return adapted


def test_a_new_adapter_changes_nothing_and_trains_alone(tiny):
    vlm = fresh(tiny)
    trainable = add_lora(vlm, rank=4, alpha=8, targets=("q_proj", "gate_proj"))
    assert torch.equal(our_logits(vlm, PICTURES), our_logits(tiny.vlm, PICTURES))
    names = {name for name, weight in vlm.named_parameters() if weight.requires_grad}
    assert names and all("lora_" in name for name in names) and len(names) == len(trainable)
    # q_proj in 3 decoder layers, gate_proj in 3 decoder layers and 4 vision blocks, two factors each
    assert len(names) == 2 * (3 + 3 + 4)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["k_proj", "v_proj", "o_proj"]], ids=str)
def test_generation_with_an_adapter(tiny, tmp_path, targets, static):
    """Greedy tokens of peft's adapted network, and, disabled, of the base."""
    adapted, vlm = peft_model(tiny, target_modules=targets), fresh(tiny)
    adapted.save_pretrained(tmp_path / "adapter")
    load_adapter(vlm, tmp_path / "adapter")
    batch = make_batch(tiny.config, BATCHES["padded, with and without pictures"], seed=2)
    expected, base = hf_greedy(adapted.merge_and_unload(), batch, 10), hf_greedy(tiny.hf, batch, 10)
    assert not torch.equal(expected, base)
    options = dict(n=2, max_new_tokens=10, static=static, **GREEDY)
    assert torch.equal(vlm.generate(**batch, **options).tokens, expected.repeat_interleave(2, 0))
    with lora_disabled(vlm):
        assert torch.equal(vlm.generate(**batch, **options).tokens, base.repeat_interleave(2, 0))


def test_generation_sees_weights_that_were_trained(tiny):
    """The product of q, k and v is made of the weights of the moment and leaves nothing behind."""
    vlm, batch = fresh(tiny), make_batch(tiny.config, [[6], [3]])
    before = vlm.generate(**batch, max_new_tokens=8, **GREEDY).tokens
    with torch.no_grad():
        for layer in vlm.model.layers:
            layer.self_attn.q_proj.weight.mul_(-1)
    after = vlm.generate(**batch, max_new_tokens=8, **GREEDY)
    assert sampled(after) == naive_greedy(vlm, batch, 8) != before.tolist()
    with pytest.raises(IndexError), torch.no_grad():
        vlm.generate(torch.tensor([[10 ** 6]]))  # an error inside leaves nothing behind either
    assert all(layer.self_attn.fused is None for layer in vlm.model.layers)


def test_lora_disabled_is_the_base(tiny):
    vlm, base = with_adapter(tiny), our_logits(tiny.vlm, PICTURES)
    adapted = our_logits(vlm, PICTURES)
    assert deviation(adapted, base) > 0.01
    with pytest.raises(KeyError), lora_disabled(vlm):
        assert torch.equal(our_logits(vlm, PICTURES), base)
        raise KeyError  # an error inside leaves the adapter on again
    assert torch.equal(our_logits(vlm, PICTURES), adapted)


PATHS = ("layers.1.self_attn.q_proj", "model.layers.1.self_attn.q_proj",
         "model.language_model.layers.1.self_attn.q_proj", "language_model.layers.1.self_attn.q_proj",
         "visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv", "proj", "0", "2")


@pytest.mark.parametrize("target", PATHS)
def test_targets_by_path_are_those_of_peft(tiny, tmp_path, target):
    """Our paths and the published ones name one layer, and a short name may be that of other modules, too (a convolution,
    a whole layer); what we save and what peft saves goes to the other."""
    vlm = with_adapter(tiny, targets=(target,))
    found = sum(isinstance(m, LoRALinear) for m in vlm.modules())
    assert found == (4 if target == "proj" else 1)
    save_adapter(vlm, tmp_path / "ours")
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny.path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)           # peft warns about keys that it did not find
        adapted = PeftModel.from_pretrained(hf, tmp_path / "ours").eval()
    assert sum(name.endswith("lora_A.default.weight") for name, _ in adapted.named_parameters()) == found
    assert_same_logits(vlm, adapted)
    adapted.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = fresh(tiny)
        load_adapter(again, tmp_path / folder)
        assert torch.equal(our_logits(again, PICTURES), our_logits(vlm, PICTURES))


def test_a_refused_adapter_leaves_the_model_as_it_was(tiny, tmp_path):
    """Its rank is 4 in the file and 3 in the config. The right one is read afterwards."""
    right, wrong, vlm = with_adapter(tiny), tmp_path / "wrong", fresh(tiny)
    frozen = fresh(tiny).requires_grad_(False)
    save_adapter(right, wrong)
    config = json.loads((wrong / "adapter_config.json").read_text())
    (wrong / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))
    with pytest.raises(ValueError, match="weights do not fit"):
        load_adapter(vlm, wrong)
    assert not hasattr(vlm, "lora") and all(weight.requires_grad for weight in vlm.parameters())
    with pytest.raises(ValueError, match="weights do not fit"):
        load_adapter(frozen, wrong)
    assert not any(weight.requires_grad for weight in frozen.parameters())
    assert vlm.state_dict().keys() == tiny.vlm.state_dict().keys()
    assert torch.equal(our_logits(vlm, PICTURES), our_logits(tiny.vlm, PICTURES))
    (wrong / "adapter_config.json").write_text(json.dumps(config))
    load_adapter(vlm, wrong)
    assert torch.equal(our_logits(vlm, PICTURES), our_logits(right, PICTURES))


def test_peft_loads_our_adapter(tiny, tmp_path):
    vlm = with_adapter(tiny)
    save_adapter(vlm, tmp_path / "adapter")
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny.path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns about keys that it did not find
        adapted = PeftModel.from_pretrained(hf, tmp_path / "adapter").eval()
    assert_same_logits(vlm, adapted)


@pytest.mark.parametrize("options", [dict(), dict(r=2, lora_alpha=1), dict(target_modules=["qkv", "o_proj"]),
                                     dict(target_modules=["self_attn.q_proj"]),
                                     dict(target_modules="all-linear")], ids=str)
def test_we_load_the_adapter_of_peft(tiny, tmp_path, options):
    adapted, vlm = peft_model(tiny, **options), fresh(tiny)
    adapted.save_pretrained(tmp_path / "adapter")
    load_adapter(vlm, tmp_path / "adapter")
    theirs = hf_logits(adapted, PICTURES)[REAL]
    assert deviation(our_logits(vlm, PICTURES)[REAL], theirs) < CLOSE
    assert deviation(our_logits(tiny.vlm, PICTURES)[REAL], theirs) > 0.01


def test_our_adapter_comes_back(tiny, tmp_path):
    vlm, again = with_adapter(tiny), fresh(tiny)
    save_adapter(vlm, tmp_path / "adapter")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(our_logits(again, PICTURES), our_logits(vlm, PICTURES))


ADAPTER_REFUSALS = {"use_rslora": True, "use_dora": True, "bias": "all", "alpha_pattern": {"q_proj": 99},
                    "rank_pattern": {"q_proj": 2}, "target_modules": r".*layers\.\d\.self_attn\.q_proj"}


@pytest.mark.parametrize("name", ADAPTER_REFUSALS)
def test_adapters_that_are_refused(tiny, tmp_path, name):
    """What we do not implement is refused by name: a scale that is silently ignored would be a wrong model."""
    peft_model(tiny, **{name: ADAPTER_REFUSALS[name]}).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="lora_A|rank_pattern" if name == "rank_pattern" else name):
        load_adapter(fresh(tiny), tmp_path / "adapter")


@pytest.mark.parametrize("option, value, named", [("rank", 2, "lora_A"), ("alpha", 99, "alpha"),
                                                  ("targets", ["qkv"], "q_proj")])
def test_an_adapter_beside_another_is_refused(tiny, tmp_path, option, value, named):
    """Loaded into a model that already has an adapter of another rank, scale or place."""
    save_adapter(with_adapter(tiny), tmp_path / "adapter")
    with pytest.raises(ValueError, match=named):
        load_adapter(with_adapter(tiny, **{option: value}), tmp_path / "adapter")


@pytest.mark.parametrize("kept", [0, 5, 1000, None])
def test_a_broken_adapter_file_is_named(tiny, tmp_path, kept):
    save_adapter(with_adapter(tiny), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.unlink()
    if kept is not None:
        file.write_bytes(whole[:kept])
    with pytest.raises(ValueError, match="adapter_model.safetensors"):
        load_adapter(fresh(tiny), tmp_path / "adapter")


def test_a_target_that_is_no_layer_is_named(tiny):
    with pytest.raises(ValueError, match="no_such_proj"):
        add_lora(fresh(tiny), rank=2, alpha=2, targets=("q_proj", "no_such_proj"))


@pytest.mark.parametrize("targets, said", [(("q_proj", "lm_head"), "'lm_head' is the head"), ((), "named in targets")])
def test_targets_that_take_no_adapter(targets, said):
    vlm = model.VLM.from_config(make_config(tied=False).to_dict())
    with pytest.raises(ValueError, match=said):
        add_lora(vlm, rank=2, alpha=2, targets=targets)
    assert all(weight.requires_grad for weight in vlm.parameters()) and not hasattr(vlm, "lora")


def test_a_second_adapter_needs_the_first_merged(tiny):
    vlm = with_adapter(tiny)
    adapted = our_logits(vlm, PICTURES)
    with pytest.raises(ValueError, match="has an adapter already: merge_lora first"):
        add_lora(vlm, rank=2, alpha=2, targets=("k_proj",))
    assert torch.equal(our_logits(vlm, PICTURES), adapted)
    add_lora(merge_lora(vlm), rank=2, alpha=2, targets=("k_proj",))
    assert deviation(our_logits(vlm, PICTURES), adapted) < CLOSE


@pytest.mark.parametrize("name, value", [("init_lora_weights", "pissa"), ("init_lora_weights", "olora"),
                                         ("use_qalora", True), ("alora_invocation_tokens", [1, 2]),
                                         ("layer_replication", [[0, 2], [1, 3]])])
def test_adapters_whose_base_differs_are_refused(tiny, tmp_path, name, value):
    save_adapter(with_adapter(tiny), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    for changed, refused in ((value, True), ("gaussian" if name == "init_lora_weights" else None, False)):
        file.write_text(json.dumps({**json.loads(file.read_text()), name: changed}))
        with pytest.raises(ValueError, match=name) if refused else nullcontext():
            load_adapter(fresh(tiny), tmp_path / "adapter")


def test_a_merged_adapter_is_a_full_checkpoint(tiny, tmp_path):
    vlm = with_adapter(tiny)
    adapted = our_logits(vlm, PICTURES)
    merge_lora(vlm)
    assert deviation(our_logits(vlm, PICTURES), adapted) < CLOSE
    vlm.save_pretrained(tmp_path / "merged")
    hf, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values()), report
    assert deviation(hf_logits(hf, PICTURES)[REAL], adapted[REAL]) < CLOSE


def test_an_unmerged_adapter_is_saved_apart(tiny, tmp_path):
    """save_pretrained writes the base alone, with the keys of a Qwen2.5-VL checkpoint; save_adapter writes the rest."""
    with_adapter(tiny).save_pretrained(tmp_path / "base")
    hf, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(report.values()), report
    assert_same_logits(tiny.vlm, hf)


# ---- pictures --------------------------------------------------------------------------------------------------------
def picture(width, height, mode="RGB", seed=0):
    """A smooth pattern under noise, so that a wrong filter, order or channel shows."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 7), np.cos(y / 5), np.sin((x + y) / 11), np.cos(x / 13)], -1) * 90 + 128
    pixels = np.clip(waves + rng.normal(0, 20, waves.shape), 0, 255).astype(np.uint8)
    if mode in ("RGBA", "CMYK", "LA"):  # the last channel of RGBA and LA is a transparency that varies
        channels = pixels[..., :len(Image.new(mode, (1, 1)).getbands())]
        return Image.frombytes(mode, (width, height), np.ascontiguousarray(channels).tobytes())
    return Image.fromarray(pixels[..., :3]).convert(mode)


def look(processor, *images):
    """pixel_values and image_grid_thw that our processor makes of a user turn with these pictures."""
    batch = processor([[{"role": "user", "content": [{"type": "image", "image": image} for image in images]}]])
    return batch["pixel_values"], batch["image_grid_thw"]


def assert_pictures_equal(ours, theirs):
    """Within one 8-bit level in every channel. A patch is (channel, 2 frames, p, p), flattened."""
    (pixels, grid), reference = ours, torch.as_tensor(theirs["pixel_values"])
    assert grid.tolist() == theirs["image_grid_thw"].tolist()
    assert pixels.shape == reference.shape and pixels.dtype == torch.float32
    level = 1 / 255 / torch.tensor(Qwen2VLImageProcessorPil.image_std)
    off = (pixels - reference).abs().view(len(pixels), 3, -1).amax((0, 2))  # (channels,)
    assert (off <= 1.01 * level).all(), off


SIZES = {"tiny": (5, 7), "one pixel": (1, 1), "small": (40, 30), "exact": (84, 56), "halves of a token": (70, 42),
         "wide": (400, 20), "tall": (31, 260), "large": (500, 333), "as wide as allowed": (200, 1)}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_pixels_equal_transformers(tiny, processor, size):
    image = picture(*size)
    assert_pictures_equal(look(processor, image), Qwen2VLImageProcessorPil.from_pretrained(tiny.path)(image))


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "1", "CMYK"])
def test_picture_modes_equal_transformers(tiny, processor, mode):
    image = picture(90, 60, mode)
    assert image.mode == mode
    assert_pictures_equal(look(processor, image), Qwen2VLImageProcessorPil.from_pretrained(tiny.path)(image))


def test_transparent_palette_equals_transformers(tiny, processor, tmp_path):
    colours = picture(90, 60, "P")
    commonest = np.bincount(np.asarray(colours).ravel()).argmax().item()
    colours.save(tmp_path / "palette.png", transparency=commonest)
    image = Image.open(tmp_path / "palette.png")
    assert image.mode == "P" and "transparency" in image.info
    assert_pictures_equal(look(processor, image), Qwen2VLImageProcessorPil.from_pretrained(tiny.path)(image))


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_file_is_turned_upright(tiny, processor, tmp_path, orientation):
    from transformers.image_utils import load_image
    exif = Image.Exif()
    exif[0x0112] = orientation  # 3: upside down, 6: on its side
    picture(90, 60).save(tmp_path / "photo.jpg", exif=exif)
    upright = load_image(str(tmp_path / "photo.jpg"))
    assert upright.size == ((90, 60) if orientation == 3 else (60, 90))
    for path in (tmp_path / "photo.jpg", str(tmp_path / "photo.jpg"), Image.open(tmp_path / "photo.jpg")):
        assert_pictures_equal(look(processor, path), Qwen2VLImageProcessorPil.from_pretrained(tiny.path)(upright))


@pytest.mark.parametrize("change", [{"min_pixels": 784, "max_pixels": 4704},
                                    {"size": {"shortest_edge": 784, "longest_edge": 4704}}], ids=["flat", "size"])
def test_both_spellings_of_the_pixel_limits(tiny, tmp_path, change):
    path = shutil.copytree(tiny.path, tmp_path / "limits")
    settings_file = path / "preprocessor_config.json"
    kept = {key: value for key, value in json.loads(settings_file.read_text()).items() if key != "size"}
    settings_file.write_text(json.dumps({**kept, **change}))
    theirs = Qwen2VLImageProcessorPil(min_pixels=784, max_pixels=4704)  # 1 and 6 tokens
    for size in ((300, 200), (20, 20)):
        assert_pictures_equal(look(Processor.from_pretrained(path), picture(*size)), theirs(picture(*size)))


def test_patch_size_of_the_checkpoint(tmp_path):
    path = save_checkpoint(make_model(make_config(vision=dict(patch_size=8, window_size=48))), tmp_path / "patch8")
    images = [picture(100, 70), picture(48, 64)]
    theirs = Qwen2VLImageProcessorPil.from_pretrained(path)(images)
    assert_pictures_equal(look(Processor.from_pretrained(path), *images), theirs)


def test_several_pictures_keep_their_order(tiny, processor):
    images = [picture(90, 60, seed=1), picture(56, 120, seed=2), picture(60, 60, "L", seed=3)]
    assert_pictures_equal(look(processor, *images), Qwen2VLImageProcessorPil.from_pretrained(tiny.path)(images))


@pytest.mark.parametrize("size", [(201, 1), (3, 700)])
def test_extreme_aspect_ratio_is_refused(processor, size):
    with pytest.raises(ValueError, match="200"):
        look(processor, picture(*size))


def test_a_file_that_is_no_picture(processor, tmp_path):
    (tmp_path / "words.jpg").write_text("not a picture")
    for name in ("words.jpg", "absent.jpg"):
        with pytest.raises(ValueError, match=name):
            look(processor, tmp_path / name)


# ---- chat ------------------------------------------------------------------------------------------------------------
def text_ids(text):
    """Ids of a text that can only be text."""
    return plain_tokenizer().encode(text).ids


def test_prompt_by_hand(processor):
    # <|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nIs it red?<|im_end|>\n<|im_start|>assistant\n
    batch = processor([[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it red?"}]])
    expected = [IM_START, *text_ids("system\nBe brief."), IM_END, *text_ids("\n"),
                IM_START, *text_ids("user\nIs it red?"), IM_END, *text_ids("\n"), IM_START, *text_ids("assistant\n")]
    assert batch["input_ids"].tolist() == [expected]
    assert batch["attention_mask"].tolist() == [[True] * len(expected)]
    assert batch["pixel_values"] is None and batch["image_grid_thw"] is None
    # The published template makes a string, and the published kind of tokenizer reads it: the same ids.
    string = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nIs it red?<|im_end|>\n<|im_start|>assistant\n"
    assert full_tokenizer().encode(string).ids == expected


def test_the_template_fills_in_a_system_turn(processor):
    string = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
              "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = processor([[{"role": "user", "content": "Hi"}]])["input_ids"]
    assert ids.tolist() == [full_tokenizer().encode(string).ids]


def test_prompt_with_pictures_and_an_earlier_answer(processor):
    parts = [{"type": "text", "text": "Compare"}, {"type": "image", "image": picture(84, 56)},
             {"type": "text", "text": " with\n\n"}, {"type": "image", "image": picture(56, 56)},
             {"type": "text", "text": "now."}]
    batch = processor([[{"role": "system", "content": ""}, {"role": "user", "content": parts},
                        {"role": "assistant", "content": "\nSame."}, {"role": "user", "content": "Sure?"}]])

    def pictured(n):
        return f"<|vision_start|>{n * '<|image_pad|>'}<|vision_end|>"
    # 84 x 56 pixels are 6 x 4 patches, 6 tokens; 56 x 56 are 4 tokens
    string = ("<|im_start|>system\n<|im_end|>\n"
              f"<|im_start|>user\nCompare{pictured(6)} with\n\n{pictured(4)}now.<|im_end|>\n"
              "<|im_start|>assistant\n\nSame.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n")
    assert batch["input_ids"].tolist() == [full_tokenizer().encode(string).ids]
    assert batch["image_grid_thw"].tolist() == [[1, 4, 6], [1, 4, 4]]


def test_a_batch_is_padded_on_the_left(processor, tiny):
    talks = [[{"role": "user", "content": "Why is the sky so very blue in this picture, and not green?"}],
             [{"role": "user", "content": [{"type": "image", "image": picture(56, 56)}]}],
             [{"role": "user", "content": "?"}]]
    batch, alone = processor(talks), [processor([talk]) for talk in talks]
    assert batch["input_ids"].dtype == torch.long and batch["attention_mask"].dtype == torch.bool
    for ids, mask, single in zip(batch["input_ids"], batch["attention_mask"], alone):
        length = single["input_ids"].shape[1]
        assert mask.tolist() == [False] * (len(mask) - length) + [True] * length
        assert ids[mask].tolist() == single["input_ids"][0].tolist()
    assert torch.equal(batch["pixel_values"], alone[1]["pixel_values"])
    logits = our_logits(tiny.vlm, batch)  # what the processor makes is what the network takes
    assert deviation(logits[1][batch["attention_mask"][1]], hf_logits(tiny.hf, alone[1])[0]) < CLOSE


def test_ids_of_the_processor(processor):
    assert tuple(processor.eos_ids) == (IM_END, ENDOFTEXT)
    assert processor.pad_id == ENDOFTEXT


def test_a_broken_processor_directory(tiny, tmp_path):
    path = shutil.copytree(tiny.path, tmp_path / "broken")
    (path / "generation_config.json").unlink()
    assert tuple(Processor.from_pretrained(path).eos_ids) == (IM_END,)  # what ends a turn
    plain_tokenizer().save(str(path / "tokenizer.json"))
    with pytest.raises(ValueError, match="tokenizer.json.*im_start"):
        Processor.from_pretrained(path)
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json"):
        Processor.from_pretrained(path)
    full_tokenizer().save(str(path / "tokenizer.json"))
    (path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        Processor.from_pretrained(path)


def test_picture_settings_as_transformers_saves_them_now(tiny, processor, tmp_path):
    """Its processors write the settings of their parts into processor_config.json (ProcessorMixin.to_json_file), and
    its image processor reads them back from there."""
    path = shutil.copytree(tiny.path, tmp_path / "new")
    settings = json.loads((path / "preprocessor_config.json").read_text())
    (path / "preprocessor_config.json").unlink()
    (path / "processor_config.json").write_text(json.dumps({"image_processor": settings, "processor_class": "x"}))
    theirs, ours = Qwen2VLImageProcessorPil.from_pretrained(path), Processor.from_pretrained(path)
    picture = Image.effect_noise((90, 70), 80).convert("RGB")
    expected = torch.as_tensor(theirs(images=[picture], return_tensors="pt")["pixel_values"])
    assert torch.equal(ours.pixels(picture)[0], processor.pixels(picture)[0])
    assert (ours.pixels(picture)[0] - expected).abs().max() < 1e-4
    # beside an older file they go first, as for transformers
    (path / "preprocessor_config.json").write_text(json.dumps({**settings, "image_mean": [0.1, 0.2, 0.3]}))
    theirs, ours = Qwen2VLImageProcessorPil.from_pretrained(path), Processor.from_pretrained(path)
    assert list(theirs.image_mean) == pytest.approx(ours.mean.tolist()) == settings["image_mean"]
    (path / "preprocessor_config.json").unlink()
    (path / "processor_config.json").write_text('{"processor_class": "x"}')
    with pytest.raises(ValueError, match="processor_config.json: no picture settings"):
        Processor.from_pretrained(path)


@pytest.mark.parametrize("name, value", [("do_resize", False), ("do_rescale", False), ("do_normalize", False),
                                         ("resample", 2), ("rescale_factor", 1 / 128)])
def test_picture_settings_that_change_the_pixels_are_refused(tiny, tmp_path, name, value):
    """Each makes other pixels in transformers."""
    path = shutil.copytree(tiny.path, tmp_path / "other")
    settings = json.loads((path / "preprocessor_config.json").read_text())
    picture = Image.effect_noise((90, 70), 80).convert("RGB")
    pixels = []
    for said in (settings, {**settings, name: value}):
        (path / "preprocessor_config.json").write_text(json.dumps(said))
        image = picture.resize((84, 84)) if name == "do_resize" else picture     # which is not resized must fit
        pixels.append(torch.as_tensor(Qwen2VLImageProcessorPil.from_pretrained(path)(
            images=[image], return_tensors="pt")["pixel_values"]))
    assert name == "do_resize" or not torch.equal(*pixels)
    with pytest.raises(ValueError, match=name):
        Processor.from_pretrained(path)


def test_the_turn_ends_with_its_own_token_however_ends_are_listed(tiny, tmp_path):
    """eos_token_id is a set to transformers: any order, with or without <|im_end|>. All are special."""
    path = shutil.copytree(tiny.path, tmp_path / "ends")
    file = path / "tokenizer.json"
    plain = json.loads(file.read_text())
    for token in plain["added_tokens"]:
        token["special"] = False
    file.write_text(json.dumps(plain))
    tag = full_tokenizer().token_to_id("</think>")            # an end, but a word of the answer as well
    for listed in ([ENDOFTEXT, IM_END], ENDOFTEXT, [ENDOFTEXT, tag]):
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
        processor = Processor.from_pretrained(path)
        assert processor.end == IM_END and processor.eos_ids[:2] == (IM_END, ENDOFTEXT)
        assert ENDOFTEXT not in processor.encode("a<|endoftext|>b") and processor.decode([ENDOFTEXT]) == ""
        assert processor.encode("</think>") == [tag] and processor.decode([tag]) == "</think>"


@pytest.mark.parametrize("wrong", [[], [[]], ["hello"], [[{"content": "x"}]], [[{"role": "user", "content": None}]],
                                   [[{"role": "user", "content": ["x"]}]]], ids=str)
def test_conversations_that_are_refused(processor, wrong):
    with pytest.raises(ValueError, match="conversation: |no conversation: give"):
        processor(wrong)


@pytest.mark.parametrize("part", [{"type": "video", "video": "film.mp4"}, {"type": "image"},
                                  {"type": "text", "text": None}, {"type": "text", "text": 5},
                                  {"type": "text", "text": ["a"]}, {"type": "image", "image": None},
                                  {"type": "image", "image": [1]}, {"type": "image", "image": torch.zeros(3, 8, 8)},
                                  {"type": "image", "image": 7}], ids=lambda p: str(p)[:30])
def test_contents_that_are_refused(processor, part):
    with pytest.raises(ValueError, match="is neither"):
        processor([[{"role": "user", "content": [part]}]])


PIECES = CONTROL + TAGS + ("<|im_", "end|>", "<|", "|>", "user\n", "\n", " ", "é", "日本", "\u0301")
HOSTILE = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=8).map("".join)


@settings(max_examples=40, deadline=None)
@given(system=HOSTILE, first=HOSTILE, second=HOSTILE)
def test_text_makes_no_control_token(processor, system, first, second):
    """Turns and pictures alone decide how often each control token stands in the prompt, and the words are those that
    were given."""
    content = [{"type": "text", "text": first}, {"type": "image", "image": Image.new("RGB", (56, 56))},
               {"type": "text", "text": second}]
    batch = processor([[{"role": "system", "content": system}, {"role": "user", "content": content}]])
    ids = batch["input_ids"][0].tolist()
    counts = {i: ids.count(i) for i in range(FIRST_CONTROL, FIRST_CONTROL + len(CONTROL)) if i in ids}
    assert counts == {IM_START: 3, IM_END: 2, VISION_START: 1, VISION_END: 1, IMAGE_PAD: 4}
    words = f"system\n{system}\nuser\n{first}{second}\nassistant\n"
    assert normalize("NFC", processor.decode(ids)) == normalize("NFC", words)


def test_decode_drops_control_tokens_only(processor):
    text = "<think> it says <|im_end|> here</think>\n  <ret>"
    before, after = (full_tokenizer().encode(words).ids for words in ("<think> it says ", " here</think>\n  <ret>"))
    ids = before + text_ids("<|im_end|>") + after
    assert processor.decode([IM_START, *ids, IM_END, ENDOFTEXT]) == text
    assert processor.decode(torch.tensor(ids + [IM_END])) == text
    assert processor.decode(ids + [303]) == text  # a spare row of the embedding has no text


# ---- checkpoints -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_logits(checkpoint, tmp_path, layout):
    hf, path = checkpoint
    vlm = model.VLM.from_pretrained(rewrite(path, tmp_path / "other", layout))
    assert torch.equal(our_logits(vlm, PICTURES), our_logits(model.VLM.from_pretrained(path), PICTURES))
    assert_same_logits(vlm, hf)


@pytest.mark.parametrize("layout", ["nested, old keys", "flat, old keys, sharded"])
def test_untied_head_in_other_layouts(tmp_path, layout):
    hf = make_model(make_config(tied=False), seed=2)
    vlm = model.VLM.from_pretrained(rewrite(save_checkpoint(hf, tmp_path / "a"), tmp_path / "b", layout))
    assert_same_logits(vlm, hf)


def test_a_tied_head_may_be_written_out(checkpoint, damaged):
    weights = load_file(damaged / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    assert_same_logits(model.VLM.from_pretrained(damaged), checkpoint[0])
    weights["lm_head.weight"][5, 3] += 1
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    assert "1 weights do not fit config.json: tied, but lm_head.weight differs" in refusal(damaged)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_a_device_that_is_not_there(checkpoint):
    assert "device 'cuda' cannot be used here" in refusal(checkpoint[1], device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["nested, new keys", "flat, old keys, sharded", "middle, new keys, sharded"])
def test_transformers_loads_what_we_save(checkpoint, tmp_path, layout, dtype):
    vlm = model.VLM.from_pretrained(rewrite(checkpoint[1], tmp_path / "source", layout), dtype=dtype)
    vlm.save_pretrained(tmp_path / "saved")
    hf, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values()), report
    assert hf.dtype == dtype
    ours, theirs = our_logits(vlm.float(), PICTURES), hf_logits(hf.float(), PICTURES)
    assert deviation(ours[PICTURES["attention_mask"]], theirs[PICTURES["attention_mask"]]) < CLOSE
    assert torch.equal(our_logits(model.VLM.from_pretrained(tmp_path / "saved"), PICTURES), ours)


def test_transformers_loads_our_shards(checkpoint, tmp_path):
    hf, path = checkpoint
    vlm = model.VLM.from_pretrained(path)
    vlm.save_pretrained(tmp_path / "shards", shard_bytes=100_000)
    assert len(list((tmp_path / "shards").glob("model-*-of-*.safetensors"))) > 2
    again, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "shards", output_loading_info=True)
    assert not any(report.values()), report
    assert_same_logits(vlm, again)
    assert torch.equal(our_logits(model.VLM.from_pretrained(tmp_path / "shards"), PICTURES), our_logits(vlm, PICTURES))
    vlm.save_pretrained(tmp_path / "shards")  # one file again: no shard and no index stays
    assert [file.name for file in (tmp_path / "shards").glob("model*")] == ["model.safetensors"]


def test_saving_over_another_layout(checkpoint, tmp_path):
    """What lay in the directory before, an index with its shards, is not what is loaded afterwards."""
    path = rewrite(checkpoint[1], tmp_path / "checkpoint", "flat, old keys, sharded")
    vlm = model.VLM.from_pretrained(path)
    with torch.no_grad():
        vlm.model.norm.weight += 1
    vlm.save_pretrained(path)
    expected = our_logits(vlm, PICTURES)
    assert torch.equal(our_logits(model.VLM.from_pretrained(path), PICTURES), expected)
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(path)
    assert deviation(hf_logits(hf, PICTURES)[PICTURES["attention_mask"]], expected[PICTURES["attention_mask"]]) < CLOSE
    assert not list(path.glob("*.new")) + list(path.glob("*.tmp"))


def test_bfloat16(checkpoint):
    """As close to the float32 answer as transformers' own bfloat16 is."""
    hf, path = checkpoint
    exact = hf_logits(hf, PICTURES)[REAL]
    vlm = model.VLM.from_pretrained(path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in vlm.parameters()} == {torch.bfloat16}
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="eager")
    ours = our_logits(vlm, PICTURES)[REAL]
    assert ours.dtype == torch.bfloat16
    assert deviation(ours, exact) < 1.5 * deviation(hf_logits(theirs, PICTURES)[REAL], exact)
    samples = vlm.generate(**PICTURES, n=2, max_new_tokens=4, generator=seeded(0))
    assert samples.logps.dtype == torch.float32 and samples.logps.isfinite().all()


def test_every_bad_key_is_named_at_once(damaged):
    weights = load_file(damaged / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"], weights["visual.merger.ln_q.weight"]
    weights["model.layers.1.input_layernorm.weight"] = torch.ones(65)
    weights["visual.blocks.0.attn.qkv.weight"] = weights["visual.blocks.0.attn.qkv.weight"].T.contiguous()
    weights["model.layers.7.input_layernorm.weight"] = torch.ones(64)
    weights["audio_tower.weight"] = torch.ones(2)
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    message = refusal(damaged)
    for key in ("layers.0.mlp.up_proj.weight", "visual.merger.ln_q.weight", "layers.1.input_layernorm.weight",
                "visual.blocks.0.attn.qkv.weight", "layers.7.input_layernorm.weight", "audio_tower.weight"):
        assert key in message, (key, message)


CONFIG_REFUSALS = {  # change of config.json -> what the message must name
    "model type": (dict(model_type="llama"), ["model_type", "llama"]),
    "no model type": (dict(model_type=None), ["model_type"]),
    "sliding window": (dict(use_sliding_window=True), ["use_sliding_window"]),
    "rope type": (dict(rope_scaling={"type": "yarn", "factor": 4.0, "mrope_section": [2, 3, 3]}), ["yarn"]),
    "rope type beside type": (dict(rope_scaling={"rope_type": "linear", "type": "mrope", "mrope_section": [2, 3, 3]}),
                              ["linear"]),
    "activation": (dict(hidden_act="gelu_new"), ["hidden_act", "gelu_new"]),
    "mrope section": (dict(rope_scaling={"type": "mrope", "mrope_section": [2, 3, 4]}), ["mrope_section"]),
    "no mrope section": (dict(rope_scaling=None), ["mrope_section"]),
    "heads": (dict(num_attention_heads=3), ["num_attention_heads"]),
    "size as a word": (dict(hidden_size="64"), ["hidden_size"]),
}


@pytest.mark.parametrize("change, named", CONFIG_REFUSALS.values(), ids=CONFIG_REFUSALS)
def test_configurations_that_are_refused(checkpoint, tmp_path, change, named):
    path = rewrite(checkpoint[1], tmp_path / "flat", "flat, old keys")
    (path / "config.json").write_text(json.dumps({**json.loads((path / "config.json").read_text()), **change}))
    message = refusal(path)
    assert all(name in message for name in named) and "config.json" in message, message


NESTED_REFUSALS = {"use_sliding_window": True, "hidden_act": "relu",
                   "rope_parameters": {"rope_type": "dynamic", "mrope_section": [2, 3, 3]}}


@pytest.mark.parametrize("name", NESTED_REFUSALS)
def test_nested_configurations_that_are_refused(damaged, name):
    config = json.loads((damaged / "config.json").read_text())
    config["text_config"][name] = NESTED_REFUSALS[name]
    (damaged / "config.json").write_text(json.dumps(config))
    assert ("dynamic" if name == "rope_parameters" else name) in refusal(damaged)


def test_broken_files_are_named(damaged):
    whole = (damaged / "model.safetensors").read_bytes()
    for kept in (len(whole) // 2, len(whole) - 1, 100, 4, 0):
        (damaged / "model.safetensors").write_bytes(whole[:kept])
        assert "model.safetensors" in refusal(damaged)
    (damaged / "model.safetensors").unlink()
    assert "safetensors" in refusal(damaged)
    (damaged / "pytorch_model.bin").write_bytes(b"old")
    message = refusal(damaged)
    assert "pytorch_model.bin" in message and "safetensors" in message
    (damaged / "config.json").write_text("{")
    assert "config.json" in refusal(damaged)
    (damaged / "config.json").unlink()
    assert "config.json" in refusal(damaged)
    assert "nowhere" in refusal(damaged / "nowhere")


def test_a_missing_shard_is_named(checkpoint, tmp_path):
    path = rewrite(checkpoint[1], tmp_path / "sharded", "flat, old keys, sharded")
    (path / "model-00002-of-00004.safetensors").unlink()
    assert "model-00002-of-00004.safetensors" in refusal(path)
    (path / "model.safetensors.index.json").write_text("[]")
    assert "index" in refusal(path)


PUBLISHED_7B = dict(
    model_type="qwen2_5_vl", hidden_act="silu", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
    num_attention_heads=28, num_key_value_heads=4, vocab_size=152064, max_position_embeddings=128000,
    rms_norm_eps=1e-6, rope_theta=1000000.0, rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
    sliding_window=32768, use_sliding_window=False, tie_word_embeddings=False, image_token_id=151655,
    video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653, vision_token_id=151654,
    vision_config={"hidden_size": 1280, "in_chans": 3, "model_type": "qwen2_5_vl", "spatial_patch_size": 14})


def test_the_published_sparse_configuration():
    """All sizes of the 7B model, whose vision_config names almost nothing, are those that transformers reads out of
    it."""
    ours, theirs = model.read_config(PUBLISHED_7B), Qwen2_5_VLConfig(**copy.deepcopy(PUBLISHED_7B))
    for name in ("depth", "hidden_size", "intermediate_size", "num_heads", "in_channels", "patch_size",
                 "temporal_patch_size", "spatial_merge_size", "window_size"):
        assert getattr(ours.vision, name) == getattr(theirs.vision_config, name), name
    assert list(ours.vision.fullatt_block_indexes) == list(theirs.vision_config.fullatt_block_indexes)
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                 "vocab_size", "rms_norm_eps", "max_position_embeddings"):
        assert getattr(ours, name) == getattr(theirs.text_config, name), name
    rope = theirs.text_config.rope_parameters
    assert (list(ours.mrope_section), ours.rope_theta) == (rope["mrope_section"], rope["rope_theta"])
    assert (ours.tie_word_embeddings, ours.image_token_id) == (False, 151655)


def test_random_weights_follow_the_seed(checkpoint, tmp_path):
    config = json.loads((checkpoint[1] / "config.json").read_text())
    one, same, other = (model.VLM.from_config(*source) for source in ((config, 0), (checkpoint[1], 0), (config, 1)))
    assert torch.equal(our_logits(one, PICTURES), our_logits(same, PICTURES))
    assert not torch.equal(our_logits(one, PICTURES), our_logits(other, PICTURES))
    entropy = torch.distributions.Categorical(logits=our_logits(one, PICTURES)).entropy()
    assert (entropy - np.log(304)).abs().max() < 1  # a fresh network knows nothing
    one.save_pretrained(tmp_path / "fresh")
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "fresh")
    assert_same_logits(one, hf)
    assert one.config.max_positions == 512


# ---- memory ----------------------------------------------------------------------------------------------------------
PEAK = """
import sys, torch, torch.nn.functional as F
sys.path.insert(0, sys.argv[1])
import model
torch.set_num_threads(1)

def resident(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

def peak_of(work):
    "Bytes by which the largest resident memory during the work exceeds that before it."
    open("/proc/self/clear_refs", "w").write("5")
    before = resident("VmRSS")
    kept = work()
    return resident("VmHWM") - before
"""


def peak_memory(script, *arguments):
    """Runs the script in a fresh process (a peak can only be seen there) and returns the numbers of bytes that it
    prints."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of resident memory cannot be read on this system")
    command = [sys.executable, "-c", PEAK + script, str(ROOT), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


def test_loading_needs_little_more_than_the_weights(tiny, tmp_path):
    """A checkpoint of 300 MB, every weight touched after loading."""
    sizes = dict(vocab_size=24000, hidden_size=1024, intermediate_size=3072, num_attention_heads=8)
    vlm = model.VLM.from_config(make_config(text=sizes).to_dict())
    size = sum(weight.nbytes for weight in vlm.parameters())
    assert 2.4e8 < size < 3.6e8
    vlm.save_pretrained(tmp_path / "big")
    del vlm
    script = """
model.VLM.from_pretrained(sys.argv[3])  # what torch imports at its first use is not counted
def load():
    vlm = model.VLM.from_pretrained(sys.argv[2])
    return vlm, [weight.sum() for weight in vlm.parameters()]
print(peak_of(load))
"""
    peak, = peak_memory(script, tmp_path / "big", tiny.path)
    assert peak < 1.15 * size


def test_log_probs_need_a_quarter_of_the_plain_memory(tmp_path):
    """Forward and backward at the published vocabulary of 151,936. Ours reads 4 x 1,024 tokens; the plain way grows
    with the tokens, so that 4 x 32 of them tell what 4 x 1,024 would need."""
    config = make_config(text=dict(vocab_size=151936, num_hidden_layers=1)).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    script = """
vlm = model.VLM.from_config(sys.argv[2])
def ours(tokens):
    ids = torch.randint(0, 280, (4, tokens))
    vlm.log_probs(ids, torch.ones_like(ids, dtype=torch.bool)).sum().backward()
def plain(tokens):
    ids = torch.randint(0, 280, (4, tokens))
    vlm(ids)[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).sum().backward()
ours(8), plain(8)  # what torch imports at its first use, and the gradients, are not counted
print(peak_of(lambda: ours(1024)), peak_of(lambda: plain(32)))
"""
    ours, plain = peak_memory(script, tmp_path)
    assert ours < 32 * plain / 4
