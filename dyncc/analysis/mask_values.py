"""Masks over abstract values, whatever the sizes: how a mask was built says what it hides.

`evaluate` follows a mask back to what it was made from. What a value may be stands in abstract_values.py, operations on one mask in
mask_views.py, comparisons and sums of two in mask_compare.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from dyncc.analysis.abstract_values import CAUSAL, Abstract, Causal, Const, Distance, Position, pointwise
from dyncc.analysis.mask_compare import AND, NUMBERS, OR, binary
from dyncc.analysis.mask_views import UNARY, carried, spread
from dyncc.ir import argument, is_mutating, is_tensor, op_name, operands, shape, size_expr, val

__all__ = ["CARRY", "CAUSAL", "Abstract", "Causal", "Const", "Distance", "Position", "evaluate"]

CARRY = {"to", "_to_copy", "alias", "expand", "clone", "contiguous", "detach", "lift_fresh_copy"}
VIEWS = {"slice", "select", "view", "unsqueeze", "squeeze", "expand", "transpose", "permute", "alias", "detach", "diagonal", "t"}
POINTWISE = {"mul": lambda a, b: a * b, "rsub": lambda a, b: b - a}
BITWISE = {"__and__", "bitwise_and", "__or__", "bitwise_or"}


def evaluate(node: Any, known: dict[fx.Node, Abstract]) -> Abstract:
    """The abstract value of a node or number; None when it has none that is known."""
    if isinstance(node, (bool, int, float)):
        return Const(node)
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if isinstance(val(node), (int, torch.SymInt)):
        return Const(size_expr(val(node)))
    if node not in known:
        known[node] = None if _written_to(node) else _evaluate(node, known)
    return known[node]


def _written_to(node: fx.Node) -> bool:
    """Whether something writes into a tensor or a view of it."""
    views = [u for u in node.users if op_name(u) in VIEWS]
    return any(is_mutating(u) and u.args[0] is node for u in node.users) or any(_written_to(u) for u in views)


def _evaluate(node: fx.Node, known: dict[fx.Node, Abstract]) -> Abstract:
    name = op_name(node)
    if name in ("new_ones", "ones", "ones_like", "new_zeros", "zeros", "zeros_like"):
        return Const(name in ("new_ones", "ones", "ones_like"))
    if name in ("full", "new_full", "full_like", "scalar_tensor"):
        value = argument(node, "s") if name == "scalar_tensor" else argument(node, "fill_value")
        return Const(value) if isinstance(value, (bool, int, float)) else None
    if name == "arange":
        start = evaluate(argument(node, "start", 0) or 0, known)
        return Position(-1, start.value) if isinstance(start, Const) and argument(node, "step", 1) == 1 else None
    if name in CARRY:
        return carried(node, evaluate(node.args[0], known))
    if name in UNARY:
        return UNARY[name](node, evaluate(node.args[0], known))
    if name in BITWISE and val(node).dtype != torch.bool:
        return None
    if name in AND or name in OR or (name in NUMBERS and argument(node, "alpha", 1) == 1):
        return binary(name, shape(node), *(spread(node, a, evaluate(a, known)) for a in node.args[:2]))
    if name in ("where", "masked_fill"):
        return _chosen(node, known)
    if name in POINTWISE and argument(node, "alpha", 1) == 1:
        return pointwise(POINTWISE[name], *(spread(node, a, evaluate(a, known)) for a in node.args[:2]))
    if name == "diff":
        return _difference(node, known)
    if name == "index":
        return _indexed(node, evaluate(node.args[0], known), known)
    return None


def _chosen(node: fx.Node, known: dict[fx.Node, Abstract]) -> Abstract:
    """where(condition, a, b), and masked_fill(b, condition, a)."""
    if len(node.args) != 3:
        return None
    condition, a, b = node.args if op_name(node) == "where" else (node.args[1], node.args[2], node.args[0])
    values = [spread(node, x, evaluate(x, known)) for x in (condition, a, b)]
    return pointwise(lambda c, x, y: x if c else y, *values)


def _difference(node: fx.Node, known: dict[fx.Node, Abstract]) -> Abstract:
    """diff of positions is 1 everywhere, also at the front when what is put there is one less than the first."""
    value, front = evaluate(node.args[0], known), evaluate(argument(node, "prepend"), known)
    along = argument(node, "dim", -1)
    if not isinstance(value, Position) or argument(node, "n", 1) != 1 or argument(node, "append") is not None:
        return None
    if along not in (value.dim, value.dim + len(shape(node))):
        return None
    if argument(node, "prepend") is not None and front != Const(value.offset - 1):
        return None
    return Const(1)


def _indexed(node: fx.Node, value: Abstract, known: dict[fx.Node, Abstract]) -> Abstract:
    """Rows of a constant are the constant; counting up along a position gives the position back, where the index counts."""
    if isinstance(value, Const):
        return value
    if not isinstance(value, Position):
        return None
    source = operands(node)[0]
    indices = argument(node, "indices")
    at = value.dim % len(shape(source))
    index = indices[at] if at < len(indices) else None
    if any(i is None for i in indices) or not is_tensor(index):
        return None
    place = spread(node, index, evaluate(index, known))
    return replace(place, offset=place.offset + value.offset) if isinstance(place, Position) else None
