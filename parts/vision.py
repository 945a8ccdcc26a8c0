"""A picture file becomes image tokens: reading it, its size, and the vision tower of Qwen2.5-VL."""
import functools
import math
import os
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn

from parts.layers import RMSNorm, SwiGLU, rotate, turns
from plumbing.old import read_json

# -------------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower. The defaults are those that checkpoints leave out of config.json."""
    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14                              # pixels
    temporal_patch_size: int = 2                      # a still picture is shown twice
    spatial_merge_size: int = 2                       # 2 x 2 patches become one image token
    window_size: int = 112                            # pixels: attention is local to windows of 8 x 8 patches ...
    fullatt_block_indexes: tuple = (7, 15, 23, 31)    # ... except in these blocks


# --------------------------------------------------------------------------------------------------------- vision tower


@functools.lru_cache(maxsize=1024)
def patch_layout(grid, merge, window):
    """Where the patches of one picture stand, in window order.

    grid (t, h, w) in patches; merge: patches per token side; window: tokens per window side.
    The processor emits patches in 2 x 2 blocks (a block = one image token). The tower sorts the blocks by window;
    ragged windows at the right and lower edge are shorter.
    Returns rows (P,), columns (P,), order (P / merge^2,) of the blocks, window lengths in patches.
    """
    t, h, w = grid
    bh, bw, unit = h // merge, w // merge, merge * merge
    block = torch.arange(bh * bw).view(bh, bw)
    order, lengths = [], []
    for top in range(0, bh, window):
        for left in range(0, bw, window):
            members = block[top:top + window, left:left + window].flatten()
            order.append(members)
            lengths.append(len(members) * unit)
    order = torch.cat(order)
    inside = torch.arange(unit)
    rows = (order // bw)[:, None] * merge + inside // merge            # (blocks, unit)
    cols = (order % bw)[:, None] * merge + inside % merge
    frames = torch.cat([order + f * bh * bw for f in range(t)])        # each frame is attended by itself
    return rows.flatten().repeat(t), cols.flatten().repeat(t), frames, lengths * t


def attend_blocks(q, k, v, lengths):
    """Attention inside consecutive blocks of patches. Blocks of one length are one batch.

    q, k, v (P, H, D); lengths of the blocks sum to P.
    """
    P, H, D = q.shape
    if len(set(lengths)) == 1:
        split = lambda x: x.view(-1, lengths[0], H, D).transpose(1, 2)                   # (blocks, H, length, D)
        return F.scaled_dot_product_attention(split(q), split(k), split(v)).transpose(1, 2).reshape(P, H, D)
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    out = torch.empty_like(q)
    for length in sorted(set(lengths)):
        where = (starts[sizes == length][:, None] + torch.arange(length)).to(q.device)     # (blocks, length)
        y = F.scaled_dot_product_attention(*(x[where].transpose(1, 2) for x in (q, k, v)))  # (blocks, H, length, D)
        out[where] = y.transpose(1, 2)
    return out


class VisionAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.num_heads
        self.qkv = nn.Linear(c.hidden_size, 3 * c.hidden_size)
        self.proj = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x, cos, sin, lengths):
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)      # (P, H, D) each
        y = attend_blocks(rotate(q, cos, sin), rotate(k, cos, sin), v, lengths)
        return self.proj(y.reshape(len(x), -1))


class VisionBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(c.hidden_size, 1e-6), RMSNorm(c.hidden_size, 1e-6)
        self.attn = VisionAttention(c)
        self.mlp = SwiGLU(c.hidden_size, c.intermediate_size, bias=True)

    def forward(self, x, cos, sin, lengths):
        x = x + self.attn(self.norm1(x), cos, sin, lengths)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel is a matrix product with each patch; the weight keeps its published 5-D
    shape."""
    def __init__(self, c):
        super().__init__()
        self.proj = nn.Module()
        self.proj.weight = nn.Parameter(torch.empty(
            c.hidden_size, c.in_channels, c.temporal_patch_size, c.patch_size, c.patch_size))

    def forward(self, patches):
        return F.linear(patches, self.proj.weight.flatten(1))


class PatchMerger(nn.Module):
    """2 x 2 neighbouring patches -> one token of the decoder's width."""
    def __init__(self, c, out_size):
        super().__init__()
        inner = c.hidden_size * c.spatial_merge_size ** 2
        self.inner = inner
        self.ln_q = RMSNorm(c.hidden_size, 1e-6)
        self.mlp = nn.Sequential(nn.Linear(inner, inner), nn.GELU(), nn.Linear(inner, out_size))

    def forward(self, x):
        return self.mlp(self.ln_q(x).view(-1, self.inner))


