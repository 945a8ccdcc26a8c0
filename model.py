"""Qwen2.5-VL by hand: from a conversation with pictures to the next token.

What flows through this file:
    conversation -> Processor -> token ids, image patches -> VisionTower -> image tokens inside the text
                 -> Decoder -> logits -> sampled tokens

Legend of shapes
    B rows of a batch   T tokens of a row   C hidden size   H query heads   KV key/value heads   D head dimension
    V vocabulary   P image patches of all pictures of a batch; in (N, P) tokens of a prompt   S key slots of a sample
    N prompts   n samples of a prompt (B = N * n)   g = H / KV   M response tokens
    a picture's grid is (t, h, w) patches; the merger makes one image token of 2 x 2 patches

Sources: Qwen2.5-VL technical report (arXiv 2502.13923), M-RoPE (Qwen2-VL, arXiv 2409.12191), grouped-query attention
(2305.13245), RMSNorm (1910.07467), SwiGLU (2002.05202), LoRA (2106.09685). Key names and file formats are the published
ones of Hugging Face.

Deviations from the released model code, with the reason
    * Pictures only, no video: the paper has none. The tower could read several frames, the processor makes one.
    * The prompt's keys and values are kept once for all n samples of a prompt (`KVCache.share`) instead of being copied
      n times. What is finished leaves the batch by whole prompts and in lots, not row by row: a group is computed to
      the end of its longest sample.
    * `log_probs` applies the head to response tokens only and in chunks: a (B, T, V) tensor in float32 never exists.
    * Text between control tokens is encoded with control tokens switched off, so that no text can end a turn or insert
      a picture.
"""
import math
import os
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from parts.chat import Processor
from parts.layers import RMSNorm, SwiGLU, rotate, turns
from parts.lora import add_lora, load_adapter, lora_disabled, save_adapter
from parts.vision import VisionConfig, VisionTower
from plumbing.old import settle, usable_device, write_json
from plumbing.weights import (WEIGHT_TYPES, finite, flat_config, our_name, retyped, set_parameter,
                              weight_files)


