"""model.py against transformers: network, positions, sampling and log-probabilities, on small
random float32 models."""
import inspect
import json
import math
import random
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

import model
from networks import (BATCHES, CLOSE, GREEDY, PICTURES, REAL, assert_same_logits, fresh, make_pair,
                      our_logits, seeded)
from oracles import (ENDOFTEXT, FIRST_CONTROL, IMAGE_PAD, VISION_END, VISION_START, deviation,
                     hf_greedy, hf_inputs, hf_logits, make_batch, make_config, make_model, new_keys,
                     save_checkpoint, split_rows)
from parts.lora import add_lora


VARIANTS = {
    "4 heads on 2, tied": dict(),
    "4 heads on 1, untied": dict(text=dict(num_key_value_heads=1), tied=False),
    "4 heads of their own, patch 8": dict(text=dict(num_key_value_heads=4),
                                          vision=dict(patch_size=8, window_size=48,
                                                      fullatt_block_indexes=[2])),
    "2 heads of 32 on 1, untied": dict(text=dict(num_attention_heads=2, num_key_value_heads=1),
                                       tied=False),
    "3 heads of 32 on 1, no full block": dict(text=dict(hidden_size=96, num_attention_heads=3,
                                                        num_key_value_heads=1),
                                              vision=dict(num_heads=1, fullatt_block_indexes=[])),
}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("variant"), **VARIANTS[request.param])


# ------------------------------------------------------------------------------------- the network


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


def test_inputs_are_what_transformers_takes(small):
    """The mask may be transformers' integers, and an unpadded batch may leave it out."""
    row = make_batch(small.config, [[4, (4, 6), 5]])
    expected = our_logits(small.vlm, row)
    numbers = {**row, "attention_mask": row["attention_mask"].long()}
    assert torch.equal(our_logits(small.vlm, numbers), expected)
    assert deviation(our_logits(small.vlm, {**row, "attention_mask": None}), expected) < 1e-6


def test_windows_matter(small):
    """What the comparison above rests on: the same weights with one window over the whole picture
    answer otherwise."""
    batch = make_batch(small.config, BATCHES["one picture"])
    wide = make_model(make_config(vision=dict(window_size=448)))
    assert deviation(hf_logits(wide, batch), hf_logits(small.hf, batch)) > 100 * CLOSE


@pytest.mark.parametrize("change", ["a picture too many", "a picture too few", "a token too few",
                                    "no picture",
                                    "a patch too few", "no patches"])
def test_pictures_and_tokens_must_match(small, change):
    batch = make_batch(small.config, [[4, (4, 4), 2, (4, 6), 5]])
    if change == "a picture too many":
        batch["image_grid_thw"] = torch.cat([batch["image_grid_thw"], torch.tensor([[1, 2, 2]])])
        batch["pixel_values"] = torch.cat([batch["pixel_values"], batch["pixel_values"][:4]])
    elif change == "a picture too few":
        batch["image_grid_thw"] = batch["image_grid_thw"][:1]
        batch["pixel_values"] = batch["pixel_values"][:16]
    elif change == "a token too few":
        cut = (batch["input_ids"][0] == IMAGE_PAD).nonzero()[-1].item()
        batch["input_ids"][0, cut] = 7
    elif change == "a patch too few":
        batch["pixel_values"] = batch["pixel_values"][:-1]
    elif change == "no patches":
        batch["pixel_values"] = None
    else:
        batch["image_grid_thw"] = batch["pixel_values"] = None
    message = "image tokens|pixel_values holds .* the grids of image_grid_thw make 40"
    with pytest.raises(ValueError, match=message):
        small.vlm(**batch)


@pytest.mark.parametrize("rows", list(BATCHES)[1:4] + list(BATCHES)[5:])  # those with pictures
def test_positions_equal_transformers(small, rows):
    batch = make_batch(small.config, BATCHES[rows])
    theirs, delta = small.hf.model.get_rope_index(**hf_inputs(batch))
    ours, after = small.vlm.positions(batch["input_ids"], batch["attention_mask"],
                                      batch["image_grid_thw"])
    real = batch["attention_mask"]
    assert torch.equal(ours[:, real], theirs[:, real])
    # transformers keeps position minus length
    assert torch.equal(after, delta.flatten() + real.sum(1))


def test_positions_by_hand(small):
    # One padding token, two words, the start marker, a picture of 4 x 8 patches (2 x 4 tokens), the
    # end marker, a word. Words count 0, 1, 2; the picture starts at 3 in all three axes; its longer
    # side is 4, so the text goes on at 3 + 4 = 7, and the next token would be 9.
    ids = torch.tensor([[ENDOFTEXT, 10, 11, VISION_START] + 8 * [IMAGE_PAD] + [VISION_END, 12]])
    mask = torch.tensor([[False] + 13 * [True]])
    ours, after = small.vlm.positions(ids, mask, torch.tensor([[1, 4, 8]]))
    time = [0, 1, 2] + [3, 3, 3, 3, 3, 3, 3, 3] + [7, 8]
    height = [0, 1, 2] + [3, 3, 3, 3, 4, 4, 4, 4] + [7, 8]
    width = [0, 1, 2] + [3, 4, 5, 6, 3, 4, 5, 6] + [7, 8]
    assert ours[:, 0, 1:].tolist() == [time, height, width]
    assert after.tolist() == [9]


