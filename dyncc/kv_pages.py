"""What a growing cache keeps of its pages, up to date as rows are written: a new key changes that of its own page only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyncc.kernels.select_keys import page_bounds, page_means


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


class PageMeans:
    """The mean of each page of `page` keys, [B, G, pages, D] of float, by sums with room to grow."""

    def __init__(self, page: int) -> None:
        self.page = page
        self.sums: Tensor | None = None

    def append(self, keys: Tensor, new: int, room: int) -> tuple[Tensor]:
        """Take note of the last `new` of all keys [B, G, N, D]; `room` is how many keys their buffer holds. Returns the means."""
        length: Any = keys.shape[2]
        pages = (length + self.page - 1) // self.page
        counts = (length - torch.arange(pages, device=keys.device) * self.page).clamp(max=self.page).unsqueeze(1)
        if self.sums is None or new != 1 or pages > self.sums.shape[2]:
            self.sums = _wide(page_means(keys, self.page)[:, :, :pages] * counts, (room + self.page - 1) // self.page, 0.0)
        else:
            self.sums[:, :, pages - 1 : pages] += keys[:, :, length - 1 :]
        return (self.sums[:, :, :pages] / counts,)

    def forget(self) -> None:
        """Take the means anew from the keys at the next step: rows were dropped, or others came."""
        self.sums = None

    def copy(self) -> PageMeans:
        other = PageMeans(self.page)
        other.sums = self.sums.clone() if self.sums is not None else None
        return other


def pages_for(select: Any) -> PageBounds | PageMeans | None:
    """What a cache keeps of its pages for a pass that selects; None where it needs nothing."""
    kinds: dict[str, type[PageBounds | PageMeans]] = {"bound": PageBounds, "mean": PageMeans}
    return kinds[select.score](select.page) if select is not None and select.score in kinds else None


def _wide(x: Tensor, pages: Any, fill: float) -> Tensor:
    wide = x.new_full((x.shape[0], x.shape[1], pages, x.shape[3]), fill)
    wide[:, :, : x.shape[2]] = x
    return wide


def _roomy(keys: Tensor, page: int, room: int) -> tuple[Tensor, Tensor]:
    pages = (room + page - 1) // page
    low, high = page_bounds(keys, page)
    return _wide(low, pages, torch.inf), _wide(high, pages, -torch.inf)
