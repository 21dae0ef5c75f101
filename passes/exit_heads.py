"""Exit heads: what the model computes behind its last layer, computed behind an earlier one, on the rows that it reads alone."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from dyncc.analysis.axes import Axes
from dyncc.analysis.layers import Stack
from dyncc.ir import argument, aten, descendants, emit, hoist, is_tensor, op_name, operands, outputs, refresh, shape, val
from dyncc.passes.reads import Reads
from dyncc.region import Region, copy_nodes, find_region
from dyncc.restrict import Refusal, where

Map = tuple[fx.Node, fx.Node]
"""Weight [D, D] and bias [D] of an affine map in front of a head."""
At: TypeAlias = int | fx.Node
"""Which row is read: the first (0), the last (-1), or that at a computed position [B]."""


@dataclass(frozen=True)
class Head:
    """`suffix`: the graph behind the last layer. Where it reads one row of the token axis, `read` is the node that does and `rowwise` are
    the nodes in front of it, which treat every row alike; `at` is 0 or -1, or the node that holds a position [B] for each sequence."""

    suffix: Region
    dim: int
    read: fx.Node | None = None
    rowwise: tuple[fx.Node, ...] = ()
    at: At = 0


def find_head(graph: fx.Graph, axes: Axes, stack: Stack, reads: Reads) -> Head:
    """The head of the model, by dataflow. A model that returns the state behind its last layer has one that changes nothing.

    Raises:
        Refusal: no output comes from the last layer, or what is computed behind it cannot be computed elsewhere.
    """
    end = stack.layers[-1].end
    behind = {end, *descendants(end)}
    exits = [n for n in outputs(graph) if isinstance(n, fx.Node) and n in behind and is_tensor(n)]
    if not exits:
        raise Refusal("no output comes from the last layer, so there is no head to leave by")
    suffix = find_region([end], list(dict.fromkeys(exits)))
    inside = descendants(end)
    found = [n for n in suffix.nodes if n in reads.nodes or _picked(axes, stack, n, inside) is not None]
    if len(found) != 1:
        return Head(suffix, stack.dim)
    read = found[0]
    rowwise = tuple(n for n in suffix.nodes if n in inside and read in descendants(n))
    at = _one_row(read) if read in reads.nodes else _picked(axes, stack, read, inside)
    alone = not any(u not in (*rowwise, read) for n in (end, *rowwise) for u in n.users)
    follows = alone and all(_is_rowwise(axes, stack, n) for n in rowwise)
    return Head(suffix, stack.dim, read, rowwise, at) if at is not None and follows else Head(suffix, stack.dim)


def _one_row(read: fx.Node) -> int | None:
    """Which row a select or slice reads, if it is the first or the last one alone."""
    if op_name(read) == "select":
        index = argument(read, "index")
        return index if index in (0, -1) else None
    start, size = argument(read, "start", 0) or 0, val(read).shape[argument(read, "dim", 0)]
    return start if start in (0, -1) and isinstance(size, int) and size == 1 else None


def _picked(axes: Axes, stack: Stack, node: fx.Node, inside: set[fx.Node]) -> fx.Node | None:
    """The positions [B] that x[arange(B), positions] reads, if they do not depend on the layers."""
    if op_name(node) != "index" or stack.dim != 1 or not (stack.batch and stack.axis):
        return None
    slots, given = operands(node), argument(node, "indices")
    if len(slots) != 3 or len(given) != 2 or len(shape(slots[2])) != 1 or slots[2] in inside:
        return None
    dims, read = axes.dims(slots[0]), {r.dim: r.counted for r in axes.ops[node].reads}
    fits = dims[:2] == (stack.batch, stack.axis) and read == {0: 1, 1: None} and axes.dims(slots[2])[0] == stack.batch
    return slots[2] if fits else None


def _is_rowwise(axes: Axes, stack: Stack, node: fx.Node) -> bool:
    op = axes.ops.get(node)
    if op is None or not op.known or op.regroups or axes.places(node, stack.axis) != [stack.dim]:
        return False
    slots = operands(node)
    return not any(stack.dim in axes.places(slots[r.slot], stack.axis) and r.dim == stack.dim for r in op.reads)


def put_head(head: Head, state: fx.Node, affine: Map | None, before: fx.Node) -> tuple[fx.Node, ...]:
    """Compute the head, behind an affine map where one is given, from the state [B, T, D] behind an earlier layer; its outputs.

    Raises:
        Refusal: it also reads what later layers compute.
    """
    late = descendants(state)
    stranger = next((n for n in head.suffix.operands if n in late and n is not head.suffix.entries[0]), None)
    if stranger is not None:
        raise Refusal(f"the model's head also reads {where(stranger)}, which later layers compute")
    order = {n: i for i, n in enumerate(state.graph.nodes)}
    for operand in head.suffix.operands:
        if operand is not head.suffix.entries[0]:
            hoist(operand, before, order)
    end, known = head.suffix.entries[0], dict[fx.Node, fx.Node]()
    if head.read is None:
        known[end] = _mapped(state, affine, before)
        made = copy_nodes(head.suffix.nodes, state.graph, known, before)
        return tuple(made[n] for n in head.suffix.exits)
    row = read_row(state, head.dim, head.at, before)
    known[end] = _mapped(row, affine, before)
    made = copy_nodes(head.rowwise, state.graph, known, before)
    for node in head.rowwise:
        refresh(made[node])
    source = made[operands(head.read)[0]]
    made[head.read] = source if op_name(head.read) == "slice" else emit(before, lambda x: x.select(head.dim, 0), source)
    rest = [n for n in head.suffix.nodes if n not in made]
    made = copy_nodes(rest, state.graph, made, before)
    return tuple(made[n] for n in head.suffix.exits)


def read_row(state: fx.Node, dim: int, at: At, before: fx.Node) -> fx.Node:
    """The row of a state that `at` names, [B, 1, D]."""
    row: fx.Node
    if isinstance(at, fx.Node):
        row = emit(before, lambda x, i: _at(x, i).unsqueeze(1), state, at)
    else:
        row = emit(before, lambda x: aten.slice.Tensor(x, dim, at, 1 if at == 0 else sys.maxsize), state)
    return row


def _at(x: Tensor, positions: Tensor) -> Tensor:
    """[B, D]: row positions[b] of x[b]."""
    return x[torch.arange(x.shape[0], device=x.device), positions]


def _mapped(state: fx.Node, affine: Map | None, before: fx.Node) -> fx.Node:
    if affine is None:
        return state
    made: fx.Node = emit(before, lambda x, w, b: F.linear(x, w.to(x.dtype), b.to(x.dtype)), state, *affine)
    return made


def row_of(head: Head, state: fx.Node, before: fx.Node) -> fx.Node:
    """[B, D]: the row of a state that the head reads, or the mean over its rows where it reads them all."""
    row: fx.Node
    if head.read is None:
        row = emit(before, lambda x: x.mean(head.dim), state)
    elif isinstance(head.at, fx.Node):
        row = emit(before, _at, state, head.at)
    else:
        row = emit(before, lambda x: torch.select(x, head.dim, head.at), state)
    return row
