"""Linear attention over an image's tokens with gates on keys and values (LINA, 2026)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LEAST = 1e-6


class GatedImageAttention(nn.Module):
    """q (k' v / N) / (q mean(k) + 1e-6) with q, k = relu + 1e-6 of projections: every token sees all N. Learned numbers a head and token
    multiply k and v, so that the gate on k is in the normaliser too. [B, N, width] to the same; rotations and the convolution beside it
    are not part of the layer."""

    def __init__(self, width: int, tokens: int, heads: int = 4):
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} is no multiple of heads={heads}")
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.key_gate, self.value_gate = (nn.Parameter(torch.ones(1, heads, tokens, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, width]."""
        return self.out(self.mixed(x))

    def mixed(self, x: Tensor) -> Tensor:
        """What is projected [B, N, width], computed in at least float32."""
        q, k, v = (p.unflatten(2, (self.heads, -1)).transpose(1, 2).float() for p in self.qkv(x).chunk(3, -1))
        q, k, v = torch.relu(q) + LEAST, (torch.relu(k) + LEAST) * self.key_gate, v * self.value_gate
        mass = (q * k.mean(2, keepdim=True)).sum(-1, keepdim=True) + LEAST
        return (q @ (k.transpose(2, 3) @ v / x.shape[1]) / mass).transpose(1, 2).flatten(2).to(x.dtype)
