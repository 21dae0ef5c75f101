"""From pages to keys: the keys of the best pages are scored by q.k, or the pages are split, and the best parts again, down to keys.

HISA (Xu et al. 2026) for two stages; HiP (Lee et al. 2024) for halving spans, each scored by one key of its own. Lengths may be symbolic,
so every list of spans but the first has a fixed size: those behind the last key fill up, and indices of keys may lie behind the last key.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dyncc.kernels.one_row import SELECT_BEST
from dyncc.kernels.select_keys.pages import page_keys
from dyncc.kernels.select_keys.truth import shared_scores, take_keys

HIDDEN, SHOWN, FORCED = 0.0, 1.0, 2.0
"""What may become of a span: it holds no visible key; it may be taken; it is taken whatever its score."""
UNSURE = 1e29
"""The score of a span of which nothing is known: above all others, below what is forced."""


def span_scores(q: Tensor, k: Tensor, share: str, index: Tensor | None = None) -> Tensor:
    """q.k of rows q [B, H, 1, D] and keys k [B, G, N, D], or their keys `index` [B, C, N] alone, [B, C, N]; `share` as in `key_scores`."""
    batch, heads, _, width = q.shape
    groups = k.shape[1]
    if share != "head":  # the mean of products is the product with the mean
        q, heads = q.reshape(batch, groups, -1, width).mean(2, keepdim=True), groups
    if index is None:
        found = q.reshape(batch, groups, heads // groups, width) @ k.transpose(2, 3)
    else:
        count = index.shape[2]
        taken = take_keys(k, index.expand(batch, heads, count).reshape(batch, groups, heads // groups * count))
        found = q.reshape(batch, heads, 1, width) @ taken.reshape(batch, heads, count, width).transpose(2, 3)
    return shared_scores(found.reshape(batch, heads, found.shape[3]).float(), groups, share)


def key_states(visible: Tensor, sinks: int, recents: int, keys: Any) -> Tensor:
    """What may become of `keys` keys, [B, 1, keys] of float: `span_states` of visible [B, 1, N] bool, then HIDDEN ones."""
    return F.pad(span_states(visible, sinks, recents), (0, keys - visible.shape[2]))


def span_states(visible: Tensor, sinks: int, recents: int) -> Tensor:
    """Of visible [B, 1, N] bool the first `sinks` and the last `recents` visible ones are FORCED: [B, 1, N] of float."""
    rank = visible.to(torch.int64).cumsum(2)
    forced = visible & ((rank <= sinks) | (rank > rank[:, :, -1:] - recents))
    return visible.float() + forced.float()


def refine_pages(
    q: Tensor, k: Tensor, score: Tensor, told: Tensor | None, states: Tensor, page: int, branch: int, beam: int, budget: int, share: str
) -> Tensor:
    """Sorted indices [B, C, budget] of the best keys found by splitting the best pages; hidden ones fill up. Where the last spans of
    `branch` keys stay whole, beam * branch = budget, their indices [B, C, beam].

    Args:
        score: [B, C, pages]; told: [B, 1, pages] bool, whether visible keys alone speak for a page, None where they do for all.
        states: [B, 1, (pages + beam) * page], as `key_states` gives it.
        branch: into how many a span is split, `page` is a power of it; beam: how many stay at each level, beam * branch >= budget.
    """
    size, count = page, beam if page > 1 else budget
    own = _spans(states, page)
    if told is not None:
        score = score.masked_fill(~told & (own[:, :, : score.shape[2]] > HIDDEN), UNSURE)
    spans = best_spans(F.pad(score, (0, beam)), own, count)
    while size > (branch if beam * branch == budget else 1):
        size //= branch
        spans, count = page_keys(spans, branch), beam if size > 1 else budget
        at = (spans * size + size // 2).clamp(max=k.shape[2] - 1)
        own, told = _at(_spans(states, size), spans), _at(states, at) > HIDDEN
        found = span_scores(q, k, share, at).masked_fill(~told & (own > HIDDEN), UNSURE)
        spans = spans.gather(2, best_spans(found, own, count))
    return spans


def _spans(states: Tensor, size: int) -> Tensor:
    return states.view(states.shape[0], 1, -1, size).amax(3)


def _at(states: Tensor, index: Tensor) -> Tensor:
    return states.expand(index.shape[0], index.shape[1], states.shape[2]).gather(2, index)


def best_spans(score: Tensor, states: Tensor, count: int) -> Tensor:
    """Sorted indices [B, C, count] of the best spans by scores [B, C, N]: forced ones first, hidden ones last, ties to the lower index."""
    score = score.masked_fill(states == FORCED, torch.inf).masked_fill(states == HIDDEN, -torch.inf)
    found: Tensor = SELECT_BEST(score, count, None, 0, 0, True)
    return found
