"""What appending means, and how much memory it takes: known from sizes alone, so that a compiled graph knows the strides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROOM = 512
"""Rows by which a buffer grows."""


def append_rows(past: Tensor, new: Tensor) -> Tensor:
    """Rows past [B, G, N, D] and behind them new [B, G, T, D], as [B, G, N + T, D]."""
    return torch.cat([past, new], 2)


def capacity(rows: Any) -> Any:
    """How many rows the buffer of so many has, the next multiple of `ROOM`; sizes may be symbolic.

    >>> capacity(1), capacity(512), capacity(513)
    (512, 512, 1024)
    """
    return (rows + ROOM - 1) // ROOM * ROOM


def strides(heads: Any, rows: Any, width: Any) -> tuple[Any, Any, Any, int]:
    """Of `rows` rows [B, heads, rows, width] at the start of their buffer."""
    room = capacity(rows)
    return heads * room * width, room * width, width, 1
