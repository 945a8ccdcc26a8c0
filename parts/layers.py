"""Layers that the decoder and the vision tower share: RMSNorm, SwiGLU, the rotary turn."""
import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202). The vision tower's has biases, the decoder's
    has none."""

    def __init__(self, size, inner, bias):
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def turns(angles):
    """The angles (..., D/2) of rotary pairs -> the factors (..., D) that `rotate` takes: cosines,
    and signed sines."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x, cos, sin):
    """Rotary position embedding: turns the pairs (a, b) = (x[i], x[i + D/2]) to
    (a cos - b sin, b cos + a sin).

    x (..., D); cos, sin of `turns`, broadcast to it. Rolling x by half its length puts each b under
    its a, and each a under its b.
    """
    partner = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos, partner, sin).to(x.dtype)
