"""One cut of a stack: score, select, restrict, and put the rows back at the exit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from dyncc.analysis.axes import Axes
from dyncc.analysis.layers import Layer, Stack
from dyncc.ir import Program, aten, emit, is_symbolic, operands, refresh, replace_operands, shape
from dyncc.passes.fused_row import NoTake, append_fused_row, with_fused_row
from dyncc.passes.hidden_keys import hide_keys
from dyncc.passes.kept_rows import Kept, keep_rows
from dyncc.passes.reads import Reads
from dyncc.passes.scores import SCORES, Tap
from dyncc.restrict import Plan, Refusal, TakeRows, gather_rows, scatter_rows, shorten


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
    index, after = keep_rows(before, options, score, reads, kept)
    short = emit(before, lambda x, i: gather_rows(x, i, 1, 0 if batch else None), at, index)
    if options.fuse:
        short = emit(before, append_fused_row, short, at, score, index, *([] if kept.valid is None else [kept.valid]))
        after = with_fused_row(before, after)
    take = NoTake() if options.fuse else TakeRows(axes, plan, index, batch)
    shorten(axes, plan, at, short, size_node(before, short, 1), size_node(before, at, 0), take, size_node(before, at, stack.dim), stop)
    shorter = [r for r in (*(x.attention for x in stack.layers), *stack.tail) if r.v in plan.short]
    for region in shorter if after.valid is not None else ():
        hide_keys(region, after.valid)
    if stop is not None:
        _put_back(plan, stop, at, index, after.valid, fill, options.fuse)
    return Cut(layer.index, at.name, stop and stop.name, fill, tuple(r.core.name for r in shorter), options.fuse, options.keep, after)


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


def size_node(before: fx.Node, node: fx.Node, dim: int) -> Any:
    size = shape(node)[dim]
    if not is_symbolic(size):
        return size
    with before.graph.inserting_before(before):
        made = before.graph.call_function(aten.sym_size.int, (node, dim))
    made.meta["val"] = size
    return made


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
