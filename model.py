"""Qwen2.5-VL by hand: from token ids and pictures to the next token.

What flows through this file
    token ids, picture patches -> VLM.embed (a table for words, parts/vision.py for pictures)
        -> Decoder -> hidden states -> VLM.head -> logits -> pick -> the next token
    parts/chat.py makes the ids and patches of a conversation; parts/config.py reads config.json

Legend of shapes
    B rows of a batch     T tokens of a row     C hidden size     V vocabulary
    H query heads         KV key/value heads    g = H / KV        D head dimension
    N prompts             n samples of each     B = N n           L tokens of a sample
    P key slots of a prompt, S key slots of a sample behind its prompt
    a picture's grid is (t, h, w) patches; 2 x 2 patches become one image token

Sources: Qwen2.5-VL (arXiv 2502.13923), M-RoPE (Qwen2-VL, arXiv 2409.12191), grouped-query attention
(2305.13245). Names of weights and file formats are the published ones of Hugging Face.

Deviations from the released model code, with the reason
    * Pictures only, no video: the paper has none.
    * The keys and values of a prompt are stored once for all its n samples, instead of n times.
    * Prompts whose samples have all ended leave the batch, several at a time.
    * `log_probs` applies the head to response tokens only, and in chunks: a (B, T, V) tensor in
      float32 never exists.
    * `group_log_probs` computes a prompt once for all its responses (prefix sharing).
"""
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from parts.chat import Processor                    # noqa: F401, a public name of this file
from parts.config import our_name, read_config, saved_config
from parts.layers import RMSNorm, SwiGLU, rotate, turns
from parts.lora import add_lora, load_adapter, lora_disabled, save_adapter      # noqa: F401, public
from parts.vision import VisionTower
from plumbing.files import write_json
from plumbing.weights import read_weights, usable_device, weight_files, write_shards


# ------------------------------------------------------------------------------------------ decoder

def real_tokens(input_ids, attention_mask):
    """(B, T) bool, False at padding. Without an attention_mask there is none."""
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    return attention_mask.bool()


def causal_mask(valid, new=None):
    """True where a token sees a slot: the valid ones up to its own, and always its own. Padding
    would else see nothing, and a softmax over nothing is NaN.

    valid (..., slots) bool, new (T,) the tokens' slots, by default all -> (..., T, slots) bool.
    """
    slot = torch.arange(valid.shape[-1], device=valid.device)
    own = (slot if new is None else new)[:, None]                   # (T, 1)
    usable = valid[..., None, :] | (slot == own)
    return usable & (slot <= own)


