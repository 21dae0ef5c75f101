"""An exponential moving average of the tokens, as in SymbolicLight's decay path (2026)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DecayMixer(nn.Module):
    """c_t = d c_{t-1} + (1 - d) x_t W with one learned d = sigmoid(raw) a head. [B, T, width] to the same; the state is [B, width]."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} is no multiple of heads={heads}")
        self.value = nn.Linear(width, width, bias=False)
        self.raw = nn.Parameter(torch.linspace(0.0, 4.0, heads))
        self.repeats = width // heads

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The averages and the last of them; `state` is what an earlier call returned."""
        v, decay = self.value(x), torch.sigmoid(self.raw).repeat_interleave(self.repeats)
        held, outs = torch.zeros_like(v[:, 0]) if state is None else state, []
        for t in range(x.shape[1]):
            held = decay * held + (1 - decay) * v[:, t]
            outs.append(held)
        return torch.stack(outs, 1), held
