"""Speed beside peers: one process, the same random weights, equal results asserted first, then
timed in turns.

    python -m lab.bench                                                every part, for a CPU
    python -m lab.bench update --shape d512                            one part, one shape
    python -m lab.bench model rollout update --device cuda --shape 3b

    model      forward, prefill, a plain training step; decoding of real shapes
                                                                       against transformers
    rollout    n samples behind each prompt                            transformers.generate
    update     one Step-GRPO update, a row for each sample and with a shared prefix
                                                                       on transformers' model
    retrieve   a base of 200,000 vectors; the text encoder             hnswlib, faiss, numpy
    router     questions in batch                                      one by one

A figure is the median of rounds in which the ways take turns, so that a slow spell of the machine
meets all of them. The last line is one JSON object: {"command", "shapes", "load", "figures": {part:
{name: figure}}, "ratio": {"part name": times better than the peer}, "machine"}. Real shapes (3b,
7b) are updated without a peer: their memory is what is asked.

Legend of shapes: N prompts   n samples of a prompt   P prompt tokens   L response tokens
                  V vocabulary   Q queries   D dimension of a vector

Peers are imported where they are needed: the parts model, rollout and update want torch and
transformers only, so that they run on a bare GPU machine.
"""
import ctypes
import gc
import inspect
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from grpo import grpo_loss
from model import VLM, Processor, add_lora
from plumbing.files import run_command
from plumbing.options import OneLineParser, add_flags, check_options, from_flags, option
from plumbing.run import MasterAdamW

HERE = Path(__file__).resolve().parent.parent

# ------------------------------------------------------------------------------------------- sizes


@dataclass(frozen=True)
class Load:
    """How much work is timed."""
    runs: int = option(5, "rounds, of which the median counts", least=1)
    rows: int = option(4, "prompts of a batch (model, rollout)", least=1)
    prompt: int = option(500, "tokens of a prompt, those of its picture included", least=1)
    samples: int = option(8, "samples of a prompt (rollout, update)", least=1)
    new: int = option(64, "tokens of a response (rollout, update, decoding)", least=1)
    groups: int = option(1, "prompts of an update, each with its samples", least=1)
    vectors: int = option(200_000, "vectors of the base (retrieve)", least=1)
    queries: int = option(1_000, "queries (retrieve)", least=1)
    texts: int = option(512, "passages for the encoder (retrieve)", least=1)
    questions: int = option(200, "questions (router)", least=1)
    vocabulary: int = option(151_936, "words where the memory of an update is measured; the "
                             "published number", least=1)


QUICK = Load(runs=1, rows=2, prompt=80, samples=4, new=8, groups=1, vectors=3_000, queries=50,
             texts=8, questions=4, vocabulary=20_000)


def shape(hidden, layers, heads, kv_heads, inner, vocab, tower, tied=True):
    """config.json of a Qwen2.5-VL of these sizes; the last ids of the vocabulary are the control
    tokens. tower: the vision tower's sizes, in the order of `names`."""
    names = ("depth", "hidden_size", "intermediate_size", "num_heads", "patch_size", "window_size",
             "fullatt_block_indexes")
    pairs = hidden // heads // 2
    side = 3 * pairs // 8                           # rotary pairs of the height, and of the width
    return {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "tie_word_embeddings": tied,
        "rope_scaling": {"type": "mrope", "mrope_section": [pairs - 2 * side, side, side]},
        "image_token_id": vocab - 1,
        "video_token_id": vocab - 2,
        "vision_start_token_id": vocab - 3,
        "vision_end_token_id": vocab - 4,
        "vision_config": {**dict(zip(names, tower)), "in_channels": 3, "temporal_patch_size": 2,
                          "spatial_merge_size": 2, "hidden_act": "silu", "out_hidden_size": hidden},
    }


PUBLISHED_TOWER = (32, 1280, 3420, 16, 14, 112, [7, 15, 23, 31])
SHAPES = {"tiny": shape(96, 4, 4, 2, 256, 900, (2, 64, 128, 2, 8, 32, [1])),
          "d512": shape(512, 10, 8, 2, 1408, 4096, (4, 128, 256, 4, 14, 112, [3])),
          "3b": shape(2048, 36, 16, 2, 11008, 151_936, PUBLISHED_TOWER),
          "7b": shape(3584, 28, 28, 4, 18944, 152_064, PUBLISHED_TOWER, tied=False)}
REAL = ("3b", "7b")
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}   # dense bf16, from the data sheets
MEMORY_GOALS = {("3b", 0): 80, ("7b", 16): 48, ("3b", 16): 24}  # GB, by shape and adapter's rank

# --------------------------------------------------------------------------------- timing, figures


def figure(name, value, unit, at_least=None, at_most=None, **more):
    """A line of the table: `value`, perhaps `peer`, `peer_value` and `ratio` (how many times better
    than the peer). The goal speaks of the ratio where there is one, else of the value."""
    row = {"name": name, "value": value, "unit": unit, **more}
    judged = more.get("ratio", value)
    if at_least is not None:
        row |= {"goal": f">= {at_least:.3g}", "met": bool(judged >= at_least)}
    elif at_most is not None:
        row |= {"goal": f"<= {at_most:.3g}", "met": bool(judged <= at_most)}
    return row


def compared(name, times, ours, peer, work, unit, at_least=None):
    """A figure from the seconds of two ways: `work` units in a second of ours, beside the peer's;
    and the least and the largest ratio of a round."""
    our_time, peer_time = median(times[ours]), median(times[peer])
    ratios = [theirs / mine for mine, theirs in zip(times[ours], times[peer])]
    return figure(name, work / our_time, unit, at_least, peer=peer, peer_value=work / peer_time,
                  ratio=peer_time / our_time, rounds=[min(ratios), max(ratios)])


