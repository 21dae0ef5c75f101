"""What kinds share whose programs take a few whole rows each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dyncc.kernels.generator.frame import OUT, TILE, Operand, ids, tile
from dyncc.kernels.generator.launch import blocks, broadcast, launch, results
from dyncc.kernels.generator.spec import KernelSpec, check, power

WIDEST_ROW = 16384
"""Channels above which one row no longer fits a program's registers."""


def check_row(width: int) -> None:
    check(0 < width <= WIDEST_ROW, "width", width, f"a row has 1 to {WIDEST_ROW:,} channels")


def rows_at_once(width: int) -> int:
    """Rows of a program: about 4096 numbers.

    >>> [rows_at_once(width) for width in (64, 1000, 8192)]
    [16, 4, 1]
    """
    return min(16, max(1, 4096 // power(width)))


@dataclass(frozen=True)
class RowKernel(KernelSpec):
    """A kernel whose results are rows of `width` channels."""

    large: ClassVar[Mapping[str, int]] = {"heads": 1, "keys": 8192}
    width: int

    def __post_init__(self) -> None:
        check_row(self.width)
        super().__post_init__()

    def choices(self) -> Mapping[str, tuple[int, ...]]:
        return {"warps": (2, 4, 8, 16)}

    @property
    def team(self) -> int:
        lanes = power(self.width)
        return self.warps or (4 if lanes <= 4096 else 8 if lanes <= 8192 else 16)

    def constants(self) -> dict[str, int]:
        return {"HEADS": 1}

    def sized(self) -> str:
        return f"w{self.width}"

    def read_and_written(self, rows: int, beside: int = 0) -> tuple[int, int]:
        """Operations, about four of each number and epilogue, and bytes of `rows` rows; `beside` are more bytes of each."""
        ends = len(self.epilogues)
        return rows * self.width * 4 * ends, rows * (self.width * (2 + ends) * self.itemsize + beside)

    def rows_of_a_program(self) -> list[str]:
        return [*ids(rows_at_once(self.width), self.width), *tile(power(self.width))]

    def over_rows(self, tensors: Mapping[str, Tensor], rows: int, out: Tensor | None = None, **extras: Any) -> Tensor:
        """`out`, or `rows` new rows, from operands by name, `x` [B, H, N, width] among them; extras: what the epilogues read."""
        x = tensors["x"]
        batch, heads, _, width = x.shape
        shape = (batch, heads, rows, width)
        out = results(self, x, shape, out)
        grid = (blocks(rows, rows_at_once(width)), batch * heads)
        told = broadcast(self, extras, shape if self.in_order else out.shape)
        launch(self, grid, {**tensors, "out": out}, {"rows": rows}, {"HEADS": heads}, told)
        return out


@dataclass(frozen=True)
class IndexedRows(RowKernel):
    """A kernel over the rows that an index [B, T] of int64 names."""

    def operands(self) -> tuple[Operand, ...]:
        return (Operand("x", TILE), Operand("index", ("batch",), "index"), OUT)

    def work(self) -> tuple[int, int]:
        """2048 rows."""
        return self.read_and_written(2048, 8)

    def places(self, into: str) -> str:
        """The line that reads the index of each row of a program."""
        return f"{into} = tl.load(index + batch * index_batch + at, mask=at < rows, other=0)"


def as_wide(places: Tensor, x: Tensor) -> Tensor:
    """Places [B, T] of rows as an index [B, H, T, D] of x [B, H, N, D]."""
    return places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
