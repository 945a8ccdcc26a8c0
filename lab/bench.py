"""Speed beside peers: one process, the same random weights, equal results asserted first, then timed in turns.

    python bench.py                                                every part, at sizes for a CPU
    python bench.py update --shape d512                            one part, one shape
    python bench.py model rollout update --device cuda --shape 3b

    model      forward, prefill, a plain training step; decoding of real shapes    against transformers
    rollout    n samples behind each prompt                                        transformers.generate
    update     one Step-GRPO update, a row a sample and with a shared prefix       the same on transformers' model
    retrieve   a base of 200,000 vectors; the text encoder                         hnswlib, faiss, numpy; transformers
    router     questions in batch                                                  one by one

A figure is the median of rounds in which the ways take turns, so that a slow spell of the machine meets all of them.
The last line is one JSON object: {"command", "shapes", "load", "figures": {part: {name: figure}}, "ratio": {"part
name": times better than the peer}, "machine"}. Real shapes (3b, 7b) are updated without a peer: their memory is what
is asked.

Legend of shapes: N prompts   n samples of a prompt   P prompt tokens   L response tokens   V vocabulary
                  Q queries   D dimension of a vector

Peers and other files of this project are imported where they are needed: the parts model, rollout and update want
torch, transformers and model.py only, so that they run on a bare GPU machine.
"""
import argparse
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
from dataclasses import asdict, dataclass, field, fields
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F

from model import VLM
from parts.chat import Processor
from parts.lora import add_lora

HERE = Path(__file__).resolve().parents[1]

# --------------------------------------------------------------------------------------------------------------- sizes


def size(default, quick, text):
    return field(default=default, metadata={"quick": quick, "help": text})


@dataclass(frozen=True)
class Load:
    """How much work is timed. Each field is a flag; --quick is a toy scale that only shows that everything runs."""
    runs: int = size(5, 1, "rounds, of which the median counts")
    rows: int = size(4, 2, "prompts of a batch (model, rollout)")
    prompt: int = size(500, 80, "tokens of a prompt, those of its picture included")
    samples: int = size(8, 4, "samples of a prompt (rollout, update)")
    new: int = size(64, 8, "tokens of a response (rollout, update, decoding)")
    groups: int = size(1, 1, "prompts of an update, each with its samples")
    vectors: int = size(200_000, 3_000, "vectors of the base (retrieve)")
    queries: int = size(1_000, 50, "queries (retrieve)")
    texts: int = size(512, 8, "passages for the encoder (retrieve)")
    questions: int = size(200, 4, "questions (router)")
    vocabulary: int = size(151_936, 20_000, "words where the memory of an update is measured; the published one")


def shape(hidden, layers, heads, kv_heads, inner, vocab, tower, tied=True):
    """config.json of a Qwen2.5-VL of these sizes; the last ids of the vocabulary are the control tokens."""
    pairs = hidden // heads // 2
    side = 3 * pairs // 8                                       # rotary pairs of the height, and of the width
    names = ("depth", "hidden_size", "intermediate_size", "num_heads", "patch_size", "window_size",
             "fullatt_block_indexes")
    return {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_act": "silu", "rms_norm_eps": 1e-6,
            "max_position_embeddings": 32768, "rope_theta": 1e6, "tie_word_embeddings": tied,
            "rope_scaling": {"type": "mrope", "mrope_section": [pairs - 2 * side, side, side]},
            "image_token_id": vocab - 1, "video_token_id": vocab - 2, "vision_start_token_id": vocab - 3,
            "vision_end_token_id": vocab - 4,
            "vision_config": {**dict(zip(names, tower)), "in_channels": 3, "temporal_patch_size": 2,
                              "spatial_merge_size": 2, "hidden_act": "silu", "out_hidden_size": hidden}}


PUBLISHED_TOWER = (32, 1280, 3420, 16, 14, 112, [7, 15, 23, 31])
SHAPES = {"tiny": shape(96, 4, 4, 2, 256, 900, (2, 64, 128, 2, 8, 32, [1])),
          "d512": shape(512, 10, 8, 2, 1408, 4096, (4, 128, 256, 4, 14, 112, [3])),
          "3b": shape(2048, 36, 16, 2, 11008, 151_936, PUBLISHED_TOWER),
          "7b": shape(3584, 28, 28, 4, 18944, 152_064, PUBLISHED_TOWER, tied=False)}
REAL = ("3b", "7b")
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}   # dense bf16, from the data sheets
MEMORY_GOALS = {("3b", 0): 80, ("7b", 16): 48, ("3b", 16): 24}  # GB of an update, by shape and rank of the adapter

# ----------------------------------------------------------------------------------------------------- timing, figures


def figure(name, value, unit, at_least=None, at_most=None, **more):
    """A line of the table: `value`, perhaps `peer`, `peer_value` and `ratio` (how many times better than the peer).

    The goal speaks of the ratio where there is one, else of the value."""
    judged, goal = more.get("ratio", value), {}
    if at_least is not None:
        goal = {"goal": f">= {at_least:.3g}", "met": bool(judged >= at_least)}
    elif at_most is not None:
        goal = {"goal": f"<= {at_most:.3g}", "met": bool(judged <= at_most)}
    return {"name": name, "value": value, "unit": unit, **more, **goal}


