"""Rows at chosen places: what is kept of a sequence, together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dyncc.kernels.generator.kinds.row_base import IndexedRows, as_wide
from dyncc.kernels.generator.launch import side_by_side, stored


@dataclass(frozen=True)
class GatherRows(IndexedRows):
    """out[b, h, t] = x[b, h, index[b, t]], rows of `width` channels."""

    entry: ClassVar[str] = "gather_rows"
    title: ClassVar[str] = "Rows at chosen places"

    def body(self, ending: list[str]) -> list[str]:
        return [
            *self.rows_of_a_program(),
            self.places("source"),
            "x_at = x + batch * x_batch + head * x_head",
            "result = tl.load(x_at + source[:, None] * x_row + lane[None, :], mask=kept, other=0.0).to(tl.float32)",
            *ending,
        ]

    def run(self, *given: Tensor, **more: Any) -> Tensor:
        """[B, H, T, width] of x [B, H, N, width] and index [B, T] of int64; epilogues' tensors are of the result's shape."""
        x, index = (side_by_side(t) for t in given)
        return self.over_rows({"x": x, "index": index}, index.shape[1], **more)

    def truth(self, *given: Tensor, **more: Any) -> Tensor:
        x, index = given
        return stored(self, x.gather(2, as_wide(index, x)).float(), more, more.get("out"))
