"""Gated linear attention (Yang et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GatedLinearAttention(nn.Module):
    """S_t = diag(exp(a_t)) S_{t-1} + k_t' v_t, o_t = q_t S_t / sqrt(dk), with a_t = logsigmoid(x W1 W2 + b) / 16.

    It goes one token after the other. Heads are normalised, gated by swish(x W) and projected. [B, T, width] to the same; the state is
    [B, heads, width / 2 / heads, width / heads] in float32.
    """

    def __init__(self, width: int, heads: int = 4, rank: int = 16):
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"width={width} is no multiple of 2 * heads={2 * heads}")
        self.heads = heads
        self.q, self.k = (nn.Linear(width, width // 2, bias=False) for _ in range(2))
        self.v, self.gate, self.out = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.decay = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width // 2))
        self.norm = nn.RMSNorm(width // heads)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The layer's result and the state behind the last token; `state` is what an earlier call returned."""
        q, k, v, a = (self.split(made) for made in (self.q(x), self.k(x), self.v(x), F.logsigmoid(self.decay(x)) / 16))
        held = q.new_zeros((*q.shape[:2], q.shape[3], v.shape[3]), dtype=torch.float32) if state is None else state
        outs = []
        for t in range(x.shape[1]):
            held = held * a[:, :, t, :, None].exp() + k[:, :, t, :, None] * v[:, :, t, None, :]
            outs.append((q[:, :, t, :, None] * q.shape[3] ** -0.5 * held).sum(-2))
        mixed = self.norm(torch.stack(outs, 1).to(x.dtype)).flatten(2)
        return self.out(mixed * F.silu(self.gate(x))), held

    def split(self, x: Tensor) -> Tensor:
        """[B, T, heads D] as [B, heads, T, D]."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)