def compared(name, times, ours, peer, work, unit, at_least=None):
    """A figure from the seconds of two ways: `work` units a second of ours, beside the peer's; least and largest ratio
    of a round."""
    a, b = times[ours], times[peer]
    rounds = [y / x for x, y in zip(a, b)]
    return figure(name, work / median(a), unit, at_least, peer=peer, peer_value=work / median(b),
                  ratio=median(b) / median(a), rounds=[min(rounds), max(rounds)])


def in_turns(ways, runs, device="cpu", warm=True):
    """{name: seconds of each round}; the ways take turns, backwards every other round. One round before warms up."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    times = {name: [] for name in ways}
    for i in range(-1 if warm else 0, runs):
        for name, way in list(ways.items())[::-1 if i % 2 else 1]:
            wait()
            start = time.perf_counter()
            way()
            wait()
            if i >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def agree(equal, what):
    """Speed is compared for equal results only."""
    if not equal:
        raise ValueError(f"{what} not equal to the peer's, so nothing was timed")


def deviation(a, b):
    """Largest difference over the largest value."""
    return ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()


def resident(name):
    """Bytes of this process in memory (Linux): "VmRSS" now, "VmHWM" at the most."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(name + ":")[1].split()[0])


class PeakMemory:
    """with PeakMemory(device) as peak: ... -> peak.bytes: growth of memory to its highest point inside the block."""
    def __init__(self, device):
        self.cuda = torch.device(device).type == "cuda"

    def __enter__(self):
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL(None).malloc_trim(0)                    # what was freed and kept would hide what is allocated
            Path("/proc/self/clear_refs").write_text("5")       # the high-water mark starts anew
        self.before = torch.cuda.memory_allocated() if self.cuda else resident("VmRSS")
        return self

    def __exit__(self, *_):
        self.bytes = (torch.cuda.max_memory_allocated() if self.cuda else resident("VmHWM")) - self.before


def machine(device):
    """Where the figures were measured; `load` is the number of busy processes in the last minute, ours included."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    peers = {name: sys.modules[name].__version__ for name in ("transformers", "faiss") if sys.modules.get(name)}
    return {"cpu": (names or [platform.processor()])[0], "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "cpu",
            "load": round(os.getloadavg()[0], 2), "torch": torch.__version__, **peers}


# ------------------------------------------------------------------------------------------------- models and batches


def needed(name):
    """Import a peer, or say in one line that it is not there."""
    try:
        module = __import__(name)
    except ImportError as e:
        raise ValueError(f"the peer {name} is missing ({e}): pip install -r requirements-dev.txt") from None
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
    weights = {n.replace("model.", "model.language_model.", 1): p.detach() for n, p in ours.named_parameters()}
    weights = {"model." + n if n.startswith("visual.") else n: p for n, p in weights.items()}
    missing, unexpected = peer.load_state_dict(weights, strict=False)
    agree(not unexpected and set(missing) <= {"lm_head.weight"}, "names of the weights")
    peer.generation_config = hf.GenerationConfig(pad_token_id=0)                  # no end token: full-length answers
    return ours, peer.eval()


def prompts(o, config, rows, length, seed=0):
    """A left-padded batch of random words with one picture a row, as the processor would return it. The longest row has
    `length` tokens, the shortest a twentieth less; a picture takes 64 tokens of a long prompt, 16 of a short one."""
    g = torch.Generator().manual_seed(seed)
    grid = (1, 16, 16) if length >= 200 else (1, 8, 8)
    patches, patch = grid[1] * grid[2], 3 * 2 * config["vision_config"]["patch_size"] ** 2
    picture = [config[f"vision_{name}_token_id"] for name in ("start", "end")]
    picture[1:1] = [config["image_token_id"]] * (patches // 4)
    ids, mask = torch.zeros(rows, length, dtype=torch.long), torch.zeros(rows, length, dtype=torch.bool)
    for i in range(rows):
        count = length - len(picture) - i * length // (20 * rows)
        words = torch.randint(config["vocab_size"] - 8, (count,), generator=g)
        row = torch.cat((words[:count // 2], torch.tensor(picture), words[count // 2:]))
        ids[i, -len(row):], mask[i, -len(row):] = row, True
    batch = {"input_ids": ids, "attention_mask": mask, "image_grid_thw": torch.tensor([grid] * rows),
             "pixel_values": torch.randn(rows * patches, patch, generator=g).to(o.dtype)}
    return {k: v.to(o.device) for k, v in batch.items()}


def for_peer(peer, batch):
    """Our batch as transformers wants it; recent versions ask for a type of each token, 1 at pictures."""
    batch = {**batch, "attention_mask": batch["attention_mask"].long()}
    if "mm_token_type_ids" in inspect.signature(peer.forward).parameters:
        batch["mm_token_type_ids"] = (batch["input_ids"] == peer.config.image_token_id).int()
    return batch


def behind(batch, tokens):
    """A row a sample: each prompt (N, P) repeated before its responses, tokens (N n, L) -> a batch of (N n, P + L), and
    the mask of the responses in it."""
    N, P = batch["input_ids"].shape
    n = len(tokens) // N
    rows = {k: v.unflatten(0, (N, -1)).repeat_interleave(n, 0).flatten(0, 1) for k, v in batch.items()}
    ones = torch.ones_like(tokens, dtype=torch.bool)
    rows["input_ids"] = torch.cat((rows["input_ids"], tokens), 1)
    rows["attention_mask"] = torch.cat((rows["attention_mask"], ones), 1)
    return rows, F.pad(ones, (P, 0))


def peer_generate(peer, batch, new, **options):
    """transformers' generate -> (rows, new) tokens."""
    settings = needed("transformers").GenerationConfig(max_new_tokens=new, pad_token_id=0, **options)
    return peer.generate(**for_peer(peer, batch), generation_config=settings)[:, batch["input_ids"].shape[1]:]


