"""Restrict: run a region of the graph on fewer rows of an axis. The one primitive behind pruning, last-row slicing and key selection.

A `Plan` (row_plan.py) says, before anything is edited, which dimensions of which nodes become short. `shorten` then edits the graph in
place: wherever a full-length operand meets a shortened one it is taken (gathered or sliced) along the linked dimension, sizes written into
views follow, and fake values are recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

from dyncc.analysis.axes import Axes, Dim, OpAxes, find
from dyncc.ir import argument, emit, op_name, operands, refresh, replace_operands, shape
from dyncc.refusal import Refusal, where
from dyncc.row_plan import IT, SIZED, Plan, needed, plan_backward, plan_forward
from dyncc.take_rows import TakeRows, gather_rows, scatter_rows

__all__ = [
    "IT", "Plan", "Refusal", "TakeRows", "gather_rows", "plan_backward", "plan_forward", "resize", "scatter_rows", "shorten", "where",
]  # fmt: skip

Take = Callable[[fx.Node, fx.Node, set[int], fx.Node, int], fx.Node]


def shorten(
    axes: Axes,
    plan: Plan,
    cut: fx.Node | None,
    short_cut: fx.Node | None,
    count: Any,
    batch: Any,
    take: Take,
    full: Any,
    stop: fx.Node | None = None,
) -> None:
    """Edit the graph so that the plan's nodes run short.

    Args:
        cut, short_cut: the node after which rows are kept and the node that holds the kept rows (None for a backward plan).
        count: the number of rows kept, an int or a SymInt node; `batch`: likewise the batch size.
        take: `take(before, operand, dims, user, slot)` gives the operand with only the kept rows along `dims`.
        full: the full row count, an int or node, for sizes read off shortened nodes.
        stop: the last short node of a forward plan; the caller puts its rows back for whoever reads it behind.
    """
    graph = next(iter(plan.short)).graph
    for node in [n for n in graph.nodes if (n in plan.short and n is not cut) or _reads_short(n, plan)]:
        if op_name(node) == "sym_size":
            if node.args[0] is not cut:
                _answer_size(node, plan, full)
            continue
        op, slots = axes.ops.get(node), operands(node)
        if op is None or (node not in plan.short and {s for s in slots if s in plan.short} == {stop}):
            continue
        swaps: dict[int, fx.Node] = {}
        for slot, dims in _meeting(axes, plan, node, op, slots).items():
            missing = dims - plan.short.get(slots[slot], set())
            if missing:
                swaps[slot] = take(node, slots[slot], missing, node, slot)
        if cut is not None and short_cut is not None:
            swaps.update({i: short_cut for i, s in enumerate(slots) if s is cut})
        if swaps:
            replace_operands(node, swaps)
        if node in plan.short:
            resize(node, axes.dims(node), plan.short[node], plan.axis, count, batch)
        refresh(node)


def _reads_short(node: fx.Node, plan: Plan) -> bool:
    return node.op == "call_function" and any(s in plan.short for s in operands(node))


def _answer_size(node: fx.Node, plan: Plan, full: Any) -> None:
    source, dim = node.args
    if isinstance(source, fx.Node) and dim % len(shape(source)) in plan.short.get(source, ()) and full is not None:  # type: ignore[operator]
        node.replace_all_uses_with(full) if isinstance(full, fx.Node) else _fold(node, full)


def _fold(node: fx.Node, size: int) -> None:
    for user in list(node.users):
        user.args, user.kwargs = fx.node.map_arg((user.args, user.kwargs), lambda n: size if n is node else n)


def _meeting(axes: Axes, plan: Plan, node: fx.Node, op: OpAxes, slots: list[fx.Node]) -> dict[int, set[int]]:
    """Which dimensions of which slots must be short for the node to run short."""
    dims = plan.short.get(node, set())
    found = needed(axes, plan, node, op, slots, dims)
    for c in op.contracts:
        sides = ((c.slot, c.dim), (c.other, c.other_dim))
        if any(d in plan.short.get(slots[s], ()) for s, d in sides):
            for s, d in sides:
                found.setdefault(s, set()).add(d)
    return found


def resize(node: fx.Node, dims: tuple[Dim, ...], short: Iterable[int], axis: Dim, count: Any, batch: Any) -> None:
    """Sizes written into a view or expand follow its rows, `count` along the axis in its dimensions `short`; -1 follows by itself."""
    if op_name(node) not in SIZED:
        return
    name = "size" if op_name(node) in ("view", "expand", "_unsafe_view") else "shape"
    sizes = list(argument(node, name))
    offset = len(sizes) - len(dims)
    for dim in short:
        if isinstance(sizes[dim + offset], int) and sizes[dim + offset] == -1:
            continue
        sizes[dim + offset] = _short_size(dims[dim], axis, count, batch, node)
    node.args = (node.args[0], sizes)
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != name}


def _short_size(dim: Dim, axis: Dim, count: Any, batch: Any, node: fx.Node) -> Any:
    at = find(dim, axis)
    others = [a for i, a in enumerate(dim) if not at <= i < at + len(axis)]
    if not others:
        return count
    static = 1
    symbolic = False
    for atom in others:
        if isinstance(atom.size, int):
            static *= atom.size
        else:
            symbolic = True
    if not symbolic:
        return emit(node, lambda n: n * static, count) if isinstance(count, fx.Node) else count * static
    if batch is None:
        raise Refusal(f"{where(node)} merges the token axis with one whose size is not known")
    return emit(node, lambda b, n: b * static * n, batch, count)
