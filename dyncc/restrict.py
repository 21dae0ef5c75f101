"""Restrict: run a region of the graph on fewer rows of an axis. The one primitive behind pruning, last-row slicing and key selection.

A `Plan` says, before anything is edited, which dimensions of which nodes become short. It is found by following the links of the axis
rules forward from a cut (tokens kept from there on) or backward from a slice (rows needed up to there). `shorten` then edits the graph in
place: wherever a full-length operand meets a shortened one it is taken (gathered or sliced) along the linked dimension, sizes written into
views follow, and fake values are recomputed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from dyncc.analysis.attention import AttentionRegion
from dyncc.analysis.axes import Axes, Dim, OpAxes, Read, find
from dyncc.ir import argument, emit, is_mutating, is_tensor, op_name, operands, refresh, replace_operands, shape, source_line

IT = re.compile(r"\bit\b")
SIZED = {"view", "reshape", "_unsafe_view", "expand"}


class Refusal(Exception):
    """Why a rewrite does not fit, in words a user can act on. Caught by the rewrite framework, never by the user."""


@dataclass
class Plan:
    """Short dimensions by node. `reads` are position reads that are answered by remapping: the node is computed on short rows as it is."""

    axis: Dim
    short: dict[fx.Node, set[int]] = field(default_factory=dict)


def where(node: fx.Node) -> str:
    line = source_line(node)
    return f"{op_name(node)} ({node.name}{', ' + line if line else ''})"


def short_slots(axes: Axes, plan: Plan, node: fx.Node, op: OpAxes, slots: list[fx.Node]) -> set[int]:
    """The output dimensions that become short because an operand's linked dimension is."""
    if op.regroups:
        return _regrouped(axes, plan, slots[0], node)
    return {link.out for link in op.links if link.dim in plan.short.get(slots[link.slot], ())}


def _regrouped(axes: Axes, plan: Plan, source: fx.Node, node: fx.Node) -> set[int]:
    """A view keeps its atoms in order, so the k-th occurrence of the axis going in is the k-th coming out."""
    before, after = axes.places(source, plan.axis), axes.places(node, plan.axis)
    if len(before) != len(after):
        raise Refusal(f"{where(node)} splits the token axis")
    return {b for a, b in zip(before, after, strict=True) if a in plan.short[source]}


def plan_forward(
    axes: Axes,
    axis: Dim,
    cut: fx.Node,
    dim: int,
    stop: fx.Node | None,
    regions: tuple[AttentionRegion, ...],
    harmless: Callable[[fx.Node, Read], bool],
) -> Plan:
    """Everything after `cut` that carries the axis runs short, up to and including `stop` (None: to the end of the graph).

    Args:
        harmless: says whether a position read along a short dimension gives the same result on the kept rows (it reads a kept row).
    Raises:
        Refusal: an op on the way has no rule, mutates, reads positions or reduces over the axis; the op and its source line are named.
    """
    inside = _attention_nodes(regions)
    plan = Plan(axis, {cut: {dim}})
    for node in _after(cut):
        slots = operands(node)
        if node.op == "output" or not any(s in plan.short for s in slots) or op_name(node) == "sym_size":
            continue
        op = axes.ops.get(node)
        if op is None or not op.known:
            raise Refusal(f"{where(node)} has no axis rule, so tokens cannot be followed through it")
        if is_mutating(node):
            raise Refusal(f"{where(node)} writes in place along the token axis")
        for read in op.reads:
            allowed = (node in inside and "softmax" in read.why) or harmless(node, read)
            if read.dim in plan.short.get(slots[read.slot], ()) and not allowed:
                raise Refusal(f"{where(node)} {IT.sub('the token axis', read.why, count=1)}")
        for c in op.contracts:
            a, b = plan.short.get(slots[c.slot], ()), plan.short.get(slots[c.other], ())
            if (c.dim in a or c.other_dim in b) and node not in inside:
                raise Refusal(f"{where(node)} sums over the token axis outside of attention")
        _check_covered(plan, node, op, slots)
        dims = short_slots(axes, plan, node, op, slots)
        if dims:
            plan.short[node] = dims
        if node is stop:
            break
    return plan