@torch.no_grad()
def agree_on_greedy(o, vlm, peer, batch, new, n, what):
    """Our greedy tokens are transformers'. In half precision near ties fall either way: there transformers, reading our
    tokens of the first prompt, must find them as likely as its own choices."""
    ours = vlm.generate(**batch, n=n, max_new_tokens=new, temperature=0.0).tokens
    if o.dtype == torch.float32:
        theirs = peer_generate(peer, batch, new, do_sample=False)
        return agree(torch.equal(ours, theirs.repeat_interleave(n, 0)), f"{what}: greedy tokens are")
    rows = len(batch["input_ids"])
    full, _ = behind({k: v[:len(v) // rows] for k, v in batch.items()}, ours[:1])
    logits = peer(**for_peer(peer, full), logits_to_keep=new + 1, use_cache=False).logits[0, :-1].float()      # (L, V)
    lost = (logits.max(-1).values - logits.gather(1, ours[0, :, None])[:, 0]).mean()
    agree(lost < 0.05, f"{what}: greedy tokens ({lost:.3f} nats worse) are")


# --------------------------------------------------------------------------------------------------------- part: model


def bench_model(o):
    """Reading a batch, a plain training step; of the real shapes decoding instead of training."""
    for name in o.shape:
        vlm, peer = both_models(o, SHAPES[name])
        batch = prompts(o, SHAPES[name], o.load.rows, o.load.prompt)
        yield from bench_reading(o, name, vlm, peer, batch)
        yield from (bench_decoding if name in REAL else bench_training)(o, name, vlm, peer, batch)


@torch.no_grad()
def bench_reading(o, name, vlm, peer, batch):
    """forward: all logits. prefill: what generation begins with, the cache kept, logits of the last token only."""
    theirs, real, close = for_peer(peer, batch), batch["attention_mask"], 1e-4 if o.dtype == torch.float32 else 0.05
    read = {"ours": lambda: vlm(**batch), "transformers": lambda: peer(**theirs, use_cache=False).logits}
    fill = {"ours": lambda: vlm.head(vlm.prefill(**batch)[1])[:, None],
            "transformers": lambda: peer(**theirs, use_cache=True, logits_to_keep=1).logits}
    for title, ways in (("forward", read), ("prefill", fill)):
        a, b = (way() for way in ways.values())                                   # (B, T or 1, V)
        shown = real[:, -a.shape[1]:]
        agree(deviation(a[shown], b[shown]) < close, f"{name} {title}: logits are")
        del a, b
        times = in_turns(ways, o.load.runs, o.device)
        yield compared(f"{name} {title}", times, "ours", "transformers", int(real.sum()), "tokens/s", at_least=1.0)


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)


def step(loss, optimizer):
    """Backward and one step of the optimizer."""
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def bench_training(o, name, vlm, peer, batch):
    """Forward, mean loss of every word, backward, AdamW."""
    theirs, real = for_peer(peer, batch), batch["attention_mask"]
    words = real & real.roll(1, 1) & (batch["input_ids"] != vlm.config.image_token_id)
    words[:, 0] = False                                                           # what begins a row follows nothing
    labels = batch["input_ids"].masked_fill(~words, -100)
    losses = {"ours": lambda: -vlm.log_probs(**batch, targets_mask=words).sum() / words.sum(),
              "transformers": lambda: peer(**theirs, labels=labels, use_cache=False).loss}
    a, b = losses["ours"]().detach(), losses["transformers"]().detach()
    agree(deviation(a, b) < (1e-4 if o.dtype == torch.float32 else 0.02), f"{name} training step: loss is")
    optimizers = {"ours": adamw(vlm), "transformers": adamw(peer)}
    ways = {k: lambda k=k: step(losses[k](), optimizers[k]) for k in losses}
    times = in_turns(ways, o.load.runs, o.device)
    yield compared(f"{name} training step", times, "ours", "transformers", int(real.sum()), "tokens/s", at_least=1.0)


def bench_decoding(o, name, vlm, peer, batch):
    """Tokens a second behind the prompt: the time of a long answer less that of an answer of one token.

    The limit of decoding is memory: each step reads every weight of the decoder and of the head once."""
    read = sum(p.nbytes for n, p in vlm.named_parameters() if n.startswith(("model.layers", "model.norm")))
    read += (vlm.model.embed_tokens if vlm.config.tie_word_embeddings else vlm.lm_head).weight.nbytes
    new = o.load.new
    for rows, speed, share in ((1, 4.0, 0.6), (64, None, None)):
        batch = prompts(o, SHAPES[name], rows, o.load.prompt)
        agree_on_greedy(o, vlm, peer, batch, new, 1, f"{name} decoding, batch {rows}")
        ways = {}
        for length in (1, new):
            ways["ours", length] = lambda m=length: vlm.generate(**batch, max_new_tokens=m, temperature=0.0)
            ways["transformers", length] = lambda m=length: peer_generate(peer, batch, m, do_sample=False)
        t = in_turns(ways, o.load.runs, o.device)
        t = {k: [max(b - a, 1e-9) for a, b in zip(t[k, 1], t[k, new])] for k in ("ours", "transformers")}
        yield compared(f"{name} decoding, batch {rows}", t, "ours", "transformers", rows * (new - 1), "tokens/s", speed)
        used = read * (new - 1) / median(t["ours"]) / copy_bandwidth(o.device)
        yield figure(f"{name} share of the memory bandwidth, batch {rows}", used, "of 1", at_least=share)
        with PeakMemory(o.device) as peak:
            ways["ours", new]()
        weights = sum(p.nbytes for p in vlm.parameters())
        yield figure(f"{name} memory, batch {rows}", (weights + peak.bytes) / 1e9, "GB")


def copy_bandwidth(device):
    """Bytes a second that a plain copy of 512 MiB reads and writes: what the memory really gives."""
    a = torch.zeros(2 ** 27, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / median(in_turns({"copy": lambda: b.copy_(a)}, 5, device)["copy"])


# ------------------------------------------------------------------------------------------------------- part: rollout


def bench_rollout(o):
    """n samples behind each prompt, as an update of Step-GRPO needs them, all of full length. The tiny shape has short
    prompts, as in the embedded world: 64 rows of 8 prompts, and for comparison of 64 that have nothing to share."""
    few, many, short = o.load.rows, o.load.samples, o.load.new * 3 // 4
    for name in o.shape:
        vlm, peer = both_models(o, SHAPES[name])
        cases = [(few, many, o.load.prompt, o.load.new, 2.0)]                     # prompts, samples, their tokens, goal
        if name == "tiny":
            cases = [(2 * few, many, 80, short, 3.0), (2 * few * many, 1, 80, short, None)]
        for rows, n, length, new, goal in cases:
            batch, what = prompts(o, SHAPES[name], rows, length), f"{name} rollout, {rows} x {n} x {new}"
            agree_on_greedy(o, vlm, peer, batch, new, n, what)
            generator, like_ours = torch.Generator(o.device).manual_seed(0), {"do_sample": True, "top_k": 0}
            ways = {"ours": lambda: vlm.generate(**batch, n=n, max_new_tokens=new, generator=generator),
                    "transformers": lambda: peer_generate(peer, batch, new, num_return_sequences=n, **like_ours)}
            times = in_turns(ways, o.load.runs, o.device)
            yield compared(what, times, "ours", "transformers", rows * n * new, "tokens/s", goal)


# -------------------------------------------------------------------------------------------------------- part: update


def clipped_loss(logp, old, advantages):
    """grpo.grpo_loss (Eq. 4, 5) where every token counts; grpo.py itself would import the knowledge bases.
    (N n, L), (N n, L), (N n,) -> ()."""
    ratio, a = (logp - old).exp(), advantages[:, None]
    return -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()


def group(o, config, prompt, new):
    """What an update sees: prompts, responses (N n, L) of random words, how far the old log-probabilities are off,
    advantages (N n,)."""
    g, rows = torch.Generator().manual_seed(1), o.load.groups * o.load.samples
    tokens = torch.randint(config["vocab_size"] - 8, (rows, new), generator=g)
    noise, advantages = 0.1 * torch.randn(rows, new, generator=g), torch.randn(rows, generator=g)
    return prompts(o, config, o.load.groups, prompt), *(x.to(o.device) for x in (tokens, noise, advantages))


def log_prob_ways(vlm, peer, batch, tokens):
    """Log-probabilities (N n, L) of the responses in three ways. The peer's head is applied to responses only, too.
    With a shared prefix the entropies are computed beside them, as train.py does."""
    full, targets = behind(batch, tokens)
    P, L = batch["input_ids"].shape[1], tokens.shape[1]
    mask = torch.ones_like(tokens, dtype=torch.bool)

    def plainly():
        logits = peer(**for_peer(peer, full), logits_to_keep=L + 1, use_cache=False).logits[:, :-1]      # (N n, L, V)
        return logits.float().log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    return {"ours": lambda: vlm.log_probs(**full, targets_mask=targets)[:, P - 1:],
            "shared": lambda: vlm.group_log_probs(tokens, mask, **batch, entropy=True)[0],
            "transformers": plainly}


def bench_update(o):
    """One Step-GRPO update: log-probabilities with gradient, loss, backward, optimizer."""
    for name in o.shape:
        yield from (real_update if name in REAL else small_update)(o, name)


def small_update(o, name):
    """A row a sample, and with a shared prefix, against transformers: time, and memory at a large vocabulary."""
    load, (vlm, peer) = o.load, both_models(o, SHAPES[name])
    batch, tokens, noise, advantages = group(o, SHAPES[name], load.prompt, load.new)
    ways, models = log_prob_ways(vlm, peer, batch, tokens), {"ours": vlm, "shared": vlm, "transformers": peer}
    with torch.no_grad():
        old = ways["transformers"]() + noise
    found = {}
    for k, way in ways.items():
        loss = clipped_loss(way(), old, advantages)
        loss.backward()
        norms = [p.grad.float().norm() for p in models[k].parameters() if p.grad is not None]
        found[k] = torch.stack((loss.detach(), torch.stack(norms).norm()))
        models[k].zero_grad(set_to_none=True)
    for k in ("ours", "shared"):
        close = deviation(found[k], found["transformers"]) < (1e-3 if o.dtype == torch.float32 else 0.05)
        agree(close, f"{name} update, {k}: loss and norm of the gradient are")
    optimizer = {"ours": adamw(vlm), "transformers": adamw(peer)}
    optimizer["shared"] = optimizer["ours"]
    update = {k: lambda k=k: step(clipped_loss(ways[k](), old, advantages), optimizer[k]) for k in ways}
    times, work = in_turns(update, load.runs, o.device), len(tokens) * (load.prompt + load.new)
    yield compared(f"{name} update, a row a sample", times, "ours", "transformers", work, "tokens/s", at_least=1.0)
    yield compared(f"{name} update, shared prefix", times, "shared", "transformers", work, "tokens/s", at_least=2.0)
    a, b = (in_fresh_process(update_peak, o, name, k) / 1e6 for k in ("shared", "transformers"))
    yield figure(f"{name} update, memory at V {load.vocabulary}", a, "MB", 2.0, peer="transformers", peer_value=b,
                 ratio=b / a)


def update_peak(o, name, way):
    """Bytes that an update at the large vocabulary adds to this process at its peak. A small update before it gives
    the optimizer its state."""
    config = {**SHAPES[name], "vocab_size": o.load.vocabulary}
    vlm, peer = VLM.from_config(config, 0, o.dtype, o.device), None
    if way == "transformers":
        vlm, peer = both_models(o, config)
    optimizer = adamw(peer or vlm)
    for prompt, new in ((80, 2), (o.load.prompt, o.load.new)):
        batch, tokens, noise, advantages = group(o, config, prompt, new)
        log_probs = log_prob_ways(vlm, peer, batch, tokens)[way]
        with PeakMemory(o.device) as peak:
            logp = log_probs()
            step(clipped_loss(logp, logp.detach() + noise, advantages), optimizer)
            del logp
    return peak.bytes


def in_fresh_process(function, *args):
    """What function(*args) returns in a process that has done nothing else: memory that is freed is not always given
    back, so only a fresh process shows what is needed."""
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    except BrokenProcessPool:
        raise ValueError(f"{function.__name__}: its process was killed; is there too little memory?") from None


class MasterAdamW:
    """AdamW on float32 copies of half-precision weights: a step smaller than the last bit of a weight is not lost."""
    def __init__(self, weights):
        self.weights = list(weights)
        self.masters = [p.detach().float() for p in self.weights]
        self.inner = torch.optim.AdamW(self.masters, lr=1e-6, fused=True)

    @torch.no_grad()
    def step(self):
        for p, m in zip(self.weights, self.masters):
            m.grad, p.grad = p.grad.float(), None
        self.inner.step()
        for p, m in zip(self.weights, self.masters):
            p.copy_(m)
            m.grad = None

    def zero_grad(self, set_to_none):
        """Nothing is left to clear: `step` drops each gradient once it is read."""


def real_update(o, name):
    """An update of a published shape: seconds, share of the card's arithmetic, memory. Activations are recomputed layer
    by layer; of the matrix products neither that nor attention is counted, and frozen weights have no gradient."""
    load, vlm = o.load, VLM.from_config(SHAPES[name], 0, o.dtype, o.device)
    vlm.model.gradient_checkpointing = True
    if o.lora:
        add_lora(vlm, o.lora, 2 * o.lora)
    batch, tokens, noise, advantages = group(o, SHAPES[name], load.prompt, load.new)
    way = log_prob_ways(vlm, None, batch, tokens)["shared"]
    weights = sum(p.nbytes for p in vlm.parameters())
    with PeakMemory(o.device) as peak:
        masters = o.dtype != torch.float32 and not o.lora
        optimizer = MasterAdamW(vlm.parameters()) if masters else adamw(vlm)

        def update():
            logp = way()
            step(clipped_loss(logp, logp.detach() + noise, advantages), optimizer)
        seconds = median(in_turns({"update": update}, load.runs, o.device)["update"])
    computed = load.groups * (load.prompt + load.samples * load.new)              # tokens of the packed rows
    linear = sum(p.numel() for p in vlm.model.layers.parameters() if p.dim() == 2)
    products = linear * computed + vlm.model.embed_tokens.weight.numel() * tokens.numel()     # the head: responses only
    rate = (4 if o.lora else 6) * products / seconds
    title = f"{name}{f' LoRA {o.lora}' if o.lora else ''} update, {load.groups} x {load.samples}"
    yield figure(f"{title}, seconds", seconds, "s")
    yield figure(f"{title}, computed", computed / seconds, "tokens/s")
    yield figure(f"{title}, arithmetic", rate / 1e12, "TFLOP/s")
    for flops in [v for k, v in PEAK_FLOPS.items() if k in machine(o.device)["device"]]:
        yield figure(f"{title}, share of the bf16 peak", rate / flops, "of 1", at_least=0.4)
    yield figure(f"{title}, memory", (weights + peak.bytes) / 1e9, "GB", at_most=MEMORY_GOALS.get((name, o.lora)))


# ------------------------------------------------------------------------------------------------------ part: retrieve


def bench_retrieve(o):
    """The text encoder against transformers; a base of vectors against the libraries beneath and exact search."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        yield from bench_encoder(o, Path(folder))
        yield from bench_base(o, Path(folder))
    torch.set_num_threads(threads)                                                # faiss sets them for torch, too


def bench_encoder(o, folder):
    """A BERT of MiniLM's size over passages of 20 to 100 words; both sides sort by length, the peer batches by 32."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from parts.pretrained import load_encoder
    hf = needed("transformers")
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"w{i}" for i in range(2000))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    torch.manual_seed(0)
    config = hf.BertConfig(vocab_size=len(words), hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
                           intermediate_size=1536)
    net = hf.BertModel(config).eval()
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", model_max_length=512)
    net.save_pretrained(folder / "bert")
    fast.save_pretrained(folder / "bert")
    rng, encoder = np.random.default_rng(0), load_encoder(folder / "bert")
    texts = [" ".join(f"w{i}" for i in rng.integers(2000, size=rng.integers(20, 101))) for _ in range(o.load.texts)]
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))

    @torch.inference_mode()
    def peer():
        out = torch.empty(len(texts), 384)
        for part in (order[i:i + 32] for i in range(0, len(order), 32)):
            inputs = fast([texts[i] for i in part], padding=True, return_tensors="pt")
            out[part] = F.normalize(net(**inputs).last_hidden_state[:, 0], dim=1)
        return out.numpy()
    ways = {"ours": lambda: encoder.encode_docs([{"text": text} for text in texts]), "transformers": peer}
    agree(np.abs(ways["ours"]() - peer()).max() < 1e-4, "encoder: vectors are")
    times = in_turns(ways, o.load.runs)
    yield compared("encoder", times, "ours", "transformers", len(texts), "passages/s", at_least=1.0)


