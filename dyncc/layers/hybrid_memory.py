"""Chunks of tokens that are kept as keys and values, or absorbed by a state: one layer decides for each (NAtS-L, 2026)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class HybridMemory(nn.Module):
    """norm(softmax read) + norm(state read), with queries, keys and values in common. [B, T, width] to the same, T a multiple of `chunk`.

    A chunk goes where two scores of its mean say: 0 keeps its keys and values, 1 hands its tokens to a gated delta rule. Until a chunk is
    complete its tokens are read by softmax, causally: each past token is in exactly one memory. How the two reads are joined is not
    published.
    """

    def __init__(self, width: int, heads: int = 4, chunk: int = 16):
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} is no multiple of heads={heads}")
        self.heads, self.chunk = heads, chunk
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.decay, self.beta, self.score = nn.Linear(width, heads), nn.Linear(width, heads), nn.Linear(width, 2)
        self.near, self.far = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width]."""
        if x.shape[1] % self.chunk:
            raise ValueError(f"{x.shape[1]} tokens are no multiple of chunk={self.chunk}")
        absorbed = self.score(x.unflatten(1, (-1, self.chunk)).mean(2)).argmax(-1).repeat_interleave(self.chunk, 1)
        q, k, v = (f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        read = self.near(self.kept(q, k, v, absorbed)) + self.far(self.state(x, q, k, v, absorbed))
        return self.out(read.transpose(1, 2).flatten(2))

    def kept(self, q: Tensor, k: Tensor, v: Tensor, absorbed: Tensor) -> Tensor:
        """Softmax over the chunks that keep their keys, and over the token's own chunk."""
        at = torch.arange(q.shape[2], device=q.device)
        own = at.unsqueeze(1) // self.chunk == at // self.chunk
        seen = (at <= at.unsqueeze(1)) & (own | (absorbed == 0)[:, None, None])
        return F.scaled_dot_product_attention(q, k, v, seen)

    def state(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, absorbed: Tensor) -> Tensor:
        """The delta rule's state in front of each token's chunk: tokens of chunks that are kept leave it as it is."""
        k, lets = F.normalize(k, dim=-1), absorbed.unsqueeze(-1).to(x.dtype)
        beta, decay = torch.sigmoid(self.beta(x)) * lets, torch.exp(-F.softplus(self.decay(x)) * lets)
        held, outs = x.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]), []
        for first in range(0, x.shape[1], self.chunk):
            outs.append(F.normalize(q[:, :, first : first + self.chunk], dim=-1) @ held)
            for t in range(first, first + self.chunk):
                held = held * decay[:, t, :, None, None]
                wrong = v[:, :, t] - (k[:, :, t].unsqueeze(-1) * held).sum(-2)
                held = held + k[:, :, t].unsqueeze(-1) * (beta[:, t].unsqueeze(-1) * wrong).unsqueeze(-2)
        return torch.cat(outs, 2)