class KVCache:
    """Keys and values of all tokens read so far, in two parts.

    Prefill reads the N prompts, and `keep_prompt` stores them, once each. Then `share` gives each
    of a prompt's n samples room for tokens of its own. The key slots of a sample are numbered
    through both parts: 0 ... P - 1 the prompt, then its own.

    Where `static` is set, each decode step looks at the whole room instead of its filled part, so
    that all steps have the same shapes, and one recorded as a CUDA graph can be replayed.
    """

    def __init__(self, valid, fused=()):
        """valid (N, P) bool: False where a prompt is padded. fused: see Decoder.fused_weights."""
        self.valid = valid                          # after `share` (N, n, slots)
        self.fused = fused
        self.reading_prompt = True
        self.prompt_kv = []                         # for each layer keys, values (N, KV, P, D)

    def keep_prompt(self, k, v):
        """Stores the prompts' keys and values (N, KV, P, D) of the next layer."""
        self.prompt_kv.append((k.contiguous(), v.contiguous()))

    def share(self, n, room, static=False):
        """Ends prefill: each prompt gets n samples, and each sample room for that many tokens."""
        k, _ = self.prompt_kv[0]
        N, KV, P, D = k.shape
        self.reading_prompt = False
        self.static = static
        self.own_kv = k.new_zeros(len(self.prompt_kv), 2, N, KV, n, room, D)    # 2: keys, values
        prompt_valid = self.valid[:, None].expand(N, n, P)
        self.valid = F.pad(prompt_valid, (0, room), value=True)             # (N, n, P + room)
        self.filled = P                                 # slots that hold a token
        self.end = torch.tensor(P, device=k.device)     # the same on the device

    def select(self, prompts):
        """Keeps these prompts, (N',) long, with their samples; the others leave the batch."""
        self.prompt_kv = [(k[prompts], v[prompts]) for k, v in self.prompt_kv]
        self.own_kv = self.own_kv[:, :, prompts]
        self.valid = self.valid[prompts]

    def extend(self, T, valid=None):
        """Makes place for T more tokens of each sample, and settles what they see in all layers:
        the prompt, and their sample up to themselves.

        valid (B, T) bool: False where a new token is padding.
        """
        N, n, all_slots = self.valid.shape
        self.new = self.end + torch.arange(T, device=self.end.device)   # (T,) the slots they take
        self.end += T
        self.filled += T
        if valid is not None:
            self.valid[:, :, self.new] = valid.view(N, n, T)

        slots = all_slots if self.static else self.filled               # P + S
        mask = causal_mask(self.valid[..., :slots], self.new)           # (N, n, T, P + S)
        bias = torch.zeros_like(mask, dtype=self.own_kv.dtype)
        bias.masked_fill_(~mask, -torch.inf)
        self.bias = bias[:, None, :, None]                              # (N, 1, n, 1, T, P + S)

    def attend(self, layer, q, k, v):
        """Stores keys and values of the new tokens; returns their attention over all they see.

        q (B, H, T, D), k, v (B, KV, T, D) -> (B, H, T, D). The n samples of a prompt, and the g
        query heads that share a key head, become rows of one matrix product: the prompt's keys are
        read from memory once for all of them.
        """
        prompt_k, prompt_v = self.prompt_kv[layer]                  # (N, KV, P, D) each
        N, KV, P, D = prompt_k.shape
        B, H, T, _ = q.shape
        n = B // N
        g = H // KV

        own_k, own_v = self.own_kv[layer]                           # (N, KV, n, room, D) each
        new = self.new - P                                          # (T,) places in the own part
        k = k.view(N, n, KV, T, D).transpose(1, 2)                  # (N, KV, n, T, D)
        v = v.view(N, n, KV, T, D).transpose(1, 2)
        own_k.index_copy_(3, new, k)
        own_v.index_copy_(3, new, v)
        S = self.bias.shape[-1] - P
        own_k = own_k[..., :S, :]                                   # (N, KV, n, S, D)
        own_v = own_v[..., :S, :]

        q = q.reshape(N, n, KV, g * T, D).transpose(1, 2)
        q = D ** -0.5 * q                                           # (N, KV, n, g T, D)
        prompt_scores = q.flatten(2, 3) @ prompt_k.mT               # (N, KV, n g T, P)
        prompt_scores = prompt_scores.unflatten(2, (n, g * T))
        own_scores = q @ own_k.mT                                   # (N, KV, n, g T, S)
        scores = torch.cat((prompt_scores, own_scores), dim=-1)
        scores = scores.unflatten(3, (g, T)) + self.bias            # (N, KV, n, g, T, P + S)
        weights = scores.softmax(-1, dtype=torch.float32)
        weights = weights.to(q.dtype).flatten(3, 4)                 # (N, KV, n, g T, P + S)
        prompt_weights, own_weights = weights.split((P, S), dim=-1)
        prompt_y = prompt_weights.flatten(2, 3) @ prompt_v          # (N, KV, n g T, D)
        y = prompt_y.view(q.shape) + own_weights @ own_v            # (N, KV, n, g T, D)
        return y.transpose(1, 2).reshape(B, H, T, D)