def wait_for(device):
    """Returns when the device has done what it was told."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def in_turns(ways, runs, device="cpu", warm=True):
    """{name: seconds of each round}; the ways take turns, backwards every other round. One round
    before warms up."""
    times = {name: [] for name in ways}
    for i in range(-1 if warm else 0, runs):
        names = list(ways)
        if i % 2:
            names.reverse()
        for name in names:
            wait_for(device)
            start = time.perf_counter()
            ways[name]()
            wait_for(device)
            if i >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def agree(equal, what):
    """Speed is compared for equal results only."""
    if not equal:
        raise ValueError(f"{what} not equal to the peer's, so nothing was timed")


def deviation(a, b):
    """Largest difference over the largest value."""
    difference = (a.float() - b.float()).abs().max()
    return (difference / b.float().abs().max()).item()


def resident(name):
    """Bytes of this process in memory (Linux): "VmRSS" now, "VmHWM" at the most."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(name + ":")[1].split()[0])


class PeakMemory:
    """with PeakMemory(device) as peak: ... -> peak.bytes: growth of memory to its highest point
    inside the block."""

    def __init__(self, device):
        self.cuda = torch.device(device).type == "cuda"

    def __enter__(self):
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)        # what was freed and kept would hide growth
            Path("/proc/self/clear_refs").write_text("5")       # the high-water mark starts anew
            self.before = resident("VmRSS")
        return self

    def __exit__(self, *_):
        peak = torch.cuda.max_memory_allocated() if self.cuda else resident("VmHWM")
        self.bytes = peak - self.before


def machine(device):
    """Where the figures were measured; `load` is the number of busy processes in the last minute,
    ours included."""
    cpu, peers = platform.processor(), {}
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
    for name in ("transformers", "faiss"):
        if sys.modules.get(name):
            peers[name] = sys.modules[name].__version__
    cuda = torch.device(device).type == "cuda"
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "load": round(os.getloadavg()[0], 2), "torch": torch.__version__, **peers}


# ----------------------------------------------------------------------------- models and batches


def needed(name):
    """Imports a peer, or says in one line that it is not there."""
    try:
        module = __import__(name)
    except ImportError as error:
        raise ValueError(f"the peer {name} is missing ({error}): pip install -r "
                         "requirements-dev.txt") from None
    if name == "transformers":
        module.logging.set_verbosity_error()
        module.logging.disable_progress_bar()
    return module


def both_models(o, config):
    """Our model with random weights, and transformers' with a copy of them."""
    hf = needed("transformers")
    ours = VLM.from_config(config, dtype=o.dtype, device=o.device)
    settings = hf.Qwen2_5_VLConfig.from_dict(config)
    with torch.device(o.device):
        peer = hf.Qwen2_5_VLForConditionalGeneration._from_config(settings, dtype=o.dtype)
    weights = {}
    for name, p in ours.named_parameters():
        theirs = name.replace("model.", "model.language_model.", 1)
        weights["model." + name if name.startswith("visual.") else theirs] = p.detach()
    missing, unexpected = peer.load_state_dict(weights, strict=False)
    agree(not unexpected and set(missing) <= {"lm_head.weight"}, "names of the weights")
    peer.generation_config = hf.GenerationConfig(pad_token_id=0)    # no end: full-length answers
    return ours, peer.eval()


