"""Rows put back at their places: what a block made of the tokens that it was given, with the residual of those places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dyncc.kernels.generator.frame import OUT, TILE, Operand, ending, ids, read, tile
from dyncc.kernels.generator.kinds.rows import check_row, row_team, rows_at_once
from dyncc.kernels.generator.spec import KernelSpec, power


@dataclass(frozen=True)
class ScatterRows(KernelSpec):
    """out[b, h, index[b, t]] = x[b, h, t], rows of `width` channels; other rows of `out` stay. Epilogues read at index[b, t]."""

    entry: ClassVar[str] = "scatter_rows"
    title: ClassVar[str] = "Rows put at chosen places"

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

    def ending(self) -> list[str]:
        return ending(self.epilogues, "place")

    def body(self, ending: list[str]) -> list[str]:
        return [
            *ids(rows_at_once(self.width), self.width),
            *tile(power(self.width)),
            "place = tl.load(index + batch * index_batch + at, mask=at < rows, other=0)",
            *read("x", "result"),
            *ending,
        ]

    def run(self, *given: Tensor, **more: Any) -> Tensor:
        """`out` [B, H, N, width], changed: x [B, H, T, width] is put at index [B, T]. What the epilogues read may be `out` itself."""
        from dyncc.kernels.generator.launch import blocks, broadcast, launch, side_by_side

        x, index = (side_by_side(t) for t in given)
        batch, heads, rows, width = x.shape
        out: Tensor = more.pop("out")
        grid = (blocks(rows, rows_at_once(width)), batch * heads)
        launch(self, grid, {"x": x, "index": index, "out": out}, {"rows": rows}, {"HEADS": heads}, broadcast(self, more, out.shape))
        return out

    def truth(self, *given: Tensor, **more: Any) -> Tensor:
        from dyncc.kernels.generator.launch import broadcast, ended

        x, index = given
        out: Tensor = more.pop("out")
        place = index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        wide = broadcast(self, more, out.shape)
        there = {name: value.gather(2, place) if isinstance(value, Tensor) else value for name, value in wide.items()}
        return out.scatter(2, place, ended(self, x.float(), there).to(out.dtype))
