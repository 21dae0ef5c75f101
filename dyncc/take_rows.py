"""Chosen rows of an axis: taken out of a tensor, put back into one, or taken wherever a full-length operand meets a shortened one."""

from __future__ import annotations

import torch
from torch import fx

from dyncc.analysis.axes import Axes, Dim, find
from dyncc.ir import emit, shape
from dyncc.refusal import Refusal, where
from dyncc.row_plan import Plan


def gather_rows(value: torch.Tensor, index: torch.Tensor, dim: int, batch_dim: int | None) -> torch.Tensor:
    """Rows `index` [B, K] of `value` along `dim`; `batch_dim` is where the batch stands (None: one row of indices for all).

    >>> gather_rows(torch.arange(6).view(2, 3), torch.tensor([[0, 2], [1, 2]]), 1, 0).tolist()
    [[0, 2], [4, 5]]
    """
    if batch_dim is None:
        return value.index_select(dim, index[0])
    view = [1] * value.dim()
    view[batch_dim], view[dim] = index.shape[0], index.shape[1]
    sizes = list(value.shape)
    sizes[dim] = index.shape[1]
    sizes[batch_dim] = index.shape[0]
    batched = value.expand(*[s if i == batch_dim else -1 for i, s in enumerate(sizes)])
    return batched.gather(dim, _oriented(index, batch_dim, dim).view(view).expand(sizes))


def _oriented(index: torch.Tensor, batch_dim: int, dim: int) -> torch.Tensor:
    return index if batch_dim < dim else index.t().contiguous()


def scatter_rows(rows: torch.Tensor, base: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    """`base` [B, T, ...] with `rows` [B, K, ...] put at `index` [B, K] along `dim` (1); other rows keep the base's values."""
    if dim != 1:
        raise ValueError("rows are scattered along dimension 1")
    view = index.view(*index.shape, *[1] * (rows.dim() - 2)).expand(rows.shape)
    return base.scatter(1, view, rows)


class TakeRows:
    """The `take` of a restricted token axis: gather by an index node [B, K], inserting the batch where an operand has none."""

    def __init__(self, axes: Axes, plan: Plan, index: fx.Node, batch: Dim):
        self.axes, self.plan, self.index, self.batch = axes, plan, index, batch
        self.made: dict[tuple[fx.Node, frozenset[int], int], fx.Node] = {}

    def __call__(self, before: fx.Node, operand: fx.Node, dims: set[int], user: fx.Node, slot: int) -> fx.Node:
        merged = [d for d in (self.axes.dims(operand)[i] for i in dims) if find(d, self.plan.axis) != 0 or len(d) != len(self.plan.axis)]
        if merged:
            raise Refusal(f"{where(user)} meets {operand.name}, whose rows are merged with another axis")
        place, pad = self._batch_place(operand, user)
        key = (operand, frozenset(dims), pad)
        if key not in self.made:
            self.made[key] = emit(before, lambda value, index: _take(value, index, sorted(dims), place, pad), operand, self.index)
            self.axes._dims[self.made[key]] = ()
        return self.made[key]

    def _batch_place(self, operand: fx.Node, user: fx.Node) -> tuple[int | None, int]:
        """Where the batch stands in the operand (after `pad` leading dimensions are added), or None when one index serves all rows."""
        if not self.batch:
            return None, 0
        own = self.axes.places(operand, self.batch)
        if own:
            return own[0], 0
        out = self.axes.places(user, self.batch)
        if not out:
            raise Refusal(f"{where(user)} meets {operand.name} away from the batch axis")
        pad = len(shape(user)) - len(shape(operand))
        return out[0], max(0, pad)


def _take(value: torch.Tensor, index: torch.Tensor, dims: list[int], place: int | None, pad: int) -> torch.Tensor:
    for _ in range(pad):
        value = value.unsqueeze(0)
    for dim in dims:
        value = gather_rows(value, index, dim + pad, place)
    return value