def prompts(o, config, rows, length, seed=0):
    """A left-padded batch of random words with one picture a row, as the processor returns it.

    The longest row has `length` tokens, the shortest a twentieth less; a picture takes 64 tokens of
    a long prompt, 16 of a short one.
    """
    g = torch.Generator().manual_seed(seed)
    grid = (1, 16, 16) if length >= 200 else (1, 8, 8)
    patches = grid[1] * grid[2]
    patch = 3 * 2 * config["vision_config"]["patch_size"] ** 2
    picture = [config["vision_start_token_id"], *[config["image_token_id"]] * (patches // 4),
               config["vision_end_token_id"]]
    ids = torch.zeros(rows, length, dtype=torch.long)
    mask = torch.zeros(rows, length, dtype=torch.bool)
    for i in range(rows):
        count = length - len(picture) - i * length // (20 * rows)
        words = torch.randint(config["vocab_size"] - 8, (count,), generator=g)
        row = torch.cat((words[:count // 2], torch.tensor(picture), words[count // 2:]))
        ids[i, -len(row):] = row
        mask[i, -len(row):] = True
    pixels = torch.randn(rows * patches, patch, generator=g).to(o.dtype)
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels,
             "image_grid_thw": torch.tensor([grid] * rows)}
    return {name: tensor.to(o.device) for name, tensor in batch.items()}


def for_peer(peer, batch):
    """Our batch as transformers wants it; recent versions ask for a type of each token, 1 at
    pictures."""
    batch = {**batch, "attention_mask": batch["attention_mask"].long()}
    if "mm_token_type_ids" in inspect.signature(peer.forward).parameters:
        batch["mm_token_type_ids"] = (batch["input_ids"] == peer.config.image_token_id).int()
    return batch


def behind(batch, tokens):
    """A row for each sample: each prompt (N, P) repeated before its responses, tokens (N n, L) -> a
    batch of (N n, P + L), and the mask of the responses in it."""
    N, P = batch["input_ids"].shape
    n = len(tokens) // N
    rows = {}
    for name, tensor in batch.items():
        per_prompt = tensor.unflatten(0, (N, -1))                               # (N, rows, ...)
        rows[name] = per_prompt.repeat_interleave(n, 0).flatten(0, 1)           # (N n rows, ...)
    ones = torch.ones_like(tokens, dtype=torch.bool)
    rows["input_ids"] = torch.cat((rows["input_ids"], tokens), 1)               # (N n, P + L)
    rows["attention_mask"] = torch.cat((rows["attention_mask"], ones), 1)
    return rows, F.pad(ones, (P, 0))


def peer_generate(peer, batch, new, **options):
    """transformers' generate -> (rows, new) tokens."""
    hf = needed("transformers")
    settings = hf.GenerationConfig(max_new_tokens=new, pad_token_id=0, **options)
    tokens = peer.generate(**for_peer(peer, batch), generation_config=settings)
    return tokens[:, batch["input_ids"].shape[1]:]


@torch.no_grad()
def agree_on_greedy(o, vlm, peer, batch, new, n, what):
    """Our greedy tokens are transformers'. In half precision near ties fall either way: there
    transformers, reading our tokens of the first prompt, must find them as likely as its own."""
    ours = vlm.generate(**batch, n=n, max_new_tokens=new, temperature=0.0).tokens
    if o.dtype == torch.float32:
        theirs = peer_generate(peer, batch, new, do_sample=False).repeat_interleave(n, 0)
        agree(torch.equal(ours, theirs), f"{what}: greedy tokens are")
        return
    rows = len(batch["input_ids"])
    first = {name: tensor[:len(tensor) // rows] for name, tensor in batch.items()}
    full, _ = behind(first, ours[:1])
    logits = peer(**for_peer(peer, full), logits_to_keep=new + 1, use_cache=False).logits
    logits = logits[0, :-1].float()                                             # (L, V)
    chosen = logits.gather(1, ours[0, :, None])[:, 0]
    lost = (logits.max(-1).values - chosen).mean()
    agree(lost < 0.05, f"{what}: greedy tokens ({lost:.3f} nats worse) are")


# ------------------------------------------------------------------------------------- part: model


def bench_model(o):
    """Reading a batch, a plain training step; of the real shapes decoding instead of training."""
    for name in o.shape:
        vlm, peer = both_models(o, SHAPES[name])
        batch = prompts(o, SHAPES[name], o.load.rows, o.load.prompt)
        yield from bench_reading(o, name, vlm, peer, batch)
        if name in REAL:
            yield from bench_decoding(o, name, vlm, peer)
        else:
            yield from bench_training(o, name, vlm, peer, batch)


@torch.no_grad()
def bench_reading(o, name, vlm, peer, batch):
    """forward: all logits. prefill: what generation begins with, the cache kept, logits of the last
    token only."""
    theirs, real = for_peer(peer, batch), batch["attention_mask"]

    def our_prefill():
        hidden = vlm.prefill(**batch)[1]
        return vlm.head(hidden)[:, None]

    def their_prefill():
        return peer(**theirs, use_cache=True, logits_to_keep=1).logits

    def our_forward():
        return vlm(**batch)

    def their_forward():
        return peer(**theirs, use_cache=False).logits

    for title, ours, peers in (("forward", our_forward, their_forward),
                               ("prefill", our_prefill, their_prefill)):
        a, b = ours(), peers()                                                  # (B, T or 1, V)
        shown = real[:, -a.shape[1]:]
        close = 1e-4 if o.dtype == torch.float32 else 0.05
        agree(deviation(a[shown], b[shown]) < close, f"{name} {title}: logits are")
        del a, b
        times = in_turns({"ours": ours, "transformers": peers}, o.load.runs, o.device)
        yield compared(f"{name} {title}", times, "ours", "transformers", int(real.sum()),
                       "tokens/s", at_least=1.0)


def adamw(model):
    weights = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(weights, lr=1e-6, fused=True)


def step(loss, optimizer):
    """Backward and one step of the optimizer."""
    loss.backward()
    if isinstance(optimizer, MasterAdamW):
        optimizer.clip()
        optimizer.step(1e-6)
    else:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def bench_training(o, name, vlm, peer, batch):
    """Forward, mean loss of every word, backward, AdamW."""
    theirs, real = for_peer(peer, batch), batch["attention_mask"]
    words = real & real.roll(1, 1) & (batch["input_ids"] != vlm.config.image_token_id)
    words[:, 0] = False                                         # what begins a row follows nothing
    labels = batch["input_ids"].masked_fill(~words, -100)
    optimizer, peer_optimizer = adamw(vlm), adamw(peer)

    def our_loss():
        return -vlm.log_probs(**batch, targets_mask=words).sum() / words.sum()

    def their_loss():
        return peer(**theirs, labels=labels, use_cache=False).loss

    def ours():
        step(our_loss(), optimizer)

    def peers():
        step(their_loss(), peer_optimizer)

    close = 1e-4 if o.dtype == torch.float32 else 0.02
    different = deviation(our_loss().detach(), their_loss().detach())
    agree(different < close, f"{name} training step: loss is")
    times = in_turns({"ours": ours, "transformers": peers}, o.load.runs, o.device)
    yield compared(f"{name} training step", times, "ours", "transformers", int(real.sum()),
                   "tokens/s", at_least=1.0)


def bench_decoding(o, name, vlm, peer):
    """Tokens a second behind the prompt: the time of a long answer less that of an answer of one
    token.

    The limit of decoding is memory: each step reads every weight of the decoder and of the head
    once.
    """
    tied = vlm.config.tie_word_embeddings
    weight_bytes = (vlm.model.embed_tokens if tied else vlm.lm_head).weight.nbytes
    for key, p in vlm.named_parameters():
        if key.startswith(("model.layers", "model.norm")):
            weight_bytes += p.nbytes
    new = o.load.new
    for rows, speed_goal, share_goal in ((1, 4.0, 0.6), (64, None, None)):
        batch = prompts(o, SHAPES[name], rows, o.load.prompt)
        title = f"batch {rows}"
        agree_on_greedy(o, vlm, peer, batch, new, 1, f"{name} decoding, {title}")

        def ours(length=new):
            vlm.generate(**batch, max_new_tokens=length, temperature=0.0)

        def peers(length=new):
            peer_generate(peer, batch, length, do_sample=False)

        ways = {("ours", new): ours, ("transformers", new): peers,
                ("ours", 1): lambda: ours(1), ("transformers", 1): lambda: peers(1)}
        seconds = in_turns(ways, o.load.runs, o.device)
        times = {}
        for side in ("ours", "transformers"):
            pairs = zip(seconds[side, 1], seconds[side, new])
            times[side] = [max(long - short, 1e-9) for short, long in pairs]
        yield compared(f"{name} decoding, {title}", times, "ours", "transformers",
                       rows * (new - 1), "tokens/s", speed_goal)
        used = weight_bytes * (new - 1) / median(times["ours"]) / copy_bandwidth(o.device)
        yield figure(f"{name} share of the memory bandwidth, {title}", used, "of 1", share_goal)
        with PeakMemory(o.device) as peak:
            ours()
        weights = sum(p.nbytes for p in vlm.parameters())
        yield figure(f"{name} memory, {title}", (weights + peak.bytes) / 1e9, "GB")


def copy_bandwidth(device):
    """Bytes a second that a copy of 512 MiB reads and writes: what the memory really gives."""
    a = torch.zeros(2 ** 27, device=device)
    b = torch.empty_like(a)
    times = in_turns({"copy": lambda: b.copy_(a)}, 5, device)
    return 2 * a.nbytes / median(times["copy"])


# ----------------------------------------------------------------------------------- part: rollout


def bench_rollout(o):
    """n samples behind each prompt, as an update of Step-GRPO needs them, all of full length.

    The tiny shape has short prompts, as in the embedded world: rows of prompts with many samples
    each, and for comparison as many rows that have nothing to share.
    """
    few, many, short = o.load.rows, o.load.samples, o.load.new * 3 // 4
    for name in o.shape:
        vlm, peer = both_models(o, SHAPES[name])
        # prompts, samples of each, tokens of a prompt and of a response, goal
        cases = [(few, many, o.load.prompt, o.load.new, 2.0)]
        if name == "tiny":
            cases = [(2 * few, many, 80, short, 3.0), (2 * few * many, 1, 80, short, None)]
        for rows, n, length, new, goal in cases:
            batch = prompts(o, SHAPES[name], rows, length)
            title = f"{name} rollout, {rows} x {n} x {new}"
            agree_on_greedy(o, vlm, peer, batch, new, n, title)
            generator = torch.Generator(o.device).manual_seed(0)

            def ours():
                vlm.generate(**batch, n=n, max_new_tokens=new, generator=generator)

            def peers():
                peer_generate(peer, batch, new, num_return_sequences=n, do_sample=True, top_k=0)

            times = in_turns({"ours": ours, "transformers": peers}, o.load.runs, o.device)
            yield compared(title, times, "ours", "transformers", rows * n * new, "tokens/s", goal)


# ------------------------------------------------------------------------------------ part: update


def policy_loss(logp, old, advantages):
    """The loss of training (Eq. 4) where every token counts; all (N n, L) but advantages (N n,)."""
    mask = torch.ones_like(logp, dtype=torch.bool)
    return grpo_loss(logp, old, advantages, mask)[0]


def group(o, config, prompt, new):
    """What an update sees: prompts, responses (N n, L) of random words, how far the old
    log-probabilities are off (N n, L), advantages (N n,)."""
    g = torch.Generator().manual_seed(1)
    rows = o.load.groups * o.load.samples
    tokens = torch.randint(config["vocab_size"] - 8, (rows, new), generator=g)
    noise = 0.1 * torch.randn(rows, new, generator=g)
    advantages = torch.randn(rows, generator=g)
    batch = prompts(o, config, o.load.groups, prompt)
    return batch, tokens.to(o.device), noise.to(o.device), advantages.to(o.device)


def log_prob_ways(vlm, peer, batch, tokens):
    """Log-probabilities (N n, L) of the responses in three ways. The peer's head is applied to
    responses only, too. With a shared prefix the entropies are computed beside them, as train.py
    does."""
    full, targets = behind(batch, tokens)
    P, L = batch["input_ids"].shape[1], tokens.shape[1]
    mask = torch.ones_like(tokens, dtype=torch.bool)

    def ours():
        return vlm.log_probs(**full, targets_mask=targets)[:, P - 1:]

    def shared():
        return vlm.group_log_probs(tokens, mask, **batch, entropy="value")[0]

    def peers():
        logits = peer(**for_peer(peer, full), logits_to_keep=L + 1, use_cache=False).logits
        logp = logits[:, :-1].float().log_softmax(-1)                           # (N n, L, V)
        return logp.gather(2, tokens[..., None])[..., 0]

    return {"ours": ours, "shared": shared, "transformers": peers}


def bench_update(o):
    """One Step-GRPO update: log-probabilities with gradient, loss, backward, optimizer."""
    for name in o.shape:
        yield from (real_update if name in REAL else small_update)(o, name)


def small_update(o, name):
    """A row for each sample, and with a shared prefix, against transformers: time, and memory at a
    large vocabulary."""
    vlm, peer = both_models(o, SHAPES[name])
    batch, tokens, noise, advantages = group(o, SHAPES[name], o.load.prompt, o.load.new)
    ways = log_prob_ways(vlm, peer, batch, tokens)
    with torch.no_grad():
        old = ways["transformers"]() + noise
    optimizer, peer_optimizer = adamw(vlm), adamw(peer)

    def gradient(way, model):
        """Loss and norm of the gradient, (2,)."""
        loss = policy_loss(ways[way](), old, advantages)
        loss.backward()
        norms = [p.grad.float().norm() for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        return torch.stack((loss.detach(), torch.stack(norms).norm()))

    theirs = gradient("transformers", peer)
    for way in ("ours", "shared"):
        close = 1e-3 if o.dtype == torch.float32 else 0.05
        agree(deviation(gradient(way, vlm), theirs) < close,
              f"{name} update, {way}: loss and norm of the gradient are")

    def update(way, optimizer):
        return lambda: step(policy_loss(ways[way](), old, advantages), optimizer)

    updates = {"ours": update("ours", optimizer), "shared": update("shared", optimizer),
               "transformers": update("transformers", peer_optimizer)}
    times = in_turns(updates, o.load.runs, o.device)
    work = len(tokens) * (o.load.prompt + o.load.new)
    yield compared(f"{name} update, a row a sample", times, "ours", "transformers", work,
                   "tokens/s", at_least=1.0)
    yield compared(f"{name} update, shared prefix", times, "shared", "transformers", work,
                   "tokens/s", at_least=2.0)
    ours = in_fresh_process(update_peak, o, name, "shared") / 1e6
    peers = in_fresh_process(update_peak, o, name, "transformers") / 1e6
    yield figure(f"{name} update, memory at V {o.load.vocabulary}", ours, "MB", 2.0,
                 peer="transformers", peer_value=peers, ratio=peers / ours)


def update_peak(o, name, way):
    """Bytes that an update at the large vocabulary adds to this process at its peak. A small update
    before it gives the optimizer its state."""
    config = {**SHAPES[name], "vocab_size": o.load.vocabulary}
    if way == "transformers":
        vlm, peer = both_models(o, config)
    else:
        vlm, peer = VLM.from_config(config, 0, o.dtype, o.device), None
    optimizer = adamw(peer or vlm)
    for prompt, new in ((80, 2), (o.load.prompt, o.load.new)):
        batch, tokens, noise, advantages = group(o, config, prompt, new)
        log_probs = log_prob_ways(vlm, peer, batch, tokens)[way]
        with PeakMemory(o.device) as peak:
            logp = log_probs()
            step(policy_loss(logp, logp.detach() + noise, advantages), optimizer)
            del logp
    return peak.bytes


def in_fresh_process(function, *args):
    """What function(*args) returns in a process that has done nothing else: memory that is freed is
    not always given back, so only a fresh process shows what is needed."""
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    except BrokenProcessPool:
        raise ValueError(f"{function.__name__}: its process was killed; is there too little "
                         "memory?") from None


def real_update(o, name):
    """An update of a published shape: seconds, share of the card's arithmetic, memory.

    Activations are recomputed layer by layer; of the matrix products neither that nor attention is
    counted, and frozen weights have no gradient.
    """
    vlm = VLM.from_config(SHAPES[name], 0, o.dtype, o.device)
    vlm.model.gradient_checkpointing = True
    if o.lora:
        add_lora(vlm, o.lora, 2 * o.lora)
    batch, tokens, noise, advantages = group(o, SHAPES[name], o.load.prompt, o.load.new)
    log_probs = log_prob_ways(vlm, None, batch, tokens)["shared"]
    weights = sum(p.nbytes for p in vlm.parameters())
    with PeakMemory(o.device) as peak:
        optimizer = adamw(vlm)
        if o.dtype != torch.float32 and not o.lora:
            optimizer = MasterAdamW(vlm.named_parameters(), 1e-6)

        def update():
            logp = log_probs()
            step(policy_loss(logp, logp.detach() + noise, advantages), optimizer)

        seconds = median(in_turns({"update": update}, o.load.runs, o.device)["update"])
    packed = o.load.groups * (o.load.prompt + o.load.samples * o.load.new)      # tokens
    linear = sum(p.numel() for p in vlm.model.layers.parameters() if p.dim() == 2)
    head = vlm.model.embed_tokens.weight.numel()                # applied to the responses only
    products = linear * packed + head * tokens.numel()
    rate = (4 if o.lora else 6) * products / seconds
    adapter = f" LoRA {o.lora}" if o.lora else ""
    title = f"{name}{adapter} update, {o.load.groups} x {o.load.samples}"
    yield figure(f"{title}, seconds", seconds, "s")
    yield figure(f"{title}, computed", packed / seconds, "tokens/s")
    yield figure(f"{title}, arithmetic", rate / 1e12, "TFLOP/s")
    for card, flops in PEAK_FLOPS.items():
        if card in machine(o.device)["device"]:
            yield figure(f"{title}, share of the bf16 peak", rate / flops, "of 1", at_least=0.4)
    yield figure(f"{title}, memory", (weights + peak.bytes) / 1e9, "GB",
                 at_most=MEMORY_GOALS.get((name, o.lora)))


# ---------------------------------------------------------------------------------- part: retrieve


def bench_retrieve(o):
    """The text encoder against transformers; a base of vectors against the libraries beneath and
    exact search."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        yield from bench_encoder(o, Path(folder))
        yield from bench_base(o, Path(folder))
    torch.set_num_threads(threads)                              # faiss sets them for torch, too


def random_bert(folder):
    """A BERT of MiniLM's size with random weights and 2,000 words, saved by transformers: (net,
    tokenizer)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    hf = needed("transformers")
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"w{i}" for i in range(2000))]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    torch.manual_seed(0)
    net = hf.BertModel(hf.BertConfig(vocab_size=len(words), hidden_size=384, num_hidden_layers=6,
                                     num_attention_heads=12, intermediate_size=1536)).eval()
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]",
                                      model_max_length=512)
    net.save_pretrained(folder)
    fast.save_pretrained(folder)
    return net, fast


def bench_encoder(o, folder):
    """Passages of 20 to 100 words; both sides sort by length, the peer batches by 32."""
    from parts.pretrained import load_encoder
    net, tokenizer = random_bert(folder / "bert")
    encoder, rng, texts = load_encoder(folder / "bert"), np.random.default_rng(0), []
    for _ in range(o.load.texts):
        words = rng.integers(2000, size=rng.integers(20, 101))
        texts.append(" ".join(f"w{i}" for i in words))
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))

    @torch.inference_mode()
    def peers():
        vectors = torch.empty(len(texts), 384)
        for start in range(0, len(order), 32):
            rows = order[start:start + 32]
            batch = tokenizer([texts[i] for i in rows], padding=True, return_tensors="pt")
            vectors[rows] = F.normalize(net(**batch).last_hidden_state[:, 0], dim=1)
        return vectors.numpy()

    def ours():
        return encoder.encode_docs([{"text": text} for text in texts])

    agree(np.abs(ours() - peers()).max() < 1e-4, "encoder: vectors are")
    times = in_turns({"ours": ours, "transformers": peers}, o.load.runs)
    yield compared("encoder", times, "ours", "transformers", len(texts), "passages/s", at_least=1.0)


