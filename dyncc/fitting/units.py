"""Surrogates of layers and routers between the two: layer(x) - x ~ x down up + bias by reduced-rank ridge regression.

Informed Routing (2025) runs a layer for the tokens whose surrogate would be wrong, and the surrogate for the others. The router here is
closed-form too: ridge of log(|layer(x) - surrogate(x)| / |layer(x) - x|) on x / rms(x), on rows that are looked at a second time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from dyncc.fitting.moments import Moments, reduced_rank, restore, tensors_of
from dyncc.fitting.subject import Subject
from dyncc.kernels.route_rows import unit_scale

LEVELS = 101
"""Quantiles of the router's scores that are kept: a threshold for every percent of tokens."""


class UnitsFitter:
    """Sums for the surrogate of each layer; then the routers."""

    def __init__(self, subject: Subject, layers: tuple[int, ...], rank: int, strength: float) -> None:
        self.subject, self.layers, self.rank, self.strength = subject, layers, rank, strength
        self.moments = {str(layer): Moments() for layer in layers}
        self.routers = {layer: Moments() for layer in layers}
        self.scaled: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        self.watch = tuple(dict.fromkeys(subject.states[i] for layer in layers for i in (layer, layer + 1)))
        self.maps: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def add(self, known: dict[fx.Node, Any], values: Mapping[fx.Node, Tensor], real: Tensor | None) -> None:
        """The states of one batch."""
        for layer in self.layers:
            x, change = self._pair(layer, values, real)
            self.moments[str(layer)].add(x, change)

    def _pair(self, layer: int, values: Mapping[fx.Node, Tensor], real: Tensor | None) -> tuple[Tensor, Tensor]:
        x, y = (self.subject.rows(values[self.subject.states[i]], real).float() for i in (layer, layer + 1))
        return x, y - x

    def state(self) -> dict[str, Tensor]:
        return tensors_of(self.moments)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        restore(self.moments, tensors)

    def solve(self) -> None:
        """The surrogates, from all rows."""
        for layer in self.layers:
            m = self.moments[str(layer)]
            down, up = reduced_rank(m, m.ridge(self.strength), self.rank)
            self.maps[layer] = (down.T.float().contiguous(), up.T.float().contiguous(), m.bias(down @ up).float())

    def look(self, known: dict[fx.Node, Any], values: Mapping[fx.Node, Tensor], real: Tensor | None) -> None:
        """A second look at a batch: how wrong each row's surrogate is."""
        tiny = torch.finfo(torch.float32).tiny
        for layer, (down, up, bias) in self.maps.items():
            x, change = self._pair(layer, values, real)
            wrong = (change - F.linear(F.linear(x, down), up, bias)).norm(dim=-1)
            target = (wrong.clamp(min=tiny) / change.norm(dim=-1).clamp(min=tiny)).log().clamp(-20.0, 20.0)
            self.routers[layer].add(unit_scale(x), target[:, None])
            self.scaled[layer].append(unit_scale(x))

    def result(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors, and how good they are on the calibration data."""
        tensors: dict[str, Tensor] = {}
        figures: dict[str, Any] = {}
        for layer, (down, up, bias) in self.maps.items():
            router = self.routers[layer]
            weight = router.ridge(self.strength)
            level = router.bias(weight)
            scores = torch.cat(self.scaled[layer]) @ weight.float() + level.float()
            tensors |= {
                f"unit.{layer}.down.weight": down, f"unit.{layer}.up.weight": up, f"unit.{layer}.bias": bias,
                f"unit.{layer}.router.weight": weight.T.float().contiguous(), f"unit.{layer}.router.bias": level.float(),
                f"unit.{layer}.router.quantiles": torch.quantile(scores.flatten(), torch.linspace(0, 1, LEVELS, device=scores.device)),
            }  # fmt: skip
            explained = self.moments[str(layer)].explained(down.T.double() @ up.T.double())
            figures[f"unit {layer}"] = {"explained": explained, "router explains": router.explained(weight)}
        return tensors, figures
