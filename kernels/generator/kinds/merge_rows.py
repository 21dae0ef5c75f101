"""Rows merged into fewer: each result is the mean of its rows, weighted by how many tokens each stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dyncc.kernels.generator.frame import DIVIDED, OUT, TILE, Operand
from dyncc.kernels.generator.kinds.row_base import RowKernel, as_wide
from dyncc.kernels.generator.launch import side_by_side, stored
from dyncc.kernels.generator.spec import power


@dataclass(frozen=True)
class MergeRows(RowKernel):
    """out[b, h, t] = sum of size[b, n] x[b, h, n] / sum of size[b, n] over the rows n whose target is t, of `width` channels.

    A result that no row goes to is zeros. Rows are read in their order: same bits each time.
    """

    entry: ClassVar[str] = "merge_rows"
    title: ClassVar[str] = "Rows merged"

    def operands(self) -> tuple[Operand, ...]:
        told = (Operand("size", ("batch",), "float"), Operand("order", ("batch",), "index"), Operand("start", ("batch",), "index"))
        return (Operand("x", TILE), *told, OUT)

    def work(self) -> tuple[int, int]:
        """4096 rows into 2048."""
        moved = (4096 + 2048 * (1 + len(self.epilogues))) * self.width * self.itemsize + 4096 * 12 + 2048 * 8
        return (2 * 4096 + 4 * 2048 * len(self.epilogues)) * self.width, moved

    def body(self, ending: list[str]) -> list[str]:
        inner = [
            "some = i < count",
            "source = tl.load(order + batch * order_batch + first + i, mask=some, other=0)",
            "share = tl.load(size + batch * size_batch + source, mask=some, other=0.0)",
            "x_tile = tl.load(x_at + source[:, None] * x_row + lane[None, :], mask=kept & some[:, None], other=0.0).to(tl.float32)",
            "acc += x_tile * share[:, None]",
            "total += share",
        ]
        return [
            *self.rows_of_a_program(),
            "start_at = start + batch * start_batch + at",
            "first = tl.load(start_at, mask=at < rows, other=0)",
            "count = tl.load(start_at + 1, mask=at < rows, other=0) - first",
            "x_at = x + batch * x_batch + head * x_head",
            "total = tl.zeros([ROWS], dtype=tl.float32)",
            f"acc = tl.zeros([ROWS, {power(self.width)}], dtype=tl.float32)",
            "for i in range(0, tl.max(count, axis=0)):",
            *(f"    {line}" for line in inner),
            DIVIDED,
            *ending,
        ]

    def run(self, *given: Tensor, **more: Any) -> Tensor:
        """[B, H, rows, width] of x [B, H, N, width], size [B, N] and target [B, N] below `rows`."""
        x, size, target = (side_by_side(t) for t in given)
        rows: int = more.pop("rows")
        ordered, order = target.sort(dim=1, stable=True)
        edges = torch.arange(rows + 1, device=x.device).expand(x.shape[0], -1).contiguous()
        tensors = {"x": x, "size": size.float(), "order": order, "start": torch.searchsorted(ordered, edges)}
        return self.over_rows(tensors, rows, **more)

    def truth(self, *given: Tensor, **more: Any) -> Tensor:
        x, size, target = given
        rows: int = more.pop("rows")
        place = as_wide(target, x)
        weight = size.float()[:, None, :, None]
        summed = x.new_zeros((*x.shape[:2], rows, x.shape[3]), dtype=torch.float32).scatter_add(2, place, x.float() * weight)
        mass = torch.zeros_like(summed).scatter_add(2, place, weight.expand_as(x))
        return stored(self, summed / torch.where(mass == 0.0, 1.0, mass), more, more.get("out"))