def test_random_weights_follow_the_seed(small, tmp_path):
    config = json.loads((small.path / "config.json").read_text())
    one, same, other = (model.VLM.from_config(*source)
                        for source in ((config, 0), (small.path, 0), (config, 1)))
    assert torch.equal(our_logits(one, PICTURES), our_logits(same, PICTURES))
    assert not torch.equal(our_logits(one, PICTURES), our_logits(other, PICTURES))
    entropy = torch.distributions.Categorical(logits=our_logits(one, PICTURES)).entropy()
    assert (entropy - np.log(304)).abs().max() < 1  # a fresh network knows nothing
    one.save_pretrained(tmp_path / "fresh")
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "fresh")
    assert_same_logits(one, hf)
    assert one.config.max_position_embeddings == 512


def test_first_weights_by_hand():
    """Norms 1, biases 0, matrices of spread 1 / sqrt(fan-in), and those that end a block smaller by
    1 / sqrt(2 x blocks)."""
    text = dict(hidden_size=256, intermediate_size=384, num_hidden_layers=2)
    vision = dict(hidden_size=96, intermediate_size=128, depth=4)
    weights = dict(model.VLM.from_config(make_config(text, vision).to_dict()).named_parameters())
    for name, std in (
            ("model.embed_tokens", 256 ** -0.5), ("model.layers.0.self_attn.q_proj", 256 ** -0.5),
            ("model.layers.1.self_attn.o_proj", (256 * 2 * 2) ** -0.5),
            ("model.layers.0.mlp.up_proj", 256 ** -0.5),
            ("model.layers.0.mlp.down_proj", (384 * 2 * 2) ** -0.5),
            ("visual.patch_embed.proj", (3 * 2 * 14 * 14) ** -0.5),
            ("visual.blocks.0.attn.qkv", 96 ** -0.5),
            ("visual.blocks.3.attn.proj", (96 * 2 * 4) ** -0.5),
            ("visual.blocks.0.mlp.down_proj", (128 * 2 * 4) ** -0.5),
            ("visual.merger.mlp.0", (4 * 96) ** -0.5)):
        assert weights[f"{name}.weight"].std().item() == pytest.approx(std, rel=0.03), name
        assert abs(weights[f"{name}.weight"].mean().item()) < 0.03 * std
    for name, p in weights.items():
        if p.dim() == 1:
            gain = "norm" in name or name.endswith("ln_q.weight")
            assert (p == (1.0 if gain else 0.0)).all(), name


def test_bfloat16(small):
    """As close to the float32 answer as transformers' own bfloat16 is."""
    hf, path = small.hf, small.path
    exact = hf_logits(hf, PICTURES)[REAL]
    vlm = model.VLM.from_pretrained(path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in vlm.parameters()} == {torch.bfloat16}
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.bfloat16,
                                                                attn_implementation="eager")
    ours = our_logits(vlm, PICTURES)[REAL]
    assert ours.dtype == torch.bfloat16
    assert deviation(ours, exact) < 1.5 * deviation(hf_logits(theirs, PICTURES)[REAL], exact)
    samples = vlm.generate(**PICTURES, n=2, max_new_tokens=4, generator=seeded(0))
    assert samples.logps.dtype == torch.float32 and samples.logps.isfinite().all()


# -------------------------------------------------------------------------------------- generation


@torch.no_grad()
def naive_greedy(vlm, batch, new_tokens, eos_ids=()):
    """No cache, no batch: read the whole row again for each token. -> a list of tokens for each
    row, the end token included."""
    answers = []
    for row in split_rows(batch):
        answer = []
        while len(answer) < new_tokens and not (answer and answer[-1] in eos_ids):
            # (1, t, V)
            logits = vlm(row["input_ids"], None, row["pixel_values"], row["image_grid_thw"])
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
    with pytest.raises(FrozenInstanceError):
        samples.tokens = None
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


def test_rows_leave_the_batch(small, shapes):
    """Sixteen prompts that end at many different times; each is right, and three equal samples of
    each are too."""
    rng = random.Random(0)
    rows = [[rng.randint(1, 12)] + rng.choice([[], [(4, 4), 2], [(2, 6), 1]]) for _ in range(16)]
    batch = make_batch(small.config, rows, seed=3)
    free = hf_greedy(small.hf, batch, 20)
    eos = tuple(free.flatten().bincount().topk(8).indices.tolist())
    expected = cut(free, eos)
    assert len({len(row) for row in expected}) > 5  # the case is what it claims to be
    assert sampled(small.vlm.generate(**batch, max_new_tokens=20, eos_ids=eos,
                                      **GREEDY)) == expected
    ends = len(shapes)
    tripled = sampled(small.vlm.generate(**batch, n=3, max_new_tokens=20, eos_ids=eos, **GREEDY))
    assert tripled == [row for row in expected for _ in range(3)]
    for n, steps in ((1, shapes[:ends]), (3, shapes[ends:])):
        left = [count for count, _ in steps]
        assert left[0] <= 16 * n and len(set(left)) > 2
        assert_rows_left_in_lots(left, 0.8)