def clustered(count, queries, dim=384, seed=0):
    """Unit vectors (count, D) and queries (Q, D) in clusters of about 200; they differ from their centre along 32
    directions mostly, as embeddings do."""
    rng, clusters = np.random.default_rng(seed), max(1, count // 200)
    centres, directions = rng.standard_normal((clusters, dim)), rng.standard_normal((32, dim)) / 32 ** 0.5
    x = np.empty((count + queries, dim), np.float32)
    for part in np.array_split(x, max(1, len(x) // 10_000)):
        part[:] = centres[rng.integers(clusters, size=len(part))] + rng.standard_normal((len(part), 32)) @ directions
        part += 0.1 * rng.standard_normal(part.shape)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return x[:count], x[count:]


def exact(vectors, queries, k):
    """Rows (Q, k) of the largest inner products by numpy, in no order."""
    parts = (queries[i:i + 100] @ vectors.T for i in range(0, len(queries), 100))
    return np.concatenate([np.argpartition(part, -k, axis=1)[:, -k:] for part in parts])


def recall_of(rows, truth):
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(rows, truth)]))


def least_ef(rows_at, truth, target, step=5):
    """The smallest number of candidates, in steps, with which rows_at(ef) (Q, k) reaches the recall."""
    return next((ef for ef in range(truth.shape[1], 1000, step) if recall_of(rows_at(ef), truth) >= target), 1000)


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
    del kb                                                                        # it was open until here
    return grown