class Attention(nn.Module):
    """Grouped-query attention: g query heads share a key/value head; q, k and v have biases."""

    def __init__(self, c, layer):
        super().__init__()
        self.layer = layer                                          # its number
        self.heads = c.num_attention_heads
        self.kv_heads = c.num_key_value_heads
        self.head_dim = c.head_dim
        q_size = self.heads * self.head_dim
        kv_size = self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(c.hidden_size, q_size)
        self.k_proj = nn.Linear(c.hidden_size, kv_size)
        self.v_proj = nn.Linear(c.hidden_size, kv_size)
        self.o_proj = nn.Linear(q_size, c.hidden_size, bias=False)

    def forward(self, x, cos, sin, mask, cache):
        B, T, _ = x.shape
        qkv = self.project(x, cache)                                # (B, T, (H + 2 KV) D)
        qkv = qkv.view(B, T, -1, self.head_dim).transpose(1, 2)     # (B, H + 2 KV, T, D)
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        qk = rotate(qk, cos, sin)
        q, k = qk.split((self.heads, self.kv_heads), dim=1)         # (B, H, T, D), (B, KV, T, D)
        if cache is None or cache.reading_prompt:                   # training, prefill
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                               enable_gqa=True)
            if cache is not None:
                cache.keep_prompt(k, v)
        else:                                                       # decode
            y = cache.attend(self.layer, q, k, v)
        y = y.transpose(1, 2).reshape(B, T, -1)                     # (B, T, H D)
        return self.o_proj(y)

    def project(self, x, cache):
        """Queries, keys and values side by side: (B, T, C) -> (B, T, (H + 2 KV) D)."""
        if cache is not None and self.layer in cache.fused:
            weight, bias = cache.fused[self.layer]
            return F.linear(x, weight, bias)
        q = self.q_proj(x)
        k = self.k_proj(x)
        v = self.v_proj(x)
        return torch.cat((q, k, v), dim=-1)


class DecoderLayer(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = SwiGLU(c.hidden_size, c.intermediate_size, bias=False)

    def forward(self, x, cos, sin, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(c, i) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.gradient_checkpointing = False

    def angles(self, positions):
        """M-RoPE: each rotary pair turns with the time, the height or the width of its token.

        positions (3, B, T) -> cos, sin (B, 1, T, D).
        """
        D = self.c.head_dim
        even = torch.arange(0, D, 2, device=positions.device, dtype=torch.float32)
        speed = self.c.rope_theta ** (-even / D)                    # (D/2,)
        angles = []
        for position, speeds in zip(positions, speed.split(self.c.mrope_section)):
            angles.append(position[:, None, :, None] * speeds)      # (B, 1, T, pairs of this axis)
        return turns(torch.cat(angles, dim=-1))

    def forward(self, x, positions, mask=None, cache=None):
        """x (B, T, C) embedded tokens, positions (3, B, T) -> (B, T, C) normalised hidden states.

        mask: bool (B, 1, T, T), True where a token sees another; None: it sees all before it. After
        prefill the cache says what is seen.
        """
        cos, sin = self.angles(positions)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, mask, cache, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, cache)
        return self.norm(x)

    def fused_weights(self):
        """{number of a layer: (weight, bias)}: those of q, k and v below one another, so that
        decoding needs one matrix product instead of three. Layers where these have an adapter are
        left out.

        A copy, a twentieth of a published model, that lives as long as its cache.
        """
        fused = {}
        for i, layer in enumerate(self.layers):
            attention = layer.self_attn
            linears = attention.q_proj, attention.k_proj, attention.v_proj
            if all(type(linear) is nn.Linear for linear in linears):
                weight = torch.cat([linear.weight for linear in linears])
                bias = torch.cat([linear.bias for linear in linears])
                fused[i] = weight, bias
        return fused


# ----------------------------------------------------------------------------------------- sampling

@dataclass(frozen=True)
class Samples:
    """What `generate` sampled: a row for each sample, those of a prompt next to each other."""
    tokens: torch.Tensor        # (B, L) long; behind the end of a row stands the first eos id
    mask: torch.Tensor          # (B, L) bool, True where the model sampled the token, eos included
    logps: torch.Tensor         # (B, L) float32, log-probabilities at the temperature, else 0


def likeliest(probs, top_k, top_p):
    """Probabilities (B, V) with a 0 wherever top-k, and after it top-p, rule a token out."""
    if top_k > 0:
        k = min(top_k, probs.shape[-1])
        least = probs.topk(k, dim=-1).values[:, -1:]                        # (B, 1)
        probs = probs.masked_fill(probs < least, 0)
    if top_p < 1.0:
        share = probs / probs.sum(-1, keepdim=True)
        share, token = share.sort(dim=-1, descending=True)
        outside = share.cumsum(-1) - share >= top_p             # likelier tokens hold top_p already
        outside = torch.zeros_like(outside).scatter(1, token, outside)      # back in order of ids
        probs = probs.masked_fill(outside, 0)
    return probs


def pick(logits, temperature, top_k, top_p, noise):
    """Samples a token for each row: logits (B, V), noise (B,) uniform in [0, 1) -> tokens (B,) and
    their log-probabilities (B,) float32.

    The log-probability is that of softmax(logits / temperature) before top-k and top-p, as
    `log_probs` recomputes it.
    """
    probs = F.softmax(logits.float() / (temperature or 1.0), dim=-1)        # (B, V)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        # Inverse distribution function: on a line where each token is as long as its probability,
        # the row's random number is a point, and the token it falls on is taken.
        end = likeliest(probs, top_k, top_p).cumsum(-1)                     # (B, V)
        point = noise[:, None].clamp(max=1 - 1e-6) * end[:, -1:]            # (B, 1)
        tokens = torch.searchsorted(end, point, right=True)[:, 0]
        tokens = tokens.clamp(max=logits.shape[-1] - 1)                     # where logits are NaN
    logps = probs.gather(1, tokens[:, None])[:, 0].log()
    return tokens, logps


class NextToken:
    """The decode step: the tokens that were sampled go in, the logits of the next ones come out.

    On CUDA a step of static shapes is recorded as a graph, which launches its hundreds of small
    kernels at once. What differs from step to step (tokens, positions, the cache's end) therefore
    stays on the device, in tensors that are changed in place.
    """

    def __init__(self, vlm, cache, position):
        """position (B,): where the tokens of the first step stand."""
        self.vlm = vlm
        self.cache = cache
        self.position = position
        self.token = torch.zeros_like(position)
        self.calls = 0
        self.graph = None

    def compute(self):
        """Reads `token` (B,) and moves all rows on by one -> logits (B, V)."""
        self.cache.extend(1)
        x = self.vlm.model.embed_tokens(self.token[:, None])                # (B, 1, C)
        positions = self.position.expand(3, -1)[..., None]                  # (3, B, 1)
        hidden = self.vlm.model(x, positions, cache=self.cache)
        self.position += 1
        return self.vlm.head(hidden[:, 0])

    def __call__(self, token):
        """token (B,) -> logits (B, V), which the next call may overwrite."""
        self.token.copy_(token)
        self.calls += 1
        graph_fits = token.is_cuda and self.cache.static
        if not graph_fits or self.calls == 1:                   # the first call loads the kernels
            return self.compute()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):              # recorded, not yet run
                self.logits = self.compute()
        self.graph.replay()
        return self.logits


