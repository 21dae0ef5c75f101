"""The op `dyncc::attend_slots`: its meaning is its truth; on a CPU it runs a few rows at a time, so that the scores of all rows never stand
at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dyncc.kernels.gradients import by_truth
from dyncc.kernels.slot_attention.truth import attend_slots, check

SCORES = 1 << 20
"""Scores that are held at once: fewer make products too small, more leave the caches."""
LEAST_ROWS = 32

_library = torch.library.Library("dyncc", "FRAGMENT")
_library.define("attend_slots(Tensor x, Tensor keys, Tensor values, float scale=1.0, float eps=0.0, str approximate='none') -> Tensor")


def attend_by_rows(x: Tensor, keys: Tensor, values: Tensor, scale: float = 1.0, eps: float = 0.0, approximate: str = "none") -> Tensor:
    """What truth.attend_slots computes, in memory that grows with rows and slots alone."""
    check(x, keys, values)
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_empty((rows.shape[0], values.shape[1]))
    for start in range(0, rows.shape[0], some := max(LEAST_ROWS, SCORES // max(keys.shape[0], 1))):
        weights = _weights(rows[start : start + some] @ keys.T, scale, eps, approximate)
        torch.mm(weights, values, out=out[start : start + some])
    return out.reshape((*x.shape[:-1], values.shape[1]))


def _weights(scores: Tensor, scale: float, eps: float, approximate: str) -> Tensor:
    """The weights of some rows [rows, S], in place of their scores."""
    scores.div_(torch.linalg.vector_norm(scores, dim=-1, keepdim=True).clamp_min_(eps)).mul_(scale)
    return torch.ops.aten.gelu_(scores, approximate=approximate)


_library.impl("attend_slots", attend_slots, "CompositeExplicitAutograd")
_library.impl("attend_slots", attend_by_rows, "CPU")


@torch.library.register_fake("dyncc::attend_slots")
def fake(x: Tensor, keys: Tensor, values: Tensor, *more: Any, **named: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[1]))


ATTEND_SLOTS = torch.ops.dyncc.attend_slots.default
by_truth(_library, ATTEND_SLOTS, attend_slots)
TRUTHS: dict[Any, Callable[..., Any]] = {ATTEND_SLOTS: attend_slots}
"""The op's truth in ATen, for engines that do not know it."""
