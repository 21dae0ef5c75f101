"""Rows put back at their places: what a block made of the tokens that it was given, with the residual of those places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dyncc.kernels.generator.frame import ending, read
from dyncc.kernels.generator.kinds.row_base import IndexedRows, as_wide
from dyncc.kernels.generator.launch import broadcast, ended, side_by_side


@dataclass(frozen=True)
class ScatterRows(IndexedRows):
    """out[b, h, index[b, t]] = x[b, h, t], rows of `width` channels; other rows of `out` stay. Epilogues read at index[b, t]."""

    entry: ClassVar[str] = "scatter_rows"
    title: ClassVar[str] = "Rows put at chosen places"
    in_order: ClassVar[bool] = False

    def ending(self) -> list[str]:
        return ending(self.epilogues, "place")

    def body(self, ending: list[str]) -> list[str]:
        return [
            *self.rows_of_a_program(),
            self.places("place"),
            *read("x", "result"),
            *ending,
        ]

    def run(self, *given: Tensor, **more: Any) -> Tensor:
        """`out` [B, H, N, width], changed: x [B, H, T, width] is put at index [B, T]. What the epilogues read may be `out` itself."""
        x, index = (side_by_side(t) for t in given)
        return self.over_rows({"x": x, "index": index}, x.shape[2], more.pop("out"), **more)

    def truth(self, *given: Tensor, **more: Any) -> Tensor:
        x, index = given
        out: Tensor = more.pop("out")
        place = as_wide(index, x)
        wide = broadcast(self, more, out.shape)
        there = {name: value.gather(2, place) if isinstance(value, Tensor) else value for name, value in wide.items()}
        return out.scatter(2, place, ended(self, x.float(), there).to(out.dtype))
