"""The truth of select_rows: a stable descending sort, the first `count`, sorted back into their order."""

from __future__ import annotations

from typing import Any

import torch


def select_rows(
    score: torch.Tensor,
    count: Any,
    first: int = 0,
    last: int = 0,
    valid: torch.Tensor | None = None,
    force: torch.Tensor | None = None,
    pinned: tuple[int, int] = (0, 0),
) -> torch.Tensor:
    """Sorted indices [B, count] of the rows that stay (see `rank_rows` for what goes first).

    >>> select_rows(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 2).tolist()
    [[1, 2]]
    """
    return rank_rows(score, first, last, valid, force, pinned)[:, :count].sort(dim=1).values


def rank_rows(
    score: torch.Tensor,
    first: int = 0,
    last: int = 0,
    valid: torch.Tensor | None = None,
    force: torch.Tensor | None = None,
    pinned: tuple[int, int] = (0, 0),
) -> torch.Tensor:
    """Row positions [B, T] from the one to keep first to the one to keep last.

    Args:
        score: [B, T], higher stays; ties keep the lower index.
        first, last: how many rows at either end stay where they are valid.
        valid: [B, T] bool; rows that are not (pads) go before any valid row does.
        force: [B, T] bool, rows that stay whatever they are; pinned: likewise, (first, last) rows by position.
    """
    score = torch.nan_to_num(score.float(), nan=0.0, posinf=1e30, neginf=-1e30)
    score = _raise(score, first, last)
    if valid is not None:
        score = score.masked_fill(~valid, -torch.inf)
    score = _raise(score, *pinned)
    if force is not None:
        score = score.masked_fill(force, torch.inf)
    return torch.sort(score, dim=1, descending=True, stable=True).indices


def alive_rows(order: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """[B, T] bool: the first `count` [B] rows of an order [B, T], at their positions. Rows of a batch may keep different numbers.

    >>> alive_rows(torch.tensor([[2, 0, 1], [1, 0, 2]]), torch.tensor([1, 2])).tolist()
    [[False, False, True], [True, True, False]]
    """
    inside = torch.arange(order.shape[1], device=order.device).unsqueeze(0) < count.unsqueeze(1)
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, order, inside)


def _raise(score: torch.Tensor, first: int, last: int) -> torch.Tensor:
    if not first and not last:
        return score
    position = torch.arange(score.shape[1], device=score.device)
    return score.masked_fill((position < first) | (position >= score.shape[1] - last), torch.inf)