def bench_base(o, folder, k=10, M=16, ef_construction=200):
    """Build, size, recall, speed, on all cores. ef is the smallest with which bare hnswlib reaches recall 0.985."""
    from retrieve import KnowledgeBase
    faiss, hnswlib, cores = needed("faiss"), needed("hnswlib"), os.cpu_count()
    vectors, queries = clustered(o.load.vectors, o.load.queries)
    docs = [{"id": str(i), "text": f"passage {i}"} for i in range(len(vectors))]
    encoder, built = given_encoder(vectors, queries), {}

    def ours():
        built["ours"] = KnowledgeBase.build(docs, encoder, M=M, ef_construction=ef_construction, threads=cores)

    def bare():
        built["hnswlib"] = index = hnswlib.Index("ip", vectors.shape[1])
        index.init_index(len(vectors), M=M, ef_construction=ef_construction, random_seed=0)
        index.set_num_threads(cores)
        index.add_items(vectors)
    times = in_turns({"ours": ours, "hnswlib": bare}, min(o.load.runs, 3), warm=False)
    yield compared("build", times, "ours", "hnswlib", len(vectors), "vectors/s", at_least=1 / 1.1)
    built.pop("ours").save(folder / "base")
    faiss.omp_set_num_threads(cores)
    built["faiss"] = faiss.IndexHNSWFlat(vectors.shape[1], M, faiss.METRIC_INNER_PRODUCT)
    built["faiss"].hnsw.efConstruction = ef_construction
    built["faiss"].add(vectors)

    def near(name, ef):
        """Rows (Q, k) that a peer finds."""
        if name == "hnswlib":
            built[name].set_ef(ef)
            return built[name].knn_query(queries, k)[0]
        built[name].hnsw.efSearch = ef
        return built[name].search(queries, k)[1]
    truth = exact(vectors, queries, k)
    ef = least_ef(lambda ef: near("hnswlib", ef), truth, 0.985)
    yield figure("disk", sum(f.stat().st_size for f in (folder / "base").iterdir()) / len(vectors), "bytes a vector")
    yield figure("memory", in_fresh_process(base_memory, folder / "base") / len(vectors), "bytes a vector")
    kb = KnowledgeBase.load(folder / "base", encoder, ef=ef)
    yield from bench_search(o, kb, docs, near, truth, vectors, queries, ef)


