"""Gated linear attention in both directions over one set of queries, keys and values (ViG, Liao et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TwoWayLinearAttention(nn.Module):
    """s norm((forwards + backwards) / 2) + (1 - s) norm(x), projected, with s = sigmoid(x W): both ways have decays of their own, and each
    counts a token's own value. [B, T, width] to the same; the image convolution in front of it is not part of the layer."""

    def __init__(self, width: int, heads: int = 4, rank: int = 16):
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"width={width} is no multiple of 2 * heads={2 * heads}")
        self.heads = heads
        self.q, self.k = (nn.Linear(width, width // 2, bias=False) for _ in range(2))
        self.v, self.out, self.mix = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.decay = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width))
        self.norm, self.own = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width]."""
        share = torch.sigmoid(self.mix(x))
        return self.out(share * self.norm(self.both(x)) + (1 - share) * self.own(x))

    def both(self, x: Tensor) -> Tensor:
        """The mean of both directions [B, T, width]."""
        q, k, v = (f(x).unflatten(2, (self.heads, -1)) for f in (self.q, self.k, self.v))
        ahead, back = (a.unflatten(2, (self.heads, -1)) for a in (F.logsigmoid(self.decay(x)) / 16).chunk(2, -1))
        turned = one_way(*(t.flip(1) for t in (q, k, v, back))).flip(1)
        return (one_way(q, k, v, ahead) + turned).flatten(2) / 2


def one_way(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """The recurrence over [B, T, heads, D], one token after the other."""
    held, outs = q.new_zeros((q.shape[0], *q.shape[2:], v.shape[3])), []
    for t in range(q.shape[1]):
        held = held * log_decay[:, t, :, :, None].exp() + k[:, t, :, :, None] * v[:, t, :, None, :]
        outs.append((q[:, t, :, :, None] * q.shape[3] ** -0.5 * held).sum(-2))
    return torch.stack(outs, 1)
