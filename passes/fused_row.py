"""One row in place of all that a cut drops, their sum by their scores (EViT, Liang et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from dyncc.ir import emit
from dyncc.passes.kept_rows import Kept
from dyncc.restrict import Refusal


def append_fused_row(short: Tensor, hidden: Tensor, score: Tensor, index: Tensor, *valid: Tensor) -> Tensor:
    """Append the row sum_j a_j x_j over the rows that go (EViT: weights are not normalised)."""
    gone = torch.ones_like(score).scatter(1, index, 0.0)
    weight = score * gone * (valid[0] if valid else 1.0)
    return torch.cat([short, (weight.to(hidden.dtype).unsqueeze(1) @ hidden)], 1)


def with_fused_row(before: fx.Node, kept: Kept) -> Kept:
    """The fused row is real, may go at a later cut, and has no original position."""

    def longer(rows: Tensor, value: bool) -> Tensor:
        return torch.cat([rows, torch.full_like(rows[:, :1], value)], 1)

    valid = None if kept.valid is None else emit(before, longer, kept.valid, True)
    force = None if kept.force is None else emit(before, longer, kept.force, False)
    return Kept(valid, force, None)


class NoTake:
    """With a fused row no full-length operand can follow: it has no original position."""

    def __call__(self, before: fx.Node, operand: fx.Node, dims: set[int], user: fx.Node, slot: int) -> fx.Node:
        hint = "use fuse=false, or put simplify-mask in front when it is a mask that hides nothing"
        raise Refusal(f"fuse=true makes a row without a position, but {user.name} needs {operand.name} at every row; {hint}")
