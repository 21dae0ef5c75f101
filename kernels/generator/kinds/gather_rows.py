"""Rows at chosen places: what is kept of a sequence, together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dyncc.kernels.generator.frame import OUT, TILE, Operand, ids, tile
from dyncc.kernels.generator.kinds.rows import check_row, row_team, rows_at_once
from dyncc.kernels.generator.spec import KernelSpec, power


@dataclass(frozen=True)
class GatherRows(KernelSpec):
    """out[b, h, t] = x[b, h, index[b, t]], rows of `width` channels."""

    entry: ClassVar[str] = "gather_rows"
    title: ClassVar[str] = "Rows at chosen places"

    width: int

    def __post_init__(self) -> None:
        check_row(self.width)
        super().__post_init__()

    @property
    def team(self) -> int:
        return self.warps or row_team(self.width)

    def operands(self) -> tuple[Operand, ...]:
        return (Operand("x", TILE), Operand("index", ("batch",), "index"), OUT)

    def constants(self) -> dict[str, int]:
        return {"HEADS": 1}

    def sized(self) -> str:
        return f"w{self.width}"

    def work(self) -> tuple[int, int]:
        """2048 rows."""
        return 2048 * self.width * 4 * len(self.epilogues), 2048 * (self.width * (2 + len(self.epilogues)) * self.itemsize + 8)

    def body(self, ending: list[str]) -> list[str]:
        return [
            *ids(rows_at_once(self.width), self.width),
            *tile(power(self.width)),
            "source = tl.load(index + batch * index_batch + at, mask=at < rows, other=0)",
            "x_at = x + batch * x_batch + head * x_head",
            "result = tl.load(x_at + source[:, None] * x_row + lane[None, :], mask=kept, other=0.0).to(tl.float32)",
            *ending,
        ]

    def run(self, *given: Tensor, **more: Any) -> Tensor:
        """[B, H, T, width] of x [B, H, N, width] and index [B, T] of int64; epilogues' tensors are of the result's shape."""
        from dyncc.kernels.generator.launch import blocks, broadcast, launch, side_by_side

        x, index = (side_by_side(t) for t in given)
        batch, heads, _, width = x.shape
        shape = (batch, heads, index.shape[1], width)
        out = more.pop("out", None)
        out = x.new_empty(shape) if out is None else out
        grid = (blocks(shape[2], rows_at_once(width)), batch * heads)
        launch(self, grid, {"x": x, "index": index, "out": out}, {"rows": shape[2]}, {"HEADS": heads}, broadcast(self, more, shape))
        return out

    def truth(self, *given: Tensor, **more: Any) -> Tensor:
        from dyncc.kernels.generator.launch import ended

        x, index = given
        taken = x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
        return ended(self, taken.float(), more).to(x.dtype)
