"""Causal attention whose values get a share of a bank of value embeddings that all layers have in common (MoVE, 2026)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ValueBank(nn.Module):
    """What a token's id holds for the values of every layer: ids [B, T] to [B, T, slots, width], read once for all layers."""

    def __init__(self, vocabulary: int, slots: int, width: int):
        super().__init__()
        self.table, self.slots = nn.Embedding(vocabulary, slots * width), slots

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T, slots, width]."""
        return self.table(ids).unflatten(2, (self.slots, -1))


class ValueBankAttention(nn.Module):
    """Causal attention with v_t = x_t Wv + sum_m g_tm E_tm, g = sigmoid(x W) for each head and slot. `bank` is what `ValueBank` read, or
    one [slots, width] for all tokens: the paper's abstract leaves open which. [B, T, width] to the same."""

    def __init__(self, width: int, slots: int, heads: int = 4):
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} is no multiple of heads={heads}")
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, heads * slots)

    def forward(self, x: Tensor, bank: Tensor) -> Tensor:
        """[B, T, width]."""
        q, k, v = (p.unflatten(2, (self.heads, -1)) for p in self.qkv(x).chunk(3, -1))
        q, k, v = (p.transpose(1, 2) for p in (q, k, v + self.recalled(x, bank)))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def recalled(self, x: Tensor, bank: Tensor) -> Tensor:
        """What is added to values [B, T, heads, D]."""
        share = torch.sigmoid(self.gate(x)).unflatten(2, (self.heads, -1))
        held = bank.unflatten(-1, (self.heads, -1))
        return torch.einsum("bthm,mhd->bthd" if bank.dim() == 2 else "bthm,btmhd->bthd", share, held)