def bench_search(o, kb, docs, near, truth, vectors, queries, ef):
    """Scores and rows of the best k, as the libraries return them; hits with their texts; one query at a time; how fast
    exact search goes over its half-precision vectors."""
    from retrieve import KnowledgeBase
    k, asked = truth.shape[1], list(map(str, range(len(queries))))
    scores, rows = kb.search_vectors(queries, k)                                  # (Q, k) each
    recall = recall_of(rows, truth)
    agree(np.abs(scores - np.einsum("qkd,qd->qk", vectors[rows], queries)).max() < 1e-4, "search: scores are")
    agree([[hit.id for hit in hits] for hits in kb.search(asked, k)] == rows.astype(str).tolist(), "search: hits are")
    agree(abs(recall - recall_of(near("hnswlib", ef), truth)) < 0.01, "search: recall is")
    yield figure(f"recall@{k}, ef {ef}", recall, "of 1", at_least=0.98)
    faiss_ef = least_ef(lambda ef: near("faiss", ef), truth, recall, step=1)
    ways = {"ours": lambda: kb.search_vectors(queries, k), "hits": lambda: kb.search(asked, k),
            "hnswlib": lambda: near("hnswlib", ef), "faiss": lambda: near("faiss", faiss_ef)}
    times = in_turns(ways, o.load.runs)
    yield compared("search against hnswlib", times, "ours", "hnswlib", len(queries), "queries/s", 0.9)
    yield compared(f"search against faiss, ef {faiss_ef}", times, "ours", "faiss", len(queries), "queries/s", 1.0)
    yield compared("search, hits with texts", times, "hits", "hnswlib", len(queries), "queries/s")
    few, flat = queries[:100], KnowledgeBase.build(docs, kb.encoder, index="flat")
    agree(recall_of(flat.search_vectors(few, k)[1], truth) > 0.98, "flat: rows, but for half precision, are")
    for title, parts, goal in (("one by one", [few[i:i + 1] for i in range(len(few))], 20.0), ("at once", [few], None)):
        times = in_turns({"ours": lambda: [kb.search_vectors(part, k) for part in parts],
                          "numpy": lambda: [exact(vectors, part, k) for part in parts],
                          "flat": lambda: [flat.search_vectors(part, k) for part in parts]}, o.load.runs)
        yield compared(f"{len(few)} queries {title}", times, "ours", "numpy", len(few), "queries/s", goal)
        read = 2 * vectors.size * len(parts)                                      # bytes of half-precision vectors
        yield figure(f"flat, {len(few)} queries {title}", read / 1e9 / median(times["flat"]), "GB/s")


