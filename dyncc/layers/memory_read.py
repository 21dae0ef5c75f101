"""A gated pair of a short convolution and a read of learned memory (Gated Associative Memory, 2025)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MemoryRead(nn.Module):
    """sigmoid(g1) conv(x) + sigmoid(g2) softmax(x M') M: a causal depth-wise convolution over three tokens, and one matrix M [slots, width]
    for keys and values. [B, T, width] to the same."""

    def __init__(self, width: int, slots: int = 512):
        super().__init__()
        self.memory = nn.Parameter(torch.randn(slots, width) * 0.02)
        self.conv, self.gates = nn.Conv1d(width, width, 3, groups=width), nn.Linear(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width]."""
        local = self.conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)
        read = torch.softmax(x @ self.memory.T, -1) @ self.memory
        near, far = self.gates(x).chunk(2, -1)
        return torch.sigmoid(near) * local + torch.sigmoid(far) * read
