"""A picture file becomes image tokens: load_picture -> picture_patches -> VisionTower.

Shapes: P patches of all pictures of a batch, one behind the other; H heads, D head dimension. A
picture's grid is (t, h, w) patches; a block of 2 x 2 patches becomes one image token.

Source: Qwen2.5-VL (arXiv 2502.13923). Deviation: pictures only, no video.
"""
import functools
import math
import os
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn

from parts.layers import RMSNorm, SwiGLU, rotate, turns
from plumbing.files import read_json
from plumbing.options import fill, option


# Pillow reads more, but a file need not be what its name says, and some formats start programs
# (EPS: Ghostscript).
PICTURES = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

# What Pillow raises for a damaged picture; the last two when it writes a damaged EXIF note anew.
DAMAGED = (Image.DecompressionBombError, Image.DecompressionBombWarning, OSError, SyntaxError,
           ValueError, TypeError, struct.error)


def load_picture(image):
    """A path or a PIL picture -> a PIL picture in RGB, turned upright by its EXIF note.

    ValueError names a file that is no picture of the formats PICTURES, or that unpacks to more than
    Pillow's limit of 90 million pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                             # of damaged notes
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = image if isinstance(image, Image.Image) else open_picture(image)
            picture = ImageOps.exif_transpose(picture)
        if picture.has_transparency_data:       # white shines through, as in the published code
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture)
        return picture.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{image}: no such picture") from None
    except UnidentifiedImageError:
        raise ValueError(f"{image}: not a readable picture; these formats are read: "
                         f"{', '.join(PICTURES)}") from None
    except DAMAGED as error:
        raise ValueError(f"{image}: not a readable picture ({error})") from None


def open_picture(path):
    """The picture in a file, with all of its pixels read."""
    if os.path.exists(path) and not os.path.isfile(path):       # a pipe would wait for its writer
        raise OSError("no regular file")
    with Image.open(path, formats=PICTURES) as picture:
        picture.load()
    return picture


# ------------------------------------------------------------------------------------------ patches

def edge(default, most):
    return option(default, least=1, most=most)


@dataclass(frozen=True)
class PictureSettings:
    """How pictures become patches. A field with one choice says what else is not implemented."""
    patch_size: int = edge(14, most=100)                        # pixels
    temporal_patch_size: int = edge(2, most=10)                 # frames: a picture is all of them
    merge_size: int = edge(2, most=10)                          # patches, of an image token
    min_pixels: int = edge(56 * 56, most=2 ** 26)
    max_pixels: int = edge(28 * 28 * 1280, most=2 ** 26)
    image_mean: tuple = (0.48145466, 0.4578275, 0.40821073)     # of red, green, blue from 0 to 1
    image_std: tuple = (0.26862954, 0.26130258, 0.27577711)
    do_resize: bool = option(True, choices=(True,))
    do_rescale: bool = option(True, choices=(True,))
    do_normalize: bool = option(True, choices=(True,))
    resample: int = option(3, choices=(3,))                     # bicubic
    rescale_factor: float = option(1 / 255, least=0.00391, most=0.00393)

    def __post_init__(self):
        for name, least in (("image_mean", -math.inf), ("image_std", 0)):
            colour = getattr(self, name)
            numbers = isinstance(colour, (list, tuple)) and len(colour) == 3
            if not numbers or not all(type(x) in (int, float) and least < x < math.inf
                                      for x in colour):
                raise ValueError(f"{name} is {str(colour)[:40]!r}: expected three numbers above "
                                 f"{least}")


def read_picture_settings(path):
    """PictureSettings of a model directory. ValueError names the field that does not fit."""
    values = dict(picture_settings(path))
    where = f"{path}: picture settings"
    size = values.get("size") or {}
    if not isinstance(size, dict):
        raise ValueError(f"{where}: size is {str(size)[:40]!r}, expected an object")
    for name, newer in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if values.get(name) is None:
            values[name] = size.get(newer)
    return fill(PictureSettings, values, where)


def picture_settings(path):
    """Picture settings of a model directory as they are, a dict: the part of processor_config.json
    in which newer releases of transformers save them, else preprocessor_config.json."""
    older, newer = Path(path) / "preprocessor_config.json", Path(path) / "processor_config.json"
    settings = read_json(newer).get("image_processor") if newer.is_file() else None
    if settings is None and newer.is_file() and not older.is_file():
        raise ValueError(f"{newer}: no picture settings ('image_processor'), and there is no "
                         f"{older.name}")
    if settings is None:
        return read_json(older)
    if not isinstance(settings, dict):
        raise ValueError(f"{newer}: image_processor is {str(settings)[:40]!r}, expected an object")
    return settings


def smart_resize(height, width, factor, min_pixels, max_pixels):
    """Published rule: both sides multiples of `factor`, the area within the limits, the shape kept
    as well as that allows. Pixels in, pixels out.

    ValueError for a picture that is more than 200 times longer than wide.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"a picture of {width} x {height} pixels is more than 200 times longer "
                         "than wide; cut it first")
    h = round(height / factor) * factor
    w = round(width / factor) * factor
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / shrink / factor) * factor)
        w = max(factor, math.floor(width / shrink / factor) * factor)
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h = math.ceil(height * grow / factor) * factor
        w = math.ceil(width * grow / factor) * factor
    return h, w


