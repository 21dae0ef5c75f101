"""An abstract value behind an operation on one mask: another view of it, a cast, a triangle of it, its negation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from dyncc.analysis.abstract_values import Abstract, Causal, Const, Distance, Position, counting, pointwise
from dyncc.ir import argument, same_size, shape, val

EXACT_TO_MILLIONS = {torch.int32, torch.int64, torch.float32, torch.float64}
"""Types that positions survive a cast to."""


def carried(node: fx.Node, value: Abstract) -> Abstract:
    """Casts and broadcasts keep the value, where numbers stay what they are."""
    if not isinstance(value, (Position, Distance)) and not val(node).is_floating_point():
        value = pointwise(bool if val(node).dtype == torch.bool else _whole, value)
    elif isinstance(value, (Position, Distance)) and val(node).dtype not in EXACT_TO_MILLIONS:
        return None
    return spread(node, node.args[0], value)


def _whole(number: Any) -> Any:
    return int(number) if not isinstance(number, float) or number.is_integer() else None


def spread(node: fx.Node, source: Any, value: Abstract) -> Abstract:
    """The value of an operand broadcast to the node's sizes: a dimension that counts must not get longer."""
    if any(len(shape(source)) < -dim or not same_size(shape(source)[dim], shape(node)[dim]) for dim in counting(value)):
        return None
    return value


def _unsqueeze(node: fx.Node, value: Abstract) -> Abstract:
    at = argument(node, "dim") % len(shape(node)) - len(shape(node))
    if isinstance(value, Position):
        return replace(value, dim=value.dim - 1) if at >= value.dim else value
    return value if isinstance(value, Const) or (value is not None and at < min(counting(value))) else None


def _slice(node: fx.Node, value: Abstract) -> Abstract:
    source = node.args[0]
    dim = argument(node, "dim", 0) % len(shape(node)) - len(shape(node))
    if not isinstance(source, fx.Node) or isinstance(value, Const) or same_size(shape(source)[dim], shape(node)[dim]):
        return value
    if isinstance(value, Position) and argument(node, "step", 1) == 1:
        start = argument(node, "start", 0) or 0
        if dim != value.dim:
            return value
        if isinstance(start, int) and start >= 0:
            moved = value.offset + start
            return Const(moved) if same_size(shape(node)[dim], 1) else replace(value, offset=moved)
    return None


def _select(node: fx.Node, value: Abstract) -> Abstract:
    """One of several: of a constant it is the constant; of positions along another dimension, they stay."""
    at, index = argument(node, "dim") % (len(shape(node)) + 1) - len(shape(node)) - 1, argument(node, "index")
    if isinstance(value, Position) and at != value.dim:
        return replace(value, dim=value.dim + (at > value.dim))
    if isinstance(value, Position):
        return Const(value.offset + index) if isinstance(index, int) and index >= 0 else None
    return value if isinstance(value, Const) else None


def _shaped(node: fx.Node, value: Abstract) -> Abstract:
    """A constant stays one; so do positions in a single row."""
    in_front = all(same_size(s, 1) for s in (*shape(node)[:-1], *shape(node.args[0])[:-1]))  # type: ignore[arg-type]
    counted = isinstance(value, Position) and value.dim == -1 and in_front and same_size(shape(node)[-1], shape(node.args[0])[-1])  # type: ignore[arg-type]
    return value if counted or isinstance(value, Const) else None


def _sum(node: fx.Node, value: Abstract) -> Abstract:
    return Const(0) if value == Const(0) else None


def _not(node: fx.Node, value: Abstract) -> Abstract:
    return pointwise(lambda x: not x, value) if val(node).dtype == torch.bool else None


def _turned(node: fx.Node, value: Abstract) -> Abstract:
    if isinstance(value, Distance):
        return Distance(-value.sign, -value.offset)
    return pointwise(lambda x: -x, value) if val(node).dtype != torch.bool else None


def _lower(node: fx.Node, value: Abstract) -> Abstract:
    """tril of a constant is it where the key is not beyond the row, and 0 elsewhere."""
    nothing = val(node).dtype != torch.bool and 0
    return Causal(value.value, nothing) if isinstance(value, Const) and argument(node, "diagonal", 0) == 0 else None


def _upper(node: fx.Node, value: Abstract) -> Abstract:
    """triu from the first diagonal on is the constant where the key is beyond the row."""
    nothing = val(node).dtype != torch.bool and 0
    return Causal(nothing, value.value) if isinstance(value, Const) and argument(node, "diagonal", 0) == 1 else None


UNARY = {
    "unsqueeze": _unsqueeze, "slice": _slice, "cumsum": _sum, "logical_not": _not, "bitwise_not": _not, "tril": _lower, "triu": _upper,
    "view": _shaped, "reshape": _shaped, "squeeze": _shaped, "select": _select, "neg": _turned,
}  # fmt: skip