def clustered(count, queries, dim=384, seed=0):
    """Unit vectors (count, D) and queries (Q, D) in clusters of about 200; they differ from their
    centre along 32 directions mostly, as embeddings do."""
    rng, clusters = np.random.default_rng(seed), max(1, count // 200)
    centres = rng.standard_normal((clusters, dim))
    directions = rng.standard_normal((32, dim)) / 32 ** 0.5
    x = np.empty((count + queries, dim), np.float32)
    for part in np.array_split(x, max(1, len(x) // 10_000)):
        own = centres[rng.integers(clusters, size=len(part))]
        part[:] = own + rng.standard_normal((len(part), 32)) @ directions
        part += 0.1 * rng.standard_normal(part.shape)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return x[:count], x[count:]


def exact(vectors, queries, k):
    """Rows (Q, k) of the largest inner products by numpy, in no order."""
    rows = []
    for start in range(0, len(queries), 100):
        scores = queries[start:start + 100] @ vectors.T
        rows.append(np.argpartition(scores, -k, axis=1)[:, -k:])
    return np.concatenate(rows)


def recall_of(rows, truth):
    """Recall@k of rows (Q, k)."""
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(rows, truth)]))


def least_ef(rows_at, truth, target, step=5):
    """The smallest number of candidates, in steps, with which rows_at(ef) (Q, k) reaches the
    recall."""
    for ef in range(truth.shape[1], 1000, step):
        if recall_of(rows_at(ef), truth) >= target:
            return ef
    return 1000