def picture_patches(image, settings):
    """A path or a PIL picture -> its patches (P, 3 * frames * size^2) float32, those of a block
    next to each other, and its grid (1, h, w)."""
    image = load_picture(image)
    p, m = settings.patch_size, settings.merge_size
    height, width = smart_resize(image.height, image.width, p * m, settings.min_pixels,
                                 settings.max_pixels)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    mean = np.array(settings.image_mean, dtype=np.float32)
    std = np.array(settings.image_std, dtype=np.float32)
    x = np.asarray(image, dtype=np.float32) / 255
    x = (x - mean) / std                                            # (height, width, 3)

    h, w = height // p, width // p
    x = x.transpose(2, 0, 1).reshape(3, h // m, m, p, w // m, m, p)
    # channel, block row, row, y, block column, column, x -> block row, block column, row, column,
    # channel, y, x
    x = x.transpose(1, 4, 2, 5, 0, 3, 6)
    x = x[:, :, :, :, :, None].repeat(settings.temporal_patch_size, axis=5)     # frame before y, x
    return torch.from_numpy(x.reshape(h * w, -1)), (1, h, w)


# ------------------------------------------------------------------------------------- vision tower

@functools.lru_cache(maxsize=1024)
def patch_layout(grid, merge, window):
    """Where the patches of one picture stand, in the order of windows.

    grid (t, h, w) in patches; merge: patches along a side of a block; window: blocks along a side
    of a window. Patches come in blocks of merge x merge, an image token each. The tower sorts the
    blocks by window; the windows at the right and lower edge may be smaller.
    Returns the rows (P,) and columns (P,) of patches, the order (blocks,) of blocks, and how many
    patches each window has.
    """
    t, h, w = grid
    high, wide = h // merge, w // merge                             # blocks of a frame
    unit = merge * merge
    block = torch.arange(high * wide).view(high, wide)
    order, lengths = [], []
    for top in range(0, high, window):
        for left in range(0, wide, window):
            members = block[top:top + window, left:left + window].flatten()
            order.append(members)
            lengths.append(len(members) * unit)
    order = torch.cat(order)                                        # (blocks of a frame,)
    inside = torch.arange(unit)
    rows = (order // wide)[:, None] * merge + inside // merge       # (blocks of a frame, unit)
    columns = (order % wide)[:, None] * merge + inside % merge
    frames = torch.cat([order + frame * high * wide for frame in range(t)])     # each by itself
    return rows.flatten().repeat(t), columns.flatten().repeat(t), frames, lengths * t


def attend_blocks(q, k, v, lengths):
    """Attention inside consecutive stretches of patches. Those of one length are one batch.

    q, k, v (P, H, D); lengths sum to P. Returns (P, H, D).
    """
    P, H, D = q.shape
    if len(set(lengths)) == 1:
        shape = (-1, lengths[0], H, D)
        y = attend_batch(q.view(shape), k.view(shape), v.view(shape))
        return y.reshape(P, H, D)
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    out = torch.empty_like(q)
    for length in sorted(set(lengths)):
        start = starts[sizes == length]
        place = (start[:, None] + torch.arange(length)).to(q.device)        # (stretches, length)
        out[place] = attend_batch(q[place], k[place], v[place])
    return out


def attend_batch(q, k, v):
    """Attention of q, k, v (stretches, length, H, D) inside each stretch, in the same shape."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v)                     # (stretches, H, length, D)
    return y.transpose(1, 2)


class VisionAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.num_heads
        self.qkv = nn.Linear(c.hidden_size, 3 * c.hidden_size)
        self.proj = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x, cos, sin, lengths):
        P = len(x)
        q, k, v = self.qkv(x).view(P, 3, self.heads, -1).unbind(1)          # (P, H, D) each
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = attend_blocks(q, k, v, lengths)
        return self.proj(y.reshape(P, -1))


class VisionBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1 = RMSNorm(c.hidden_size, 1e-6)
        self.norm2 = RMSNorm(c.hidden_size, 1e-6)
        self.attn = VisionAttention(c)
        self.mlp = SwiGLU(c.hidden_size, c.intermediate_size, bias=True)

    def forward(self, x, cos, sin, lengths):
        x = x + self.attn(self.norm1(x), cos, sin, lengths)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel is a matrix product with each patch. The weight
    keeps its published shape of five axes."""

    def __init__(self, c):
        super().__init__()
        shape = (c.hidden_size, c.in_channels, c.temporal_patch_size, c.patch_size, c.patch_size)
        self.proj = nn.Module()
        self.proj.weight = nn.Parameter(torch.empty(shape))

    def forward(self, patches):
        return F.linear(patches, self.proj.weight.flatten(1))


class PatchMerger(nn.Module):
    """2 x 2 neighbouring patches -> one token of the decoder's width."""

    def __init__(self, c, out_size):
        super().__init__()
        self.inner = c.hidden_size * c.spatial_merge_size ** 2
        self.ln_q = RMSNorm(c.hidden_size, 1e-6)
        self.mlp = nn.Sequential(nn.Linear(self.inner, self.inner), nn.GELU(),
                                 nn.Linear(self.inner, out_size))

    def forward(self, x):
        return self.mlp(self.ln_q(x).view(-1, self.inner))


class VisionTower(nn.Module):
    """Patches of all pictures of a batch, one behind the other -> image tokens. Nothing is padded:
    the cost grows with the area of the pictures."""

    def __init__(self, c, out_size):
        """c: a parts.config.VisionConfig; out_size: the decoder's hidden size C."""
        super().__init__()
        self.c = c
        self.patch_embed = PatchEmbed(c)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.depth))
        self.merger = PatchMerger(c, out_size)

    def angles(self, rows, columns):
        """Half of the rotary pairs turn with the row, half with the column: (P,), (P,) -> cos, sin
        (P, 1, D)."""
        quarter = self.c.hidden_size // self.c.num_heads // 4               # D / 4
        speed = 10000.0 ** (-torch.arange(quarter, device=rows.device) / quarter)
        angles = torch.cat((rows[:, None] * speed, columns[:, None] * speed), dim=-1)   # (P, D / 2)
        return turns(angles[:, None])

    def forward(self, patches, grids):
        """patches (P, channels * frames * size^2), grids a list of [t, h, w] -> image tokens
        (P / 4, C) in reading order."""
        c, device = self.c, patches.device
        unit = c.spatial_merge_size ** 2
        window = max(1, c.window_size // c.spatial_merge_size // c.patch_size)
        rows, columns, order = [], [], []
        window_lengths, frame_lengths = [], []
        blocks = 0
        for grid in grids:
            layout = patch_layout(tuple(grid), c.spatial_merge_size, window)
            rows.append(layout[0])
            columns.append(layout[1])
            order.append(layout[2] + blocks)
            window_lengths += layout[3]
            t, h, w = grid
            frame_lengths += [h * w] * t
            blocks += len(layout[2])
        order = torch.cat(order).to(device)                                 # (P / 4,)
        cos, sin = self.angles(torch.cat(rows).to(device), torch.cat(columns).to(device))

        x = self.patch_embed(patches)                                       # (P, C_vision)
        x = x.view(-1, unit, x.shape[-1])                                   # (P / 4, 4, C_vision)
        x = x[order].flatten(0, 1)                                          # sorted by window
        for i, block in enumerate(self.blocks):
            full = i in c.fullatt_block_indexes                             # sees the whole frame
            x = block(x, cos, sin, frame_lengths if full else window_lengths)
        return self.merger(x)[order.argsort()]                              # in reading order
