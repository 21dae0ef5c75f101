"""Two abstract values of a mask compared, added or joined: "key <= row" is where causal masks, windows and prefixes come from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy

from dyncc.analysis.abstract_values import CAUSAL, Abstract, Causal, Const, Distance, Position, joined, pointwise
from dyncc.ir import size_expr

AND = ("__and__", "bitwise_and", "logical_and")
OR = ("__or__", "bitwise_or", "logical_or")
NUMBERS = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "le": lambda a, b: a <= b, "ge": lambda a, b: a >= b, "lt": lambda a, b: a < b,
    "gt": lambda a, b: a > b, "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
}  # fmt: skip
_FLIPPED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}


def binary(name: str, sizes: tuple[Any, ...], a: Abstract, b: Abstract) -> Abstract:
    """The value of the operation `name` on two values, whose result has these sizes."""
    if name in AND or name in OR:
        return joined(a, b, neutral=name in AND)
    if a is None or b is None:
        return None
    if isinstance(a, Causal) or isinstance(b, Causal):
        return pointwise(NUMBERS[name], a, b)
    if isinstance(a, Const) and isinstance(b, Const):
        told = name in ("add", "sub") or not {type(a.value), type(b.value)} - {int, bool}  # sizes are not compared here
        return Const(NUMBERS[name](a.value, b.value)) if told else None
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


def _beside(name: str, a: Position, number: Any) -> Abstract:
    """A position compared with a number: true everywhere, or told apart by a prefix of keys."""
    if name in ("gt", "ge"):
        if _never_less(a.offset, number + (name == "gt")):
            return Const(True)
        return pointwise(lambda x: not x, _beside("le" if name == "gt" else "lt", a, number))
    prefix = number + (name == "le") - a.offset
    if a.dim != -1 or not isinstance(prefix, int):
        return None
    return Causal(False, False, prefix=prefix, inside=(True,) * 3) if prefix > 0 else Const(False)


def _distant(name: str, a: Distance, number: Any, sizes: tuple[Any, ...]) -> Abstract:
    """A distance compared with a number is a key's position compared with its row's."""
    key, row = Position(-1, a.offset - number if a.sign > 0 else number - a.offset), Position(-2, 0)
    return _compared(name, key, row, sizes) if a.sign > 0 else _compared(name, row, key, sizes)


def _compared(name: str, a: Abstract, b: Abstract, sizes: tuple[Any, ...]) -> Abstract:
    """key <= row, or row >= key: causal, or true everywhere where the last key is not beyond the first row."""
    if name in ("gt", "lt"):
        return pointwise(lambda x: not x, _compared("le" if name == "gt" else "ge", a, b, sizes))
    if not isinstance(a, Position) or not isinstance(b, Position) or name not in ("le", "ge"):
        return None
    key, row = (a, b) if name == "le" else (b, a)
    if key.dim != row.dim and _never_less(row.offset, key.offset + size_expr(sizes[key.dim]) - 1):
        return Const(True)
    if (key.dim, row.dim) == (-2, -1):  # row <= key is what key + 1 <= row is not
        return pointwise(lambda x: not x, _compared("le", replace(row, offset=row.offset + 1), key, sizes))
    if (key.dim, row.dim) != (-1, -2):
        return None
    back = key.offset - row.offset
    return CAUSAL if back == 0 else Causal(False, False, int(back), True) if sympy.sympify(back).is_Integer and back > 0 else None


def _never_less(a: Any, b: Any) -> bool:
    """Whether a >= b for all sizes that there can be (sizes are positive)."""
    return bool(sympy.sympify(a - b).is_nonnegative)
