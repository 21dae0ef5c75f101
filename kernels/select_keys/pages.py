"""Pages of keys: what stands for each (bounds, Quest, Tang et al. 2024; the mean; one key), scores of pages for one query row, and the keys
of chosen pages.

A bound says what one key of a page could be at most, far above what keys are: heads that choose together are misled by it. `near_bounds`
lie between the mean and the bound, and read as many rows; `share="any"` compares what pages are to each head, not products of heads of
unlike size. Both are ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyncc.kernels.select_keys.truth import shared_scores


def page_bounds(k: Tensor, page: int, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each channel in each page of `page` keys, [B, G, ceil(N / page), D] twice.

    Args:
        k: [B, G, N, D]; visible: [B, 1, N] bool, hidden keys do not count (a page of hidden keys alone has bounds +inf and -inf).
    """
    batch, groups, keys, width = k.shape
    at, pages = _places(keys, page, k.device)
    low = high = k
    if visible is not None:
        shown = visible.unsqueeze(-1)
        low, high = torch.where(shown, k, torch.inf), torch.where(shown, k, -torch.inf)
    paged = (side.index_select(2, at).view(batch, groups, pages, page, width) for side in (low, high))
    return next(paged).amin(3), next(paged).amax(3)


def near_bounds(k: Tensor, page: int, slack: float, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Bounds of pages [B, G, ceil(N / page), D] twice, drawn towards the mean: mean + slack (bound - mean). Arguments as in `page_bounds`.

    What `page_scores` makes of them is slack times the bound of q.k and 1 - slack times its mean. Pages of hidden keys keep +inf and -inf.
    """
    low, high = page_bounds(k, page, visible)
    if slack == 1.0:
        return low, high
    return drawn_in(low, high, page_means(k, page, visible)[:, :, :-1], slack)


def drawn_in(low: Tensor, high: Tensor, mean: Tensor, slack: float) -> tuple[Tensor, Tensor]:
    """Bounds between which `slack` of their distance from the mean is left, in their own type."""
    return tuple((mean + slack * (side.float() - mean)).to(side.dtype) for side in (low, high))  # type: ignore[return-value]


def _places(keys: Any, page: int, device: torch.device, spare: int = 0) -> tuple[Tensor, Any]:
    """The keys of all pages in a row; a ragged last page is filled up with the last key, which changes no bound. And how many pages."""
    pages = (keys + page - 1) // page + spare
    return torch.arange(pages * page, device=device).clamp(max=keys - 1), pages


def page_means(k: Tensor, page: int, visible: Tensor | None = None) -> Tensor:
    """The mean of each page's keys, [B, G, ceil(N / page) + 1, D] of float; zeros for a page of hidden keys, and in a spare page behind.

    With a spare page their number is never 1, which a compiler of symbolic sizes would take for a size to broadcast.

    Args:
        k: [B, G, N, D]; visible: [B, 1, N] bool, hidden keys do not count.
    """
    batch, groups, keys, width = k.shape
    at, pages = _places(keys, page, k.device, spare=1)
    real = (torch.arange(pages * page, device=k.device) < keys).expand(batch, 1, pages * page)
    counts = (real if visible is None else real & visible.index_select(2, at)).view(batch, 1, pages, page, 1)
    rows = k.index_select(2, at).view(batch, groups, pages, page, width).float()
    return rows.masked_fill(~counts, 0.0).sum(3) / counts.to(rows.dtype).sum(3).clamp(min=1.0)


def page_middles(x: Tensor, page: int) -> Tensor:
    """Of x [B, G, N, ...] the row in the middle of each page, or the last one where that lies behind it: [B, G, ceil(N / page) + 1, ...].

    A spare page as in `page_means`.
    """
    keys: Any = x.shape[2]
    pages = (keys + page - 1) // page + 1
    return x.index_select(2, (torch.arange(pages, device=x.device) * page + page // 2).clamp(max=keys - 1))


def page_scores(
    q: Tensor, low: Tensor, high: Tensor, share: str, shown: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """An upper bound of q.k over each page's keys, [B, C, pages]: the sum over channels of max(q low, q high).

    Args:
        q: [B, H, 1, D]; low, high: [B, G, pages, D] with H a multiple of G.
        share: as `key_scores` takes it; "any" gives a group [B, G, pages] the largest of its heads' log softmax of `scale` times the bound
            over the pages `shown` [B, 1, pages] bool, and -inf to the others.
        scale: 1 / sqrt(D) where it is None.
    """
    batch, heads, _, width = q.shape
    groups, pages = low.shape[1], low.shape[2]
    rows = q.reshape(batch, groups, heads // groups, width)
    least, most = low.nan_to_num(posinf=0.0), high.nan_to_num(neginf=0.0)
    bound = rows.clamp(min=0) @ most.transpose(2, 3) + rows.clamp(max=0) @ least.transpose(2, 3)
    if share != "any":
        return shared_scores(bound.reshape(batch, heads, pages).float(), groups, share)
    logits = bound.float() * (width**-0.5 if scale is None else scale)
    hidden = torch.zeros(1, 1, 1, dtype=torch.bool, device=q.device) if shown is None else ~shown
    told = torch.log_softmax(logits.masked_fill(hidden.unsqueeze(2), -torch.inf), 3).amax(2)
    return told.masked_fill(hidden, -torch.inf)


def visible_pages(visible: Tensor, page: int) -> Tensor:
    """Pages [B, 1, ceil(N / page)] with any visible key, of visible [B, 1, N] bool."""
    at, pages = _places(visible.shape[2], page, visible.device)
    return visible.index_select(2, at).view(visible.shape[0], 1, pages, page).any(3)


def page_keys(pages: Tensor, page: int) -> Tensor:
    """The keys of pages [B, C, S], in order: [B, C, S * page]. Those of a ragged last page may lie behind the last key.

    They are scattered to their places, which changes nothing, so that a compiler stores them: worked out anew for each channel that is
    gathered, their arithmetic costs Inductor minutes.
    """
    at = (pages.unsqueeze(-1) * page + torch.arange(page, device=pages.device)).flatten(2)
    return torch.zeros_like(at).scatter(2, torch.arange(at.shape[2], device=at.device).expand_as(at), at)
