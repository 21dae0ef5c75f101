"""Parts of a softmax put together: it does not depend on how its sum was cut (Milakov and Gimelshein 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dyncc.kernels.generator.frame import DIVIDED, OUT, Operand, ids, nothing_summed, tile
from dyncc.kernels.generator.launch import blocks, broadcast, launch, results, stored
from dyncc.kernels.generator.spec import KernelSpec, check_width, power


@dataclass(frozen=True)
class JoinParts(KernelSpec):
    """Results of `width` channels from what `attend_chosen` left of each part."""

    entry: ClassVar[str] = "join_parts"
    title: ClassVar[str] = "Parts of attention put together"

    width: int

    def __post_init__(self) -> None:
        check_width(self.width)
        super().__post_init__()

    def operands(self) -> tuple[Operand, ...]:
        return (*(Operand(name, (), "float") for name in ("most", "mass", "sums")), OUT)

    def sizes(self) -> tuple[str, ...]:
        return ("rows", "parts")

    def constants(self) -> dict[str, int]:
        return {"HEADS": 8}

    def sized(self) -> str:
        return f"w{self.width}"

    def work(self) -> tuple[int, int]:
        """32 heads of eight parts."""
        return 32 * 8 * (2 * self.width + 6), 32 * (8 * (self.width + 2) * 4 + (1 + len(self.epilogues)) * self.width * self.itemsize)

    def body(self, ending: list[str]) -> list[str]:
        inner = [
            'most_tile = tl.load(most + place, mask=at < rows, other=-float("inf"))',
            "higher = tl.maximum(top, most_tile)",
            'base = tl.where(higher == -float("inf"), 0.0, higher)',
            "shrink, share = tl.exp(top - base), tl.exp(most_tile - base)",
            "total = total * shrink + tl.load(mass + place, mask=at < rows, other=0.0) * share",
            "sums_tile = tl.load(sums + place[:, None] * WIDTH + lane[None, :], mask=kept, other=0.0)",
            "acc = acc * shrink[:, None] + sums_tile * share[:, None]",
            "top = higher",
            "place += rows",
        ]
        return [
            *ids(16, self.width),
            *tile(power(self.width)),
            "place = (batch * HEADS + head) * parts * rows + at",
            *nothing_summed(power(self.width)),
            "for part in range(0, parts):",
            *(f"    {line}" for line in inner),
            DIVIDED,
            *ending,
        ]

    def run(self, *given: Tensor, **more: Any) -> Tensor:
        """[B, S, R, width] of most and mass [B, S, parts, R] and sums [B, S, parts, R, width]; `out` may be given."""
        most, mass, sums = (x.contiguous() for x in given)
        batch, heads, parts, rows = most.shape
        shape = (batch, heads, rows, self.width)
        out = more.pop("out", None)
        out = results(self, sums, shape, out)
        tensors = {"most": most, "mass": mass, "sums": sums, "out": out}
        numbers = {"rows": rows, "parts": parts}
        launch(self, (blocks(rows, 16), batch * heads), tensors, numbers, {"HEADS": heads}, broadcast(self, more, shape))
        return out

    def truth(self, *given: Tensor, **more: Any) -> Tensor:
        most, mass, sums = given
        top = most.amax(2, keepdim=True)
        share = torch.exp(most - torch.where(top == float("-inf"), 0.0, top))
        total = (mass * share).sum(2)
        joined = (sums * share.unsqueeze(4)).sum(2) / torch.where(total == 0.0, 1.0, total).unsqueeze(3)
        return stored(self, joined, more, more.get("out"))
