"""Scores of early exits, one number a row in [0, 1] that rises with confidence, and thresholds for them.

Over logits [B, V] with p = softmax(logits): max-prob is max p; margin p1 - p2 of the two best; entropy 1 - H(p) / log V. Over the row
[B, D] that the head reads: saturation cos(h_l, h_(l-1)), and probe sigmoid(w h + b) with fitted w and b (CALM, Schuster et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def max_prob(logits: Tensor) -> Tensor:
    """The largest probability.

    >>> max_prob(torch.tensor([[0.0, 0.0]])).tolist()
    [0.5]
    """
    return torch.softmax(logits.float(), -1).amax(-1)


def margin(logits: Tensor) -> Tensor:
    """The difference of the two largest probabilities.

    >>> margin(torch.tensor([[3.0, 3.0, 0.0]])).tolist()
    [0.0]
    """
    p = torch.softmax(logits.float(), -1)
    best = torch.arange(p.shape[-1], device=p.device) == p.argmax(-1, keepdim=True)
    return p.amax(-1) - p.masked_fill(best, 0.0).amax(-1)


def entropy(logits: Tensor) -> Tensor:
    """1 - H / log V: 0 where all classes are alike, 1 where one is sure.

    >>> entropy(torch.tensor([[0.0, 0.0], [100.0, 0.0]])).tolist()
    [0.0, 1.0]
    """
    if logits.shape[-1] == 1:
        return torch.ones_like(logits[..., 0], dtype=torch.float32)
    log_p = torch.log_softmax(logits.float(), -1)
    return (1 + (log_p.exp() * log_p).sum(-1) / math.log(logits.shape[-1])).clamp(0.0, 1.0)


def saturation(row: Tensor, former: Tensor) -> Tensor:
    """Cosine of the row [B, D] behind a layer and the one in front of it; 0 where they turn away from each other."""
    row, former = row.float(), former.float()
    lengths = (row * row).sum(-1) * (former * former).sum(-1)
    return ((row * former).sum(-1) / lengths.sqrt().clamp(min=1e-12)).clamp(0.0, 1.0)


def probe(row: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """sigmoid(w h + b), [B]; weight [1, D], bias [1]."""
    return torch.sigmoid(F.linear(row.float(), weight.float(), bias.float()))[:, 0]


OF_LOGITS: dict[str, Callable[[Tensor], Tensor]] = {"max-prob": max_prob, "margin": margin, "entropy": entropy}


def decayed(threshold: float, tau: float, steps: int, tokens: Any) -> Any:
    """CALM's threshold clip(0.9 a + 0.1 exp(-tau t / N), 0, 1) at t tokens of N: later tokens may be less sure. Above 1 nothing exits.

    >>> decayed(0.5, 4.0, 100, 0)
    0.55
    """
    if threshold > 1.0:
        return threshold
    if isinstance(tokens, int):
        return min(max(0.9 * threshold + 0.1 * math.exp(-tau * tokens / steps), 0.0), 1.0)
    aged = torch.exp(-tau / steps * torch.ones(()).mul(tokens))
    return (0.9 * threshold + 0.1 * aged).clamp(0.0, 1.0)
