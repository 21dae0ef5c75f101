"""The best-scored places without a sort: a threshold is found by bisection, counting what lies above, and the places are put together.

Floats are compared as integers of the same order: 32 halvings find the score of the last place that is taken, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dyncc.kernels.generator.frame import Operand
from dyncc.kernels.generator.launch import launch, side_by_side
from dyncc.kernels.generator.spec import KernelSpec


@dataclass(frozen=True)
class SelectBest(KernelSpec):
    """Of scores [B, C, N] the indices of the best, in order; ties to the lower index. `keys` is the tile that one program looks at.

    With `masked`, hidden places are taken only when no other is left. NaN counts as 0, an infinite score as 1e30 of its sign.
    """

    entry: ClassVar[str] = "select_best"
    title: ClassVar[str] = "The best-scored places"
    tiles: ClassVar[tuple[str, ...]] = ("keys",)
    ends: ClassVar[bool] = False

    masked: bool = False
    keys: int = 0

    @property
    def block(self) -> int:
        return self.keys or 1024

    @property
    def team(self) -> int:
        return self.warps or (8 if self.block >= 1024 else 4)

    def operands(self) -> tuple[Operand, ...]:
        mask = (Operand("visible", ("batch",), "mask"),) if self.masked else ()
        return (Operand("score", ("batch", "head")), *mask, Operand("index", (), "index"))

    def sizes(self) -> tuple[str, ...]:
        return ("keys", "budget")

    def constants(self) -> dict[str, int]:
        return {"HEADS": 8}

    def sized(self) -> str:
        return f"of{self.block}"

    def told(self) -> list[str]:
        return ["masked"] if self.masked else []

    def work(self) -> tuple[int, int]:
        """128 of 2048 places for each of eight heads."""
        return 8 * 2048 * 34, 8 * (2048 * self.itemsize + 128 * 8) + (2048 if self.masked else 0)

    def body(self, ending: list[str]) -> list[str]:
        count = [
            "trial = edge + half",
            "total = tl.zeros([KEYS], dtype=tl.int32)",
            "for start in range(0, keys, KEYS):",
            *(f"    {line}" for line in self._ordered()),
            "    total += (rank >= trial).to(tl.int32)",
            "found = tl.sum(total, axis=0)",
            "above = tl.where(found >= budget, above, found)",
            "edge = tl.where(found >= budget, trial, edge)",
            "half = half >> 1",
        ]
        compact = [
            *self._ordered(),
            "tie = rank == edge",
            "take = (rank > edge) | (tie & (tied + tl.cumsum(tie.to(tl.int32), axis=0) <= budget - above))",
            "spot = taken + tl.cumsum(take.to(tl.int32), axis=0) - 1",
            "tl.store(index_at + spot, at.to(tl.int64), mask=take)",
            "tied += tl.sum(tie.to(tl.int32), axis=0)",
            "taken += tl.sum(take.to(tl.int32), axis=0)",
        ]
        return [
            f"KEYS: tl.constexpr = {self.block}",
            "which = tl.program_id(0)",
            "batch, head = (which // HEADS).to(tl.int64), (which % HEADS).to(tl.int64)",
            "hop = tl.arange(0, KEYS)",
            "score_at = score + batch * score_batch + head * score_head",
            "index_at = index + which.to(tl.int64) * budget",
            "edge, half = tl.full([], -(2**31), dtype=tl.int64), tl.full([], 2**31, dtype=tl.int64)",
            "above = tl.full([], 0, dtype=tl.int32)",
            "for _ in range(0, 32):",
            *(f"    {line}" for line in count),
            "tied, taken = tl.full([], 0, dtype=tl.int32), tl.full([], 0, dtype=tl.int32)",
            "for start in range(0, keys, KEYS):",
            *(f"    {line}" for line in compact),
        ]

    def _ordered(self) -> list[str]:
        """`rank` [KEYS] of int64: scores as integers of the same order, and less than any behind the end."""
        lines = [
            "at = start + hop",
            "value = tl.load(score_at + at, mask=at < keys, other=0.0).to(tl.float32)",
            "value = tl.where((value != value) | (value == 0.0), 0.0, value)",
            'value = tl.where(tl.abs(value) == float("inf"), tl.where(value > 0.0, 1e30, -1e30), value)',
        ]
        if self.masked:
            shown = "tl.load(visible + batch * visible_batch + at, mask=at < keys, other=0) != 0"
            lines.append(f'value = tl.where({shown}, value, -float("inf"))')
        lines += ["bits = value.to(tl.int32, bitcast=True)", "bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)"]
        return [*lines, "rank = tl.where(at < keys, bits.to(tl.int64), -(2**31) - 1)"]

    def run(self, *given: Tensor, **more: Any) -> Tensor:
        """Indices [B, C, min(budget, N)] of score [B, C, N]; `budget` places; `visible` [B, N] bool where the spec is masked."""
        score = side_by_side(given[0])
        batch, choices, keys = score.shape
        budget = min(more["budget"], keys)
        out = score.new_empty((batch, choices, budget), dtype=torch.int64)
        visible = more.get("visible")
        tensors = {"score": score, "index": out, "visible": None if visible is None else side_by_side(visible)}
        launch(self, (batch * choices,), tensors, {"keys": keys, "budget": budget}, {"HEADS": choices}, {})
        return out

    def truth(self, *given: Tensor, **more: Any) -> Tensor:
        from dyncc.kernels.select_keys.truth import select_keys

        visible = more.get("visible")
        return select_keys(given[0], more["budget"], None if visible is None else visible.unsqueeze(1))
