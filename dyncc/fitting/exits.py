"""Exit maps: h_L ~ W h_l + b by ridge, so that the model's own norm and head can read the state behind an earlier layer.

A head that reads the first row alone reads a class token, which is unlike the others: its map is fitted on that row. Any other head reads
rows that are like each other, and all of them are fitted on.

The probe of CALM (Schuster et al., Confident Adaptive Language Modeling, NeurIPS 2022) is sigmoid(w h_l + b) ~ P(the head behind the map
chooses what it chooses behind the last layer): logistic, on rows that are looked at a second time, once the maps are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from dyncc.fitting.moments import Moments, logistic, restore, tensors_of
from dyncc.fitting.subject import Subject


class ExitsFitter:
    """Sums for the map of each layer; then agreement and probes."""

    def __init__(self, subject: Subject, layers: tuple[int, ...], strength: float, probe: bool) -> None:
        self.subject, self.layers, self.strength, self.probe = subject, layers, strength, probe
        self.moments = {str(layer): Moments() for layer in layers}
        self.watch = tuple(subject.states[layer + 1] for layer in (*layers, subject.layers - 1))
        self.maps: dict[int, tuple[Tensor, Tensor]] = {}
        self.seen: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {layer: [] for layer in layers}

    def add(self, known: dict[fx.Node, Any], values: Mapping[fx.Node, Tensor], real: Tensor | None) -> None:
        """The states of one batch."""
        last = self._rows(values[self.watch[-1]], real)
        for layer, node in zip(self.layers, self.watch[:-1], strict=True):
            self.moments[str(layer)].add(self._rows(values[node], real), last)

    def _rows(self, state: Tensor, real: Tensor | None) -> Tensor:
        """The rows [N, D] of a state [B, T, D] that a map is fitted on."""
        return state[:, 0] if self.subject.at == 0 else self.subject.rows(state, real)

    def state(self) -> dict[str, Tensor]:
        return tensors_of(self.moments)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        restore(self.moments, tensors)

    def solve(self) -> None:
        """The maps, from all rows."""
        for layer in self.layers:
            m = self.moments[str(layer)]
            weight = m.ridge(self.strength)
            self.maps[layer] = (weight.T.float().contiguous(), m.bias(weight).float())

    def look(self, known: dict[fx.Node, Any], values: Mapping[fx.Node, Tensor], real: Tensor | None) -> None:
        """A second look at a batch: what the head chooses behind each layer, with its map and without."""
        subject = self.subject
        final = self._choice(known, values[self.watch[-1]])
        for layer, node in zip(self.layers, self.watch[:-1], strict=True):
            state = values[node]
            weight, bias = self.maps[layer]
            mapped = self._choice(known, F.linear(state, weight.to(state), bias.to(state)))
            plain = self._choice(known, state)
            features = subject.rows(state, real) if final.dim() == 2 else subject.row(known, state)
            picked = real if real is not None and final.shape == real.shape else torch.ones_like(final, dtype=torch.bool)
            if final.dim() == 2 and final.shape != state.shape[:2]:
                features = state[:, -final.shape[1] :].flatten(0, 1)  # the head reads the last rows alone
            self.seen[layer].append((features.float(), (mapped == final)[picked].flatten(), (plain == final)[picked].flatten()))

    def _choice(self, known: dict[fx.Node, Any], state: Tensor) -> Tensor:
        """What the head chooses, [B, T] or [B], of a state in the last layer's place."""
        output = self.subject.output
        chosen: Tensor = self.subject.run({**known, self.subject.states[-1]: state}, [output])[output].argmax(-1)
        return chosen

    def result(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors, and how good they are on the calibration data."""
        tensors: dict[str, Tensor] = {}
        figures: dict[str, Any] = {}
        for layer, (weight, bias) in self.maps.items():
            tensors |= {f"exit.{layer}.map.weight": weight, f"exit.{layer}.map.bias": bias}
            features, agrees, plain = (torch.cat(column) for column in zip(*self.seen[layer], strict=True))
            explained = self.moments[str(layer)].explained(weight.T.double())
            figures[f"exit {layer}"] = {
                "explained": explained, "agreement": agrees.double().mean().item(), "without map": plain.double().mean().item(),
            }  # fmt: skip
            if self.probe:
                w, b = logistic(features, agrees)
                tensors |= {f"exit.{layer}.probe.weight": w.float()[None], f"exit.{layer}.probe.bias": b.float()[None]}
                right = ((features.double() @ w + b > 0) == agrees).double().mean().item()
                figures[f"exit {layer}"]["probe is right"] = right
        return tensors, figures