def _check_covered(plan: Plan, node: fx.Node, op: OpAxes, slots: list[fx.Node]) -> None:
    """Every short dimension that goes into a node must be one its rule speaks of."""
    if op.regroups:
        return
    spoken = {(link.slot, link.dim) for link in op.links} | {(read.slot, read.dim) for read in op.reads}
    spoken |= {side for c in op.contracts for side in ((c.slot, c.dim), (c.other, c.other_dim))}
    for slot, source in enumerate(slots):
        if any((slot, dim) not in spoken for dim in plan.short.get(source, ())):
            raise Refusal(f"{where(node)}: its axis rule does not say what becomes of the token axis")


def _attention_nodes(regions: tuple[AttentionRegion, ...]) -> set[fx.Node]:
    return {n for r in regions for n in (r.out, r.softmax) if n is not None}


def _after(cut: fx.Node) -> list[fx.Node]:
    nodes = list(cut.graph.nodes)
    return nodes[nodes.index(cut) + 1 :]


def plan_backward(axes: Axes, axis: Dim, end: fx.Node, dim: int, batch: Dim = ()) -> Plan:
    """The nodes of which only the rows that `end` (a slice or select along `dim` of its operand) takes are ever used.

    With `batch` every sequence takes rows of its own: nodes that do not hold that axis stay whole.
    """
    source = operands(end)[0]
    plan = Plan(axis)
    wanted: dict[fx.Node, set[int]] = {source: {dim}}
    blocked: set[fx.Node] = set()
    nodes = list(end.graph.nodes)
    for node in reversed(nodes[: nodes.index(end)]):
        dims = wanted.get(node)
        if not dims or node in blocked or node.op != "call_function" or not _movable(axes, node, dims):
            continue
        if batch and not axes.places(node, batch):
            continue
        if not all(u is end or u in plan.short or op_name(u) == "sym_size" for u in node.users):
            continue
        op, slots = axes.ops[node], operands(node)
        if any(r.dim in dims and slots[r.slot] is slots[0] for r in op.reads):
            continue
        plan.short[node] = dims
        for slot, source_dims in _needed(axes, plan, node, op, slots, dims).items():
            operand = slots[slot]
            if wanted.setdefault(operand, source_dims) != source_dims:
                blocked.add(operand)
    _drop_partial(axes, plan, end)
    return plan


def _movable(axes: Axes, node: fx.Node, dims: set[int]) -> bool:
    op = axes.ops.get(node)
    if op is None or not op.known or is_mutating(node):
        return False
    return len(dims) == 1 if op.regroups else op_name(node) in SIZED or dims <= {link.out for link in op.links}


def _needed(axes: Axes, plan: Plan, node: fx.Node, op: OpAxes, slots: list[fx.Node], dims: set[int]) -> dict[int, set[int]]:
    if op.regroups:
        before, after = axes.places(slots[0], plan.axis), axes.places(node, plan.axis)
        if len(before) != len(after):
            return {}
        return {0: {a for a, b in zip(before, after, strict=True) if b in dims}}
    found: dict[int, set[int]] = {}
    for link in op.links:
        if link.out in dims:
            found.setdefault(link.slot, set()).add(link.dim)
    return found


def _drop_partial(axes: Axes, plan: Plan, end: fx.Node) -> None:
    """Leave out views that cannot follow, and then whatever needed them short."""
    changed = True
    while changed:
        changed = False
        for node in list(plan.short):
            if not all(u is end or u in plan.short or op_name(u) == "sym_size" for u in node.users):
                del plan.short[node]
                changed = True
                continue
            if _picks_from_whole_list(plan, node) or _splits(axes, plan, node):
                del plan.short[node]
                changed = True