class VisionTower(nn.Module):
    """Patches of all pictures of a batch, one behind the other -> image tokens. No padding: a picture costs what it
    shows."""
    def __init__(self, c, out_size):
        super().__init__()
        self.c = c
        self.patch_embed = PatchEmbed(c)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.depth))
        self.merger = PatchMerger(c, out_size)

    def angles(self, rows, cols):
        """Half of the rotary pairs turn with the row, half with the column: (P,), (P,) -> cos, sin (P, 1, D)."""
        quarter = self.c.hidden_size // self.c.num_heads // 4
        speed = 10000.0 ** (-torch.arange(quarter, device=rows.device) / quarter)
        return turns(torch.cat((rows[:, None] * speed, cols[:, None] * speed), dim=-1)[:, None])

    def forward(self, patches, grids):
        """patches (P, channels * frames * size^2), grids: list of (t, h, w) -> (P / 4, C) in reading order."""
        c, device = self.c, patches.device
        unit = c.spatial_merge_size ** 2
        window = max(1, c.window_size // c.spatial_merge_size // c.patch_size)
        rows, cols, order, lengths, full, start = [], [], [], [], [], 0
        for grid in grids:
            r, col, o, ls = patch_layout(tuple(grid), c.spatial_merge_size, window)
            rows.append(r), cols.append(col), order.append(o + start)
            lengths += ls
            full += [grid[1] * grid[2]] * grid[0]                     # full attention sees one whole frame
            start += len(o)
        order = torch.cat(order).to(device)
        cos, sin = self.angles(torch.cat(rows).to(device), torch.cat(cols).to(device))
        x = self.patch_embed(patches)                                 # (P, C_vision)
        x = x.view(-1, unit, x.shape[-1])[order].flatten(0, 1)        # blocks sorted by window
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, full if i in c.fullatt_block_indexes else lengths)
        return self.merger(x)[order.argsort()]                        # back to reading order


# ------------------------------------------------------------------------------------------- pictures and conversations


def smart_resize(height, width, factor, min_pixels, max_pixels):
    """Published rule: both sides multiples of `factor`, the area within the limits, the shape kept as well as that
    allows.

    Pixels in, pixels out. Raises ValueError for a picture more than 200 times longer than it is wide.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"a picture of {width} x {height} pixels is more than 200 times longer than wide; "
                         "cut it first")
    h, w = (round(side / factor) * factor for side in (height, width))
    if h * w > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        h, w = (max(factor, math.floor(side / beta / factor) * factor) for side in (height, width))
    elif h * w < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * beta / factor) * factor for side in (height, width))
    return h, w


# Pillow knows more, but a file need not be what its name says, and some formats start programs (EPS: Ghostscript).
PICTURES = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


def load_picture(image):
    """A path or a PIL picture -> PIL RGB, turned upright by its EXIF note. Raises ValueError that names a file that is
    no picture of the formats PICTURES, or that unpacks to more than Pillow's limit of 90 million pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                                # of notes in a picture that are damaged
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = image
            if not isinstance(image, Image.Image):
                if os.path.exists(image) and not os.path.isfile(image):    # opening a pipe would wait for its writer
                    raise OSError("no regular file")
                with Image.open(image, formats=PICTURES) as picture:
                    picture.load()
            picture = ImageOps.exif_transpose(picture)
        if picture.has_transparency_data:                 # what shows through is white, as in the published processor
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{image}: no such picture") from None
    except UnidentifiedImageError:
        raise ValueError(f"{image}: not a readable picture; these formats are read: {', '.join(PICTURES)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, OSError, SyntaxError, ValueError, TypeError,
            struct.error) as e:                           # the last two: Pillow writes the note, which may be damaged
        raise ValueError(f"{image}: not a readable picture ({e})") from None


def picture_settings(path):
    """Picture settings of a model directory: the part of processor_config.json in which newer releases of transformers
    save them, else preprocessor_config.json."""
    old, new = Path(path) / "preprocessor_config.json", Path(path) / "processor_config.json"
    settings = read_json(new).get("image_processor") if new.is_file() else None
    if settings is None and new.is_file() and not old.is_file():
        raise ValueError(f"{new}: no picture settings ('image_processor'), and there is no {old.name}")
    if not isinstance(settings, (dict, type(None))):
        raise ValueError(f"{new}: image_processor is {str(settings)[:40]!r}, expected an object")
    return read_json(old) if settings is None else settings
