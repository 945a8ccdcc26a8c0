"""Small parts that the decoder and the vision tower share: RMSNorm, SwiGLU, the rotary turn."""
import torch
import torch.nn.functional as F
from torch import nn


# ---------------------------------------------------------------------------------------------------------- small parts


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); the vision tower's has biases, the decoder's has none."""
    def __init__(self, size, inner, bias):
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def turns(angles):
    """The angles (..., D/2) of rotary pairs -> the factors (..., D) that `rotate` takes: cosines, signed sines."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x, cos, sin):
    """Rotary position embedding: turn the pairs (a, b) = (x[i], x[i + D/2]) to (a cos - b sin, b cos + a sin).

    x (..., D); cos, sin of `turns`, broadcast to it. Rolling x by half its length puts the b under the a.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)
