"""Gated linear attention in chunks of tokens: products inside a chunk, one state from each chunk to the next (Yang et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dyncc.kernels.generator.epilogues import EPILOGUES
from dyncc.kernels.generator.frame import Operand, ending
from dyncc.kernels.generator.kinds.head_base import HeadKernel
from dyncc.kernels.generator.kinds.linear_chunk_lines import DECAYED
from dyncc.kernels.generator.kinds.linear_step import check_state, recurrent_operands, recurrent_truth, run_recurrent, state_lines
from dyncc.kernels.generator.spec import check, power

TOKENS = 4096
"""What figures are told for: one sequence of so many tokens and 32 heads."""


@dataclass(frozen=True)
class LinearChunk(HeadKernel):
    """`width` channels of keys, `wide` of values (0: as many); one decay a head, one a channel of the keys, or none.

    `started`: there is a state in front of the first token. `rows` are the tokens of a chunk, `columns` the channels of
    values of one program (0: chosen); an epilogue that reads whole rows needs them all.
    """

    entry: ClassVar[str] = "linear_chunk"
    title: ClassVar[str] = "Linear attention in chunks"
    tiles: ClassVar[tuple[str, ...]] = ("rows", "columns")

    decay: str = "channel"
    started: bool = False
    rows: int = 0
    columns: int = 0

    def __post_init__(self) -> None:
        check_state(self.width, self.wide, self.decay)
        super().__post_init__()
        apart = 0 < self.columns < power(self.value_width) and self._whole
        check(not apart, "columns", self.columns, f"{', '.join(self.epilogues)} read whole rows; give 0")

    @property
    def _whole(self) -> bool:
        return any(EPILOGUES[name].whole for name in self.epilogues)

    @property
    def lanes(self) -> tuple[int, int]:
        """Channels of the state as one program holds it: fewer values where keys are wide."""
        keys, values = power(self.width), power(self.value_width)
        return keys, self.columns or (values if self._whole else min(values, max(16, 8192 // keys)))

    @property
    def chunk(self) -> int:
        """Fewer tokens where each channel has sums of its own, or a state is large, so that registers suffice."""
        return self.rows or (32 if self.decay != "channel" and max(self.lanes) <= 64 and not self.exact else 16)

    @property
    def team(self) -> int:
        return self.warps or (4 if self.decay != "channel" and self.lanes[0] * self.lanes[1] <= 4096 else 8)

    @property
    def depth(self) -> int:
        return self.stages or 1

    def ending(self) -> list[str]:
        return ending(self.epilogues, "place")

    def operands(self) -> tuple[Operand, ...]:
        return recurrent_operands(self.decay, False, self.started)

    def told(self) -> list[str]:
        return [f"decay_{self.decay}", *(["started"] if self.started else [])]

    def work(self) -> tuple[int, int]:
        """Products of pairs inside chunks, and with the state."""
        pairs, state = self.chunk * (self.width + self.value_width), 2 * self.width * self.value_width
        decays = {"none": 0, "head": 1, "channel": self.width}[self.decay] * 4
        channels = 2 * self.width + self.value_width * (2 + len(self.epilogues))
        moved = TOKENS * (channels * self.itemsize + decays) + self.width * self.value_width * 4 * (1 + self.started)
        return 2 * 32 * TOKENS * (pairs + state), 32 * moved

    def body(self, ending: list[str]) -> list[str]:
        rows = [*"qkv", *(["decay"] if self.decay != "none" else [])]
        inner = [
            "at = start + step",
            "place = at.to(tl.int64)",
            "kept = (at < rows)[:, None] & (lane < WIDTH)[None, :]",
            "inside = (at < rows)[:, None] & filled[None, :]",
            "q_tile = tl.load(q_at + place[:, None] * q_row + channel[None, :], mask=inside, other=0.0)",
            "k_tile = tl.load(k_at + place[:, None] * k_row + channel[None, :], mask=inside, other=0.0)",
            "v_tile = tl.load(v_at + place[:, None] * v_row + lane[None, :], mask=kept, other=0.0)",
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
