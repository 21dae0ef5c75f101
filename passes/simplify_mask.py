"""simplify-mask: an attention mask that hides nothing goes; one that is only causal becomes the flag.

Libraries build masks from positions in many steps even when the result is "everything" or "no later key". A mask that is handed to
attention as a tensor keeps the fastest kernels away (torch materialises it; 2,048 causal tokens: 73 ms with a bool mask, 40 with the flag
on one CPU). The mask is evaluated over three abstract values, whatever the sizes: a constant, a position (0, 1, 2, ... + offset along one
dimension), and constants told apart by "key position <= row position" and "key position <= row position - window". Exact: the same rows
and keys are seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

from dyncc.analysis.attention import AttentionRegion
from dyncc.analysis.facts import Facts
from dyncc.analysis.spelled import HIDING
from dyncc.ir import argument, is_tensor, op_name, operands, refresh, same_size, shape, val
from dyncc.kernels.fused_attention import ATTEND
from dyncc.restrict import Refusal
from dyncc.rewrite import Context, Pass, PassResult

CARRY = {"to", "_to_copy", "alias", "expand", "clone", "contiguous", "detach", "lift_fresh_copy"}
AND = ("__and__", "bitwise_and", "logical_and")
OR = ("__or__", "bitwise_or", "logical_or")
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
class Causal:
    """`upto` where the index along dimension -1 is not beyond that along -2, `later` where it is, and, with a window, `behind` where it is
    that far back or further."""

    upto: Any
    later: Any
    window: int = 0
    behind: Any = None

    @property
    def zones(self) -> tuple[Any, Any, Any]:
        return self.upto, self.later, self.behind if self.window else self.upto


CAUSAL = Causal(True, False)
Abstract = Const | Position | Causal | None


@dataclass(frozen=True)
class SimplifyMask(Pass):
    """Replace masks that hide nothing, or only later keys, by no mask or the causal flag."""

    name: ClassVar[str] = "simplify-mask"
    summary: ClassVar[str] = "drop attention masks that hide nothing; turn purely causal ones into the flag"
    exact: ClassVar[bool] = True
    keeps_gradients: ClassVar[bool] = True

    def run(self, program: Any, facts: Facts, context: Context) -> PassResult:
        """Rewrite every fused attention whose mask is understood; refuse when none is."""
        masked = [r for r in facts.attention if r.fused and r.mask is not None]
        if not masked:
            raise Refusal("no fused attention takes a mask")
        known: dict[fx.Node, Abstract] = {}
        done, misses = 0, []
        for region in masked:
            value = evaluate(region.mask, known)
            if _hides_nothing(region.mask, value) or _is_flag(region, value):
                _set_mask(region.out, value if isinstance(value, Causal) else None)
                done += 1
            else:
                misses.append(f"attention {region.index}: its mask depends on the inputs, or hides more than later keys")
        if not done:
            raise Refusal(misses[0])
        return PassResult(done, len(masked), misses=tuple(misses))


def _hides_nothing(mask: fx.Node, value: Abstract) -> bool:
    """True everywhere, or the same number added to every logit."""
    if not isinstance(value, Const):
        return False
    return value.value not in (math.inf, -math.inf) if val(mask).is_floating_point() else bool(value.value)


def _is_flag(region: AttentionRegion, value: Abstract) -> bool:
    sizes = shape(region.mask)
    rows, keys = shape(region.q)[-2], shape(region.k)[-2]
    whole = same_size(sizes[-2], rows) and same_size(sizes[-1], keys) and same_size(rows, keys)
    if not whole or not isinstance(value, Causal) or (value.window and region.out.target is not ATTEND):
        return False
    if val(region.mask).dtype == torch.bool:
        return bool(value.upto) and not value.later and not (value.window and value.behind)
    return all(x - value.upto <= HIDING for x in value.zones[1 : 3 if value.window else 2])


def _set_mask(sdpa: fx.Node, edge: Causal | None) -> None:
    kwargs = {k: v for k, v in sdpa.kwargs.items() if k not in ("attn_mask", "dropout_p", "is_causal")}
    causal = edge is not None or bool(argument(sdpa, "is_causal", False))
    if edge is not None and edge.window:
        kwargs["window"] = edge.window
    dropout = argument(sdpa, "dropout_p", 0.0)
    sdpa.args = (*sdpa.args[:3], None, dropout, causal) if causal or dropout else tuple(sdpa.args[:3])
    sdpa.kwargs = kwargs
    refresh(sdpa)


def evaluate(node: Any, known: dict[fx.Node, Abstract]) -> Abstract:
    """The abstract value of a node or number; None when it is not one of the three."""
    if isinstance(node, (bool, int, float)):
        return Const(node)
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if isinstance(val(node), (int, torch.SymInt)):
        return Const(_expression(val(node)))
    if node not in known:
        known[node] = None
        known[node] = _evaluate(node, known)
    return known[node]


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
    if not isinstance(value, Position) and not val(node).is_floating_point():
        value = _pointwise(bool if val(node).dtype == torch.bool else _whole, value)
    elif isinstance(value, Position) and val(node).dtype not in EXACT_TO_MILLIONS:
        return None
    return _spread(node, node.args[0], value)


def _whole(number: Any) -> Any:
    return int(number) if not isinstance(number, float) or number.is_integer() else None


def _spread(node: fx.Node, source: Any, value: Abstract) -> Abstract:
    """The value of an operand broadcast to the node's sizes: a dimension that counts must not get longer."""
    counting = (value.dim,) if isinstance(value, Position) else (-2, -1) if isinstance(value, Causal) else ()
    if any(len(shape(source)) < -dim or not same_size(shape(source)[dim], shape(node)[dim]) for dim in counting):
        return None
    return value


def _unsqueeze(node: fx.Node, value: Abstract) -> Abstract:
    at = argument(node, "dim") % len(shape(node)) - len(shape(node))
    if isinstance(value, Position):
        return replace(value, dim=value.dim - 1) if at >= value.dim else value
    return value if isinstance(value, Const) or at < -2 else None


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
    return value if isinstance(value, Const) else None


_UNARY = {
    "unsqueeze": _unsqueeze, "slice": _slice, "cumsum": _sum, "logical_not": _not, "bitwise_not": _not, "tril": _lower, "triu": _upper,
    "view": _shaped, "reshape": _shaped, "squeeze": _shaped, "select": _shaped,
}  # fmt: skip


def _pointwise(function: Callable[..., Any], *values: Abstract) -> Abstract:
    """A function of numbers, of constants and of values told apart by the causal edge."""
    parts = [v.zones if isinstance(v, Causal) else (getattr(v, "value", None),) * 3 for v in values]
    if not all(isinstance(p, (bool, int, float)) for zones in parts for p in zones):
        return None  # unknown, a position, or a size that is not a number yet
    windows = {v.window for v in values if isinstance(v, Causal) and v.window}
    if len(windows) > 1:
        return None
    upto, later, behind = (function(*zone) for zone in zip(*parts, strict=True))
    if upto == later == behind or not any(isinstance(v, Causal) for v in values):
        return Const(upto)
    return Causal(upto, later, *((windows.pop(), behind) if windows else ()))


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
    if name in ("add", "sub") and isinstance(a, Position) and isinstance(b, Const):
        return replace(a, offset=a.offset + (b.value if name == "add" else -b.value))
    if name == "ge" and isinstance(a, Position) and isinstance(b, Const):
        return Const(True) if _never_less(a.offset, b.value) else None
    return _compared(name, a, b, sizes)


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