def given_encoder(vectors, queries):
    """An encoder that looks vectors up, so that only the base is timed: document "7" is row 7."""
    from parts.encoders import Encoder

    class Given(Encoder):
        name, dim = "given", vectors.shape[1]

        def encode_docs(self, docs):
            return vectors[[int(doc["id"]) for doc in docs]]

        def encode_queries(self, asked):
            return queries[[int(query) for query in asked]]

    return Given()


def base_memory(path):
    """Bytes that an open base takes in this process."""
    from retrieve import KnowledgeBase
    nothing = np.empty((0, 384), np.float32)
    before = resident("VmRSS")
    kb = KnowledgeBase.load(path, given_encoder(nothing, nothing))
    grown = resident("VmRSS") - before
    del kb                                                      # it was open until here
    return grown


class Peers:
    """The same vectors in hnswlib and in faiss; near(name, ef) gives the rows (Q, k) they find."""

    def __init__(self, vectors, queries, k, M, ef_construction):
        self.vectors, self.queries, self.k = vectors, queries, k
        self.M, self.ef_construction = M, ef_construction

    def build_hnswlib(self):
        index = needed("hnswlib").Index("ip", self.vectors.shape[1])
        index.init_index(len(self.vectors), M=self.M, ef_construction=self.ef_construction,
                         random_seed=0)
        index.set_num_threads(os.cpu_count())
        index.add_items(self.vectors)
        self.hnswlib = index

    def build_faiss(self):
        faiss = needed("faiss")
        faiss.omp_set_num_threads(os.cpu_count())
        dim = self.vectors.shape[1]
        self.faiss = faiss.IndexHNSWFlat(dim, self.M, faiss.METRIC_INNER_PRODUCT)
        self.faiss.hnsw.efConstruction = self.ef_construction
        self.faiss.add(self.vectors)

    def near(self, name, ef):
        if name == "hnswlib":
            self.hnswlib.set_ef(ef)
            return self.hnswlib.knn_query(self.queries, self.k)[0]
        self.faiss.hnsw.efSearch = ef
        return self.faiss.search(self.queries, self.k)[1]


