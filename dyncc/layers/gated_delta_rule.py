"""The gated delta rule (Yang et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GatedDeltaRule(nn.Module):
    """S = exp(g_t) S_{t-1}; S_t = S + b_t k_t' (v_t - k_t S); o_t = q_t S_t / sqrt(D): a key's old value is replaced, not added to.

    g_t = -softplus(x W + c) and b_t = sigmoid(x W) are one number a head; keys and queries have length 1. [B, T, width] to the same.
    """

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} is no multiple of heads={heads}")
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.decay, self.beta = nn.Linear(width, heads), nn.Linear(width, heads)
        self.norm = nn.RMSNorm(width // heads)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The layer's result and the state [B, heads, D, D] behind the last token; `state` is what an earlier call returned."""
        q, k, v = (f(x).unflatten(2, (self.heads, -1)) for f in (self.q, self.k, self.v))
        q, k = F.normalize(q, dim=-1) * q.shape[3] ** -0.5, F.normalize(k, dim=-1)
        kept, beta = torch.exp(-F.softplus(self.decay(x)))[..., None, None], torch.sigmoid(self.beta(x)).unsqueeze(-1)
        held = x.new_zeros((x.shape[0], self.heads, q.shape[3], v.shape[3]), dtype=torch.float32) if state is None else state
        outs = []
        for t in range(x.shape[1]):
            held = held * kept[:, t]
            wrong = v[:, t] - (k[:, t].unsqueeze(-1) * held).sum(-2)
            held = held + k[:, t].unsqueeze(-1) * (beta[:, t] * wrong).unsqueeze(-2)
            outs.append((q[:, t].unsqueeze(-1) * held).sum(-2))
        return self.out(self.norm(torch.stack(outs, 1).to(x.dtype)).flatten(2)), held
