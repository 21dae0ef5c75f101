"""What a mask's entries may be, whatever the sizes, and functions of such values.

A value is a constant; a position (0, 1, 2, ... + offset along one dimension); how far a key stands behind its row; or constants told
apart by "key <= row", "key <= row - window" and "key < prefix".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


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


def pointwise(function: Callable[..., Any], *values: Abstract) -> Abstract:
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


def joined(a: Abstract, b: Abstract, neutral: bool) -> Abstract:
    """`and` (True is neutral) or `or` (False is) of two values, of which one may be unknown."""
    if Const(not neutral) in (a, b):
        return Const(not neutral)
    if None in (a, b):
        return b if a == Const(neutral) else a if b == Const(neutral) else None
    return pointwise((lambda x, y: x and y) if neutral else (lambda x, y: x or y), a, b)


def counting(value: Abstract) -> tuple[int, ...]:
    """The dimensions along which a value is not the same everywhere."""
    if isinstance(value, Position):
        return (value.dim,)
    if isinstance(value, (Causal, Distance)):
        return (-1,) if isinstance(value, Causal) and value.of_keys_alone else (-2, -1)
    return ()