def bench_base(o, folder, k=10, M=16, ef_construction=200):
    """Build, size, recall, speed, on all cores. ef is the smallest with which bare hnswlib reaches
    recall 0.985."""
    from retrieve import KnowledgeBase
    needed("faiss")
    vectors, queries = clustered(o.load.vectors, o.load.queries)
    docs = [{"id": str(i), "text": f"passage {i}"} for i in range(len(vectors))]
    encoder, bases = given_encoder(vectors, queries), []
    peers = Peers(vectors, queries, k, M, ef_construction)

    def ours():
        bases[:] = [KnowledgeBase.build(docs, encoder, M=M, ef_construction=ef_construction,
                                        threads=os.cpu_count())]

    builds = {"ours": ours, "hnswlib": peers.build_hnswlib}
    times = in_turns(builds, min(o.load.runs, 3), warm=False)
    yield compared("build", times, "ours", "hnswlib", len(vectors), "vectors/s", at_least=1 / 1.1)
    bases.pop().save(folder / "base")
    peers.build_faiss()
    truth = exact(vectors, queries, k)
    ef = least_ef(lambda ef: peers.near("hnswlib", ef), truth, 0.985)
    disk = sum(file.stat().st_size for file in (folder / "base").iterdir())
    memory = in_fresh_process(base_memory, folder / "base")
    yield figure("disk", disk / len(vectors), "bytes a vector")
    yield figure("memory", memory / len(vectors), "bytes a vector")
    kb = KnowledgeBase.load(folder / "base", encoder, ef=ef)
    yield from bench_search(o, kb, peers, truth, ef)
    yield from bench_exact(o, KnowledgeBase.build(docs, encoder, index="flat"), kb, peers, truth)


