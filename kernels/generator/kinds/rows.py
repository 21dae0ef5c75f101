"""Rows through their epilogues alone: a norm and a gate, a residual, in one pass over memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dyncc.kernels.generator.frame import OUT, TILE, Operand, read
from dyncc.kernels.generator.kinds.row_base import RowKernel
from dyncc.kernels.generator.launch import side_by_side, stored
from dyncc.kernels.generator.spec import check


@dataclass(frozen=True)
class Rows(RowKernel):
    """Each row of `width` channels, changed by its epilogues, at least one."""

    entry: ClassVar[str] = "rows"
    title: ClassVar[str] = "Rows through epilogues"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.epilogues), "epilogues", "()", "rows that nothing changes are a copy; name an epilogue")

    def operands(self) -> tuple[Operand, ...]:
        return (Operand("x", TILE), OUT)

    def work(self) -> tuple[int, int]:
        """4096 rows."""
        return self.read_and_written(4096)

    def body(self, ending: list[str]) -> list[str]:
        return [*self.rows_of_a_program(), *read("x", "result"), *ending]

    def run(self, *given: Tensor, **more: Any) -> Tensor:
        """[B, H, T, width] of x [B, H, T, width]; `out` may be x itself."""
        x = side_by_side(given[0])
        return self.over_rows({"x": x}, x.shape[2], **more)

    def truth(self, *given: Tensor, **more: Any) -> Tensor:
        return stored(self, given[0].float(), more, more.get("out"))