def assert_rows_left_in_lots(left, share):
    """Rows left only when less than this share of the batch was not finished."""
    for before, after in zip(left, left[1:]):
        assert after == before or after < share * before


@pytest.mark.parametrize("static, batch_sizes", [(False, [5, 5]), (True, [4, 4])])
def test_rows_stay_while_just_enough_are_unfinished(small, shapes, static, batch_sizes):
    """Four of five, and in static shapes two of four: no row leaves, as leaving costs a copy."""
    rows = batch_sizes[0]
    batch = make_batch(small.config, [[3 + i] for i in range(rows)], seed=1)
    first = hf_greedy(small.hf, batch, 1)[:, 0].tolist()
    ends = set(first[:1] if not static else first[:2])
    assert sum(token in ends for token in first) == len(ends) == (2 if static else 1)
    small.vlm.generate(**batch, max_new_tokens=3, eos_ids=ends, static=static, **GREEDY)
    assert [count for count, _ in shapes] == batch_sizes


def test_static_shapes_give_the_same_tokens(small, shapes):
    """The step that CUDA records, run plainly: rows leave, yet every step looks at the whole room;
    tokens are those of transformers, samples and log-probabilities those of the growing step."""
    batch = make_batch(small.config, BATCHES["padded, with and without pictures"] * 2, seed=3)
    free = hf_greedy(small.hf, batch, 20)
    eos = tuple(free.flatten().bincount().topk(8).indices.tolist())
    ours = small.vlm.generate(**batch, n=2, max_new_tokens=20, eos_ids=eos, static=True, **GREEDY)
    assert sampled(ours) == [row for row in cut(free, eos) for _ in range(2)]
    assert {slots for _, slots in shapes} == {batch["input_ids"].shape[1] + 20}
    assert len({rows for rows, _ in shapes}) > 1  # the case is what it claims to be
    assert_rows_left_in_lots([rows for rows, _ in shapes], 0.5)
    options = dict(n=3, max_new_tokens=12, eos_ids=range(0, 280, 9))
    static, plain = (small.vlm.generate(**batch, generator=seeded(0), static=on, **options)
                     for on in (True, False))
    assert sampled(static) == sampled(plain)
    assert (static.logps - plain.logps).abs().max() < 1e-5


def test_the_growing_step_looks_at_what_is_there(small, shapes, monkeypatch):
    """Its token stands at the same position on all three axes."""
    places, angles = [], model.Decoder.angles

    def noted(decoder, positions):
        places.append(positions)
        return angles(decoder, positions)
    monkeypatch.setattr(model.Decoder, "angles", noted)
    small.vlm.generate(**make_batch(small.config, [[6], [3]]), max_new_tokens=4, **GREEDY)
    assert shapes == [(2, 7), (2, 8), (2, 9)]
    assert [place.shape for place in places] == [(3, 2, 6)] + [(3, 2, 1)] * 3


