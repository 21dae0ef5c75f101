"""Sums over calibration rows, in float64, and what follows from them in closed form: ridge maps, also of reduced rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Moments:
    """Sums over rows of inputs x [N, D] and targets y [N, E]: enough for every least-squares map from one to the other."""

    NAMES = ("count", "x", "y", "xx", "xy", "yy")

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows; the order of calls is the only thing that rounding depends on."""
        x, y = x.double(), y.double()
        new = {"count": torch.tensor(float(len(x)), dtype=torch.float64), "x": x.sum(0), "y": y.sum(0), "xx": x.T @ x, "xy": x.T @ y}
        new["yy"] = (y * y).sum(0)
        self.sums = {name: self.sums[name] + new[name] if self.sums else new[name] for name in self.NAMES}

    @property
    def rows(self) -> int:
        return int(self.sums["count"]) if self.sums else 0

    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """Covariances, times the number of rows: x'x [D, D], x'y [D, E] and the sums of squares of y [E], all about the means."""
        n, x, y = self.sums["count"], self.sums["x"], self.sums["y"]
        return self.sums["xx"] - torch.outer(x, x) / n, self.sums["xy"] - torch.outer(x, y) / n, self.sums["yy"] - y * y / n

    def ridge(self, strength: float) -> Tensor:
        """W [D, E] that minimises |(x - mean) W - (y - mean)|^2 + penalty.

        The penalty is `strength` times what each input varies, so that the unit of an input does not matter: W = (C + s diag C)^-1 x'y.
        """
        xx, xy, _ = self.centred()
        spread = xx.diagonal()
        floor = spread.mean().clamp(min=torch.finfo(torch.float64).tiny) * 1e-12  # an input that never varies gets no weight
        made: Tensor = torch.linalg.solve(xx + torch.diag(strength * spread + floor), xy)
        return made

    def bias(self, weight: Tensor) -> Tensor:
        """What maps the mean of x to the mean of y behind W [D, E]: [E]."""
        n = self.sums["count"]
        return (self.sums["y"] - self.sums["x"] @ weight) / n

    def explained(self, weight: Tensor) -> float:
        """The share of the variance of y that a map W [D, E] explains on these rows."""
        xx, xy, yy = self.centred()
        left = yy.sum() - 2 * (weight * xy).sum() + ((xx @ weight) * weight).sum()
        return float(1 - left / yy.sum().clamp(min=torch.finfo(torch.float64).tiny))


def reduced_rank(moments: Moments, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`down` [D, r] and `up` [r, E] whose product is the best map of that rank behind a ridge map W [D, E].

    Reduced-rank regression: W is projected on the r directions of y in which its predictions x W vary most.
    """
    xx, _, _ = moments.centred()
    _, vectors = torch.linalg.eigh(weight.T @ xx @ weight)
    chosen = vectors[:, -rank:].flip(1)
    top = chosen.abs().argmax(0)
    chosen = chosen * chosen[top, torch.arange(rank, device=top.device)].sign()  # eigenvectors have no sign of their own
    return weight @ chosen, chosen.T


def logistic(x: Tensor, target: Tensor, strength: float = 1e-3, steps: int = 50) -> tuple[Tensor, Tensor]:
    """Weights [D] and bias [] of a logistic regression of `target` [N] in {0, 1} on x [N, D], by Newton's method in float64.

    Where one class is missing the bias alone says so. The penalty is on standardised inputs: `strength` a row.
    """
    x, target = x.double(), target.double()
    mean, spread = x.mean(0), x.std(0, unbiased=False).clamp(min=1e-12)
    design = torch.cat([(x - mean) / spread, x.new_ones(len(x), 1)], 1)
    penalty = x.new_full((design.shape[1],), strength * len(x))
    penalty[-1] = 1e-6 * len(x)
    found = x.new_zeros(design.shape[1])
    for _ in range(steps):
        probability = torch.sigmoid(design @ found)
        slope = design.T @ (target - probability) - penalty * found
        curve = design.T @ (design * (probability * (1 - probability)).clamp(min=1e-9)[:, None]) + torch.diag(penalty)
        step = torch.linalg.solve(curve, slope)
        found = found + step * min(1.0, 10.0 / max(float(step.norm()), 1e-12))
        if float(step.norm()) < 1e-9:
            break
    weight = found[:-1] / spread
    return weight, found[-1] - weight @ mean


def tensors_of(moments: Mapping[str, Moments]) -> dict[str, Tensor]:
    """The sums of several moments by name, for a file."""
    return {f"{name}.{part}": tensor for name, m in moments.items() for part, tensor in m.sums.items()}


def restore(moments: Mapping[str, Moments], tensors: Mapping[str, Tensor]) -> None:
    """Put back what `tensors_of` gave."""
    for name, m in moments.items():
        m.sums = {part: tensors[f"{name}.{part}"] for part in Moments.NAMES if f"{name}.{part}" in tensors}
