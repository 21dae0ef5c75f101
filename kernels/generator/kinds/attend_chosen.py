"""Attention of one query row over chosen pages of keys, split among programs (flash decoding, Dao et al. 2023; pages as in Quest, Tang et
al. 2024). Query heads that chose the same pages of the same key head are the rows of one tile, so that each key is read once for them all.

A program leaves the largest logit, the sum of exponentials and the weighted sum of values of its part; `join_parts` puts parts together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dyncc.kernels.generator.frame import TILE, Operand, ids, nothing_summed, softmax_step, tile
from dyncc.kernels.generator.kinds.head_base import HeadKernel, check_widths, query_tile
from dyncc.kernels.generator.launch import blocks, launch, side_by_side
from dyncc.kernels.generator.spec import check

KEYS, CHOSEN = 32768, 128
"""What figures are told for: keys of a cache, and pages chosen of them."""


@dataclass(frozen=True)
class AttendChosen(HeadKernel):
    """`width` channels of keys, `wide` of values (0: as many); pages of `page` keys, of which one program reads `split`; 1 a page: keys.

    With `masked`, keys that a mask hides count for nothing.
    """

    entry: ClassVar[str] = "attend_chosen"
    title: ClassVar[str] = "Attention over chosen pages"
    tiles: ClassVar[tuple[str, ...]] = ("keys",)
    large: ClassVar[Mapping[str, int]] = {"keys": 32768}
    ends: ClassVar[bool] = False

    page: int = 16
    split: int = 16
    masked: bool = False
    keys: int = 0

    def __post_init__(self) -> None:
        check_widths(self.width, self.wide)
        check(self.page > 0, "page", self.page, "a page has a key at least")
        check(self.split > 0, "split", self.split, "a program reads a page at least")
        super().__post_init__()

    @property
    def block(self) -> int:
        """Keys that a program works on at once."""
        return self.keys or (64 if max(self.lanes) * self.itemsize <= 256 else 32)

    def choices(self) -> Mapping[str, tuple[int, ...]]:
        return {"keys": (32, 64, 128), "warps": (2, 4, 8), "stages": (2, 3)}

    def operands(self) -> tuple[Operand, ...]:
        mask = (Operand("visible", ("batch",), "mask"),) if self.masked else ()
        index = Operand("index", ("batch", "choice"), "index")
        return (*(Operand(name, TILE) for name in "qkv"), index, *mask, *(Operand(name, (), "float") for name in ("most", "mass", "sums")))

    def sizes(self) -> tuple[str, ...]:
        return ("rows", "keys", "chosen")

    def constants(self) -> dict[str, int]:
        return {"HEADS": 8, "GROUPS": 8, "CHOICES": 8}

    def told(self) -> list[str]:
        return [f"page{self.page}", *(["masked"] if self.masked else [])]

    def least_shared(self) -> int:
        """The key and value tiles that are loaded ahead."""
        return (self.depth - 1) * self.block * sum(self.lanes) * self.itemsize

    def work(self) -> tuple[int, int]:
        """One step of 32 query heads and 8 key heads over CHOSEN pages."""
        seen, channels = CHOSEN * self.page, self.width + self.value_width
        parts = -(-CHOSEN // self.split)
        moved = 8 * seen * channels * self.itemsize + 8 * CHOSEN * 8 + (8 * seen if self.masked else 0)
        return 2 * 32 * seen * channels, moved + 32 * self.width * self.itemsize + 32 * parts * (self.value_width + 2) * 4

    def body(self, ending: list[str]) -> list[str]:
        hidden = " & (tl.load(visible + batch * visible_batch + key, mask=inside, other=0) != 0)" if self.masked else ""
        inner = [
            "slot = start + hop",
            "page = tl.load(index_at + slot // PAGE, mask=slot < last, other=0)",
            "key = page * PAGE + slot % PAGE",
            "inside = (slot < last) & (key < keys)",
            f"seen = inside{hidden}",
            "k_tile = tl.load(k_at + key[None, :] * k_row + channel[:, None], mask=inside[None, :] & filled[:, None], other=0.0)",
            f"logits = tl.dot(q_tile, k_tile{self.precision}) * scale",
            'logits = tl.where(seen[None, :], logits, -float("inf"))',
            "v_tile = tl.load(v_at + key[:, None] * v_row + lane[None, :], mask=inside[:, None] & (lane < WIDTH)[None, :], other=0.0)",
            *softmax_step(self.precision),
        ]
        return [
            f"KEYS: tl.constexpr = {self.block}",
            f"PAGE: tl.constexpr = {self.page}",
            f"SPAN: tl.constexpr = {self.page * self.split}",
            *ids(16, self.value_width),
            "part, parts = tl.program_id(2), tl.num_programs(2)",
            *tile(self.lanes[1]),
            *query_tile(self.width, self.lanes[0]),
            *(f"{x}_at = {x} + batch * {x}_batch + head // (HEADS // GROUPS) * {x}_head" for x in ("k", "v")),
            "index_at = index + batch * index_batch + head // (HEADS // CHOICES) * index_choice",
            *nothing_summed(self.lanes[1]),
            "last = tl.minimum((part + 1) * SPAN, chosen * PAGE)",
            "for start in range(part * SPAN, last, KEYS):",
            *(f"    {line}" for line in inner),
            "place = ((batch * HEADS + head) * parts + part) * rows + at",
            "tl.store(most + place, top, mask=at < rows)",
            "tl.store(mass + place, total, mask=at < rows)",
            "tl.store(sums + place[:, None] * WIDTH + lane[None, :], acc, mask=kept)",
        ]

    def run(self, *given: Tensor, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The largest logit and the sum of exponentials [B, S, parts, R] and weighted values [B, S, parts, R, wide] of each part.

        S = max(G, C) heads chose apart, and R = H / S query heads chose together.

        Args:
            given: q [B, H, 1, width], k [B, G, N, width], v [B, G, N, wide], index [B, C, pages] with C of 1, G or H.
            more: `visible` [B, N] bool where the spec is masked; `scale`.
        """
        q, k, v, index = given
        batch, heads = q.shape[:2]
        apart, chosen = max(k.shape[1], index.shape[1]), index.shape[2]
        rows, parts = heads // apart, blocks(chosen, self.split)
        folded = side_by_side(q.reshape(batch, apart, rows, q.shape[3]))
        most, mass = (q.new_empty((batch, apart, parts, rows), dtype=torch.float32) for _ in range(2))
        sums = q.new_empty((batch, apart, parts, rows, self.value_width), dtype=torch.float32)
        visible = more.get("visible")
        tensors = {"q": folded, "k": side_by_side(k), "v": side_by_side(v), "index": side_by_side(index), "most": most, "mass": mass}
        tensors |= {"sums": sums, "visible": None if visible is None else side_by_side(visible)}
        scale = more.get("scale")
        numbers = {"rows": rows, "keys": k.shape[2], "chosen": chosen, "scale": q.shape[3] ** -0.5 if scale is None else scale}
        constants = {"HEADS": apart, "GROUPS": k.shape[1], "CHOICES": index.shape[1]}
        launch(self, (blocks(rows, 16), batch * apart, parts), tensors, numbers, constants, {})
        return most, mass, sums

    def truth(self, *given: Tensor, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
        from dyncc.kernels.select_keys.pages import page_keys

        q, k, v, index = given
        apart, span = max(k.shape[1], index.shape[1]), self.page * self.split
        slots = page_keys(index, self.page)
        slots = torch.nn.functional.pad(slots, (0, -slots.shape[2] % span), value=k.shape[2])
        slots = slots.repeat_interleave(apart // index.shape[1], 1)
        seen, at = slots < k.shape[2], slots.clamp(max=k.shape[2] - 1)
        if more.get("visible") is not None:
            seen = seen & more["visible"].unsqueeze(1).expand(-1, apart, -1).gather(2, at)
        keys, values = (x.float().repeat_interleave(apart // x.shape[1], 1) for x in (k, v))
        keys, values = (x.gather(2, at.unsqueeze(3).expand(-1, -1, -1, x.shape[3])) for x in (keys, values))
        scale = q.shape[3] ** -0.5 if more.get("scale") is None else more["scale"]
        logits = q.float().reshape(q.shape[0], apart, -1, q.shape[3]) @ keys.transpose(2, 3) * scale
        logits = logits.masked_fill(~seen.unsqueeze(2), float("-inf")).unflatten(3, (-1, span)).transpose(2, 3)
        most = logits.amax(4)
        weights = torch.exp(logits - torch.where(most == float("-inf"), 0.0, most).unsqueeze(4))
        return most, weights.sum(4), weights @ values.unflatten(2, (-1, span))
