"""Masks over abstract values, whatever the sizes: how a mask was built says what it hides.

A value is a constant; a position (0, 1, 2, ... + offset along one dimension); how far a key stands behind its row; or constants told
apart by "key <= row", "key <= row - window" and "key < prefix".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from dyncc.ir import argument, is_mutating, is_tensor, op_name, operands, same_size, shape, val

CARRY = {"to", "_to_copy", "alias", "expand", "clone", "contiguous", "detach", "lift_fresh_copy"}
AND = ("__and__", "bitwise_and", "logical_and")
OR = ("__or__", "bitwise_or", "logical_or")
VIEWS = {"slice", "select", "view", "unsqueeze", "squeeze", "expand", "transpose", "permute", "alias", "detach", "diagonal", "t"}
BITWISE = {"__and__", "bitwise_and", "__or__", "bitwise_or"}
EXACT_TO_MILLIONS = {torch.int32, torch.int64, torch.float32, torch.float64}
"""Types that positions survive a cast to."""


@dataclass(frozen=True)
class Const:
    """The same number everywhere."""

    value: Any


@dataclass(frozen=True)
class Position:
    """`offset` (a number, or an expression over sizes) + the index along `dim` (counted from the right: -1 is the last)."""

    dim: int
    offset: Any


@dataclass(frozen=True)
class Distance:
    """`sign` (1 or -1) times (the index along dimension -1 less that along -2), + `offset`."""

    sign: int
    offset: Any


@dataclass(frozen=True)
class Causal:
    """`upto` where the index along dimension -1 is not beyond that along -2, `later` where it is, and, with a window, `behind` where it is
    that far back or further. With a prefix, `inside` holds these three for indices along dimension -1 below it."""

    upto: Any
    later: Any
    window: int = 0
    behind: Any = None
    prefix: int = 0
    inside: tuple[Any, ...] = ()

    @property
    def zones(self) -> tuple[Any, ...]:
        outside = self.upto, self.later, self.behind if self.window else self.upto
        return (*outside, *(self.inside if self.prefix else outside))

    @property
    def of_keys_alone(self) -> bool:
        """Whether rows do not count: only a prefix tells values apart."""
        return all(len(set(zone)) == 1 for zone in (self.zones[:3], self.zones[3:]))


CAUSAL = Causal(True, False)
Abstract = Const | Position | Distance | Causal | None


def evaluate(node: Any, known: dict[fx.Node, Abstract]) -> Abstract:
    """The abstract value of a node or number; None when it has none that is known."""
    if isinstance(node, (bool, int, float)):
        return Const(node)
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if isinstance(val(node), (int, torch.SymInt)):
        return Const(_expression(val(node)))
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
        return _carried(node, evaluate(node.args[0], known))
    if name in _UNARY:
        return _UNARY[name](node, evaluate(node.args[0], known))
    if name in BITWISE and val(node).dtype != torch.bool:
        return None
    if name in AND or name in OR or (name in _CONSTANT and argument(node, "alpha", 1) == 1):
        return _binary(name, shape(node), *(_spread(node, a, evaluate(a, known)) for a in node.args[:2]))
    if name in ("where", "masked_fill"):
        return _chosen(node, known)
    if name in _ARITHMETIC and argument(node, "alpha", 1) == 1:
        return _pointwise(_ARITHMETIC[name], *(_spread(node, a, evaluate(a, known)) for a in node.args[:2]))
    if name == "diff":
        return _difference(node, known)
    if name == "index":
        return _indexed(node, evaluate(node.args[0], known), known)
    return None


def _carried(node: fx.Node, value: Abstract) -> Abstract:
    """Casts and broadcasts keep the value, where numbers stay what they are."""
    if not isinstance(value, (Position, Distance)) and not val(node).is_floating_point():
        value = _pointwise(bool if val(node).dtype == torch.bool else _whole, value)
    elif isinstance(value, (Position, Distance)) and val(node).dtype not in EXACT_TO_MILLIONS:
        return None
    return _spread(node, node.args[0], value)


def _whole(number: Any) -> Any:
    return int(number) if not isinstance(number, float) or number.is_integer() else None


def _spread(node: fx.Node, source: Any, value: Abstract) -> Abstract:
    """The value of an operand broadcast to the node's sizes: a dimension that counts must not get longer."""
    if any(len(shape(source)) < -dim or not same_size(shape(source)[dim], shape(node)[dim]) for dim in _counting(value)):
        return None
    return value


