"""How sure a head is of its next token, without its logits in memory: the online softmax (Milakov and Gimelshein 2018) over tiles of words
keeps the largest two logits, the sum of exponentials, and what the entropy needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from dyncc.kernels.generator.frame import TILE, Operand
from dyncc.kernels.generator.kinds.row_base import check_row
from dyncc.kernels.generator.launch import blocks, launch, side_by_side
from dyncc.kernels.generator.spec import KernelSpec, check, power

LOWEST = -3.0e38
"""Below every logit, and finite: a difference of it is a number."""
KEPT = {"best": "most", "second": "next", "mass": "total", "tilt": "slope", "word": "chosen.to(tl.int64)"}
"""What a program stores of its words, by operand."""


class Confidence(NamedTuple):
    """Of each row: the largest probability, its distance to the next, the entropy in nats, and the word, [R]."""

    probability: Tensor
    margin: Tensor
    entropy: Tensor
    word: Tensor


@dataclass(frozen=True)
class ExitConfidence(KernelSpec):
    """Rows of `width` channels against the words of a head; one program reads `split` words. `words` is the tile of them (0: chosen)."""

    entry: ClassVar[str] = "exit_confidence"
    title: ClassVar[str] = "Confidence of a head"
    tiles: ClassVar[tuple[str, ...]] = ("words",)
    large: ClassVar[Mapping[str, int]] = {"rows": 16, "keys": 131072}
    ends: ClassVar[bool] = False

    width: int
    split: int = 2048
    words: int = 0

    def __post_init__(self) -> None:
        check_row(self.width)
        check(self.split > 0, "split", self.split, "a program reads a word at least")
        super().__post_init__()

    @property
    def block(self) -> int:
        return self.words or 128

    @property
    def piece(self) -> int:
        """Channels that are multiplied at once."""
        return min(64, power(self.width))

    def choices(self) -> Mapping[str, tuple[int, ...]]:
        return {"words": (64, 128, 256), "warps": (4, 8), "stages": (2, 3, 4)}

    def operands(self) -> tuple[Operand, ...]:
        kept = (Operand(name, (), "index" if name == "word" else "float") for name in KEPT)
        return (Operand("x", TILE[2:]), Operand("head", TILE[2:]), *kept)

    def sizes(self) -> tuple[str, ...]:
        return ("rows", "words")

    def constants(self) -> dict[str, int]:
        return {}

    def sized(self) -> str:
        return f"w{self.width}"

    def least_shared(self) -> int:
        """The tiles of rows and words that are loaded ahead."""
        return (self.depth - 1) * (16 + self.block) * self.piece * self.itemsize

    def work(self) -> tuple[int, int]:
        """16 rows and 131,072 words."""
        return 2 * 16 * 131072 * self.width, (131072 + 16) * self.width * self.itemsize + 16 * (131072 // self.split) * 24

    def body(self, ending: list[str]) -> list[str]:
        lanes = [f"lane = channel + tl.arange(0, {self.piece})", "inside = lane < WIDTH"]
        inner = [
            "logits = tl.zeros([ROWS, WORDS], dtype=tl.float32)",
            f"for channel in range(0, WIDTH, {self.piece}):",
            *(f"    {line}" for line in lanes),
            "    x_tile = tl.load(x_at[:, None] + lane[None, :], mask=(at < rows)[:, None] & inside[None, :], other=0.0)",
            "    head_at = head + (start + hop).to(tl.int64)[None, :] * head_row + lane[:, None]",
            "    head_tile = tl.load(head_at, mask=(start + hop < last)[None, :] & inside[:, None], other=0.0)",
            f"    logits = tl.dot(x_tile, head_tile, logits{self.precision})",
            "real = (start + hop < last)[None, :]",
            f"logits = tl.where(real, logits, {LOWEST})",
            "top, place = tl.max(logits, axis=1), tl.argmax(logits, axis=1)",
            f"rest = tl.max(tl.where(hop[None, :] == place[:, None], {LOWEST}, logits), axis=1)",
            "chosen = tl.where(top > most, start + place, chosen)",
            "next = tl.maximum(tl.minimum(most, top), tl.maximum(next, rest))",
            "higher = tl.maximum(most, top)",
            "weights = tl.where(real, tl.exp(logits - higher[:, None]), 0.0)",
            "shrink, fell = tl.exp(most - higher), tl.where(total == 0.0, 0.0, most - higher)",
            "slope = (slope + fell * total) * shrink + tl.sum(weights * tl.where(real, logits - higher[:, None], 0.0), axis=1)",
            "total = total * shrink + tl.sum(weights, axis=1)",
            "most = higher",
        ]
        return [
            "ROWS: tl.constexpr = 16",
            f"WORDS: tl.constexpr = {self.block}",
            f"WIDTH: tl.constexpr = {self.width}",
            "block, part = tl.program_id(0), tl.program_id(1)",
            "at, hop = block * ROWS + tl.arange(0, ROWS), tl.arange(0, WORDS)",
            "x_at = x + at.to(tl.int64) * x_row",
            f"most, next = tl.full([ROWS], {LOWEST}, dtype=tl.float32), tl.full([ROWS], {LOWEST}, dtype=tl.float32)",
            "total, slope = tl.zeros([ROWS], dtype=tl.float32), tl.zeros([ROWS], dtype=tl.float32)",
            "chosen = tl.zeros([ROWS], dtype=tl.int32)",
            f"last = tl.minimum((part + 1) * {self.split}, words)",
            f"for start in range(part * {self.split}, last, WORDS):",
            *(f"    {line}" for line in inner),
            "spot = part * rows + at",
            *(f"tl.store({name} + spot, {value}, mask=at < rows)" for name, value in KEPT.items()),
        ]

    def run(self, *given: Tensor, **more: Any) -> Confidence:
        """Of x [R, width] and a head [words, width], without its bias."""
        x, head = (side_by_side(t) for t in given)
        parts = blocks(head.shape[0], self.split)
        types = {name: torch.int64 if name == "word" else torch.float32 for name in KEPT}
        kept = {name: x.new_empty((parts, x.shape[0]), dtype=dtype) for name, dtype in types.items()}
        launch(self, (blocks(x.shape[0], 16), parts), {"x": x, "head": head, **kept}, {"rows": x.shape[0], "words": head.shape[0]}, {}, {})
        return joined(**kept)

    def truth(self, *given: Tensor, **more: Any) -> Confidence:
        x, head = given
        logits = x.float() @ head.float().T
        chances, words = torch.softmax(logits, 1), torch.log_softmax(logits, 1)
        best = torch.nn.functional.pad(chances, (0, 1)).topk(2).values
        return Confidence(best[:, 0], best[:, 0] - best[:, 1], -(chances * words).sum(1), logits.argmax(1))


def joined(best: Tensor, second: Tensor, mass: Tensor, tilt: Tensor, word: Tensor) -> Confidence:
    """The parts' numbers [parts, R] together: entropy is log(sum e^x) - sum(x e^x) / sum e^x."""
    top, part = best.max(0)
    fell = best - top
    share = fell.exp()
    total = (mass * share).sum(0)
    slope = ((tilt + fell * mass) * share).sum(0)
    others = torch.where(torch.arange(best.shape[0], device=best.device).unsqueeze(1) == part, second, best).amax(0)
    word = word.gather(0, part.unsqueeze(0)).squeeze(0)
    return Confidence(1 / total, (1 - (others - top).exp()) / total, total.log() - slope / total, word)