def bench_search(o, kb, peers, truth, ef):
    """Scores and rows of the best k, as the libraries return them, and hits with their texts."""
    vectors, queries, k = peers.vectors, peers.queries, peers.k
    names = [str(i) for i in range(len(queries))]
    scores, rows = kb.search_vectors(queries, k)                                # (Q, k) each
    right = np.einsum("qkd,qd->qk", vectors[rows], queries)
    recall = recall_of(rows, truth)
    ids = [[hit.id for hit in hits] for hits in kb.search(names, k)]
    agree(np.abs(scores - right).max() < 1e-4, "search: scores are")
    agree(ids == rows.astype(str).tolist(), "search: hits are")
    agree(abs(recall - recall_of(peers.near("hnswlib", ef), truth)) < 0.01, "search: recall is")
    yield figure(f"recall@{k}, ef {ef}", recall, "of 1", at_least=0.98)
    faiss_ef = least_ef(lambda ef: peers.near("faiss", ef), truth, recall, step=1)
    ways = {"ours": lambda: kb.search_vectors(queries, k), "hits": lambda: kb.search(names, k),
            "hnswlib": lambda: peers.near("hnswlib", ef),
            "faiss": lambda: peers.near("faiss", faiss_ef)}
    times = in_turns(ways, o.load.runs)
    for title, way, peer, goal in (("search against hnswlib", "ours", "hnswlib", 0.9),
                                   (f"search against faiss, ef {faiss_ef}", "ours", "faiss", 1.0),
                                   ("search, hits with texts", "hits", "hnswlib", None)):
        yield compared(title, times, way, peer, len(queries), "queries/s", goal)


def bench_exact(o, flat, kb, peers, truth):
    """The graph against exact search by numpy, one query at a time and all at once; how fast our
    exact search goes over its half-precision vectors."""
    vectors, k, few = peers.vectors, peers.k, peers.queries[:100]
    agree(recall_of(flat.search_vectors(few, k)[1], truth) > 0.98,
          "flat: rows, but for half precision, are")
    single = [few[i:i + 1] for i in range(len(few))]
    for title, parts, goal in (("one by one", single, 20.0), ("at once", [few], None)):
        ways = {"ours": lambda: [kb.search_vectors(part, k) for part in parts],
                "numpy": lambda: [exact(vectors, part, k) for part in parts],
                "flat": lambda: [flat.search_vectors(part, k) for part in parts]}
        times = in_turns(ways, o.load.runs)
        title = f"{len(few)} queries {title}"
        yield compared(title, times, "ours", "numpy", len(few), "queries/s", goal)
        read = 2 * vectors.size * len(parts)                    # bytes of half-precision vectors
        yield figure(f"flat, {title}", read / 1e9 / median(times["flat"]), "GB/s")


# ------------------------------------------------------------------------------------ part: router


def world_router(o, folder):
    """A router with the model of the flags, and questions of a small world in the folder."""
    from infer import Router
    from parts.questions import load_questions
    from parts.stepfiles import load_prompts
    from retrieve import world_bases
    words = ["--split", "test", "--seed", "1000", "--out", folder,
             "--questions", str(o.load.questions)]
    if o.quick:
        words += ["--countries", "40"]
    command = [sys.executable, "-m", "lab.world", *words]
    if subprocess.run(command, cwd=HERE, stdout=subprocess.DEVNULL).returncode:
        raise ValueError("lab.world could not write a world: see its message above")
    rows, _ = load_questions(Path(folder) / "questions.jsonl")
    vlm = VLM.from_pretrained(o.model, o.dtype, o.device)
    prompts_file = Path(o.model) / "prompts.json"
    own = load_prompts(prompts_file) if prompts_file.is_file() else {}
    router = Router(vlm, Processor.from_pretrained(o.model), world_bases(folder), prompts=own,
                    max_new_tokens=64)
    return router, rows