# -------------------------------------------------------------------------------------------------------- part: router


def bench_router(o):
    """Questions of an embedded world through the router: all at once against one by one; where the time goes.

    The model's share is that of generation; prompts, pictures, decoding and parsing are the rest. Each share is the
    median of the rounds."""
    from infer import Router
    from parts.questions import load_questions
    from parts.stepfiles import load_prompts
    from retrieve import world_bases
    path, batches, alone, rounds = Path(o.model), [], [], []     # rounds: what a round at once has spent in what
    with tempfile.TemporaryDirectory() as world:
        command = [sys.executable, "-m", "lab.world", "--split", "test", "--seed", "1000", "--out", world]
        command += ["--questions", str(o.load.questions)] + ["--countries", "40"] * o.quick
        if subprocess.run(command, cwd=HERE, stdout=subprocess.DEVNULL).returncode:
            raise ValueError("world.py could not write a world: see its message above")
        rows, _ = load_questions(Path(world) / "questions.jsonl")
        vlm, processor = VLM.from_pretrained(path, o.dtype, o.device), Processor.from_pretrained(path)
        own = load_prompts(path / "prompts.json") if (path / "prompts.json").is_file() else {}
        router = Router(vlm, processor, world_bases(world), prompts=own, max_new_tokens=64)
        generate, spent = vlm.generate, []

        def timed(**batch):
            start = time.perf_counter()
            samples = generate(**batch)
            if o.device != "cpu":
                torch.cuda.synchronize()
            spent.append(time.perf_counter() - start)
            return samples

        def at_once():
            spent.clear()
            start = time.perf_counter()
            batches.append(router.run(rows))
            seconds = time.perf_counter() - start
            model, search = sum(spent) / seconds, sum(t.seconds_search for t in batches[-1]) / seconds
            rounds.append((model, search, max(1 - model - search, 1e-6)))

        vlm.generate = timed
        ways = {"ours": at_once, "one by one": lambda: alone.append([router.run([row])[0] for row in rows])}
        times = in_turns(ways, o.load.runs, o.device, warm=False)
    agree([t.answer for t in batches[-1]] == [t.answer for t in alone[-1]], "router: answers are")
    yield compared(f"{len(rows)} questions in batch", times, "ours", "one by one", len(rows), "questions/s", 4.0)
    model, search, rest = map(median, zip(*rounds))
    yield figure("time in the model", model, "of 1")
    yield figure("time in search", search, "of 1")
    yield figure("time in the rest", rest, "of 1", at_most=0.1)


