"""Intervals that know that canvases of one digit are alike, and the trial of a promised risk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyncc.risk import binomial_tail, exit_threshold, leaves

Interval = tuple[float, float, float]


def clustered(values: Tensor, digits: Tensor, draws: int = 2000) -> Interval:
    """Mean of values [N] in points, and its 95 % interval when whole digits, with all their canvases, are drawn again."""
    sums = torch.zeros(int(digits.max()) + 1).index_add(0, digits, values.float())
    counts = torch.bincount(digits, minlength=len(sums)).float()
    drawn = torch.from_numpy(np.random.default_rng(0).integers(0, len(sums), (draws, len(sums))))
    low, high = np.percentile((100 * sums[drawn].sum(1) / counts[drawn].sum(1)).numpy(), [2.5, 97.5])
    return 100 * values.float().mean().item(), float(low), float(high)


def words(found: Interval) -> str:
    return f"{found[0]:.2f} [{found[1]:.2f}, {found[2]:.2f}]"


def most_broken(draws: int, chance: float) -> int:
    """The largest number of broken promises that is not too many, when each may break with that chance: the binomial 95 % bound.

    >>> most_broken(20, 0.1)
    4
    """
    return next(k for k in range(draws + 1) if binomial_tail(k, draws, chance) >= 0.95)


def risk_held(behind: Sequence[Tensor], digits: Tensor, risk: float, confidence: float, draws: int) -> dict[str, Any]:
    """Choose a threshold on half of the digits, one canvas each (so that rows are independent), and count on the other half's canvases what
    differs from the full model; again and again.

    Args:
        behind: logits [N, V] behind each site and of the full model.
        digits: [N] which digit each row shows.
    """
    source = torch.Generator().manual_seed(0)
    count, differs, thresholds = int(digits.max()) + 1, [], []
    scores = torch.stack([x.softmax(-1).amax(-1) for x in behind[:-1]])
    apart = torch.stack([x.argmax(-1) != behind[-1].argmax(-1) for x in behind])
    places = digits.argsort(stable=True).view(count, -1)
    for _ in range(draws):
        order = torch.randperm(count, generator=source)
        half = order[: count // 2]
        rows = places[half, torch.randint(0, places.shape[1], (len(half),), generator=source)]
        chosen = exit_threshold([x[rows] for x in behind[:-1]], behind[-1][rows], risk=risk, confidence=confidence)
        rest = places[order[count // 2 :]].flatten()
        left = leaves(scores[:, rest], chosen.threshold)
        differs.append(apart[:, rest].gather(0, left[None]).float().mean().item())
        thresholds.append(chosen.threshold)
    broken = sum(x > risk for x in differs)
    return {"broken": broken, "bound": most_broken(draws, 1 - confidence), "differs": differs, "thresholds": thresholds}
