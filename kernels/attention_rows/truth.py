"""The truth of attention_rows: softmax(q[rows] k' * scale + mask[rows]) for chosen rows; cost R * N * d, never N * N."""

from __future__ import annotations

import torch


def attention_row_logits(q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """Scaled q.k of some query rows.

    Args:
        q: [B, H, Tq, D]; k: [B, G, Tk, D] with H a multiple of G (grouped heads); rows: [R] int64 positions in Tq, or [B, R].
    Returns:
        [B, H, R, Tk].
    """
    picked = take_rows(q, rows)
    batch, heads, _, width = q.shape
    groups = k.shape[1]
    scale = width**-0.5 if scale is None else scale
    grouped = picked.reshape(batch, groups, heads // groups * rows.shape[-1], width)
    return (grouped @ k.transpose(-1, -2) * scale).reshape(batch, heads, rows.shape[-1], k.shape[2])


def attention_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    rows: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Probabilities [B, H, R, Tk] of the query rows `rows`; mask as SDPA takes it (bool: True is visible; float: added)."""
    logits = attention_row_logits(q, k, rows, scale)
    if is_causal:
        seen = torch.arange(k.shape[2], device=q.device)<= rows.view(-1, 1, rows.shape[-1], 1)
        logits = logits.masked_fill(~seen, float("-inf"))
    if mask is not None:
        mask = mask if mask.shape[-2] == 1 else take_rows(mask, rows)
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    return torch.softmax(logits, -1, dtype=torch.float32).to(q.dtype)


def take_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of [..., T, D] (queries, a mask, probabilities) along its last dimension but one; rows as `attention_rows` takes them.

    >>> take_rows(torch.arange(6).view(1, 1, 3, 2), torch.tensor([[2, 0]])).tolist()
    [[[[4, 5], [0, 1]]]]
    """
    if rows.dim() == 1:
        return x.index_select(x.dim() - 2, rows)
    wide = x.expand(rows.shape[0], *x.shape[1:]) if x.dim() == 4 else x.expand(rows.shape[0], 1, *x.shape[-2:])
    return wide.gather(2, rows[:, None, :, None].expand(-1, wide.shape[1], -1, wide.shape[3]))
