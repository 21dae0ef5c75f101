"""What a growing cache keeps of its pages, up to date as rows are written: a new key changes that of its own page only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyncc.kernels.select_keys import drawn_in, near_bounds, page_means


class PageBounds:
    """Smallest and largest value of each channel in each page of `page` keys, [B, G, pages, D] twice, with room to grow; with `slack`
    below 1 drawn towards the mean, as in `near_bounds`.

    The last page's bounds change in place, so every store has bounds of its own. What that page's keys are so far, `open`, is kept beside
    them: a step takes note of one key, and of no size that a compiler would have to reason about.
    """

    def __init__(self, page: int, slack: float = 1.0) -> None:
        self.page, self.slack = page, slack
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.open: tuple[Tensor, Tensor, Tensor] | None = None

    def append(self, keys: Tensor, new: int, room: int) -> tuple[Tensor, Tensor]:
        """Take note of the last `new` of all keys [B, G, N, D]; `room` is how many keys their buffer holds. Returns the bounds."""
        length: Any = keys.shape[2]
        pages = (length + self.page - 1) // self.page
        last = keys[:, :, length - 1 :]
        if self.low is None or self.high is None or self.open is None or new != 1 or pages > self.low.shape[2]:
            low, high = near_bounds(keys, self.page, self.slack)
            wide = (room + self.page - 1) // self.page
            self.low, self.high = _wide(low, wide, torch.inf), _wide(high, wide, -torch.inf)
            begun = keys[:, :, (pages - 1) * self.page :]
            self.open = (begun.amin(2, keepdim=True), begun.amax(2, keepdim=True), begun.float().sum(2, keepdim=True))
        elif self.slack == 1.0:
            self.low[:, :, pages - 1 : pages] = torch.minimum(self.low[:, :, pages - 1 : pages], last)
            self.high[:, :, pages - 1 : pages] = torch.maximum(self.high[:, :, pages - 1 : pages], last)
        else:
            self.open = _noted(self.open, last, torch.scalar_tensor((length - 1) % self.page, device=keys.device))
            low, high, total = self.open
            near = drawn_in(low, high, total / (length - (pages - 1) * self.page), self.slack)
            for side, kept in zip((self.low, self.high), near, strict=True):
                side[:, :, pages - 1 : pages] = kept
        return self.low[:, :, :pages], self.high[:, :, :pages]

    def forget(self) -> None:
        """Take the bounds anew from the keys at the next step: rows were dropped, or others came."""
        self.low = self.high = self.open = None

    def copy(self) -> PageBounds:
        other = PageBounds(self.page, self.slack)
        if self.low is not None and self.high is not None:
            other.low, other.high, other.open = self.low.clone(), self.high.clone(), self.open
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
    if select is not None and select.score == "bound":
        return PageBounds(select.page, select.slack)
    return PageMeans(select.page) if select is not None and select.score == "mean" else None


def _noted(open_page: tuple[Tensor, Tensor, Tensor], last: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest, largest and sum of a page's keys [B, G, 1, D] with one more, `last`; it held `before` keys: none where it begins."""
    low, high, total = open_page
    fresh = before == 0
    first = torch.where(fresh, 0.0, total)
    return torch.where(fresh, last, torch.minimum(low, last)), torch.where(fresh, last, torch.maximum(high, last)), first + last.float()


def _wide(x: Tensor, pages: Any, fill: float) -> Tensor:
    wide = x.new_full((x.shape[0], x.shape[1], pages, x.shape[3]), fill)
    wide[:, :, : x.shape[2]] = x
    return wide
