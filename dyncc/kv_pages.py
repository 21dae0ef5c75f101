"""Bounds of a growing cache's pages, kept up to date as rows are written: a new key is compared with its own page only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyncc.kernels.select_keys import page_bounds


class PageBounds:
    """Smallest and largest value of each channel in each page of `page` keys, [B, G, pages, D] twice, with room to grow.

    The last page's bounds change in place, so every store has bounds of its own.
    """

    def __init__(self, page: int) -> None:
        self.page = page
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def append(self, keys: Tensor, new: int, room: int) -> tuple[Tensor, Tensor]:
        """Take note of the last `new` of all keys [B, G, N, D]; `room` is how many keys their buffer holds. Returns the bounds."""
        length: Any = keys.shape[2]
        pages = (length + self.page - 1) // self.page
        if self.low is None or self.high is None or new != 1 or pages > self.low.shape[2]:
            self.low, self.high = _roomy(keys, self.page, room)
        else:
            last = keys[:, :, length - 1 :]
            self.low[:, :, pages - 1 : pages] = torch.minimum(self.low[:, :, pages - 1 : pages], last)
            self.high[:, :, pages - 1 : pages] = torch.maximum(self.high[:, :, pages - 1 : pages], last)
        return self.low[:, :, :pages], self.high[:, :, :pages]

    def forget(self) -> None:
        """Take the bounds anew from the keys at the next step: rows were dropped, or others came."""
        self.low = self.high = None

    def copy(self) -> PageBounds:
        other = PageBounds(self.page)
        if self.low is not None and self.high is not None:
            other.low, other.high = self.low.clone(), self.high.clone()
        return other


def _roomy(keys: Tensor, page: int, room: int) -> tuple[Tensor, Tensor]:
    found = []
    for bounds, fill in zip(page_bounds(keys, page), (torch.inf, -torch.inf), strict=True):
        wide = bounds.new_full((bounds.shape[0], bounds.shape[1], (room + page - 1) // page, bounds.shape[3]), fill)
        wide[:, :, : bounds.shape[2]] = bounds
        found.append(wide)
    return found[0], found[1]
