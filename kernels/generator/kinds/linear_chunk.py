"""Gated linear attention in chunks of tokens: products inside a chunk, one state from each chunk to the next (Yang et al. 2023).

With the delta rule, what the tokens of a chunk write solves a triangular system first (Yang et al. 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dyncc.kernels.generator.epilogues import EPILOGUES
from dyncc.kernels.generator.frame import Operand, ending
from dyncc.kernels.generator.kinds.head_base import HeadKernel
from dyncc.kernels.generator.kinds.linear_chunk_lines import DECAYED, sums_of_heads, written
from dyncc.kernels.generator.kinds.linear_step import (
    check_state,
    recurrent_operands,
    recurrent_rows,
    recurrent_told,
    recurrent_truth,
    run_recurrent,
    state_lines,
)
from dyncc.kernels.generator.spec import check, power

TOKENS = 4096
"""What figures are told for: one sequence of so many tokens and 32 heads."""
OTHER = "give bfloat16 or float16, the rule add, or the kind linear_step"


@dataclass(frozen=True)
class LinearChunk(HeadKernel):
    """`width` channels of keys, `wide` of values (0: as many); one decay a head, one a channel of the keys, or none.

    `rule` is "add" or "delta", which has no decay a channel. `started`: there is a state in front of the first token. `rows` are the tokens
    of a chunk, `columns` the channels of values of one program (0: chosen); an epilogue that reads whole rows needs them all.
    """

    entry: ClassVar[str] = "linear_chunk"
    title: ClassVar[str] = "Linear attention in chunks"
    tiles: ClassVar[tuple[str, ...]] = ("rows", "columns")
    registers: ClassVar[int] = 255
    in_order: ClassVar[bool] = False

    decay: str = "channel"
    started: bool = False
    rows: int = 0
    columns: int = 0
    rule: str = "add"

    def __post_init__(self) -> None:
        check_state(self)
        mixed = self.rule == "delta" and self.decay == "channel"
        check(not mixed, "decay", self.decay, "in chunks the delta rule has one decay a head or none; give decay=head")
        super().__post_init__()
        self._check_registers()

    def _check_registers(self) -> None:
        """What would not fit the registers of some target: sizes as they were compiled for all, at their worst."""
        keys, values = power(self.width), power(self.value_width)
        told = f"{self.dtype} by the rule {self.rule}"
        check(keys <= self.room // 16, "width", self.width, f"in chunks of {told} keys have 1 to {self.room // 16} channels: {OTHER}")
        most = self.room // keys
        names = ", ".join(self.epilogues)
        held = f"beside {keys} channels of keys a program holds {most} of values"
        whole = f"{names} read whole rows, and {held}: end with the kind `rows` instead"
        check(values <= most or not self._whole, "epilogues", names, whole)
        check(self.columns <= most, "columns", self.columns, held)
        apart = 0 < self.columns < values and self._whole
        check(not apart, "columns", self.columns, f"{names} read whole rows; give 0")
        check(self.rows <= self.longest, "rows", self.rows, f"a chunk of these channels has at most {self.longest} tokens")
        check(self.stages < 2, "stages", self.stages, "a program of chunks loads none ahead; give 0")
        check(self.warps in (0, 8), "warps", self.warps, "a program of chunks has 8 warps, or 0")

    @property
    def room(self) -> int:
        """Of a state, as one program holds it at most."""
        return 1024 if self.exact else 2048 if self.rule == "delta" else 4096

    @property
    def _whole(self) -> bool:
        return any(EPILOGUES[name].whole for name in self.epilogues)

    @property
    def lanes(self) -> tuple[int, int]:
        """Channels of the state as one program holds it: fewer values where keys are wide."""
        keys, values = power(self.width), power(self.value_width)
        return keys, self.columns or min(values, self.room // keys)

    @property
    def longest(self) -> int:
        """Tokens of a chunk at most: fewer where each channel has sums of its own, a system is solved, or a state is large."""
        held = self.lanes[0] * self.lanes[1]
        most = 256 if self.exact else 4096 if self.decay != "channel" and self.rule == "add" else 1024
        return 32 if max(self.lanes) <= 64 and held <= most else 16

    @property
    def chunk(self) -> int:
        return self.rows or (self.longest if self.decay != "channel" and self.rule == "add" else 16)

    @property
    def team(self) -> int:
        return 8

    @property
    def depth(self) -> int:
        return self.stages or 1

    def ending(self) -> list[str]:
        return ending(self.epilogues, "place")

    def choices(self) -> Mapping[str, tuple[int, ...]]:
        return {"rows": (16, 32), "columns": (16, 32, 64)}

    def operands(self) -> tuple[Operand, ...]:
        return recurrent_operands(self)

    def told(self) -> list[str]:
        return recurrent_told(self)

    def work(self) -> tuple[int, int]:
        """Products of pairs inside chunks, and with the state."""
        times = 2 if self.rule == "delta" else 1  # pairs are solved first, and the state is read twice
        pairs, state = times * self.chunk * (self.width + self.value_width), (1 + times) * self.width * self.value_width
        decays = ({"none": 0, "head": 1, "channel": self.width}[self.decay] + times - 1) * 4
        channels = 2 * self.width + self.value_width * (2 + len(self.epilogues))
        moved = TOKENS * (channels * self.itemsize + decays) + self.width * self.value_width * 4 * (1 + self.started)
        return 2 * 32 * TOKENS * (pairs + state), 32 * moved

    def body(self, ending: list[str]) -> list[str]:
        rows = recurrent_rows(self)
        q, k = (f"{x}_tile = tl.load({x}_at + place[:, None] * {x}_row + channel[None, :], mask=inside, other=0.0)" for x in "qk")
        v = "v_tile = tl.load(v_at + place[:, None] * v_row + lane[None, :], mask=kept, other=0.0)"
        sums = sums_of_heads(self)
        inner = [
            "at = start + step",
            "place = at.to(tl.int64)",
            "kept = (at < rows)[:, None] & (lane < WIDTH)[None, :]",
            "inside = (at < rows)[:, None] & filled[None, :]",
            *([k, v, *sums, *written(self), q] if self.rule == "delta" else [q, k, v, *sums]),  # few tiles while a system is solved
            *DECAYED[self.decay](self),
            f"result = tl.dot(weights.to(v_tile.dtype), v_tile{self.precision})",
            f"result = tl.dot(q_tile, held.to(q_tile.dtype), result{self.precision}) * scale",
            f"held = tl.dot(tl.trans(k_tile), v_tile, held * across{self.precision})",
            *ending,
        ]
        return [
            f"ROWS: tl.constexpr = {self.chunk}",
            f"WIDTH: tl.constexpr = {self.value_width}",
            "which, column = tl.program_id(0), tl.program_id(1)",
            "batch, head = (which // HEADS).to(tl.int64), (which % HEADS).to(tl.int64)",
            f"step, channel = tl.arange(0, ROWS), tl.arange(0, {self.lanes[0]})",
            f"lane = column * {self.lanes[1]} + tl.arange(0, {self.lanes[1]})",
            f"filled = channel < {self.width}",
            "after, behind = step[:, None] > step[None, :], step[:, None] < step[None, :]",
            *(f"{name}_at = {name} + batch * {name}_batch + head * {name}_head" for name in rows),
            *state_lines(self.width, self.lanes, self.started),
            "for start in range(0, rows, ROWS):",
            *(f"    {line}" for line in inner),
            "tl.store(last + held_at, held, mask=held_in)",
        ]

    def run(self, *given: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        """Results [B, H, T, wide] and the state [B, H, width, wide] behind the last token, of what `linear_step` takes."""
        columns = -(-self.value_width // self.lanes[1])
        return run_recurrent(self, (given[0].shape[0] * given[0].shape[1], columns), given, more)

    def truth(self, *given: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        return recurrent_truth(self, given, more)
