"""Bounds of pages: an upper bound of the product of a query with any key of a page (Quest, Tang et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dyncc.kernels.generator.frame import TILE, Operand, ids, read, tile
from dyncc.kernels.generator.launch import blocks, launch, side_by_side
from dyncc.kernels.generator.spec import KernelSpec, check_width, power


@dataclass(frozen=True)
class ScorePages(KernelSpec):
    """score[b, h, p] = sum over `width` channels of max(q low, q high), of the smallest and largest values of each page's keys."""

    entry: ClassVar[str] = "score_pages"
    title: ClassVar[str] = "Bounds of pages"
    ends: ClassVar[bool] = False

    width: int

    def __post_init__(self) -> None:
        check_width(self.width)
        super().__post_init__()

    def operands(self) -> tuple[Operand, ...]:
        return (Operand("q", ("batch", "head")), Operand("low", TILE), Operand("high", TILE), Operand("score", (), "float"))

    def constants(self) -> dict[str, int]:
        return {"HEADS": 32, "GROUPS": 8}

    def sized(self) -> str:
        return f"w{self.width}"

    def work(self) -> tuple[int, int]:
        """One step of 32 query heads and 8 key heads over 2048 pages."""
        return 4 * 32 * 2048 * self.width, (2 * 8 * 2048 + 32) * self.width * self.itemsize + 32 * 2048 * 4

    @property
    def block(self) -> int:
        """Pages that a program scores."""
        return max(4, 4096 // power(self.width))

    def body(self, ending: list[str]) -> list[str]:
        return [
            *ids(self.block, self.width),
            "group = head // (HEADS // GROUPS)",
            *tile(power(self.width)),
            "query = tl.load(q + batch * q_batch + head * q_head + lane, mask=lane < WIDTH, other=0.0).to(tl.float32)[None, :]",
            *read("low", head="group"),
            *read("high", head="group"),
            '# a page of hidden keys has the bounds inf and -inf',
            'low_tile = tl.where(low_tile == float("inf"), 0.0, low_tile)',
            'high_tile = tl.where(high_tile == -float("inf"), 0.0, high_tile)',
            "bound = tl.sum(tl.maximum(query, 0.0) * high_tile + tl.minimum(query, 0.0) * low_tile, axis=1)",
            "tl.store(score + (batch * HEADS + head) * rows + at, bound, mask=at < rows)",
        ]

    def run(self, *given: Tensor, **more: Any) -> Tensor:
        """Bounds [B, H, pages] of q [B, H, 1, D] with low and high [B, G, pages, D], in float32."""
        q, low, high = (side_by_side(x) for x in given)
        batch, heads, groups, pages = q.shape[0], q.shape[1], low.shape[1], low.shape[2]
        out = q.new_empty((batch, heads, pages), dtype=torch.float32)
        grid = (blocks(pages, self.block), batch * heads)
        tensors = {"q": q, "low": low, "high": high, "score": out}
        launch(self, grid, tensors, {"rows": pages}, {"HEADS": heads, "GROUPS": groups}, {})
        return out

    def truth(self, *given: Tensor, **more: Any) -> Tensor:
        from dyncc.kernels.select_keys.pages import page_scores

        q, low, high = (x.float() for x in given)
        return page_scores(q, low, high, "head")
