"""Rotary embeddings by dataflow: x * cos + rotate_half(x) * sin, whatever made the two tables."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from torch import fx

from dyncc.ir import argument, is_tensor, op_name, same_size, shape

ELEMENTWISE = {"cos", "sin", "mul", "to", "_to_copy", "unsqueeze", "alias"}


@dataclass(frozen=True)
class Rotary:
    """`x` [B, H, S, D] turned by `cos` and `sin` [B or 1, S, D], whose second halves repeat their first."""

    x: fx.Node
    cos: fx.Node
    sin: fx.Node


def find_rotary(node: fx.Node) -> Rotary | None:
    """The rotary embedding that a node is the result of, or None."""
    if op_name(node) != "add" or argument(node, "alpha", 1) != 1:
        return None
    products = [_factors(n) for n in node.args]
    if None in products:
        return None
    for plain, other in itertools.permutations(p for p in products if p is not None):
        for (x, cos), (turned, sin) in itertools.product((plain, plain[::-1]), (other, other[::-1])):  # factors stand in either order
            if _turns(turned, x) and (tables := _tables(cos, sin)) is not None and len(shape(x)) == 4:
                return Rotary(x, *tables)
    return None


def _factors(node: Any) -> tuple[fx.Node, fx.Node] | None:
    if not is_tensor(node) or op_name(node) != "mul" or not all(is_tensor(n) for n in node.args):
        return None
    return node.args[0], node.args[1]


def _turns(turned: fx.Node, x: fx.Node) -> bool:
    """Whether `turned` is cat(-second half of x, first half of x)."""
    if op_name(turned) != "cat" or argument(turned, "dim", 0) not in (-1, 3) or len(turned.args[0]) != 2:  # type: ignore[arg-type]
        return False
    high, low = turned.args[0]  # type: ignore[misc]
    if op_name(high) != "neg":
        return False
    half = shape(x)[-1] // 2 if isinstance(shape(x)[-1], int) else 0
    return _half(high.args[0], x, half, half) and _half(low, x, 0, half)


def _half(node: Any, x: fx.Node, start: int, width: int) -> bool:
    if not isinstance(node, fx.Node) or op_name(node) != "slice" or node.args[0] is not x or shape(node)[-1] != width:
        return False
    return (argument(node, "start", 0) or 0) == start and argument(node, "dim", 0) in (3, -1)


def _tables(cos: fx.Node, sin: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Cosine and sine without the dimension of heads, where both repeat their halves and are one for all heads."""
    found = []
    for node in (cos, sin):
        if op_name(node) != "unsqueeze" or argument(node, "dim") != 1 or not isinstance(node.args[0], fx.Node):
            return None
        if not _repeats(node.args[0]) or len(shape(node.args[0])) != 3:
            return None
        found.append(node.args[0])
    return found[0], found[1]


def _repeats(node: fx.Node) -> bool:
    """Whether the second half of the last dimension repeats the first, seen through elementwise steps."""
    for _ in range(8):
        if op_name(node) == "cat":
            parts = node.args[0]
            last = argument(node, "dim", 0) in (-1, len(shape(node)) - 1)
            return last and len(parts) == 2 and parts[0] is parts[1]  # type: ignore[arg-type, index]
        tensors = [n for n in node.args if is_tensor(n)]
        if op_name(node) not in ELEMENTWISE or len(tensors) != 1 or not same_size(shape(tensors[0])[-1], shape(node)[-1]):
            return False
        node = tensors[0]
    return False
