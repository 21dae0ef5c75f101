"""Which rows stay at a cut, by their scores, and what is known of those rows: how many, which count, which must stay, where they were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dyncc.ir import emit, hoist
from dyncc.kernels.select_rows import alive_rows, rank_rows
from dyncc.passes.reads import Reads
from dyncc.restrict import Refusal


@dataclass(frozen=True)
class Kept:
    """The rows alive in front of a cut: `valid` and `force` [B, n] (nodes or None), `origin` [B, n] where they were (None: all rows)."""

    valid: fx.Node | None
    force: fx.Node | None
    origin: fx.Node | None

    @classmethod
    def start(cls, at: fx.Node, real: Callable[[fx.Node], fx.Node] | None, computed: tuple[fx.Node, ...]) -> Kept:
        """All rows: which are real, and which are read at computed positions (their nodes are moved in front of the cut)."""
        before = at.next
        force = None
        for positions in computed:
            hoist(positions, before, {n: i for i, n in enumerate(at.graph.nodes)})
            hit = emit(before, lambda x, p: torch.arange(x.shape[1]).unsqueeze(0) == (p % x.shape[1]).unsqueeze(1), at, positions)
            force = hit if force is None else emit(before, torch.logical_or, force, hit)
        return cls(real(before) if real else None, force, None)


def keep_rows(before: fx.Node, options: Any, score: fx.Node, reads: Reads, kept: Kept) -> tuple[fx.Node, Kept]:
    """The sorted positions [B, K] that stay, and what is known of those rows."""
    first = max(options.sinks, 1 if options.score == "cls-attention" else 0)
    pinned = (reads.first, reads.last)
    fixed = max(first, reads.first) + max(options.recents, reads.last)
    if options.fuse and (options.recents or reads.last):
        raise Refusal("fuse=true puts its row at the end, but the last rows must stay where they are")
    if isinstance(options.keep, int) and options.keep < fixed:
        raise Refusal(f"keep={options.keep} is fewer than the {fixed} rows that must stay")

    def rank(score: torch.Tensor, *extra: torch.Tensor) -> torch.Tensor:
        stream = iter(extra)
        valid = next(stream) if kept.valid is not None else None
        force = next(stream) if kept.force is not None else None
        return rank_rows(score, first, options.recents, valid, force, pinned)

    order = emit(before, rank, score, *(n for n in (kept.valid, kept.force) if n is not None))
    index = emit(before, lambda o: o[:, : row_count(options.keep, o.shape[1], fixed)].sort(dim=1).values, order)
    return index, _after(before, kept, order, index, options.keep, fixed)


def row_count(keep: Any, total: Any, fixed: int = 0) -> Any:
    """How many rows stay of `total`: min(keep, total), or the `fixed` ones plus a ratio of the others, rounded up.

    >>> row_count(0.7, 197, 1), row_count(50, 20)
    (139, 20)
    """
    if isinstance(keep, int):
        return torch.sym_min(keep, total) if isinstance(total, torch.SymInt) else min(keep, total)
    parts = round(keep * 10_000)
    count = fixed + ((total - fixed) * parts + 9_999) // 10_000
    if isinstance(total, torch.Tensor):
        return torch.minimum(count, total)
    return torch.sym_min(count, total) if isinstance(total, torch.SymInt) else min(count, total)


def _after(before: fx.Node, kept: Kept, order: fx.Node, index: fx.Node, keep: Any, fixed: int) -> Kept:
    origin = index if kept.origin is None else emit(before, lambda o, i: o.gather(1, i), kept.origin, index)
    force = None if kept.force is None else emit(before, lambda f, i: f.gather(1, i), kept.force, index)
    valid = None
    if kept.valid is not None:
        valid = emit(before, lambda v, o, i: _still_valid(v, o, i, keep, fixed), kept.valid, order, index)
    return Kept(valid, force, origin)


def _still_valid(valid: torch.Tensor, order: torch.Tensor, index: torch.Tensor, keep: Any, fixed: int) -> torch.Tensor:
    """Which of the kept rows count: real ones, as many as the ratio allows of the sequence's own length: padding changes nothing."""
    if isinstance(keep, int):
        return valid.gather(1, index)
    return (valid & alive_rows(order, row_count(keep, valid.sum(1), fixed))).gather(1, index)