# ---------------------------------------------------------------------------------------- the model

class VLM(nn.Module):
    """The vision-language model: `visual` makes tokens of pictures, `model` reads them among the
    words, the head scores the next token."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.vision, config.hidden_size)
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    # ----------------------------------------------------------------------------- make, load, save

    @classmethod
    def from_config(cls, path_or_dict, seed=0, dtype=torch.float32, device="cpu"):
        """Random weights from a config.json, a directory or a dict; the seed fixes them."""
        config = read_config(path_or_dict)
        device = usable_device(device)
        with torch.device("meta"):
            vlm = cls(config)
        count = sum(p.numel() for p in vlm.parameters())
        if count > 100e9:                                   # before anything is allocated
            raise ValueError(f"config.json asks for {count:.1e} random weights: at most 1e11 are "
                             "made")
        vlm.to_empty(device=device)
        generator = torch.Generator(device).manual_seed(seed)
        with torch.no_grad():
            for name, p in vlm.named_parameters():
                vlm.initialize(name, p, generator)
        return vlm.to(dtype)

    def initialize(self, name, p, generator):
        """First values of the parameter of this name, in place. The spread of a matrix shrinks with
        its fan-in, that of a block's last one with the depth, too."""
        config = self.config
        if p.dim() == 1:
            p.fill_(1.0 if "norm" in name or "ln_q" in name else 0.0)
        elif "embed_tokens" in name:
            p.normal_(0, config.hidden_size ** -0.5, generator=generator)
        else:
            std = p[0].numel() ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight")):
                in_tower = name.startswith("visual")
                depth = config.vision.depth if in_tower else config.num_hidden_layers
                std *= (2 * depth) ** -0.5
            p.normal_(0, std, generator=generator)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Reads a Hugging Face directory (either layout, one file or shards) straight into dtype
        and device. ValueError lists every missing, unexpected and mis-shaped weight."""
        if not Path(path).is_dir():
            raise ValueError(f"{path}: no such model directory; expected one with config.json and "
                             "model.safetensors")
        config = read_config(path)
        device = usable_device(device)
        with torch.device("meta"):
            vlm = cls(config)
        shapes = {name: p.shape for name, p in vlm.named_parameters()}
        optional = ()
        if config.tie_word_embeddings:                      # files may hold it nevertheless
            optional = ("lm_head.weight",)
            shapes["lm_head.weight"] = vlm.model.embed_tokens.weight.shape
        weights = read_weights(weight_files(path), shapes, our_name, optional, dtype, device)
        for name in optional:
            head = weights.pop(name, None)
            if head is not None and not torch.equal(head, weights["model.embed_tokens.weight"]):
                raise ValueError(f"{path}: tied, but {name} differs from the embedding table")
        vlm.load_state_dict(weights, assign=True)
        return vlm

    def save_pretrained(self, path, dtype=None, shard_bytes=5_000_000_000):
        """Writes config.json and safetensors that `from_pretrained` and transformers read. An
        adapter is left out (`save_adapter`, or `merge_lora` first)."""
        dtype = dtype or next(self.parameters()).dtype
        weights = {}
        for name, p in self.named_parameters():
            if "lora_" not in name:
                weights[name] = p.detach().to(dtype).cpu().contiguous()
        write_shards(weights, path, shard_bytes)
        config = saved_config(self.config.raw, str(dtype).removeprefix("torch."))
        write_json(Path(path) / "config.json", config)

    # -------------------------------------------------------------------------------------- forward

    def image_tokens(self, image_grid_thw):
        """How many tokens the pictures of these grids (pictures, 3) take."""
        if image_grid_thw is None:
            return 0
        merged = self.config.vision.spatial_merge_size ** 2
        return int((image_grid_thw.prod(-1) // merged).sum())

    def embed(self, input_ids, pixel_values=None, image_grid_thw=None, is_image=None):
        """Token ids (B, T) -> embeddings (B, T, C), those of image tokens from the vision tower.

        is_image (B, T) bool: where these stand, by default wherever their id does.
        """
        x = self.model.embed_tokens(input_ids)
        if is_image is None:
            is_image = input_ids == self.config.image_token_id
        expected = self.image_tokens(image_grid_thw)
        places = int(is_image.sum())
        if places != expected:
            raise ValueError(f"{places} image tokens in input_ids, but the pictures make "
                             f"{expected}: the prompt was cut or pictures are missing")
        if places == 0:
            return x
        expected_patches = int(image_grid_thw.prod(-1).sum())
        patches = 0 if pixel_values is None else len(pixel_values)
        if patches != expected_patches:
            raise ValueError(f"pixel_values holds {patches} patches, the grids of image_grid_thw "
                             f"make {expected_patches}")
        pixel_values = pixel_values.to(x.dtype)
        features = self.visual(pixel_values, image_grid_thw.tolist())       # (image tokens, C)
        return x.masked_scatter(is_image[..., None], features)

    def positions(self, input_ids, attention_mask=None, image_grid_thw=None, is_image=None):
        """M-RoPE positions (3, B, T) of time, height and width, and the position (B,) that comes
        after each row (arXiv 2409.12191, 2.1).

        Words advance all three by one. A picture's tokens share the position where it starts, plus
        their own row and column; what follows starts behind the picture's longer side. Padding does
        not advance.
        """
        advance = real_tokens(input_ids, attention_mask).long()             # (B, T)
        pictures = [] if image_grid_thw is None else image_grid_thw.tolist()
        if not pictures:
            after = advance.cumsum(1)
            return (after - advance).repeat(3, 1, 1), after[:, -1]

        merge = self.config.vision.spatial_merge_size
        offsets, counts, sides = [], [], []
        for t, h, w in pictures:
            h, w = h // merge, w // merge
            axes = torch.arange(t), torch.arange(h), torch.arange(w)
            offsets.append(torch.cartesian_prod(*axes))                     # (t h w, 3)
            counts.append(t * h * w)
            sides.append(max(t, h, w))
        device = input_ids.device
        offsets = torch.cat(offsets).T.to(device)                           # (3, image tokens)
        counts = torch.tensor(counts, device=device)                        # (pictures,)
        sides = torch.tensor(sides, device=device)

        if is_image is None:
            is_image = input_ids == self.config.image_token_id
        row, column = is_image.nonzero(as_tuple=True)                       # (image tokens,) each
        last = counts.cumsum(0) - 1             # the number of each picture's last token among them
        advance = advance.masked_fill(is_image, 0)
        advance[row[last], column[last]] = sides
        after = advance.cumsum(1)
        positions = (after - advance).repeat(3, 1, 1)
        positions[:, is_image] += offsets
        return positions, after[:, -1]

    def head(self, hidden):
        """Hidden states (..., C) -> logits (..., V)."""
        tied = self.config.tie_word_embeddings
        table = self.model.embed_tokens if tied else self.lm_head
        return F.linear(hidden, table.weight)

    def hidden_states(self, input_ids, attention_mask=None, pixel_values=None, image_grid_thw=None,
                      is_image=None, cache=None):
        """Normalised hidden states (B, T, C) of the last layer, and the next position (B,). The
        cache, where there is one, stores the prompts."""
        valid = real_tokens(input_ids, attention_mask)
        mask = None if valid.all() else causal_mask(valid)[:, None]         # (B, 1, T, T)
        x = self.embed(input_ids, pixel_values, image_grid_thw, is_image)
        positions, after = self.positions(input_ids, valid, image_grid_thw, is_image)
        return self.model(x, positions, mask, cache), after

    def forward(self, input_ids, attention_mask=None, pixel_values=None, image_grid_thw=None):
        """Token ids (B, T) -> logits (B, T, V).

        attention_mask (B, T): 0 at padding, on either side; pixel_values (patches, numbers of a
        patch) of all pictures in reading order; image_grid_thw (pictures, 3). ValueError where
        image tokens and pictures do not match.
        """
        hidden, _ = self.hidden_states(input_ids, attention_mask, pixel_values, image_grid_thw)
        return self.head(hidden)

    # ------------------------------------------------------------------------------------- generate

    def prefill(self, input_ids, attention_mask=None, pixel_values=None, image_grid_thw=None):
        """Reads the prompts once: their cache, the last token's hidden state (N, C), and the
        position (N,) of the next token."""
        valid = real_tokens(input_ids, attention_mask)
        cache = KVCache(valid, self.model.fused_weights())
        hidden, after = self.hidden_states(input_ids, valid, pixel_values, image_grid_thw,
                                           cache=cache)
        N, P = valid.shape
        row = torch.arange(N, device=valid.device)
        column = torch.arange(P, device=valid.device)
        last = (valid * column).argmax(1)                       # (N,) the last real token
        return cache, hidden[row, last], after

    def generate(self, input_ids, attention_mask=None, pixel_values=None, image_grid_thw=None, *,
                 n=1, max_new_tokens=256, temperature=1.0, top_k=0, top_p=1.0, eos_ids=(),
                 generator=None, noise=None, static=None):
        """Samples n continuations of each prompt, input_ids (N, P) -> Samples of B = N n rows.

        temperature 0 is greedy; top_k 0 and top_p 1 switch these filters off.
        noise (B, max_new_tokens): uniform numbers in [0, 1), by default drawn from the generator.
        noise[i, t] decides token t of sample i, and nothing else is random: but for rounding, a
        sample does not depend on the rows beside it.
        static: decode in static shapes; by default on CUDA, where a step is replayed as a graph.
        """
        usable = temperature == 0 or 1e-6 <= temperature < math.inf
        if not usable or not 0 < top_p <= 1 or top_k < 0 or n < 1 or max_new_tokens < 1:
            raise ValueError(f"generate: temperature {temperature} of 0 or from 1e-6, 0 < top_p "
                             f"{top_p} <= 1, top_k {top_k} >= 0, n {n} >= 1 and max_new_tokens "
                             f"{max_new_tokens} >= 1 are expected")
        device = input_ids.device
        shape = len(input_ids) * n, max_new_tokens                          # (B, L) at most
        if static is None:
            static = input_ids.is_cuda
        if noise is None:
            noise = torch.rand(shape, generator=generator, device=device)
        eos = torch.tensor(list(eos_ids), device=device, dtype=torch.long)
        filler = int(eos[0]) if len(eos) else 0
        tokens = torch.full(shape, filler, device=device)
        mask = torch.zeros(shape, dtype=torch.bool, device=device)
        logps = torch.zeros(shape, device=device)

        rows = torch.arange(len(tokens), device=device)         # those still in the batch
        live = torch.ones_like(rows, dtype=torch.bool)          # of them: those that have not ended
        with torch.inference_mode():            # what is made inside cannot be trained on
            cache, hidden, position = self.prefill(input_ids, attention_mask, pixel_values,
                                                   image_grid_thw)
            cache.share(n, max_new_tokens, static)
            decode = NextToken(self, cache, position.repeat_interleave(n))
            logits = self.head(hidden).repeat_interleave(n, 0)              # (B, V)
            for t in range(max_new_tokens):
                token, logp = pick(logits, temperature, top_k, top_p, noise[rows, t])
                tokens[rows, t] = token.masked_fill(~live, filler)
                logps[rows, t] = logp * live
                mask[rows, t] = live
                live = live & ~torch.isin(token, eos)
                unfinished = live.view(-1, n).any(1)            # (prompts in the batch,)
                count = int(unfinished.sum())
                if count == 0 or t + 1 == max_new_tokens:
                    break
                # several leave at a time, as that costs a copy of the cache, on CUDA a new graph
                if count < (0.5 if static else 0.8) * len(unfinished):
                    prompts = unfinished.nonzero()[:, 0]
                    stay = unfinished.repeat_interleave(n)                  # (B,) bool
                    rows, live, token = rows[stay], live[stay], token[stay]
                    cache.select(prompts)
                    decode = NextToken(self, cache, decode.position[stay])
                logits = decode(token)
        L = t + 1
        return Samples(tokens[:, :L], mask[:, :L], logps[:, :L])

    # -------------------------------------------------------------- log-probabilities with gradient

    def token_log_probs(self, hidden, targets, temperature, entropy, chunk_elements=2 ** 24):
        """log p(target) of M tokens and the entropies of their distributions, (M,) float32 each:
        hidden (M, C), targets (M,). The head is applied in chunks.

        Where there are several, each computes its logits again in the backward pass, so that at
        most `chunk_elements` logits live at once. entropy: "none" (zeros instead), "value"
        (without gradient), or "grad", which costs another copy of the logits.
        """
        if not 1e-6 <= temperature < math.inf:
            raise ValueError(f"log-probabilities at temperature {temperature}: expected a number "
                             "from 1e-6")

        def of_chunk(hidden, targets):
            logits = self.head(hidden).float() / temperature                # (m, V)
            log_z = logits.logsumexp(-1)                                    # (m,)
            logp = logits.gather(1, targets[:, None])[:, 0] - log_z
            if entropy == "none":
                return logp, torch.zeros_like(logp)
            with torch.set_grad_enabled(entropy == "grad" and torch.is_grad_enabled()):
                probs = (logits - log_z[:, None]).exp()
                expected_logit = (logits * probs).sum(-1)
                return logp, log_z - expected_logit             # the entropy is log Z - E[logit]

        m = max(1, chunk_elements // self.config.vocab_size)
        if len(hidden) <= m:
            return of_chunk(hidden, targets)
        chunks = zip(hidden.split(m), targets.split(m))
        results = [checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]
        logps, entropies = zip(*results)
        return torch.cat(logps), torch.cat(entropies)

    def log_probs(self, input_ids, targets_mask, attention_mask=None, pixel_values=None,
                  image_grid_thw=None, *, temperature=1.0):
        """Log-probabilities of the tokens under targets_mask, each given all before it; with
        gradient.

        input_ids (B, T); targets_mask (B, T) bool, whose first column is no target, or (B, T - 1),
        the mask of input_ids[:, 1:]. Returns (B, T - 1) float32: entry t belongs to
        input_ids[:, t + 1]; 0 outside the mask.
        """
        mask = targets_mask.bool()
        if mask.shape[1] == input_ids.shape[1]:
            mask = mask[:, 1:]                                              # (B, T - 1)
        is_image = input_ids == self.config.image_token_id
        if int(is_image.sum()) != self.image_tokens(image_grid_thw):
            is_image &= ~F.pad(mask, (1, 0))            # a sampled image token shows no picture
        hidden, _ = self.hidden_states(input_ids, attention_mask, pixel_values, image_grid_thw,
                                       is_image)
        hidden = hidden[:, :-1][mask]                                       # (M, C)
        targets = input_ids[:, 1:][mask]                                    # (M,)
        logps, _ = self.token_log_probs(hidden, targets, temperature, "none")
        zeros = torch.zeros(mask.shape, device=hidden.device)
        return zeros.masked_scatter(mask, logps)

    def group_log_probs(self, tokens, mask, input_ids, attention_mask=None, pixel_values=None,
                        image_grid_thw=None, *, temperature=1.0, entropy="none"):
        """Log-probabilities of n responses behind each prompt, the prompt computed once (prefix
        sharing); with gradient.

        tokens, mask (N n, L) as `generate` returns them, a row's tokens at its beginning; input_ids
        (N, P) left-padded prompts. A prompt and its responses are one row [prompt | y1 | ... | yn]:
        each response has the positions that follow the prompt, and sees the prompt and itself only.
        Returns (N n, L) float32, 0 outside the mask; unless entropy is "none" also the entropies
        (N n, L), see `token_log_probs`.
        """
        N, P = input_ids.shape
        L = tokens.shape[1]
        device = input_ids.device
        valid = real_tokens(input_ids, attention_mask)
        mask = mask.bool()
        if not valid[:, -1].all():
            raise ValueError("group_log_probs: prompts must be padded on the left, so that their "
                             "last token is real")
        if (mask[:, 1:] & ~mask[:, :-1]).any():
            raise ValueError("group_log_probs: a row's mask must be one run from its beginning, as "
                             "generate returns it")

        # pack a prompt's responses: one behind the other, padding at the end, K tokens at most
        flat = mask.reshape(N, -1)                                          # (N, n L)
        K = int(flat.sum(1).max())
        place = flat.long().argsort(dim=1, descending=True, stable=True)
        place = place[:, :K]                                    # (N, K) where a token stood in flat
        real = flat.gather(1, place)
        packed = tokens.reshape(N, -1).gather(1, place)
        response, t = place // L, place % L                     # it was token t of this response

        before, after = self.positions(input_ids, valid, image_grid_thw)
        behind = (after[:, None] + t).expand(3, -1, -1)                     # (3, N, K)
        positions = torch.cat((before, behind), dim=2)                      # (3, N, P + K)

        part = F.pad(response, (P, 0), value=-1)        # (N, P + K) its response, -1 in the prompt
        of_prompt = part[:, None, :] == -1                                  # (N, 1, P + K)
        same_part = part[:, None, :] == part[:, :, None]                    # (N, P + K, P + K)
        causal = causal_mask(torch.cat((valid, real), dim=1))
        sees = causal & (of_prompt | same_part)

        prompt_x = self.embed(input_ids, pixel_values, image_grid_thw)
        response_x = self.model.embed_tokens(packed)
        x = torch.cat((prompt_x, response_x), dim=1)                        # (N, P + K, C)
        hidden = self.model(x, positions, sees[:, None])
        # the prompt's end predicts y[0], y[t - 1] predicts y[t]
        previous = P - 1 + torch.arange(K, device=device)
        source = torch.where(t == 0, P - 1, previous)                       # (N, K)
        hidden = hidden.take_along_dim(source[..., None], dim=1)            # (N, K, C)

        logps, entropies = self.token_log_probs(hidden[real], packed[real], temperature, entropy)
        zeros = torch.zeros(mask.shape, device=device)
        logps = zeros.masked_scatter(mask, logps)                           # (N n, L)
        if entropy == "none":
            return logps
        return logps, zeros.masked_scatter(mask, entropies)


if __name__ == "__main__":                  # python model.py check DIR
    project = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent)}
    os.execve(sys.executable, [sys.executable, "-m", "lab.check", *sys.argv[1:]], project)
