"""Attention whose results feed back into later tokens, by a triangular solve (Sessa, 2026)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FeedbackAttention(nn.Module):
    """(I - diag(g) A) s = f: A is a softmax over strictly earlier tokens (row 0 is 0), g_t = 0.999 tanh(b + w x_t).
    `f` and `x` [B, T, width] to s [B, T, width]; the solve is in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.q, self.k, self.gain = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False), nn.Linear(width, 1)

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        """s [B, T, width]."""
        weights = self.gains(x) * self.weights(x)
        eye = torch.eye(x.shape[1], device=x.device)
        return torch.linalg.solve_triangular(eye - weights.float(), f.float(), upper=False, unitriangular=True).to(f.dtype)

    def gains(self, x: Tensor) -> Tensor:
        """[B, T, 1], below 1 in size."""
        return 0.999 * torch.tanh(self.gain(x))

    def weights(self, x: Tensor) -> Tensor:
        """A [B, T, T]."""
        logits = self.q(x) @ self.k(x).transpose(1, 2) * x.shape[2] ** -0.5
        earlier = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril(-1)
        return torch.softmax(logits.masked_fill(~earlier, torch.finfo(logits.dtype).min), -1).masked_fill(~earlier, 0.0)
