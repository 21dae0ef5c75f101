"""The truth of routing: scores of a linear router, and the first rows of a mask, in plain ATen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def unit_scale(x: Tensor) -> Tensor:
    """x [..., D] over its root mean square, in float32: what a fitted router reads."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def router_scores(x: Tensor, weight: Tensor, bias: Tensor, scaled: bool = True) -> Tensor:
    """Scores [B, T], float32, of states x [B, T, D] by a router `weight` [1, D] and `bias` [1]; `scaled`: of x / rms(x)."""
    x = unit_scale(x) if scaled else x.float()
    return torch.nn.functional.linear(x, weight.float(), bias.float()).squeeze(-1)


def first_rows(wanted: Tensor, count: Any) -> tuple[Tensor, Tensor]:
    """Sorted indices [B, count] of the first rows that are wanted [B, T] bool, filled up with others, and which of them are wanted.

    Later rows never change what becomes of earlier ones.

    >>> first_rows(torch.tensor([[False, True, True, True], [False, False, False, True]]), 2)[0].tolist()
    [[1, 2], [0, 3]]
    """
    order = (~wanted).to(torch.int32).argsort(dim=1, stable=True)
    index = order[:, :count].sort(dim=1).values
    return index, wanted.gather(1, index)
