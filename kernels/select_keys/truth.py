"""The truth of key selection for decoding: one query row a head, keys [B, G, N, D] of grouped heads, H a multiple of G.

Heads choose for themselves, for their group, or for the layer: a choice is [B, C, S] with C one of H, G and 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyncc.kernels.attention_rows import attention_row_logits


def visible_keys(mask: Tensor) -> Tensor:
    """Which keys a mask [B, 1, 1, N] (bool: True is visible; float: added) leaves visible, [B, 1, N] bool."""
    row = mask[:, :, 0]
    return row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2


def key_scores(q: Tensor, k: Tensor, mask: Tensor | None, score: str, share: str, scale: float | None = None) -> Tensor:
    """Scores [B, C, N] of keys for query rows q [B, H, 1, D], higher stays.

    Args:
        score: "logits", the heads' q.k; "vote", their softmax over all visible keys (TokenSelect's soft vote); "recents", the position.
        share: "head", "group" (mean over a group's heads) or "layer" (mean over all heads).
    """
    if score == "recents":
        return newest(k.shape[0], k.shape[2], k.device)
    found = attention_row_logits(q, k, torch.arange(1, device=q.device), scale).squeeze(2).float()
    if score == "vote":
        hidden = found if mask is None else found.masked_fill(~visible_keys(mask), -torch.inf)
        found = torch.softmax(hidden, -1)
    return shared_scores(found, k.shape[1], share)


def newest(batch: Any, keys: Any, device: torch.device) -> Tensor:
    """Each key's position as its score, [B, 1, N]."""
    return torch.arange(keys, device=device, dtype=torch.float32).expand(batch, 1, keys)


def shared_scores(score: Tensor, groups: int, share: str) -> Tensor:
    """Scores [B, H, N] of heads as [B, C, N]: their own ("head"), their group's mean ("group"), or the mean of all ("layer")."""
    if share == "head":
        return score
    batch, heads, keys = score.shape
    return score.view(batch, groups, heads // groups, keys).mean(2) if share == "group" else score.mean(1, keepdim=True)


def select_keys(
    score: Tensor, budget: int, visible: Tensor | None = None, sinks: int = 0, recents: int = 0, enough: bool = False
) -> Tensor:
    """Sorted indices [B, C, min(budget, N)] of the best-scored keys, ties to the lower index; no key is taken twice.

    Args:
        score: [B, C, N]; visible: [B, 1, N] bool, hidden keys are taken only when no other is left.
        sinks, recents: the first and the last visible keys are taken whatever their scores.
        enough: N is known to be `budget` at least, so that a symbolic N needs no minimum.

    >>> select_keys(torch.tensor([[[1.0, 3.0, 3.0, 2.0, 0.0]]]), 3, recents=1).tolist()
    [[[1, 2, 4]]]
    """
    keys: Any = score.shape[2]
    count = budget if enough else torch.sym_min(budget, keys) if isinstance(keys, torch.SymInt) else min(budget, keys)
    score = torch.nan_to_num(score.float(), nan=0.0, posinf=1e30, neginf=-1e30)
    if sinks or recents:
        score = score.masked_fill(_forced(score, visible, sinks, recents), torch.inf)
    if visible is not None:
        score = score.masked_fill(~visible, -torch.inf)
    least = torch.topk(score, count, dim=2).values[:, :, -1:]
    above, ties = score > least, (score == least).to(torch.int64)
    wanted = count - above.to(torch.int64).sum(2, keepdim=True)
    taken = above | ((ties == 1) & (ties.cumsum(2) <= wanted))
    place = torch.where(taken, taken.to(torch.int64).cumsum(2) - 1, count)
    at = torch.arange(keys, device=score.device).expand(score.shape)
    return at.new_zeros(score.shape[0], score.shape[1], count + 1).scatter(2, place, at)[:, :, :count]


def _forced(score: Tensor, visible: Tensor | None, sinks: int, recents: int) -> Tensor:
    if visible is None:
        position = torch.arange(score.shape[2], device=score.device)
        return (position < sinks) | (position >= score.shape[2] - recents)
    rank = visible.to(torch.int64).cumsum(2)
    return (rank <= sinks) | (rank > rank[:, :, -1:] - recents)


def attend_selected(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, index: Tensor, scale: float | None = None, ragged: bool = False
) -> Tensor:
    """Attention [B, H, 1, Dv] of q [B, H, 1, D] over the keys `index` [B, C, S] alone; heads that chose together share gathered keys.

    With `ragged`, places behind the last key are no keys (a last page that is not full).
    """
    inside = None
    if ragged:
        inside, index = index < k.shape[2], index.clamp(max=k.shape[2] - 1)
    batch, heads, _, width = q.shape
    choices, count = index.shape[1], index.shape[2]
    picked_k, picked_v = (_picked(t, index, heads) for t in (k, v))
    rows = picked_k.shape[1]
    folded = q.reshape(batch, rows, heads // rows, width)
    seen = None if inside is None else inside.unsqueeze(2).expand(batch, choices, folded.shape[2], count)
    if mask is not None:
        wide = mask[:, :, 0].expand(batch, 1, mask.shape[3]).expand(batch, choices, mask.shape[3])
        picked = wide.gather(2, index)
        if inside is not None:
            picked = picked & inside if mask.dtype == torch.bool else picked.masked_fill(~inside, -torch.inf)
        seen = picked.unsqueeze(2).expand(batch, choices, folded.shape[2], count)
    out = torch.ops.aten.scaled_dot_product_attention.default(folded, picked_k, picked_v, seen, 0.0, False, scale=scale)
    return out.reshape(batch, heads, 1, v.shape[3])


def attend_selected_logits(logits: Tensor, v: Tensor, index: Tensor) -> Tensor:
    """softmax over the keys `index` [B, C, S] alone of masked logits [B, H, 1, N], times their values v [B, G, N, Dv]: [B, H, 1, Dv]."""
    batch, heads = logits.shape[:2]
    choices, count = index.shape[1], index.shape[2]
    per_head = index.repeat_interleave(heads // choices, 1) if choices > 1 else index.expand(batch, heads, count)
    weights = torch.softmax(logits.squeeze(2).gather(2, per_head), -1, dtype=torch.float32).to(v.dtype)
    picked = _picked(v, index, heads)
    rows = picked.shape[1]
    return (weights.view(batch, rows, heads // rows, count) @ picked).view(batch, heads, 1, v.shape[3])


def take_keys(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B, G, S] of keys or values [B, G, N, D], each head's own: [B, G, S, D]."""
    return x.gather(2, index.unsqueeze(-1).expand(*index.shape, x.shape[3]))


def _picked(x: Tensor, index: Tensor, heads: int) -> Tensor:
    """Keys or values [B, G, N, D] at `index` [B, C, S]: once a group where its heads chose together, [B, G, S, D], else [B, H, S, D]."""
    batch, groups = x.shape[:2]
    choices, count = index.shape[1], index.shape[2]
    if choices != heads or groups == heads:
        return take_keys(x, index.expand(batch, groups, count))
    apart = take_keys(x, index.reshape(batch, groups, heads // groups * count))
    return apart.reshape(batch, heads, count, x.shape[3])


def visible_logits(logits: Tensor) -> Tensor:
    """Which keys masked logits [B, H, 1, N] leave visible to any head, [B, 1, N] bool."""
    return (logits.squeeze(2) > torch.finfo(logits.dtype).min / 2).any(1, keepdim=True)