class Tape(TorchDispatchMode):
    """A CUDA graph for the CPU: it notes every operation with its operands, leaves the memory as it
    was, and runs the same operations on the same memory as often as it is replayed."""
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
                # neither a view nor changed in place
                if old is not None and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def taped(monkeypatch):
    """The tapes that are made where the model believes to be on CUDA."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", lambda tape: tape)
    monkeypatch.setattr(Tape, "taped", [])
    return Tape.taped


def test_a_step_is_recorded_at_its_second_call(small, taped):
    """The first one loads the kernels; the second is recorded and replayed, the third replayed."""
    with torch.no_grad():
        cache, _, after = small.vlm.prefill(**make_batch(small.config, [[4], [4]]))
        cache.share(1, 4, static=True)
        step = model.NextToken(small.vlm, cache, after)
        for tapes, replays in ((0, 0), (1, 1), (1, 2)):
            step(torch.tensor([5, 6]))
            assert (len(taped), sum(tape.replays for tape in taped)) == (tapes, replays)
        cache.static = False                                # shapes that grow cannot be replayed
        step(torch.tensor([5, 6]))
        assert sum(tape.replays for tape in taped) == 2


def test_a_recorded_step_can_be_replayed(small, taped):
    """What `generate` does on CUDA, with a tape as the graph: one recorded step continues for all
    later ones, without a look at the host, until rows leave and the smaller step is recorded
    anew."""
    batch = make_batch(small.config, BATCHES["padded, with and without pictures"] * 2, seed=3)
    free = hf_greedy(small.hf, batch, 20)
    eos = tuple(free.flatten().bincount().topk(8).indices.tolist())
    samples = small.vlm.generate(**batch, n=2, max_new_tokens=20, eos_ids=eos, **GREEDY)
    assert sampled(samples) == [row for row in cut(free, eos) for _ in range(2)]
    assert len(taped) > 1 and sum(tape.replays for tape in taped) > 5
    names = {operation.name() for tape in taped for operation, *_ in tape.calls}
    assert not names & {"aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh",
                        "aten::is_nonzero"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_generation_on_cuda(small):
    vlm = model.VLM.from_pretrained(small.path, device="cuda")
    batch = make_batch(small.config, BATCHES["padded, with and without pictures"], seed=2)
    expected = hf_greedy(small.hf, batch, 16).repeat_interleave(2, 0)
    batch = {name: value.to("cuda") for name, value in batch.items()}
    assert torch.equal(vlm.generate(**batch, n=2, max_new_tokens=16, **GREEDY).tokens.cpu(),
                       expected)


def test_greedy_after_a_first_end_token(small):
    """An answer of one token, for every row, is one column."""
    batch = make_batch(small.config, [[6], [3]])
    first = hf_greedy(small.hf, batch, 1)
    samples = small.vlm.generate(**batch, max_new_tokens=9, eos_ids=tuple(first.flatten().tolist()),
                                 **GREEDY)
    assert samples.tokens.tolist() == first.tolist() and samples.mask.all()


@pytest.mark.parametrize("options", [dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-4)],
                         ids=str)
def test_narrow_sampling_is_greedy(small, options):
    batch = make_batch(small.config, BATCHES["padded, with and without pictures"])
    free = hf_greedy(small.hf, batch, 8)
    samples = small.vlm.generate(**batch, n=2, max_new_tokens=8, generator=seeded(0), **options)
    assert torch.equal(samples.tokens, free.repeat_interleave(2, 0))


def test_a_seed_repeats(small):
    batch = make_batch(small.config, BATCHES["padded, with and without pictures"])

    def run(seed):
        return small.vlm.generate(**batch, n=4, max_new_tokens=10, eos_ids=range(0, 280, 7),
                                  generator=seeded(seed))
    first, again, other = run(1), run(1), run(2)
    assert sampled(first) == sampled(again) != sampled(other)
    assert torch.equal(first.logps, again.logps)
    assert len(first.tokens) == 4 * 4
    assert len({tuple(row) for row in sampled(first)}) > 8  # samples of one prompt differ


def with_answers(batch, samples, n):
    """Every prompt n times, each followed by its sample: inputs for a forward pass that knows
    nothing of generation, and (B*n, T+L) bool, True at sampled tokens. The rows are padded on both
    sides."""
    answers = torch.where(samples.mask, samples.tokens, ENDOFTEXT)
    prompts = {key: batch[key].repeat_interleave(n, 0) for key in ("input_ids", "attention_mask")}
    pictures = [row for row in split_rows(batch) for _ in range(n)
                if row["pixel_values"] is not None]
    full = dict(input_ids=torch.cat([prompts["input_ids"], answers], 1),
                attention_mask=torch.cat([prompts["attention_mask"], samples.mask], 1),
                pixel_values=torch.cat([row["pixel_values"] for row in pictures]),
                image_grid_thw=torch.cat([row["image_grid_thw"] for row in pictures]))
    targets = torch.cat([torch.zeros_like(prompts["attention_mask"]), samples.mask], 1)
    return full, targets


def sample_mixed(small, temperature=1.0, n=3, **options):
    batch = make_batch(small.config, BATCHES["padded, with and without pictures"], seed=4)
    samples = small.vlm.generate(**batch, n=n, max_new_tokens=12, temperature=temperature,
                                 eos_ids=range(0, 280, 9),
                                generator=seeded(0), **options)
    assert 2 < samples.mask.sum(1).float().mean() < 12
    return samples, *with_answers(batch, samples, n)


@pytest.mark.parametrize("options", [dict(), dict(top_k=5), dict(top_p=0.7)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probs_equal_transformers(small, temperature, options):
    """They are those of the distribution at the temperature, before top-k and top-p: what training
    recomputes."""
    samples, full, targets = sample_mixed(small, temperature, **options)
    logps = (hf_logits(small.hf, full) / temperature).log_softmax(-1)[:, :-1]  # (B, T-1, V)
    expected = logps.gather(2, full["input_ids"][:, 1:, None])[..., 0][targets[:, 1:]]
    assert (samples.logps[samples.mask] - expected).abs().max() < 1e-4


FILTERS = {"all": dict(), "top_k 5": dict(top_k=5), "top_p 0.6": dict(top_p=0.6),
           "both": dict(top_k=12, top_p=0.8)}


@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
def test_samples_follow_the_distribution(small, options):
    """Frequencies of 2,000 first tokens at temperature 0.7 against transformers' filtered
    softmax."""
    batch = make_batch(small.config, [[6, (4, 4), 3]])
    scores = hf_logits(small.hf, batch)[:, -1] / 0.7  # (1, V)
    scores = TopKLogitsWarper(options["top_k"])(None, scores) if "top_k" in options else scores
    scores = TopPLogitsWarper(options["top_p"])(None, scores) if "top_p" in options else scores
    n, probs = 2000, scores.softmax(-1)[0]
    samples = small.vlm.generate(**batch, n=n, max_new_tokens=1, temperature=0.7,
                                 generator=seeded(0), **options)
    seen = samples.tokens[:, 0].bincount(minlength=len(probs)).float()
    assert seen[probs == 0].sum() == 0
    # Pearson's test wants at least five expected in a cell; the rest is one cell
    often = n * probs >= 5
    expected = n * torch.cat([probs[often], probs[~often].sum()[None]])  # (cells,)
    observed = torch.cat([seen[often], seen[~often].sum()[None]])
    cells = int((expected > 0).sum())
    chi2 = ((observed - expected).square() / expected.clamp(min=1e-9)).sum().item()
    assert 2 < cells
    # the mean of chi-square and five standard deviations
    assert chi2 < cells + 5 * (2 * cells) ** 0.5


HALVES = torch.tensor([[0.25, 0.5, 0.125, 0.125]]).log()             # token 1 is the likeliest


@pytest.mark.parametrize("options, chosen", [
    (dict(), {0.0: 0, 0.24: 0, 0.26: 1, 0.74: 1, 0.76: 2, 0.87: 2, 0.88: 3, 0.9999999: 3}),
    (dict(top_k=1), {0.0: 1, 0.5: 1, 0.9999999: 1}),
    (dict(top_k=2), {0.0: 0, 0.33: 0, 0.34: 1, 0.9999999: 1}),
    (dict(top_k=4), {0.76: 2, 0.9999999: 3}),
    (dict(top_k=9), {0.76: 2, 0.9999999: 3}),
    (dict(top_p=0.49), {0.0: 1, 0.9999999: 1}),
    (dict(top_p=0.51), {0.0: 0, 0.33: 0, 0.34: 1, 0.9999999: 1}),
    (dict(top_k=2, top_p=0.7), {0.0: 0, 0.33: 0, 0.34: 1}),
    (dict(top_k=2, top_p=0.6), {0.0: 1, 0.33: 1})], ids=str)
def test_a_number_decides_a_token_by_hand(options, chosen):
    """The tokens lie on a line, each as long as its probability; the number falls on one of them.
    What is filtered away takes no room; the log-probability is that before the filters."""
    for noise, token in chosen.items():
        tokens, logps = model.pick(HALVES, 1.0, options.get("top_k", 0), options.get("top_p", 1.0),
                                   torch.tensor([noise]))
        assert tokens.tolist() == [token]
        assert logps.tolist() == pytest.approx([HALVES[0, token].item()])


def test_greedy_takes_the_likeliest_and_says_how_likely_it_was():
    tokens, logps = model.pick(HALVES, 0.0, 0, 1.0, torch.tensor([0.9]))
    assert tokens.tolist() == [1] and logps.tolist() == pytest.approx([math.log(0.5)])


def test_what_holds_top_p_exactly_is_enough():
    """Of two tokens of probability 0.5 one is left at top_p 0.5."""
    tokens, _ = model.pick(torch.zeros(2, 2), 1.0, 0, 0.5, torch.tensor([0.1, 0.9]))
    assert tokens[0] == tokens[1]


def test_no_number_decides_for_a_token_of_no_probability():
    """The largest number below 1, and 1 to which it may be rounded, fall on the last token that has
    a probability, not behind it."""
    logits = torch.tensor([[0.0, 0.0, -torch.inf]]).expand(2, -1)
    tokens, _ = model.pick(logits, 1.0, 0, 1.0, torch.tensor([1 - 2 ** -24, 1.0]))
    assert tokens.tolist() == [1, 1]
    broken, logps = model.pick(torch.full((1, 3), torch.nan), 1.0, 0, 1.0, torch.tensor([0.5]))
    assert broken.tolist() == [2] and logps.isnan().all()


def test_the_same_numbers_give_the_same_samples(small):
    """Without noise it is drawn from the generator, a row for each sample; row i decides sample i,
    whatever is beside it."""
    batch = make_batch(small.config, [[5], [5], [5]], seed=2)
    noise = torch.rand(6, 8, generator=seeded(4))
    drawn = small.vlm.generate(**batch, n=2, max_new_tokens=8, generator=seeded(4))
    given = small.vlm.generate(**batch, n=2, max_new_tokens=8, noise=noise)
    assert torch.equal(drawn.tokens, given.tokens)
    last = {name: value[2:] for name, value in batch.items() if value is not None}
    alone = small.vlm.generate(**last, n=2, max_new_tokens=8, noise=noise[4:])
    assert torch.equal(alone.tokens, given.tokens[4:])


def test_what_the_calls_take_where_nothing_is_said():
    """The defaults that DESIGN promises."""
    for function, defaults in (
            (model.VLM.generate, dict(n=1, max_new_tokens=256, temperature=1.0, top_k=0, top_p=1.0,
                                      eos_ids=(), generator=None)),
            (model.VLM.from_config, dict(seed=0, dtype=torch.float32, device="cpu")),
            (model.VLM.from_pretrained, dict(dtype=torch.float32, device="cpu")),
            (model.VLM.log_probs, dict(temperature=1.0)),
            (model.VLM.group_log_probs, dict(temperature=1.0, entropy="none")),
            (model.VLM.token_log_probs, dict(chunk_elements=2 ** 24)),
            (model.VLM.save_pretrained, dict(dtype=None, shard_bytes=5_000_000_000))):
        parameters = inspect.signature(function).parameters
        assert {name: parameters[name].default for name in defaults} == defaults


def test_the_lowest_temperature(small):
    batch = make_batch(small.config, [[5]])
    samples = small.vlm.generate(**batch, max_new_tokens=2, temperature=1e-6)
    assert samples.tokens.tolist() == hf_greedy(small.hf, batch, 2).tolist()
    targets = batch["attention_mask"]
    assert small.vlm.log_probs(**batch, targets_mask=targets, temperature=1e-6).isfinite().all()


@pytest.mark.parametrize("name, value", [("temperature", -1.0), ("temperature", float("nan")),
                                         ("temperature", 1e-310), ("temperature", float("inf")),
                                         ("top_p", 0.0),
                                         ("top_p", 1.5), ("top_k", -1), ("n", 0),
                                         ("max_new_tokens", 0)])
def test_generate_refuses(small, name, value):
    with pytest.raises(ValueError, match=f"{name} {value}"):
        small.vlm.generate(**make_batch(small.config, [[3]]), **{name: value})


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_log_probs_refuse(small, temperature):
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match=f"temperature {temperature}"):
        small.vlm.log_probs(ids, torch.ones_like(ids), temperature=temperature)


@pytest.mark.parametrize("n", [1, 3])
def test_a_chunk_appended_to_the_cache(small, n):
    """A prompt is read into the cache, then two chunks of several words (the second ragged, padded
    on the left) behind each of its n copies; the logits at the chunks are those of transformers for
    the whole row."""
    prompts = make_batch(small.config, BATCHES["padded, with and without pictures"], seed=6)
    rows = 4 * n
    lengths = [[[5]] * rows, [[1 + i % 4] for i in range(rows)]]
    chunks = [make_batch(small.config, words, seed) for words, seed in zip(lengths, (7, 8))]
    with torch.no_grad():
        cache, _, after = small.vlm.prefill(**prompts)
        cache.share(n, 16)
        after, ours = after.repeat_interleave(n), []
        for chunk in chunks:
            real = chunk["attention_mask"]
            cache.extend(real.shape[1], real)
            assert cache.bias.shape[-1] == cache.filled             # no more than there is
            # (rows, t): each real token one further
            positions = after[:, None] + real.cumsum(1) - 1
            embedded = small.vlm.model.embed_tokens(chunk["input_ids"])  # (rows, t, C)
            hidden = small.vlm.model(embedded, positions.expand(3, -1, -1), cache=cache)
            after = after + real.sum(1)
            ours.append(small.vlm.head(hidden))
    prompts = {name: [row[name] for row in split_rows(prompts) for _ in range(n)]
               for name in prompts}
    for i in range(rows):
        words = [chunk["input_ids"][i][chunk["attention_mask"][i]] for chunk in chunks]
        whole = {name: values[i] for name, values in prompts.items()}
        # (1, t + both chunks)
        whole["input_ids"] = torch.cat([whole["input_ids"][0], *words])[None]
        whole["attention_mask"] = torch.ones_like(whole["input_ids"], dtype=torch.bool)
        theirs = hf_logits(small.hf, whole)[0, -sum(map(len, words)):]
        mine = torch.cat([logits[i][chunk["attention_mask"][i]] for logits,
                          chunk in zip(ours, chunks)])
        assert deviation(mine, theirs) < CLOSE


def test_a_sampled_picture_token_is_only_a_token(small, tmp_path):
    """Nothing stops a model from sampling <|image_pad|>. What generate returns, log_probs must be
    able to score."""
    hf = make_model(make_config(tied=False), seed=3)
    head = hf.lm_head.weight.data
    head[IMAGE_PAD] = 3 * head[:FIRST_CONTROL].abs().max(0).values
    vlm = model.VLM.from_pretrained(save_checkpoint(hf, tmp_path / "talks in pictures"))
    batch = make_batch(hf.config, [[3, (4, 4), 4]] * 8, seed=1)
    samples = vlm.generate(**batch, max_new_tokens=12, temperature=2.0, generator=seeded(0))
    full, targets = with_answers(batch, samples, 1)
    again = vlm.log_probs(**full, targets_mask=targets, temperature=2.0)
    assert (again[targets[:, 1:]] - samples.logps[samples.mask]).abs().max() < 1e-4


def test_weights_that_are_multiplied_as_one(small):
    """Those of q, k and v below one another, in layers without an adapter there."""
    vlm, x = fresh(small), torch.randn(5, 64, generator=seeded(0))
    add_lora(vlm, 2, 4, targets=("layers.1.self_attn.k_proj", "layers.2.self_attn.o_proj"))
    fused = vlm.model.fused_weights()
    assert list(fused) == [0, 2]
    for i, (weight, bias) in fused.items():
        a = vlm.model.layers[i].self_attn
        parts = torch.cat((a.q_proj(x), a.k_proj(x), a.v_proj(x)), dim=-1)
        assert torch.allclose(torch.nn.functional.linear(x, weight, bias), parts, atol=1e-5)


def test_generation_sees_weights_that_were_trained(small):
    """The product of q, k and v is made of the weights of the moment """
    vlm, batch = fresh(small), make_batch(small.config, [[6], [3]])
    before = vlm.generate(**batch, max_new_tokens=8, **GREEDY).tokens
    with torch.no_grad():
        for layer in vlm.model.layers:
            layer.self_attn.q_proj.weight.mul_(-1)
    after = vlm.generate(**batch, max_new_tokens=8, **GREEDY)
    assert sampled(after) == naive_greedy(vlm, batch, 8) != before.tolist()


# ----------------------------------------------------------------- log-probabilities with gradient


def gradients(network, loss):
    """{published name: gradient} of a scalar; works for transformers' network and for ours."""
    network.zero_grad()
    loss.backward()
    found = {name: weight.grad for name,
             weight in network.named_parameters() if weight.grad is not None}
    network.zero_grad()
    return new_keys(found)