def _counting(value: Abstract) -> tuple[int, ...]:
    """The dimensions along which a value is not the same everywhere."""
    if isinstance(value, Position):
        return (value.dim,)
    if isinstance(value, (Causal, Distance)):
        return (-1,) if isinstance(value, Causal) and value.of_keys_alone else (-2, -1)
    return ()


def _unsqueeze(node: fx.Node, value: Abstract) -> Abstract:
    at = argument(node, "dim") % len(shape(node)) - len(shape(node))
    if isinstance(value, Position):
        return replace(value, dim=value.dim - 1) if at >= value.dim else value
    return value if isinstance(value, Const) or (value is not None and at < min(_counting(value))) else None


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


def _sum(node: fx.Node, value: Abstract) -> Abstract:
    return Const(0) if value == Const(0) else None


def _not(node: fx.Node, value: Abstract) -> Abstract:
    return _pointwise(lambda x: not x, value) if val(node).dtype == torch.bool else None


def _lower(node: fx.Node, value: Abstract) -> Abstract:
    """tril of a constant is it where the key is not beyond the row, and 0 elsewhere."""
    nothing = val(node).dtype != torch.bool and 0
    return Causal(value.value, nothing) if isinstance(value, Const) and argument(node, "diagonal", 0) == 0 else None


def _upper(node: fx.Node, value: Abstract) -> Abstract:
    """triu from the first diagonal on is the constant where the key is beyond the row."""
    nothing = val(node).dtype != torch.bool and 0
    return Causal(nothing, value.value) if isinstance(value, Const) and argument(node, "diagonal", 0) == 1 else None


def _shaped(node: fx.Node, value: Abstract) -> Abstract:
    """A constant stays one; so do positions in a single row."""
    in_front = all(same_size(s, 1) for s in (*shape(node)[:-1], *shape(node.args[0])[:-1]))  # type: ignore[arg-type]
    counted = isinstance(value, Position) and value.dim == -1 and in_front and same_size(shape(node)[-1], shape(node.args[0])[-1])  # type: ignore[arg-type]
    return value if counted or isinstance(value, Const) else None


_UNARY = {
    "unsqueeze": _unsqueeze, "slice": _slice, "cumsum": _sum, "logical_not": _not, "bitwise_not": _not, "tril": _lower, "triu": _upper,
    "view": _shaped, "reshape": _shaped, "squeeze": _shaped, "select": _select,
}  # fmt: skip


def _pointwise(function: Callable[..., Any], *values: Abstract) -> Abstract:
    """A function of numbers, of constants and of values told apart by the causal edge."""
    parts = [v.zones if isinstance(v, Causal) else (getattr(v, "value", None),) * 6 for v in values]
    if not all(isinstance(p, (bool, int, float)) for zones in parts for p in zones):
        return None  # unknown, a position, or a size that is not a number yet
    told = [v for v in values if isinstance(v, Causal)]
    windows, prefixes = ({getattr(v, name) for v in told} - {0} for name in ("window", "prefix"))
    if len(windows) > 1 or len(prefixes) > 1:
        return None
    upto, later, behind, *inside = (function(*zone) for zone in zip(*parts, strict=True))
    if not told or all(zone == upto for zone in (later, behind, *inside)):
        return Const(upto)
    window = windows.pop() if windows and (behind != upto or inside[2] != inside[0]) else 0
    prefix = prefixes.pop() if prefixes and (upto, later, behind) != tuple(inside) else 0
    return Causal(upto, later, window, behind if window else None, prefix, tuple(inside) if prefix else ())


def _turned(node: fx.Node, value: Abstract) -> Abstract:
    if isinstance(value, Distance):
        return Distance(-value.sign, -value.offset)
    return _pointwise(lambda x: -x, value) if val(node).dtype != torch.bool else None


_UNARY["neg"] = _turned
_ARITHMETIC: dict[str, Callable[..., Any]] = {"mul": lambda a, b: a * b, "rsub": lambda a, b: b - a}


def _chosen(node: fx.Node, known: dict[fx.Node, Abstract]) -> Abstract:
    """where(condition, a, b), and masked_fill(b, condition, a)."""
    if len(node.args) != 3:
        return None
    condition, a, b = node.args if op_name(node) == "where" else (node.args[1], node.args[2], node.args[0])
    values = [_spread(node, x, evaluate(x, known)) for x in (condition, a, b)]
    return _pointwise(lambda c, x, y: x if c else y, *values)


