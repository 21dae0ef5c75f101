"""Leave-one-out: how far the output moves when one layer alone is left out and the residual stream is carried over it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from dyncc.fitting.subject import Subject


class DropsFitter:
    """Sums of the divergence of each layer."""

    def __init__(self, subject: Subject, by: str) -> None:
        self.subject, self.by = subject, by
        self.watch = (*subject.states, subject.output)
        self.sums = torch.zeros(subject.layers, dtype=torch.float64, device=subject.device)
        self.count = torch.zeros((), dtype=torch.float64)

    def add(self, known: dict[fx.Node, Any], values: Mapping[fx.Node, Tensor], real: Tensor | None) -> None:
        """One batch: the model once more from behind each layer on."""
        subject = self.subject
        dense = subject.rows(values[subject.output], real)
        found = []
        for layer in range(subject.layers):
            carried = {**known, subject.states[layer + 1]: values[subject.states[layer]]}
            output = subject.run(carried, [subject.output])[subject.output]
            found.append(divergence(dense, subject.rows(output, real), self.by))
        self.sums = self.sums + torch.stack(found)
        self.count = self.count + len(dense)

    def state(self) -> dict[str, Tensor]:
        return {"sums": self.sums, "count": self.count}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.sums, self.count = tensors["sums"], tensors["count"]

    def solve(self) -> None:
        """Nothing follows from the sums but their means."""

    def look(self, known: dict[fx.Node, Any], values: Mapping[fx.Node, Tensor], real: Tensor | None) -> None:
        """Nothing is looked at twice."""

    def result(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """`drop.divergence` [L], float64."""
        mean = self.sums / self.count
        return {"drop.divergence": mean}, {f"drop {layer}": {self.by: value} for layer, value in enumerate(mean.tolist())}


def divergence(dense: Tensor, other: Tensor, by: str) -> Tensor:
    """The sum over rows [N, C] of KL(dense || other) of logits, or of 1 - cosine, in float64."""
    if by == "cosine":
        return (1 - F.cosine_similarity(dense.double(), other.double(), dim=-1)).sum()
    p, q = F.log_softmax(dense.float(), -1), F.log_softmax(other.float(), -1)
    return (p.exp() * (p - q)).sum(-1).double().sum()
