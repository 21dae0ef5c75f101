"""Attention to learned tokens in place of a linear layer (TokenFormer, Wang et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Pattention(nn.Module):
    """gelu(s / |s| sqrt(n)) V with s = x K', for n learned keys and values. [..., width] to [..., out]."""

    def __init__(self, width: int, out: int, slots: int):
        super().__init__()
        self.keys, self.values = nn.Parameter(torch.randn(slots, width) * 0.02), nn.Parameter(torch.randn(slots, out) * 0.02)
        self.length = slots**0.5

    def forward(self, x: Tensor) -> Tensor:
        """[..., out]."""
        return F.gelu(F.normalize(x @ self.keys.T, dim=-1) * self.length) @ self.values

    def grow(self, slots: int) -> None:
        """Append slots with keys of 0: the results stay as they are, since the length stays that of the first slots."""
        self.keys = nn.Parameter(torch.cat([self.keys.data, self.keys.data.new_zeros(slots, self.keys.shape[1])]))
        self.values = nn.Parameter(torch.cat([self.values.data, torch.randn_like(self.values.data[:1]).repeat(slots, 1) * 0.02]))
