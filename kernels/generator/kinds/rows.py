"""Rows through their epilogues alone: a norm and a gate, a residual, in one pass over memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dyncc.kernels.generator.frame import OUT, TILE, Operand, ids, read, tile
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


def row_team(width: int) -> int:
    return 4 if power(width) <= 4096 else 8 if power(width) <= 8192 else 16


@dataclass(frozen=True)
class Rows(KernelSpec):
    """Each row of `width` channels, changed by its epilogues, at least one."""

    entry: ClassVar[str] = "rows"
    title: ClassVar[str] = "Rows through epilogues"

    width: int

    def __post_init__(self) -> None:
        check_row(self.width)
        check(bool(self.epilogues), "epilogues", "()", "rows that nothing changes are a copy; name an epilogue")
        super().__post_init__()

    @property
    def team(self) -> int:
        return self.warps or row_team(self.width)

    def operands(self) -> tuple[Operand, ...]:
        return (Operand("x", TILE), OUT)

    def constants(self) -> dict[str, int]:
        return {"HEADS": 1}

    def sized(self) -> str:
        return f"w{self.width}"

    def work(self) -> tuple[int, int]:
        """4096 rows; about four operations of each number and epilogue."""
        return 4096 * self.width * 4 * len(self.epilogues), 4096 * self.width * (2 + len(self.epilogues)) * self.itemsize

    def body(self, ending: list[str]) -> list[str]:
        return [*ids(rows_at_once(self.width), self.width), *tile(power(self.width)), *read("x", "result"), *ending]

    def run(self, *given: Tensor, **more: Any) -> Tensor:
        """[B, H, T, width] of x [B, H, T, width]; `out` may be x itself."""
        from dyncc.kernels.generator.launch import blocks, broadcast, launch, side_by_side

        x = side_by_side(given[0])
        batch, heads, rows, width = x.shape
        out = more.pop("out", None)
        out = x.new_empty(x.shape) if out is None else out
        grid = (blocks(rows, rows_at_once(width)), batch * heads)
        launch(self, grid, {"x": x, "out": out}, {"rows": rows}, {"HEADS": heads}, broadcast(self, more, x.shape))
        return out

    def truth(self, *given: Tensor, **more: Any) -> Tensor:
        from dyncc.kernels.generator.launch import ended

        return ended(self, given[0].float(), more).to(given[0].dtype)