def _picks_from_whole_list(plan: Plan, node: fx.Node) -> bool:
    """A piece of a split that stays whole: the piece itself is sliced, the list cannot be."""
    return any(not is_tensor(s) and s not in plan.short for s in operands(node)[:1] if op_name(node) == "getitem")


def _splits(axes: Axes, plan: Plan, node: fx.Node) -> bool:
    op = axes.ops[node]
    return op.regroups and not _needed(axes, plan, node, op, operands(node), plan.short[node])


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
    found = _needed(axes, plan, node, op, slots, dims)
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


def gather_rows(value: torch.Tensor, index: torch.Tensor, dim: int, batch_dim: int | None) -> torch.Tensor:
    """Rows `index` [B, K] of `value` along `dim`; `batch_dim` is where the batch stands (None: one row of indices for all).

    >>> gather_rows(torch.arange(6).view(2, 3), torch.tensor([[0, 2], [1, 2]]), 1, 0).tolist()
    [[0, 2], [4, 5]]
    """
    if batch_dim is None:
        return value.index_select(dim, index[0])
    view = [1] * value.dim()
    view[batch_dim], view[dim] = index.shape[0], index.shape[1]
    sizes = list(value.shape)
    sizes[dim] = index.shape[1]
    sizes[batch_dim] = index.shape[0]
    batched = value.expand(*[s if i == batch_dim else -1 for i, s in enumerate(sizes)])
    return batched.gather(dim, _oriented(index, batch_dim, dim).view(view).expand(sizes))


def _oriented(index: torch.Tensor, batch_dim: int, dim: int) -> torch.Tensor:
    return index if batch_dim < dim else index.t().contiguous()


class TakeRows:
    """The `take` of a restricted token axis: gather by an index node [B, K], inserting the batch where an operand has none."""

    def __init__(self, axes: Axes, plan: Plan, index: fx.Node, batch: Dim):
        self.axes, self.plan, self.index, self.batch = axes, plan, index, batch
        self.made: dict[tuple[fx.Node, frozenset[int], int], fx.Node] = {}

    def __call__(self, before: fx.Node, operand: fx.Node, dims: set[int], user: fx.Node, slot: int) -> fx.Node:
        merged = [d for d in (self.axes.dims(operand)[i] for i in dims) if find(d, self.plan.axis) != 0 or len(d) != len(self.plan.axis)]
        if merged:
            raise Refusal(f"{where(user)} meets {operand.name}, whose rows are merged with another axis")
        place, pad = self._batch_place(operand, user)
        key = (operand, frozenset(dims), pad)
        if key not in self.made:
            self.made[key] = emit(before, lambda value, index: _take(value, index, sorted(dims), place, pad), operand, self.index)
            self.axes._dims[self.made[key]] = ()
        return self.made[key]

    def _batch_place(self, operand: fx.Node, user: fx.Node) -> tuple[int | None, int]:
        """Where the batch stands in the operand (after `pad` leading dimensions are added), or None when one index serves all rows."""
        if not self.batch:
            return None, 0
        own = self.axes.places(operand, self.batch)
        if own:
            return own[0], 0
        out = self.axes.places(user, self.batch)
        if not out:
            raise Refusal(f"{where(user)} meets {operand.name} away from the batch axis")
        pad = len(shape(user)) - len(shape(operand))
        return out[0], max(0, pad)


def _take(value: torch.Tensor, index: torch.Tensor, dims: list[int], place: int | None, pad: int) -> torch.Tensor:
    for _ in range(pad):
        value = value.unsqueeze(0)
    for dim in dims:
        value = gather_rows(value, index, dim + pad, place)
    return value


def scatter_rows(rows: torch.Tensor, base: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    """`base` [B, T, ...] with `rows` [B, K, ...] put at `index` [B, K] along `dim` (1); other rows keep the base's values."""
    if dim != 1:
        raise ValueError("rows are scattered along dimension 1")
    view = index.view(*index.shape, *[1] * (rows.dim() - 2)).expand(rows.shape)
    return base.scatter(1, view, rows)
