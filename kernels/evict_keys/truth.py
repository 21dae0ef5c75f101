"""The truth of eviction scores: attention summed over query rows for each key, tile by tile, never N x N.

Query heads of a group are summed: a grouped cache keeps or drops a key for all of them at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyncc.kernels.attention_rows import attention_rows
from dyncc.kernels.select_keys import select_keys

TILE = 256
HIDDEN = -1.0
"""The score of a key that the last query row may not see, a pad: below any sum of probabilities."""


def column_sums(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    temperature: float = 1.0,
    seed: int = -1,
    start: int = 0,
) -> Tensor:
    """Sums [B, G, N] over query rows and a group's heads of `weights` times attention probabilities.

    Args:
        q: [B, H, T, D]; k: [B, G, N, D]; mask: [B or 1, 1, T, N] as SDPA takes it; weights: [B, T].
        is_causal: row i sees keys 0..i, as SDPA means it.
        temperature, seed: probabilities of softmax((z + noise) / temperature), noise Gumbel(0, 1) drawn by `seed` from the query's
            position (`start` is that of row 0), the key's place and the head; none below 0 (Keyformer, Adnan et al. 2024).
    """
    batch, heads, rows, width = q.shape
    groups, keys = k.shape[1], k.shape[2]
    scale = width**-0.5 if scale is None else scale
    total = torch.zeros(batch, groups, keys, dtype=torch.float32, device=q.device)
    for first in range(0, rows, TILE):
        part = q[:, :, first : first + TILE]
        count = part.shape[2]
        grouped = part.reshape(batch, groups, heads // groups * count, width)
        logits = (grouped @ k.transpose(-1, -2)).float().mul_(scale).view(batch, heads, count, keys)
        if is_causal:
            at = torch.arange(first, first + count, device=q.device)
            logits.masked_fill_(torch.arange(keys, device=q.device) > at[:, None], -torch.inf)
        if mask is not None:
            shown = mask[:, :, first : first + count]
            logits = logits.masked_fill(~shown, -torch.inf) if mask.dtype == torch.bool else logits + shown
        if seed >= 0:
            logits = logits + _gumbel(logits, seed, start + first)
        total += probability_sums(torch.softmax(logits / temperature, -1), weights[:, first : first + count], groups)
    return total


def probability_sums(probabilities: Tensor, weights: Tensor, groups: int) -> Tensor:
    """Sums [B, G, N] over rows and a group's heads of probabilities [B, H, R, N] times weights [B, R]; rows that see nothing count 0."""
    batch, heads, rows, keys = probabilities.shape
    weighed = probabilities.float().nan_to_num() * weights[:, None, :, None]
    return weighed.reshape(batch, groups, heads // groups * rows, keys).sum(2)


def window_sums(
    q: Tensor, k: Tensor, mask: Tensor | None, weights: Tensor, window: int, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """`column_sums` of the last `window` query rows only (all, where there are fewer)."""
    rows: Any = q.shape[2]
    count = last_rows(rows, window)
    at = torch.arange(count, device=q.device) + (rows - count)
    return probability_sums(attention_rows(q, k, at, mask, is_causal, scale), weights.narrow(1, rows - count, count), k.shape[1])


def last_rows(rows: Any, window: int) -> Any:
    """min(window, rows), for a size that may be symbolic."""
    return torch.sym_min(window, rows) if isinstance(rows, torch.SymInt) else min(window, rows)


def _gumbel(like: Tensor, seed: int, start: int) -> Tensor:
    """Gumbel(0, 1) noise for logits [B, H, T, N]: a hash of seed, head, position and key, so that chunks and tiles do not matter."""
    _, heads, rows, keys = like.shape
    at = lambda size, shift: torch.arange(shift, shift + size, device=like.device, dtype=torch.int64)  # noqa: E731
    mixed = (at(heads, 1)[:, None, None] * 73856093) ^ (at(rows, start)[:, None] * 19349663) ^ (at(keys, 0) * 83492791)
    mixed = mixed ^ (seed * 2654435761 & 0xFFFFFFFF)
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        mixed = ((mixed ^ (mixed >> 16)) * factor) & 0xFFFFFFFF
    uniform = ((mixed ^ (mixed >> 16)) & 0xFFFFFF).float().add_(0.5) / (1 << 24)
    return -torch.log(-torch.log(uniform))


def row_weights(mask: Tensor | None, batch: int, rows: Any, decay: float, device: torch.device) -> Tensor:
    """Weights [B, T] of query rows: `decay` to the power of their age (A2SF), and 0 for pads, which a mask hides from themselves.

    Args:
        mask: [B or 1, 1, T, N], its last T keys those of the query rows; bool (True is visible) or added.
    """
    age = torch.arange(rows - 1, -1, -1, device=device, dtype=torch.float32)
    weights = (decay**age if decay != 1.0 else torch.ones_like(age)).expand(batch, rows)
    if mask is None:
        return weights
    at = torch.arange(rows, device=mask.device) + (mask.shape[3] - rows)
    own = mask[:, 0].gather(2, at.expand(mask.shape[0], rows).unsqueeze(2)).squeeze(2)
    seen = own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2
    return weights * seen


def hide_pads(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores [B, G, N] with `HIDDEN` for keys that the mask's last row may not see."""
    if mask is None:
        return scores
    last = mask[:, :, -1]
    seen = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
    return torch.where(seen, scores, HIDDEN)


def keep_keys(scores: Tensor, budget: int, sinks: int, recents: int, pool: int = 1, enough: bool = False) -> Tensor:
    """Sorted indices [B, G, min(budget, N)] of the best-scored keys; the first `sinks` and last `recents` visible ones always stay.

    Args:
        scores: [B, G, N], `HIDDEN` for pads, which stay only where nothing else is left.
        pool: each score is first replaced by the largest of so many neighbours' (SnapKV, Li et al. 2024); odd.
        enough: N is known to be `budget` at least.
    """
    visible = scores[:, :1] >= 0
    return select_keys(_pooled(scores, pool), budget, visible, sinks, recents, enough)


def _pooled(scores: Tensor, pool: int) -> Tensor:
    """The largest of each score and its pool // 2 neighbours on either side (max_pool1d, for sizes that may be symbolic)."""
    if pool == 1:
        return scores
    edge = scores.new_full((scores.shape[0], scores.shape[1], pool // 2), HIDDEN)
    wide = torch.cat([edge, scores, edge], dim=2)
    found = scores
    for shift in range(pool):
        found = torch.maximum(found, wide.narrow(2, shift, scores.shape[2]))
    return found