def _binary(name: str, sizes: tuple[Any, ...], a: Abstract, b: Abstract) -> Abstract:
    if name in AND or name in OR:
        return _joined(a, b, neutral=name in AND)
    if a is None or b is None:
        return None
    if isinstance(a, Causal) or isinstance(b, Causal):
        return _pointwise(_CONSTANT[name], a, b)
    if isinstance(a, Const) and isinstance(b, Const):
        told = name in ("add", "sub") or not {type(a.value), type(b.value)} - {int, bool}  # sizes are not compared here
        return Const(_CONSTANT[name](a.value, b.value)) if told else None
    if name in ("add", "sub") and isinstance(a, (Position, Distance)) and isinstance(b, Const):
        return replace(a, offset=a.offset + (b.value if name == "add" else -b.value))
    if name == "sub" and isinstance(a, Position) and isinstance(b, Position) and {a.dim, b.dim} == {-1, -2}:
        return Distance(1 if a.dim == -1 else -1, a.offset - b.offset)
    if name in _FLIPPED and isinstance(a, Distance) and isinstance(b, Const):
        return _distant(name, a, b.value, sizes)
    if name in _FLIPPED and isinstance(a, Const) and isinstance(b, Position):
        a, b, name = b, a, _FLIPPED[name]
    if name in _FLIPPED and isinstance(a, Position) and isinstance(b, Const):
        return _beside(name, a, b.value)
    return _compared(name, a, b, sizes)


_FLIPPED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}


def _beside(name: str, a: Position, number: Any) -> Abstract:
    """A position compared with a number: true everywhere, or told apart by a prefix of keys."""
    if name in ("gt", "ge"):
        if _never_less(a.offset, number + (name == "gt")):
            return Const(True)
        return _pointwise(lambda x: not x, _beside("le" if name == "gt" else "lt", a, number))
    prefix = number + (name == "le") - a.offset
    if a.dim != -1 or not isinstance(prefix, int):
        return None
    return Causal(False, False, prefix=prefix, inside=(True,) * 3) if prefix > 0 else Const(False)


def _distant(name: str, a: Distance, number: Any, sizes: tuple[Any, ...]) -> Abstract:
    """A distance compared with a number is a key's position compared with its row's."""
    key, row = Position(-1, a.offset - number if a.sign > 0 else number - a.offset), Position(-2, 0)
    return _compared(name, key, row, sizes) if a.sign > 0 else _compared(name, row, key, sizes)


def _never_less(a: Any, b: Any) -> bool:
    """Whether a >= b for all sizes that there can be (sizes are positive)."""
    return bool(sympy.sympify(a - b).is_nonnegative)


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _joined(a: Abstract, b: Abstract, neutral: bool) -> Abstract:
    """`and` (True is neutral) or `or` (False is) of two values, of which one may be unknown."""
    if Const(not neutral) in (a, b):
        return Const(not neutral)
    if None in (a, b):
        return b if a == Const(neutral) else a if b == Const(neutral) else None
    return _pointwise((lambda x, y: x and y) if neutral else (lambda x, y: x or y), a, b)


_CONSTANT = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "le": lambda a, b: a <= b, "ge": lambda a, b: a >= b, "lt": lambda a, b: a < b,
    "gt": lambda a, b: a > b, "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
}  # fmt: skip


def _compared(name: str, a: Abstract, b: Abstract, sizes: tuple[Any, ...]) -> Abstract:
    """key <= row, or row >= key: causal, or true everywhere where the last key is not beyond the first row."""
    if name in ("gt", "lt"):
        return _pointwise(lambda x: not x, _compared("le" if name == "gt" else "ge", a, b, sizes))
    if not isinstance(a, Position) or not isinstance(b, Position) or name not in ("le", "ge"):
        return None
    key, row = (a, b) if name == "le" else (b, a)
    if key.dim != row.dim and _never_less(row.offset, key.offset + _expression(sizes[key.dim]) - 1):
        return Const(True)
    if (key.dim, row.dim) == (-2, -1):  # row <= key is what key + 1 <= row is not
        return _pointwise(lambda x: not x, _compared("le", replace(row, offset=row.offset + 1), key, sizes))
    if (key.dim, row.dim) != (-1, -2):
        return None
    back = key.offset - row.offset
    return CAUSAL if back == 0 else Causal(False, False, int(back), True) if sympy.sympify(back).is_Integer and back > 0 else None


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
    place = _spread(node, index, evaluate(index, known))
    return replace(place, offset=place.offset + value.offset) if isinstance(place, Position) else None