@dataclass(frozen=True)
class Config:
    """Sizes of the decoder, the ids of the control tokens, and the vision tower's sizes; `raw` is config.json as it was
    read."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    mrope_section: tuple                              # rotary pairs turning with time, height, width; they sum to D / 2
    image_token_id: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    vision: VisionConfig = field(default_factory=VisionConfig)
    raw: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    @property
    def max_positions(self):
        return self.max_position_embeddings


def read_config(source):
    """Config from a directory, a config.json or a dict, in the old flat or the new nested layout (`text_config`).

    Raises ValueError that names the field for what this file does not implement.
    """
    where, raw, text, rope, vision = flat_config(source)
    refuse = [
        ("model_type", raw.get("model_type"), ("qwen2_5_vl",)),
        ("hidden_act", text.get("hidden_act", "silu"), ("silu",)),
        ("vision_config.hidden_act", vision.get("hidden_act", "silu"), ("silu",)),
        ("use_sliding_window", text.get("use_sliding_window", False), (False, None)),
        ("rope type", rope.get("rope_type", rope.get("type", "default")), ("default", "mrope")),
        ("quantization_config", raw.get("quantization_config"), (None,)),
    ]
    for name, value, supported in refuse:
        if value not in supported:
            raise ValueError(f"{where}: {name} is {value!r}, this code supports "
                             f"{' or '.join(map(repr, supported))} only")
    text["mrope_section"] = rope.get("mrope_section")
    text["rope_theta"] = rope.get("rope_theta", text.get("rope_theta", 1e6))
    text["tie_word_embeddings"] = raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    names = [f.name for f in fields(Config) if f.name not in ("vision", "raw")]
    given = {name: text[name] for name in names if text.get(name) is not None}
    needed = [f.name for f in fields(Config) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in given]:
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    for d, names in ((given, ("mrope_section",)), (vision, ("fullatt_block_indexes",))):
        for k in (k for k in names if k in d):
            if not isinstance(d[k], list) or not all(type(i) is int and 0 <= i <= 1_000_000 for i in d[k]):
                raise ValueError(f"{where}: {k} is {str(d[k])[:40]!r}, expected a list of whole numbers")
            d[k] = tuple(d[k])
    vis = VisionConfig(**{f.name: vision[f.name] for f in fields(VisionConfig) if f.name in vision})
    config = Config(**given, vision=vis, raw=raw)
    check_config(config, where)
    return config


def check_config(c, where):
    """Raise ValueError for sizes that do not fit each other, before anything is allocated."""
    sizes = [(f.name, getattr(c, f.name)) for f in fields(Config) if f.type is int]
    sizes += [("vision_config." + f.name, getattr(c.vision, f.name)) for f in fields(VisionConfig) if f.type is int]
    for name, value in sizes:
        most = 1000 if name.endswith(("num_hidden_layers", "depth")) else 1_000_000
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{where}: {name} is {str(value)[:40]!r}, expected a whole number from 1 to {most}")
    for name in ("rms_norm_eps", "rope_theta"):
        if type(value := getattr(c, name)) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{where}: {name} is {str(value)[:40]!r}, expected a positive number")
    if c.hidden_size % c.num_attention_heads or c.num_attention_heads % c.num_key_value_heads:
        raise ValueError(f"{where}: hidden_size {c.hidden_size}, num_attention_heads {c.num_attention_heads} and "
                         f"num_key_value_heads {c.num_key_value_heads} must divide one another in this order")
    if 2 * sum(c.mrope_section) != c.head_dim or len(c.mrope_section) != 3:
        raise ValueError(f"{where}: mrope_section {list(c.mrope_section)} must be three numbers that sum to half of "
                         f"the head dimension {c.head_dim}")
    if c.vision.hidden_size % (4 * c.vision.num_heads):
        raise ValueError(f"{where}: vision hidden_size {c.vision.hidden_size} must be a multiple of "
                         f"4 x {c.vision.num_heads} heads")


# -------------------------------------------------------------------------------------------------------------- decoder


class KVCache:
    """Keys and values of everything read so far, in two parts.

    The prompts are read first, all at once, and then shared by their n samples, so they are kept once a prompt. Behind
    them each sample has room of its own for what it says. The key slots of a row are numbered through both parts:
    0 ... P - 1 the prompt, then its own.

    Where `static` is set, every step looks at the whole room instead of its filled part, so that all steps have the
    same shapes; and the number of filled slots is kept on the device too. Such a step can be replayed as a CUDA graph.
    """
    def __init__(self, valid):
        """valid (N, P) bool: False where a prompt is padded."""
        self.prompts, self.valid = [], valid                     # for each layer: keys, values (N, KV, P, D)

    def share(self, n, room, static=False):
        """From here on every prompt stands for n samples, each with room for that many tokens of its own."""
        (k, _), (N, P) = self.prompts[0], self.valid.shape
        _, KV, _, D = k.shape
        self.own = k.new_zeros(len(self.prompts), 2, N, KV, n, room, D)              # a key and a value of each layer
        self.valid = F.pad(self.valid[:, None].expand(N, n, P), (0, room), value=True)     # (N, n, P + room) key slots
        self.static = static
        self.filled, self.end = P, torch.tensor(P, device=k.device)               # one number, here and on the device

    def keep(self, prompts):
        """Keep these prompts and their samples: prompts (N',) long."""
        self.prompts = [(k[prompts], v[prompts]) for k, v in self.prompts]
        self.own, self.valid = self.own[:, :, prompts], self.valid[prompts]

    def extend(self, T, valid=None):
        """Make place for T more tokens a row, of which valid (B, T) bool is False at padding, and settle for all layers
        which key slots they will see: the prompt, what was said before, and of the new tokens those before them."""
        (N, n, slots), device = self.valid.shape, self.end.device
        self.new = self.end + torch.arange(T, device=device)                         # (T,) the slots they take
        self.end += T
        self.filled += T
        if valid is not None:
            self.valid[:, :, self.new] = valid.view(N, n, T)
        seen = slots if self.static else self.filled
        slot, new = torch.arange(seen, device=device), self.new[:, None]
        # padding sees itself: no row without a key
        sees = self.valid[:, :, None, :seen] & (slot <= new) | (slot == new)         # (N, n, T, seen)
        bias = torch.zeros_like(sees, dtype=self.own.dtype).masked_fill_(~sees, -torch.inf)
        self.bias = bias[:, None, :, None]                                           # (N, 1, n, 1, T, seen)

    def attend(self, layer, q, k, v):
        """Attention of the new tokens, whose keys and values are stored: q (B, H, T, D), k, v (B, KV, T, D) ->
        (B, H, T, D).

        The n samples of a prompt, and the H / KV query heads that share a key head, become rows of one matrix product,
        so that a shared prompt is read from memory once for all its samples.
        """
        (past_k, past_v), (B, H, T, D) = self.prompts[layer], q.shape
        N, KV, P, _ = past_k.shape
        n, g = B // N, H // KV
        for own, x in zip(self.own[layer], (k, v)):
            own.index_copy_(3, self.new - P, x.view(N, n, KV, T, D).transpose(1, 2))
        own_k, own_v = self.own[layer, ..., :self.bias.shape[-1] - P, :]             # (N, KV, n, S, D) each
        q = D ** -0.5 * q.reshape(N, n, KV, g * T, D).transpose(1, 2)                # (N, KV, n, g T, D)
        past = q.reshape(N, KV, n * g * T, D) @ past_k.transpose(-1, -2)             # (N, KV, n g T, P)
        scores = torch.cat((past.view(N, KV, n, g * T, P), q @ own_k.transpose(-1, -2)), dim=-1).unflatten(3, (g, T))
        weights = (scores + self.bias).softmax(-1, dtype=torch.float32).to(q.dtype)  # (N, KV, n, g, T, P + S)
        past, own = weights.flatten(3, 4).split((P, own_k.shape[-2]), dim=-1)        # (N, KV, n, g T, P or S)
        y = (past.reshape(N, KV, n * g * T, P) @ past_v).view(q.shape) + own @ own_v
        return y.transpose(1, 2).reshape(B, H, T, D)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share KV key/value heads; q, k, v have biases."""
    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
        self.fused = None                                           # weight and bias of q, k and v inside `fused_qkv`

    def forward(self, x, cos, sin, mask, cache, layer):
        B, T, _ = x.shape
        if self.fused:
            qkv = F.linear(x, *self.fused)
        else:
            qkv = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=-1)
        qkv = qkv.view(B, T, -1, self.head_dim).transpose(1, 2)                         # (B, H + 2 KV, T, D)
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        q, k = rotate(qk, cos, sin).split((self.heads, self.kv_heads), dim=1)           # (B, H, T, D), (B, KV, T, D)
        if cache is not None and layer < len(cache.prompts):        # something was read before
            y = cache.attend(layer, q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
            if cache is not None:
                cache.prompts.append((k.contiguous(), v.contiguous()))
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


@contextmanager
def fused_qkv(decoder):
    """Inside, q, k and v of a layer are one matrix product, with a copy of their weights (a twentieth of a published
    model); layers with an adapter keep their three."""
    layers = [layer.self_attn for layer in decoder.layers]
    for a in layers:
        parts = (a.q_proj, a.k_proj, a.v_proj)
        if all(type(p) is nn.Linear for p in parts):
            a.fused = torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])
    try:
        yield
    finally:
        for a in layers:
            a.fused = None


class DecoderLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = SwiGLU(c.hidden_size, c.intermediate_size, bias=False)

    def forward(self, x, cos, sin, mask, cache, layer):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.gradient_checkpointing = False

    def angles(self, positions):
        """M-RoPE: a rotary pair turns with the time, the height or the width of its token.

        positions (3, B, T) -> cos, sin (B, 1, T, D).
        """
        even = torch.arange(0, self.c.head_dim, 2, device=positions.device, dtype=torch.float32)
        speed = self.c.rope_theta ** (-even / self.c.head_dim)                          # (D/2,)
        axes = zip(positions[:, :, None, :, None], speed.split(self.c.mrope_section))
        return turns(torch.cat([position * s for position, s in axes], dim=-1))

    def forward(self, x, positions, mask=None, cache=None):
        """x (B, T, C) embedded tokens -> (B, T, C) normalised hidden states.

        mask: None (causal) or a bool (B, 1, T, T); a cache that holds tokens already knows what is seen.
        """
        cos, sin = (a.to(x.dtype) for a in self.angles(positions))
        for i, layer in enumerate(self.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, mask, cache, i, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, cache, i)
        return self.norm(x)


# ------------------------------------------------------------------------------------------------------------ the model


@dataclass(frozen=True)
class Samples:
    """What `generate` sampled, a row a sample, the n samples of a prompt next to each other."""
    tokens: torch.Tensor                # (B * n, L) long; behind the end of a row stands the first eos id
    mask: torch.Tensor                  # (B * n, L) bool, True where the model sampled the token, eos included
    logps: torch.Tensor                 # (B * n, L) float32, log-probabilities at the sampling temperature, 0 elsewhere


def padding_mask(valid):
    """Causal mask of a padded batch: valid (B, T) bool -> (B, 1, T, T) bool, or None where nothing is padded."""
    if valid is None or valid.all():
        return None
    T = valid.shape[1]
    triangle = torch.ones(T, T, dtype=torch.bool, device=valid.device).tril()
    own = torch.eye(T, dtype=torch.bool, device=valid.device)                # padding sees itself: no row without a key
    return (triangle & valid[:, None, None, :]) | own


def pick(logits, temperature, top_k, top_p, noise):
    """Sample a token a row. logits (B, V), noise (B,) uniform in [0, 1) -> tokens (B,), log-probabilities (B,) float32.

    The log-probability is that of softmax(logits / temperature) before top-k and top-p, as `log_probs` recomputes it.
    """
    probs = F.softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        kept = probs
        if 0 < top_k < logits.shape[-1]:
            kept = kept.masked_fill(kept < kept.topk(top_k, dim=-1).values[:, -1:], 0)
        if top_p < 1.0:
            ordered, index = (kept / kept.sum(-1, keepdim=True)).sort(dim=-1, descending=True)
            outside = ordered.cumsum(-1) - ordered >= top_p                # the more likely tokens already hold top_p
            kept = kept.masked_fill(torch.zeros_like(outside).scatter(1, index, outside), 0)
        below = kept.cumsum(-1)                          # inverse of the distribution function: one random number a row
        u = noise[:, None].clamp(max=1 - 1e-6) * below[:, -1:]
        tokens = torch.searchsorted(below, u, right=True)[:, 0]
        tokens = tokens.clamp(max=logits.shape[-1] - 1)  # where logits are no numbers, neither is the log-probability
    return tokens, probs.gather(1, tokens[:, None])[:, 0].log()


class NextToken:
    """The decode step: the tokens that were sampled go in, the logits of the next ones come out.

    On CUDA a step of static shapes is recorded as a graph, which launches its hundreds of small kernels at once. All
    that differs from step to step (tokens, positions, the cache's end) is therefore kept on the device in tensors that
    are changed in place.
    """
    def __init__(self, vlm, cache, position):
        """position (B,): where the tokens of the first step stand."""
        self.vlm, self.cache, self.position = vlm, cache, position
        self.token, self.calls, self.graph = torch.zeros_like(position), 0, None

    def compute(self):
        """Read `token` (B,), advance all rows by one -> logits (B, V)."""
        self.cache.extend(1)
        x = self.vlm.model.embed_tokens(self.token[:, None])                            # (B, 1, C)
        hidden = self.vlm.model(x, self.position.expand(3, -1)[..., None], cache=self.cache)
        self.position += 1
        return self.vlm.head(hidden[:, 0])

    def __call__(self, token):
        """token (B,) -> logits (B, V), which the next call may overwrite."""
        self.token.copy_(token)
        self.calls += 1
        if not (token.is_cuda and self.cache.static) or self.calls == 1:      # the first call loads the kernels
            return self.compute()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):                                          # recorded, not yet run
                self.logits = self.compute()
        self.graph.replay()
        return self.logits


class VLM(nn.Module):
    """The vision-language model: `visual` makes tokens of pictures, `model` reads them among the words, the head names
    the next token."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.vision, config.hidden_size)
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    # ------------------------------------------------------------------------------------------------- make, load, save
    @classmethod
    def from_config(cls, path_or_dict, seed=0, dtype=torch.float32, device="cpu"):
        """Random weights from a config.json, a directory or a dict; the seed fixes them.

        Weights shrink with their fan-in and depth.
        """
        config, device = read_config(path_or_dict), usable_device(device)
        with torch.device("meta"):
            vlm = cls(config)
        if (size := sum(p.numel() for p in vlm.parameters())) > 100e9:          # before anything is allocated
            raise ValueError(f"config.json asks for {size:.1e} random weights: this code makes up to 1e11")
        vlm.to_empty(device=device)
        g = torch.Generator(device).manual_seed(seed)
        with torch.no_grad():
            for name, p in vlm.named_parameters():
                if p.dim() == 1:
                    p.fill_(1.0 if "norm" in name or "ln_q" in name else 0.0)
                elif "embed_tokens" in name:
                    p.normal_(0, config.hidden_size ** -0.5, generator=g)
                else:
                    depth = config.vision.depth if name.startswith("visual") else config.num_hidden_layers
                    last = name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight"))
                    p.normal_(0, p[0].numel() ** -0.5 * ((2 * depth) ** -0.5 if last else 1.0), generator=g)
        return vlm.to(dtype)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Read a Hugging Face directory (old or new layout, one file or shards) straight into dtype and
        device.

        Raises ValueError that lists every missing, unexpected and mis-shaped key.
        """
        if not Path(path).is_dir():
            raise ValueError(f"{path}: no such model directory; expected one with config.json and model.safetensors")
        config, device = read_config(Path(path)), usable_device(device)
        with torch.device("meta"):
            vlm = cls(config)
        expected = dict(vlm.named_parameters())
        missing, problems, tied_head = set(expected), [], None
        for file in weight_files(path):
            try:
                with safe_open(file, framework="pt", device="cpu") as f:
                    for key in f.keys():
                        name = our_name(key)
                        if name == "lm_head.weight" and config.tie_word_embeddings:
                            tied_head = f.get_tensor(key)           # written out all the same
                            continue
                        if name not in missing:
                            problems.append(f"{'twice' if name in expected else 'unexpected'}: {key}")
                            continue
                        shape, kind = f.get_slice(key).get_shape(), f.get_slice(key).get_dtype()
                        missing.discard(name)
                        if list(shape) != list(expected[name].shape):
                            problems.append(f"shape {shape} instead of {list(expected[name].shape)}: {key}")
                            continue
                        if kind not in WEIGHT_TYPES:
                            problems.append(f"of type {kind} instead of {', '.join(WEIGHT_TYPES)}: {key}")
                            continue
                        set_parameter(vlm, name, f.get_tensor(key).to(device=device, dtype=dtype))
                        if not finite(vlm.get_parameter(name)):
                            problems.append(f"infinite or not a number: {key}")
            except (SafetensorError, OSError) as e:
                raise ValueError(f"{file}: not a readable safetensors file ({e}); is the download complete?") from None
        table = vlm.model.embed_tokens.weight
        if tied_head is not None and not table.is_meta and not torch.equal(tied_head.to(device, dtype), table):
            problems.append("tied, but lm_head.weight differs from the embedding table")
        problems = [f"missing: {name}" for name in sorted(missing)] + problems
        if problems:
            raise ValueError(f"{path}: {len(problems)} weights do not fit config.json: {'; '.join(problems)}")
        return vlm

    def save_pretrained(self, path, dtype=None, shard_bytes=5_000_000_000):
        """Write config.json and safetensors (published key names) that `from_pretrained` and transformers read; an
        adapter is left out (`save_adapter`, or `merge_lora` first). Each file is written beside and renamed."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        shards, size = [{}], 0
        for name, p in ((n, p) for n, p in self.named_parameters() if "lora_" not in n):
            p = p.detach().to(dtype or p.dtype).cpu().contiguous()
            if size + p.nbytes > shard_bytes and shards[-1]:
                shards.append({})
                size = 0
            shards[-1][name] = p
            size += p.nbytes
        names = ["model.safetensors"]
        if len(shards) > 1:
            names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        for name, shard in zip(names, shards):
            save_file(shard, path / (name + ".new"), metadata={"format": "pt"})
            settle(path / (name + ".new"))
            os.replace(path / (name + ".new"), path / name)
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(p.nbytes for s in shards for p in s.values())},
                     "weight_map": {key: name for name, s in zip(names, shards) for key in s}}
            write_json(path / "model.safetensors.index.json", index)
        else:
            # of a sharded model that was here before
            (path / "model.safetensors.index.json").unlink(missing_ok=True)
        for old in set(path.glob("model*.safetensors")) - {path / name for name in names}:
            old.unlink()
        kept = str(dtype or next(self.parameters()).dtype).removeprefix("torch.")
        raw = retyped(self.config.raw, kept)
        raw = {**raw, "architectures": ["Qwen2_5_VLForConditionalGeneration"], "torch_dtype": kept}
        write_json(path / "config.json", raw)

    # ---------------------------------------------------------------------------------------------------------- forward
    def picture_tokens(self, image_grid_thw):
        """How many tokens the pictures of these grids (pictures, 3) take."""
        merged = self.config.vision.spatial_merge_size ** 2
        return 0 if image_grid_thw is None else int((image_grid_thw.prod(-1) // merged).sum())

    def embed(self, input_ids, pixel_values=None, image_grid_thw=None, here=None):
        """Token embeddings, with the image tokens' places (`here`, by default wherever their id stands) filled by the
        vision tower. (B, T) -> (B, T, C)."""
        x = self.model.embed_tokens(input_ids)
        here = input_ids == self.config.image_token_id if here is None else here
        wanted = self.picture_tokens(image_grid_thw)
        if int(here.sum()) != wanted:
            raise ValueError(f"{int(here.sum())} image tokens in input_ids, but the pictures make {wanted}: "
                             "the prompt was cut or pictures are missing")
        patches = int(image_grid_thw.prod(-1).sum()) if wanted else 0
        if wanted and (pixel_values is None or len(pixel_values) != patches):
            found = 0 if pixel_values is None else len(pixel_values)
            raise ValueError(f"pixel_values holds {found} patches, the grids of image_grid_thw make {patches}")
        if wanted:
            features = self.visual(pixel_values.to(x.dtype), image_grid_thw.tolist())     # (image tokens, C)
            x = x.masked_scatter(here[..., None], features)
        return x

    def positions(self, input_ids, attention_mask=None, image_grid_thw=None, here=None):
        """M-RoPE positions (3, B, T) of time, height and width, and the position (B,) that comes after each row (arXiv
        2409.12191, 2.1).

        Words advance all three by one. A picture's tokens share the position where it starts, plus their own row and
        column; what follows starts behind the picture's longer side. Padding does not advance.
        """
        step = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        offsets = None
        if image_grid_thw is not None and len(image_grid_thw):
            here = input_ids == self.config.image_token_id if here is None else here
            step = step.masked_fill(here, 0)
            offsets, sides, counts = [], [], []
            for t, h, w in image_grid_thw.tolist():
                h, w = h // self.config.vision.spatial_merge_size, w // self.config.vision.spatial_merge_size
                offsets.append(torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)).view(-1, 3))
                sides.append(max(t, h, w))
                counts.append(t * h * w)
            offsets = torch.cat(offsets).T.to(input_ids.device)                           # (3, image tokens)
            last = torch.tensor(counts, device=input_ids.device).cumsum(0) - 1
            row, col = here.nonzero(as_tuple=True)
            # the last token of a picture steps over it
            step[row[last], col[last]] = torch.tensor(sides, device=input_ids.device)
        end = step.cumsum(1)
        positions = (end - step).repeat(3, 1, 1)                                          # (3, B, T)
        if offsets is not None:
            positions[:, here] += offsets
        return positions, end[:, -1]

    def head(self, hidden):
        """Hidden states (..., C) -> logits (..., V); a tied head is the embedding table."""
        return F.linear(hidden, (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight)

    def hidden_states(self, input_ids, attention_mask=None, pixel_values=None, image_grid_thw=None, here=None):
        """Normalised hidden states (B, T, C) of the last layer."""
        attention_mask = None if attention_mask is None else attention_mask.bool()
        x = self.embed(input_ids, pixel_values, image_grid_thw, here)
        positions, _ = self.positions(input_ids, attention_mask, image_grid_thw, here)
        return self.model(x, positions, padding_mask(attention_mask))

    def forward(self, input_ids, attention_mask=None, pixel_values=None, image_grid_thw=None):
        """(B, T) ids -> (B, T, V) logits. attention_mask (B, T) may be padded on either side; pixel_values (P, patch)
        of all pictures in reading order, image_grid_thw (pictures, 3). Raises ValueError where image tokens and
        pictures do not match."""
        return self.head(self.hidden_states(input_ids, attention_mask, pixel_values, image_grid_thw))

    def prefill(self, input_ids, attention_mask=None, pixel_values=None, image_grid_thw=None):
        """Read the prompts once: their cache, the last token's hidden state (N, C), the next position (N,)."""
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        positions, after = self.positions(input_ids, valid, image_grid_thw)
        cache = KVCache(valid)
        hidden = self.model(self.embed(input_ids, pixel_values, image_grid_thw), positions, padding_mask(valid), cache)
        N, P = valid.shape
        last = (valid.long() * torch.arange(P, device=valid.device)).argmax(1)       # the last real token of each row
        return cache, hidden[torch.arange(N, device=valid.device), last], after

    @torch.no_grad()
    def generate(self, input_ids, attention_mask=None, pixel_values=None, image_grid_thw=None, *, n=1,
                 max_new_tokens=256, temperature=1.0, top_k=0, top_p=1.0, eos_ids=(), generator=None, noise=None,
                 static=None):
        """Sample n continuations of each prompt (N, P) -> Samples of B = N * n rows.

        temperature 0 is greedy; top_k 0 and top_p 1 switch these filters off. A prompt is read once for all its
        samples; prompts whose samples are all finished leave the batch. All that is random is noise
        (B, max_new_tokens), uniform numbers in [0, 1), drawn from the generator where none is given: row i, column
        t decides token t of sample i, so that a sample depends on no row beside it, but for rounding.
        static: steps of static shapes, by default on CUDA, where they are replayed as a graph.
        """
        fits = temperature == 0 or 1e-6 <= temperature < math.inf
        if not fits or not 0 < top_p <= 1 or top_k < 0 or n < 1 or max_new_tokens < 1:
            raise ValueError(f"generate: temperature {temperature} of 0 or from 1e-6, 0 < top_p {top_p} <= 1, top_k "
                             f"{top_k} >= 0, n {n} >= 1 and max_new_tokens {max_new_tokens} >= 1 are expected")
        device, B = input_ids.device, len(input_ids) * n
        static = input_ids.is_cuda if static is None else static
        eos = torch.tensor(list(eos_ids), device=device, dtype=torch.long)
        tokens = torch.full((B, max_new_tokens), int(eos[0]) if len(eos) else 0, device=device)
        mask = torch.zeros(B, max_new_tokens, dtype=torch.bool, device=device)
        logps = torch.zeros(B, max_new_tokens, device=device)
        if noise is None:
            noise = torch.rand(B, max_new_tokens, generator=generator, device=device)
        rows = torch.arange(B, device=device)                         # which rows of the result are still in the batch
        live = torch.ones(B, dtype=torch.bool, device=device)         # of those: not finished, as a sibling may be
        with fused_qkv(self.model), torch.inference_mode():           # of no_grad's kind, with less ado an operation
            cache, hidden, position = self.prefill(input_ids, attention_mask, pixel_values, image_grid_thw)
            cache.share(n, max_new_tokens, static)
            step = NextToken(self, cache, position.repeat_interleave(n))
            logits = self.head(hidden).repeat_interleave(n, 0)                                  # (B, V)
            for t in range(max_new_tokens):
                new, logp = pick(logits, temperature, top_k, top_p, noise[rows, t])
                tokens[rows, t] = torch.where(live, new, tokens[rows, t])
                logps[rows, t], mask[rows, t] = logp * live, live
                live = live & ~torch.isin(new, eos)
                unfinished = live.view(-1, n).any(1)                  # (prompts in the batch,)
                left = int(unfinished.sum())
                if t + 1 == max_new_tokens or not left:
                    break
                # leaving costs a copy of the cache, and with a graph its new recording
                if left < (0.5 if static else 0.8) * len(unfinished):
                    prompts = unfinished.nonzero()[:, 0]
                    kept = (prompts[:, None] * n + torch.arange(n, device=device)).flatten()
                    rows, live, new = rows[kept], live[kept], new[kept]
                    cache.keep(prompts)
                    step = NextToken(self, cache, step.position[kept])
                logits = step(new)
        return Samples(tokens[:, :t + 1], mask[:, :t + 1], logps[:, :t + 1])

    # ---------------------------------------------------------------------------------- log-probabilities with gradient
    def token_log_probs(self, hidden, targets, temperature=1.0, entropy=False, chunk_elements=2 ** 24):
        """log p(target) of M tokens, the head applied in chunks: hidden (M, C), targets (M,) -> (M,) float32.

        Where one chunk is not enough, its logits are computed again in the backward pass, so at most `chunk_elements`
        logits live at once. With entropy=True also the entropy (M,) of each distribution, with entropy="grad" with
        gradient, which costs another copy of the logits.
        """
        if not 1e-6 <= temperature < math.inf:
            raise ValueError(f"log-probabilities at temperature {temperature}: expected a number from 1e-6")

        def of_chunk(h, y):
            logits = self.head(h).float() / temperature                                   # (m, V)
            norm = logits.logsumexp(-1)
            logp = logits.gather(1, y[:, None])[:, 0] - norm
            if not entropy:
                return logp, logp.detach()
            with torch.set_grad_enabled(torch.is_grad_enabled() and entropy == "grad"):
                return logp, norm - (logits * (logits - norm[:, None]).exp()).sum(-1)     # H = log Z - E[logit]

        m = max(1, chunk_elements // self.config.vocab_size)
        if len(hidden) <= m:
            logp, h = of_chunk(hidden, targets)
        else:
            parts = [checkpoint(of_chunk, h, y, use_reentrant=False) for h, y in zip(hidden.split(m), targets.split(m))]
            logp, h = (torch.cat(p) for p in zip(*parts))
        return (logp, h) if entropy else logp

    def log_probs(self, input_ids, targets_mask, attention_mask=None, pixel_values=None, image_grid_thw=None, *,
                  temperature=1.0):
        """Log-probabilities of the tokens under targets_mask, each given all before it; with gradient.

        input_ids (B, T); targets_mask (B, T) bool, its first column is never a target (or (B, T - 1), the mask of
        input_ids[:, 1:]). Returns (B, T - 1) float32: entry t belongs to input_ids[:, t + 1]; 0 outside the mask.
        """
        wanted = targets_mask.bool()
        wanted = wanted[:, 1:] if wanted.shape[1] == input_ids.shape[1] else wanted     # (B, T - 1)
        here = input_ids == self.config.image_token_id
        if int(here.sum()) != self.picture_tokens(image_grid_thw):
            # a sampled image token is a token like any other
            here &= ~F.pad(wanted, (1, 0))
        hidden = self.hidden_states(input_ids, attention_mask, pixel_values, image_grid_thw, here)
        hidden = hidden[:, :-1][wanted]                                                 # (M, C)
        logps = self.token_log_probs(hidden, input_ids[:, 1:][wanted], temperature)
        return torch.zeros(wanted.shape, device=hidden.device).masked_scatter(wanted, logps)

    def group_log_probs(self, tokens, mask, input_ids, attention_mask=None, pixel_values=None, image_grid_thw=None, *,
                        temperature=1.0, entropy=False):
        """Log-probabilities of n responses behind each prompt, the prompt computed once (prefix sharing); with
        gradient.

        tokens, mask (N * n, L) as `generate` returns them (a row's tokens stand at its beginning); input_ids (N, P)
        left-padded prompts. A prompt and its responses are one row [prompt | y1 | ... | yn]: each response has the
        positions that follow the prompt, and sees the prompt and itself only.
        Returns (N * n, L) float32, 0 outside the mask; with entropy also the entropies (N * n, L), as token_log_probs.
        """
        N, P = input_ids.shape
        n, L, device = len(tokens) // N, tokens.shape[1], input_ids.device
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if not valid[:, -1].all():
            raise ValueError("group_log_probs: prompts must be padded on the left, so that their last token is real")
        mask = mask.bool()
        if (mask[:, 1:] & ~mask[:, :-1]).any():
            raise ValueError("group_log_probs: a row's mask must be one run from its beginning, as generate returns it")
        before, after = self.positions(input_ids, valid, image_grid_thw)
        # the tokens of the n responses, one response behind the other, without the padding between them
        flat = mask.reshape(N, n * L)
        K = int(flat.sum(1).max())
        place = flat.long().argsort(dim=1, descending=True, stable=True)[:, :K]         # (N, K) where each stood
        real, packed = flat.gather(1, place), tokens.reshape(N, n * L).gather(1, place)
        response, t = place // L, place % L                                             # whose token, which of its
        positions = torch.cat((before, (after[:, None] + t).expand(3, -1, -1)), dim=2)  # (3, N, P + K)
        block = torch.cat((torch.full_like(input_ids, -1), response), dim=1)            # -1: the prompt
        seen = torch.cat((valid, real), dim=1)                                          # padding is seen by nobody
        sees = (block[:, None, :] == -1) | (block[:, :, None] == block[:, None, :])     # (N, P + K, P + K)
        sees = (sees.tril() & seen[:, None, :]) | torch.eye(P + K, dtype=torch.bool, device=device)
        x = torch.cat((self.embed(input_ids, pixel_values, image_grid_thw), self.model.embed_tokens(packed)), dim=1)
        hidden = self.model(x, positions, sees[:, None])                                # (N, P + K, C)
        # the prompt's end predicts y[0], y[t - 1] predicts y[t]
        source = torch.where(t == 0, P - 1, P - 1 + torch.arange(K, device=device))     # (N, K)
        hidden = hidden.gather(1, source[..., None].expand(-1, -1, hidden.shape[-1]))   # (N, K, C)
        out = self.token_log_probs(hidden[real], packed[real], temperature, entropy)
        spread = lambda values: torch.zeros(mask.shape, device=device).masked_scatter(mask, values)
        return tuple(map(spread, out)) if entropy else spread(out)