def assert_gradients_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    largest = max(gradient.abs().max() for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() < 1e-4 * max(gradient.abs().max(),
                                                                1e-3 * largest), name


def plain_log_probs(logits, batch, temperature):
    """The whole (B, T, V) log-softmax, then a gather -> (B, T-1)."""
    return (logits[:, :-1] / temperature).log_softmax(-1).gather(2,
                                                                 batch["input_ids"][:, 1:,
                                                                                    None])[..., 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_gradients_equal_the_plain_way(pair, temperature):
    """Values and the gradient of every weight, the vision tower's included, against our own logits
    and against transformers'."""
    batch = make_batch(pair.config, [[5, (6, 10), 9], [12], [(4, 4), 2, (14, 6), 9]], seed=9)
    length = batch["input_ids"].shape[1]
    targets = batch["attention_mask"] & (torch.arange(length) > length - 10)
    weights = torch.randn(targets[:, 1:].shape, generator=seeded(0)) * targets[:, 1:]
    ours = pair.vlm.log_probs(**batch, targets_mask=targets, temperature=temperature)
    assert ours.shape == weights.shape and ours.dtype == torch.float32
    assert not ours[~targets[:, 1:]].any()
    plain = plain_log_probs(pair.vlm(**batch), batch, temperature) * targets[:, 1:]
    theirs = plain_log_probs(pair.hf(**hf_inputs(batch)).logits, batch, temperature) * targets[:,
                                                                                               1:]
    assert (ours - plain).abs().max() < 1e-5
    assert (ours - theirs).abs().max() < 1e-4
    assert_gradients_equal(gradients(pair.vlm, (ours * weights).sum()),
                           gradients(pair.hf, (theirs * weights).sum()))


def test_log_probs_take_the_mask_of_the_targets_too(small):
    batch = make_batch(small.config, [[9], [6]])
    targets = batch["attention_mask"].clone()
    targets[:, :4] = False
    whole = small.vlm.log_probs(batch["input_ids"], targets, batch["attention_mask"])
    assert torch.equal(small.vlm.log_probs(batch["input_ids"], targets[:, 1:],
                                           batch["attention_mask"]), whole)
    nothing = small.vlm.log_probs(batch["input_ids"], torch.zeros_like(targets),
                                  batch["attention_mask"])
    assert torch.equal(nothing, torch.zeros(2, 8))


def test_log_probs_of_all_tokens_pictures_included(small):
    """The mask may cover a prompt's pictures: they stand where the grids say, and their ids have
    log-probabilities."""
    ours = small.vlm.log_probs(**PICTURES, targets_mask=REAL)
    both = REAL[:, 1:] & REAL[:, :-1]                   # a row's first token is given nothing
    theirs = plain_log_probs(hf_logits(small.hf, PICTURES), PICTURES, 1.0)
    assert (PICTURES["input_ids"] == IMAGE_PAD).any() and (ours - theirs)[both].abs().max() < 1e-4


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_the_head_in_chunks(small, chunk):
    """Chunks of 1, 7 and all of 20 positions: the same values, entropies and gradients as one
    log-softmax over everything."""
    generator = seeded(0)
    hidden = torch.randn(20, 64, generator=generator, requires_grad=True)
    targets = torch.randint(0, 304, (20,), generator=generator)
    logps, entropy = small.vlm.token_log_probs(hidden, targets, 0.8, entropy="value",
                                               chunk_elements=304 * chunk)
    plain = torch.distributions.Categorical(logits=small.hf.lm_head(hidden) / 0.8)
    assert (logps - plain.log_prob(targets)).abs().max() < 1e-5 * logps.abs().max()
    assert (entropy - plain.entropy()).abs().max() < 1e-5
    assert not entropy.requires_grad
    ours, = torch.autograd.grad(logps.sum(), hidden)
    theirs, = torch.autograd.grad(plain.log_prob(targets).sum(), hidden)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("chunk", [7, 1000])
def test_the_gradient_of_the_entropy(small, chunk):
    hidden = torch.randn(20, 64, generator=seeded(0), requires_grad=True)
    targets = torch.randint(0, 304, (20,), generator=seeded(1))
    _, entropy = small.vlm.token_log_probs(hidden, targets, 0.8, entropy="grad",
                                           chunk_elements=304 * chunk)
    plain = torch.distributions.Categorical(logits=small.hf.lm_head(hidden) / 0.8).entropy()
    ours, = torch.autograd.grad(entropy.sum(), hidden)
    theirs, = torch.autograd.grad(plain.sum(), hidden)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_a_chunk_is_as_large_as_may_be(small, monkeypatch):
    """The head sees 3 tokens at a time where 3 x 304 logits may live, and never fewer than one."""
    sizes, head = [], small.vlm.head
    monkeypatch.setattr(small.vlm, "head", lambda hidden: sizes.append(len(hidden)) or head(hidden))
    hidden = torch.randn(7, 64, generator=seeded(0), requires_grad=True)
    targets = torch.zeros(7, dtype=torch.long)
    for elements, expected in ((3 * 304 + 303, [3, 3, 1]), (1, [1] * 7), (7 * 304 - 1, [6, 1])):
        sizes.clear()
        logps, _ = small.vlm.token_log_probs(hidden, targets, 1.0, "none", elements)
        assert sizes == expected
        logps.sum().backward()
        assert sizes == expected + expected[::-1]               # computed again
    sizes.clear()
    logps, _ = small.vlm.token_log_probs(hidden, targets, 1.0, "none", 7 * 304)
    logps.sum().backward()
    assert sizes == [7]                                         # where all fit, once is enough


def test_sampled_log_probs_equal_the_recomputed_ones(small):
    samples, full, targets = sample_mixed(small, temperature=0.7)
    again = small.vlm.log_probs(**full, targets_mask=targets, temperature=0.7)
    assert (again[targets[:, 1:]] - samples.logps[samples.mask]).abs().max() < 1e-4
    assert not samples.logps[~samples.mask].any()


def test_a_group_in_one_row_equals_separate_rows(small):
    """Prefix sharing, with and without pictures and padding: values, entropies, and gradients
    against transformers on separate rows."""
    n, rows = 3, BATCHES["padded, with and without pictures"]
    samples, full, targets = sample_mixed(small, temperature=0.9, n=n)
    prompts = make_batch(small.config, rows, seed=4)
    ours, entropy = small.vlm.group_log_probs(samples.tokens, samples.mask, **prompts,
                                              temperature=0.9, entropy="value")
    plain = torch.distributions.Categorical(logits=small.hf(**hf_inputs(full)).logits[:, :-1] / 0.9)
    theirs = plain.log_prob(full["input_ids"][:, 1:])[targets[:, 1:]]
    assert (ours[samples.mask] - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert (entropy[samples.mask] - plain.entropy()[targets[:, 1:]]).abs().max() < 1e-4
    assert not ours[~samples.mask].any() and not entropy[~samples.mask].any()
    separate = small.vlm.log_probs(**full, targets_mask=targets, temperature=0.9)
    assert (ours[samples.mask] - separate[targets[:, 1:]]).abs().max() < 1e-5 * theirs.abs().max()
    weights = torch.randn(len(theirs), generator=seeded(0))
    expected = gradients(small.hf, (theirs * weights).sum())
    assert_gradients_equal(gradients(small.vlm, (ours[samples.mask] * weights).sum()), expected)


def test_masks_of_a_group(small):
    """Numbers do as well as truths; a response that does not start at its row's beginning is
    refused."""
    tokens, prompts = torch.tensor([[5, 6, 7], [8, 9, 4]]), make_batch(small.config, [[4]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    ours = small.vlm.group_log_probs(tokens, mask, **prompts)
    assert torch.equal(ours, small.vlm.group_log_probs(tokens, mask.bool(),
                                                       **prompts)) and not ours[0, 2] and ours[1, 2]
    for wrong in ([0, 1, 1], [1, 0, 1]):
        with pytest.raises(ValueError, match="one run from its beginning"):
            small.vlm.group_log_probs(tokens, torch.tensor([wrong, [1, 1, 1]]).bool(), **prompts)
    right = torch.tensor([[True, True, True, False]])
    with pytest.raises(ValueError, match="padded on the left"):
        small.vlm.group_log_probs(tokens, mask, prompts["input_ids"], right)


def test_gradient_checkpointing_changes_nothing(small):
    """The same gradients; each layer is computed once more in the backward pass."""
    batch, calls = make_batch(small.config, [[5, (4, 4), 3], [7]]), []
    hook = small.vlm.model.layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))

    def run():
        return gradients(small.vlm, small.vlm(**batch)[batch["attention_mask"]].square().mean())
    plain, once = run(), len(calls)
    small.vlm.model.gradient_checkpointing = True
    try:
        assert_gradients_equal(run(), plain)
    finally:
        small.vlm.model.gradient_checkpointing = False
        hook.remove()
    assert (once, len(calls)) == (1, 3)
