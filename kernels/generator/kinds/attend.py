"""Attention of many query rows, with what models say about it: causal edge, window, soft cap, mask, sinks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from dyncc.kernels.generator.frame import OUT, TILE, Operand
from dyncc.kernels.generator.kinds.attend_blocks import listed_mask
from dyncc.kernels.generator.kinds.attend_lines import lines
from dyncc.kernels.generator.kinds.head_base import HeadKernel, check_widths
from dyncc.kernels.generator.launch import blocks, broadcast, launch, results, side_by_side, stored
from dyncc.kernels.generator.spec import check

MASKS = ("none", "bool", "added", "blocks")
HEADS, GROUPS, TOKENS, LISTED = 32, 8, 4096, 16
"""What figures are told for: one sequence of so many tokens and heads, and blocks that a tile of rows reads where they are listed."""


@dataclass(frozen=True)
class Attend(HeadKernel):
    """Attention of [B, H, Tq, width] queries over [B, G, Tk, width] keys, as `dyncc::attend` means it.

    `wide` is the width of values (0: that of keys). `rows` and `keys` are the tile sizes of one program (0: chosen). With the mask "blocks"
    each tile of rows reads the blocks of `keys` keys that a list names. `packed`: sequences of different lengths lie behind each other in
    one, each attends to itself.
    """

    entry: ClassVar[str] = "attend"
    title: ClassVar[str] = "Attention"
    tiles: ClassVar[tuple[str, ...]] = ("rows", "keys")

    causal: bool = False
    window: int = 0
    cap: float = 0.0
    mask: str = "none"
    sinks: bool = False
    rows: int = 0
    keys: int = 0
    packed: bool = False

    def __post_init__(self) -> None:
        check_widths(self.width, self.wide)
        check(self.mask in MASKS, "mask", self.mask, f"choose one of {', '.join(MASKS)}")
        check(self.window >= 0 and (self.causal or not self.window), "window", self.window, "a window needs causal=True and counts keys")
        check(not self.packed or self.mask == "none", "packed", self.packed, "packed sequences have no mask; give mask=none")
        check(0 <= self.cap < float("inf"), "cap", self.cap, "a soft cap is a positive number, or 0 for none")
        super().__post_init__()
        check(not (self.packed and self.moves), "packed", self.packed, "packed sequences go to no pages; give packed=False")

    @property
    def tile(self) -> tuple[int, int]:
        """Query rows and keys that a program works on at once: fewer where heads are wide, so that registers suffice."""
        heavy = max(self.lanes) * (4 if self.exact else 1)
        rows, keys = (64, 64) if heavy <= 64 else (64, 32) if heavy <= 128 else (32, 32) if heavy <= 256 else (16, 16)
        keys = min(keys, 32) if self._loads and self.epilogues else keys  # what both load lies beside the logits
        return self.rows or rows, self.keys or keys

    @property
    def team(self) -> int:
        """More warps where a tile of results, or of a mask beside it, is large."""
        return self.warps or (8 if max(self.lanes) >= 128 or self._loads else 4)

    @property
    def _loads(self) -> bool:
        """Whether there is a mask of every row and key."""
        return self.mask in ("bool", "added")

    def choices(self) -> Mapping[str, tuple[int, ...]]:
        """Where blocks are listed, tiles are what the list means."""
        if self.mask == "blocks":
            return super().choices()
        return {"rows": (64, 128), "keys": (32, 64, 128), "warps": (4, 8), "stages": (2, 3)}

    def alike(self) -> Self:
        """How wide a window is and where a cap lies change no form."""
        return replace(self.formless(), window=min(self.window, 1), cap=min(self.cap, 1.0))

    def operands(self) -> tuple[Operand, ...]:
        found = [*(Operand(name, TILE) for name in "qkv"), OUT]
        found += [Operand("mask", (*TILE, "key"), "mask" if self.mask == "bool" else "given")] if self._loads else []
        listed = (Operand("listed", ("batch", "head", "tile"), "index"), Operand("counts", ("batch", "head"), "index"))
        found += listed if self.mask == "blocks" else ()
        found += [Operand("sinks")] if self.sinks else []
        return (*found, *([Operand("starts", (), "index")] if self.packed else []))

    def sizes(self) -> tuple[str, ...]:
        return ("rows", "keys")

    def constants(self) -> dict[str, int]:
        return {"HEADS": HEADS, "GROUPS": GROUPS}

    def told(self) -> list[str]:
        told = [*(["causal"] if self.causal else []), *([f"window{self.window}"] if self.window else [])]
        told += [f"cap{self.cap:g}".replace(".", "p")] if self.cap else []
        told += [f"mask_{self.mask}"] if self.mask != "none" else []
        return [*told, *(name for name in ("sinks", "packed") if getattr(self, name))]

    def least_shared(self) -> int:
        """The key and value tiles that are loaded ahead."""
        return (self.depth - 1) * self.tile[1] * sum(self.lanes) * self.itemsize

    def work(self) -> tuple[int, int]:
        """One sequence of TOKENS tokens."""
        seen = TOKENS * TOKENS
        if self.causal:
            span = min(self.window or TOKENS, TOKENS)
            seen = span * (span + 1) // 2 + (TOKENS - span) * span
        seen = min(seen, TOKENS * LISTED * self.tile[1]) if self.mask == "blocks" else seen
        channels = (HEADS + GROUPS) * (self.width + self.value_width) + HEADS * self.value_width * len(self.epilogues)
        listed = HEADS * TOKENS // self.tile[0] * (LISTED + 1) * 8
        mask = {"none": 0, "bool": TOKENS * TOKENS, "added": TOKENS * TOKENS * self.itemsize, "blocks": listed}[self.mask]
        return 2 * HEADS * seen * (self.width + self.value_width), TOKENS * channels * self.itemsize + mask

    def body(self, ending: list[str]) -> list[str]:
        return [*lines(self), *ending]

    def run(self, *given: Tensor, **more: Any) -> Tensor:
        """Attention [B, H, Tq, wide] of q, k, v.

        Args:
            given: q [B, H, Tq, width], k [B, G, Tk, width], v [B, G, Tk, wide].
            more: `mask` broadcastable to [B, H, Tq, Tk], of the spec's kind; `sinks` [H]; `scale`; `out`; what the epilogues read.
                Blocks: `listed` [B or 1, H or 1, tiles, slots] and `counts` [B or 1, H or 1, tiles], as `listed_mask` takes them.
                Packed sequences: all with B = 1, `starts` [S + 1] of int64, where each begins and the last ends; `longest`, at least
                the tokens of the longest.
        """
        return _run(self, *given, **more)

    def truth(self, *given: Tensor, **more: Any) -> Tensor:
        return _truth(self, *given, **more)


def _run(
    spec: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None, scale: float | None = None,
    out: Tensor | None = None, starts: Tensor | None = None, longest: int = 0, listed: Tensor | None = None, counts: Tensor | None = None,
    **extras: Any,
) -> Tensor:  # fmt: skip
    batch, heads, rows, width = q.shape
    shape = (batch, heads, rows, spec.value_width)
    out = results(spec, q, shape, out)
    given = {"q": side_by_side(q), "k": side_by_side(k), "v": side_by_side(v), "out": out, "sinks": sinks, "starts": starts}
    given["mask"] = None if mask is None else mask.expand(batch, heads, rows, k.shape[2])
    given |= {"listed": None if listed is None else side_by_side(listed).expand(batch, heads, -1, -1)}
    given |= {"counts": None if counts is None else side_by_side(counts).expand(batch, heads, -1)}
    numbers = {"rows": rows, "keys": k.shape[2], "scale": width**-0.5 if scale is None else scale}
    sequences, rows = (batch, rows) if starts is None else (starts.shape[0] - 1, longest)
    grid = (blocks(rows, spec.tile[0]), sequences * heads)
    launch(spec, grid, given, numbers, {"HEADS": heads, "GROUPS": k.shape[1]}, broadcast(spec, extras, shape))
    return out


def _truth(
    spec: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None, scale: float | None = None,
    out: Tensor | None = None, starts: Tensor | None = None, longest: int = 0, listed: Tensor | None = None, counts: Tensor | None = None,
    **extras: Any,
) -> Tensor:  # fmt: skip
    from dyncc.kernels.fused_attention.truth import attend

    more: dict[str, Any] = {"scale": scale, "cap": spec.cap, "window": spec.window}
    more["sinks"] = None if sinks is None else sinks.view(1, -1, 1, 1).float()
    if listed is not None and counts is not None:
        mask = listed_mask(listed, counts, spec.tile, q.shape[2], k.shape[2])
    mask = mask if mask is None or mask.dtype == torch.bool else mask.float()
    edges = [0, q.shape[2]] if starts is None else starts.tolist()
    parts = [slice(*edge) for edge in itertools.pairwise(edges)] if spec.packed else [slice(None)]
    whole = [attend(q[:, :, x].float(), k[:, :, x].float(), v[:, :, x].float(), mask, 0.0, spec.causal, **more) for x in parts]
    return stored(spec, torch.cat(whole, 2), extras, out)
