"""One cut of a stack: score, select, restrict, and put the rows back at the exit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from dyncc.analysis.axes import Axes
from dyncc.analysis.layers import Layer, Stack
from dyncc.ir import Program, aten, emit, hoist, is_symbolic, operands, refresh, replace_operands, shape
from dyncc.kernels.select_rows import alive_rows, rank_rows
from dyncc.passes.reads import Reads
from dyncc.passes.scores import SCORES, Tap
from dyncc.restrict import Plan, Refusal, TakeRows, gather_rows, scatter_rows, shorten


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


@dataclass(frozen=True)
class Cut:
    """A finished cut; `plain()` is what the masked form needs of it, by names that the captured graph shares."""

    layer: int
    at: str
    stop: str | None
    fill: str
    hidden_from: tuple[str, ...]
    fused: bool
    keep: Any
    after: Kept

    def plain(self) -> Cut:
        return replace(self, after=Kept(self.after.valid and True, None, None))  # type: ignore[arg-type]


def make_cut(
    options: Any,
    program: Program,
    axes: Axes,
    stack: Stack,
    layer: Layer,
    at: fx.Node,
    stop: fx.Node | None,
    plan: Plan,
    fill: str,
    reads: Reads,
    kept: Kept,
) -> Cut:
    """Edit the graph for one cut and say what it did."""
    before = _first_use(at, plan, kept)
    axis, batch = axes.dims(at)[stack.dim], axes.dims(at)[0]
    tap = Tap(before, at, layer.attention, axes, axis, options.window, options.seed, kept.valid)
    score = SCORES[options.score](tap)
    index, after = _select(before, options, score, reads, kept)
    short = emit(before, lambda x, i: gather_rows(x, i, 1, 0 if batch else None), at, index)
    if options.fuse:
        short = emit(before, _fused, short, at, score, index, *([] if kept.valid is None else [kept.valid]))
        after = _with_fused_row(before, after)
    take = _NoTake() if options.fuse else TakeRows(axes, plan, index, batch)
    shorten(axes, plan, at, short, size_node(before, short, 1), size_node(before, at, 0), take, size_node(before, at, stack.dim), stop)
    shorter = [r for r in (*(x.attention for x in stack.layers), *stack.tail) if r.v in plan.short]
    for region in shorter if after.valid is not None else ():
        hide_keys(region, after.valid)
    if stop is not None:
        _put_back(plan, stop, at, index, after.valid, fill, options.fuse)
    return Cut(layer.index, at.name, stop and stop.name, fill, tuple(r.core.name for r in shorter), options.fuse, options.keep, after)


def _select(before: fx.Node, options: Any, score: fx.Node, reads: Reads, kept: Kept) -> tuple[fx.Node, Kept]:
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


def _first_use(at: fx.Node, plan: Plan, kept: Kept) -> fx.Node:
    """The point behind the cut, and behind whatever was computed for it there."""
    nodes = list(at.graph.nodes)
    order = {n: i for i, n in enumerate(nodes)}
    last = max([at, *[n for n in (kept.valid, kept.force, kept.origin) if n is not None]], key=lambda n: order[n])
    users = [n for n in plan.short if n is not at]
    earliest = min(users, key=lambda n: order[n])
    if order[earliest] <= order[last]:
        raise Refusal(f"{last.name} is computed only after the cut is used")
    return earliest


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


def _fused(short: torch.Tensor, hidden: torch.Tensor, score: torch.Tensor, index: torch.Tensor, *valid: torch.Tensor) -> torch.Tensor:
    """Append the row sum_j a_j x_j over the rows that go (EViT: weights are not normalised)."""
    gone = torch.ones_like(score).scatter(1, index, 0.0)
    weight = score * gone * (valid[0] if valid else 1.0)
    return torch.cat([short, (weight.to(hidden.dtype).unsqueeze(1) @ hidden)], 1)


def _with_fused_row(before: fx.Node, kept: Kept) -> Kept:
    """The fused row is real, may go at a later cut, and has no original position."""

    def longer(rows: torch.Tensor, value: bool) -> torch.Tensor:
        return torch.cat([rows, torch.full_like(rows[:, :1], value)], 1)

    valid = None if kept.valid is None else emit(before, longer, kept.valid, True)
    force = None if kept.force is None else emit(before, longer, kept.force, False)
    return Kept(valid, force, None)


class _NoTake:
    """With a fused row no full-length operand can follow: it has no original position."""

    def __call__(self, before: fx.Node, operand: fx.Node, dims: set[int], user: fx.Node, slot: int) -> fx.Node:
        hint = "use fuse=false, or put simplify-mask in front when it is a mask that hides nothing"
        raise Refusal(f"fuse=true makes a row without a position, but {user.name} needs {operand.name} at every row; {hint}")


def size_node(before: fx.Node, node: fx.Node, dim: int) -> Any:
    size = shape(node)[dim]
    if not is_symbolic(size):
        return size
    with before.graph.inserting_before(before):
        made = before.graph.call_function(aten.sym_size.int, (node, dim))
    made.meta["val"] = size
    return made


def hide_keys(region: Any, valid: fx.Node) -> None:
    """Mask keys that are not valid out of an attention, for rows that are (a row with nothing to see would give NaN)."""
    if region.extras:
        raise Refusal(f"attention {region.index}: {region.extras}")
    if region.fused:
        sdpa = region.out
        mask = operands(sdpa)[3]
        replace_operands(sdpa, {3: emit(sdpa, _hidden, mask, valid)})
        refresh(sdpa)
        return
    softmax = region.softmax
    replace_operands(softmax, {0: emit(softmax, _hidden_logits, softmax.args[0], valid)})
    refresh(softmax)


def _hidden(mask: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    seen = _seen(valid, mask)
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def _seen(valid: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Which keys a row may see; rows that are not valid themselves see all (nobody looks at them, and they must not turn NaN)."""
    own = ~valid[:, None, :, None]
    return valid[:, None, None, :] | own if isinstance(rows.shape[-2], torch.SymInt) or rows.shape[-2] != 1 else valid[:, None, None, :]


def _hidden_logits(logits: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    seen = _seen(valid, logits)
    return logits.masked_fill(~seen, torch.finfo(logits.dtype).min)


def _put_back(plan: Plan, stop: fx.Node, at: fx.Node, index: fx.Node, valid: fx.Node | None, fill: str, fused: bool) -> None:
    """Scatter the surviving rows into the residual of the cut (or zeros), for whoever reads them behind the last layer."""
    users = [u for u in stop.users if u not in plan.short]
    before = stop.next

    def back(rows: torch.Tensor, base: torch.Tensor, index: torch.Tensor, *valid: torch.Tensor) -> torch.Tensor:
        rows = rows[:, :-1] if fused else rows
        base = base if fill == "carry" else torch.zeros_like(base)
        if valid:
            rows = torch.where(valid[0].unsqueeze(-1), rows, gather_rows(base, index, 1, 0))
        return scatter_rows(rows, base, index, 1)

    whole = emit(before, back, stop, at, index, *([] if valid is None else [valid]))
    for user in users:
        replace_operands(user, {i: whole for i, s in enumerate(operands(user)) if s is stop})
        if user.op == "call_function":
            refresh(user)
