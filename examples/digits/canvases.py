"""Canvases of 64 x 64: one of scikit-learn's digits, four times as large, among pieces of other digits. Most digits stand at the upper
left, where the classifier looks first, and are easy; the others stand far from there. Everything is drawn on 16 x 16 and enlarged."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

SIDE, SCALE, STEP = 64, 4, 2
NEAR, MOST, NOISE = 0.85, 2, 0.1
"""Share of digits at the upper left, pieces at most, and how loud the noise is."""
AWAY = 12
"""The others' corners stand so many rows and columns of the 16 x 16 away, or more."""
TRAINED, CALIBRATED = 1000, 400


@dataclass(frozen=True)
class Drawn:
    """`images` [N, 1, 64, 64], `labels` [N], `digits` [N]: which of the split's digits stands on each."""

    images: Tensor
    labels: Tensor
    digits: Tensor


class Canvases:
    """Draws canvases of the digits [N, 8, 8] of one split; the same ones in the same order for the same seed."""

    def __init__(self, images: Tensor, labels: Tensor, seed: int) -> None:
        self.images, self.labels = images, labels
        self.source = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.labels)

    def draw(self, digits: Tensor, most: int = MOST, near: float = NEAR) -> Drawn:
        """A canvas for each of the given digits, with `most` pieces or fewer; about the share `near` stands at the upper left."""
        count = len(digits)
        canvas = torch.zeros(count, SIDE // SCALE, SIDE // SCALE)
        pieces = self.random(most + 1, count)
        for number in range(most):
            self._put(canvas, self._piece(count) * (number < pieces)[:, None, None], PLACES[4])
        close = torch.rand(count, generator=self.source) < near
        self._put(canvas, self.images[digits] * close[:, None, None], CLOSE)
        self._put(canvas, self.images[digits] * ~close[:, None, None], FAR)
        wide = canvas.repeat_interleave(SCALE, 1).repeat_interleave(SCALE, 2)
        noise = NOISE * torch.randn(wide.shape, generator=self.source)
        return Drawn((wide + noise)[:, None], self.labels[digits], digits)

    def some(self, count: int, most: int = MOST, near: float = NEAR) -> Drawn:
        """Canvases of digits drawn at random."""
        return self.draw(self.random(len(self), count), most, near)

    def each(self, times: int) -> Drawn:
        """So many canvases of every digit, digit by digit."""
        return self.draw(torch.arange(len(self)).repeat_interleave(times))

    def random(self, high: int, count: int) -> Tensor:
        return torch.randint(0, high, (count,), generator=self.source)

    def _piece(self, count: int) -> Tensor:
        """4 x 4 out of the middle of other digits."""
        other, y, x = self.random(len(self), count), 1 + self.random(3, count), 1 + self.random(3, count)
        return self.images[(other[:, None, None], *_square(y, x, 4))]

    def _put(self, canvas: Tensor, small: Tensor, places: Tensor) -> None:
        """Squares [N, size, size] over the canvases, each at one of the places [P, 2]."""
        count, size = small.shape[:2]
        y, x = places[self.random(len(places), count)].unbind(1)
        where = (torch.arange(count)[:, None, None], *_square(y, x, size))
        canvas[where] = torch.maximum(canvas[where], small)


def _places(size: int) -> Tensor:
    """Corners [P, 2] where a square of this size can stand, rows before columns."""
    along = torch.arange(0, SIDE // SCALE - size + 1, STEP)
    return torch.cartesian_prod(along, along)


PLACES = {size: _places(size) for size in (4, 8)}
CLOSE = PLACES[8][PLACES[8].sum(1) <= STEP]
FAR = PLACES[8][PLACES[8].sum(1) >= AWAY]


def _square(y: Tensor, x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Indices of squares with their corners at (y, x): [N, size, 1] and [N, 1, size]."""
    along = torch.arange(size)
    return y[:, None, None] + along[:, None], x[:, None, None] + along


def splits() -> tuple[Canvases, Canvases, Canvases]:
    """Digits to train on, to calibrate on and to test on; none is in two of them."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images, labels = torch.tensor(found.images[order] / 16, dtype=torch.float32), torch.tensor(found.target[order])
    ends = (0, TRAINED, TRAINED + CALIBRATED, len(order))
    train, calibration, test = (Canvases(images[a:b], labels[a:b], seed=a) for a, b in pairwise(ends))
    return train, calibration, test


def joined(first: Canvases, second: Canvases, seed: int) -> Canvases:
    """The digits of two splits together."""
    return Canvases(torch.cat([first.images, second.images]), torch.cat([first.labels, second.labels]), seed)