def bench_router(o):
    """Questions of an embedded world through the router: all at once against one by one; where the
    time goes.

    The model's share is that of generation; prompts, pictures, decoding and parsing are the rest.
    Each share is the median of the rounds.
    """
    batched, alone, shares, spent = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        router, rows = world_router(o, folder)
        generate = router.vlm.generate

        def timed(**batch):
            start = time.perf_counter()
            samples = generate(**batch)
            wait_for(o.device)
            spent.append(time.perf_counter() - start)
            return samples

        def at_once():
            spent.clear()
            start = time.perf_counter()
            trajectories = router.run(rows)
            seconds = time.perf_counter() - start
            model = sum(spent) / seconds
            search = sum(t.seconds_search for t in trajectories) / seconds
            shares.append((model, search, max(1 - model - search, 1e-6)))
            batched[:] = [t.answer for t in trajectories]

        def one_by_one():
            alone[:] = [router.run([row])[0].answer for row in rows]

        router.vlm.generate = timed
        ways = {"ours": at_once, "one by one": one_by_one}
        times = in_turns(ways, o.load.runs, o.device, warm=False)
    agree(batched == alone, "router: answers are")
    yield compared(f"{len(rows)} questions in batch", times, "ours", "one by one", len(rows),
                   "questions/s", 4.0)
    model, search, rest = map(median, zip(*shares))
    yield figure("time in the model", model, "of 1")
    yield figure("time in search", search, "of 1")
    yield figure("time in the rest", rest, "of 1", at_most=0.1)


# ------------------------------------------------------------------------------------ command line

PARTS = {"model": bench_model, "rollout": bench_rollout, "update": bench_update,
         "retrieve": bench_retrieve, "router": bench_router}


@dataclass(frozen=True)
class BenchOptions:
    """Speed beside peers, for equal results."""
    shape: tuple = option((), f"of model, rollout, update, some of {', '.join(SHAPES)}; by default "
                          "tiny and d512, on CUDA 3b", nargs="+")
    device: str = option("cpu", "cpu or cuda, of model, rollout, update and router")
    dtype: str = option("", "of the weights; by default float32, on CUDA bfloat16",
                        choices=("", "float32", "bfloat16", "float16"))
    lora: int = option(0, "rank of the adapter that an update of a real shape trains; 0: none")
    model: str = option(str(HERE / "weights" / "tiny"), "model directory of router")
    quick: bool = option(False, "a toy scale, to see that everything runs")

    def __post_init__(self):
        check_options(self)


def print_line(f):
    """One line of the table."""
    def number(x):
        return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"

    line = f"  {f['name']:<46} {number(f['value']):>8} {f['unit']:<15}"
    if "ratio" in f:
        low, high = f.get("rounds", (None, None))
        spread = f", rounds {low:.2f} to {high:.2f}" if "rounds" in f else ""
        line += f"{f['ratio']:5.2f} x {f['peer']} ({number(f['peer_value'])}{spread})"
    if "goal" in f:
        line += f"  goal {f['goal']}: {'met' if f['met'] else 'missed'}"
    print(line, flush=True)


def parse_options(words):
    """Flags -> (names of the parts, what they ask of their options: shapes, dtype, load, ...)."""
    p = OneLineParser(prog="lab.bench", description=BenchOptions.__doc__)
    p.add_argument("part", nargs="*", help=f"{', '.join(PARTS)}; by default all")
    add_flags(p, BenchOptions)
    add_flags(p, Load)
    args = p.parse_args(words)
    o, load = from_flags(BenchOptions, args), from_flags(Load, args)
    cuda = torch.device(o.device).type == "cuda"
    for name in args.part:
        if name not in PARTS:
            raise ValueError(f"unknown part {name!r}: give {', '.join(PARTS)}")
    for name in o.shape:
        if name not in SHAPES:
            raise ValueError(f"unknown shape {name!r}: give {', '.join(SHAPES)}")
    if cuda and not torch.cuda.is_available():
        raise ValueError(f"--device {o.device}: torch sees no CUDA device on this machine")
    if o.quick:
        given = {f.name: getattr(load, f.name) for f in fields(Load) if hasattr(args, f.name)}
        load = replace(QUICK, **given)
    usual = ("tiny",) if o.quick else ("3b",) if cuda else ("tiny", "d512")
    shapes = o.shape or usual
    if o.lora and not set(shapes) & set(REAL):
        raise ValueError(f"--lora {o.lora} is of the shapes {' and '.join(REAL)} only, not of "
                         f"{' and '.join(shapes)}")
    dtype = getattr(torch, o.dtype or ("bfloat16" if cuda else "float32"))
    more = {"shape": shapes, "dtype": dtype, "load": load}
    return args.part or list(PARTS), SimpleNamespace(**{**asdict(o), **more})


def command(words):
    """Prints a table of each part, then all figures as one JSON object."""
    parts, o = parse_options(words)
    figures, ratios = {part: {} for part in parts}, {}
    for part in parts:
        print(part, flush=True)
        for f in PARTS[part](o):
            print_line(f)
            name = f.pop("name")
            figures[part][name] = f
            if "ratio" in f:
                ratios[f"{part} {name}"] = f["ratio"]
    print(json.dumps({"command": " ".join(["lab.bench", *words]), "shapes": list(o.shape),
                      "load": asdict(o.load), "figures": figures, "ratio": ratios,
                      "machine": machine(o.device)}))


def main(argv=None):
    return run_command("lab.bench", command, argv)


if __name__ == "__main__":
    sys.exit(main())
