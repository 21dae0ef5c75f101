"""Linear attention of differences, with projectors chosen by each token (DyDiLA, 2026)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DifferentialLinearAttention(nn.Module):
    """(q k') v / N with q = f(x Wq) - l f(x Pq_i), k = f(x Wk) - l f(x Pk_j), f = elu + 1, and one learned l = sigmoid(raw) a head.

    i and j are the best of `projectors` for each token, by x Rq and x Rk: what tokens have in common is taken off their queries and keys.
    Every token sees all N; all pairs are made. [B, N, width] to the same. How l is learned is not published.
    """

    def __init__(self, width: int, heads: int = 4, projectors: int = 2):
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} is no multiple of heads={heads}")
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.q_common, self.k_common = (nn.Linear(width, projectors * width, bias=False) for _ in range(2))
        self.q_route, self.k_route = (nn.Linear(width, projectors, bias=False) for _ in range(2))
        self.raw = nn.Parameter(torch.zeros(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, width]."""
        q, k, v = (self.split(p) for p in self.qkv(x).chunk(3, -1))
        q = self.less(q, self.chosen(x, self.q_common, self.q_route))
        k = self.less(k, self.chosen(x, self.k_common, self.k_route))
        return self.out(((q @ k.transpose(2, 3)) @ v / x.shape[1]).transpose(1, 2).flatten(2))

    def less(self, x: Tensor, common: Tensor) -> Tensor:
        """Features of x less those that are common."""
        return F.elu(x) + 1 - torch.sigmoid(self.raw) * (F.elu(common) + 1)

    def chosen(self, x: Tensor, projectors: nn.Linear, route: nn.Linear) -> Tensor:
        """Each token's best projection [B, heads, N, D]: all are computed, which takes little for few of them."""
        made = projectors(x).unflatten(2, (route.out_features, -1))
        best = route(x).argmax(-1)[..., None, None].expand(-1, -1, 1, made.shape[3])
        return self.split(made.gather(2, best).squeeze(2))

    def split(self, x: Tensor) -> Tensor:
        """[B, N, heads D] as [B, heads, N, D]."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)
