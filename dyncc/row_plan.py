"""Which dimensions of which nodes become short when an axis keeps fewer rows, found before anything is edited.

Forward from a cut: tokens are kept from there on. Backward from a slice: rows are needed up to there. Both follow the links of
the axis rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx

from dyncc.analysis.attention import AttentionRegion
from dyncc.analysis.axes import Axes, Dim, OpAxes, Read
from dyncc.ir import is_mutating, is_tensor, op_name, operands
from dyncc.refusal import Refusal, where

IT = re.compile(r"\bit\b")
SIZED = {"view", "reshape", "_unsafe_view", "expand"}


@dataclass
class Plan:
    """Short dimensions by node. `reads` are position reads that are answered by remapping: the node is computed on short rows as it is."""

    axis: Dim
    short: dict[fx.Node, set[int]] = field(default_factory=dict)


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
        for slot, source_dims in needed(axes, plan, node, op, slots, dims).items():
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


def needed(axes: Axes, plan: Plan, node: fx.Node, op: OpAxes, slots: list[fx.Node], dims: set[int]) -> dict[int, set[int]]:
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
    return op.regroups and not needed(axes, plan, node, op, operands(node), plan.short[node])