# -------------------------------------------------------------------------------------------------------- command line

PARTS = {"model": bench_model, "rollout": bench_rollout, "update": bench_update, "retrieve": bench_retrieve,
         "router": bench_router}


def print_line(f):
    """One line of the table."""
    def number(x):
        return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"
    line = f"  {f['name']:<46} {number(f['value']):>8} {f['unit']:<15}"
    if "ratio" in f:
        spread = f", rounds {f['rounds'][0]:.2f} to {f['rounds'][1]:.2f}" if "rounds" in f else ""
        line += f"{f['ratio']:5.2f} x {f['peer']} ({number(f['peer_value'])}{spread})"
    print(line + (f"  goal {f['goal']}: {'met' if f['met'] else 'missed'}" if "goal" in f else ""), flush=True)


def parse_options(argv):
    p = argparse.ArgumentParser(prog="bench.py", description=__doc__.split("\n")[0])
    p.add_argument("part", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    p.add_argument("--shape", nargs="+", choices=SHAPES, help="of model, rollout, update (tiny d512; on CUDA 3b)")
    p.add_argument("--device", default="cpu", help="cpu or cuda, of model, rollout, update and router (default cpu)")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of weights (float32; on CUDA bfloat16)")
    p.add_argument("--lora", type=int, default=0, metavar="RANK", help="update of a real shape: train an adapter only")
    p.add_argument("--model", default=HERE / "weights" / "tiny", metavar="DIR", help="of router (weights/tiny)")
    p.add_argument("--quick", action="store_true", help="a toy scale, to see that everything runs")
    for f in fields(Load):
        p.add_argument(f"--{f.name}", type=int, metavar="N", help=f"{f.metadata['help']} ({f.default})")
    o = p.parse_args(argv)
    cuda = torch.device(o.device).type == "cuda"
    if unknown := [part for part in o.part if part not in PARTS]:
        raise ValueError(f"unknown part {unknown[0]!r}: give {', '.join(PARTS)}")
    if cuda and not torch.cuda.is_available():
        raise ValueError(f"--device {o.device}: torch sees no CUDA device on this machine")
    given = {f.name: getattr(o, f.name) for f in fields(Load) if getattr(o, f.name) is not None}
    if wrong := [name for name, value in given.items() if value < 1]:
        raise ValueError(f"--{wrong[0]} is {given[wrong[0]]}: give at least 1")
    o.load = Load(**{f.name: f.metadata["quick"] for f in fields(Load) if o.quick} | given)
    o.shape = o.shape or (["tiny"] if o.quick else ["3b"] if cuda else ["tiny", "d512"])
    if o.lora and not set(o.shape) & set(REAL):
        raise ValueError(f"--lora {o.lora} is of the shapes {' and '.join(REAL)} only, not of {' and '.join(o.shape)}")
    o.dtype = getattr(torch, o.dtype or ("bfloat16" if cuda else "float32"))
    return o


def main(argv=None):
    try:
        o = parse_options(argv)
        figures = {}
        for part in o.part or PARTS:
            print(part, flush=True)
            for f in PARTS[part](o):
                print_line(f)
                figures.setdefault(part, {})[f.pop("name")] = f
        ratio = {f"{part} {name}": f["ratio"] for part in figures for name, f in figures[part].items() if "ratio" in f}
        print(json.dumps({"command": " ".join(["bench.py", *(sys.argv[1:] if argv is None else argv)]),
                          "shapes": o.shape, "load": asdict(o.load), "figures": figures, "ratio": ratio,
                          "machine": machine(o.device)}))
    except ValueError as e:
        print(f"bench.py: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
