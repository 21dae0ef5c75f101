"""Decays of all pairs of tokens, read from how they were built:

    exp(a_{j+1} + ... + a_i)    of differences of one running sum, or for each channel where queries grow by exp of it and keys shrink
    g^(i - j), exp(a (i - j))   of distances between tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from dyncc.analysis.causal_edge import FILLED, filled, lower
from dyncc.analysis.mask_values import Distance, evaluate
from dyncc.analysis.spelled import number
from dyncc.ir import argument, op_name, operands, same_size, same_sizes, shape, val

LAID_OUT = {"unsqueeze", "expand", "to", "_to_copy", "alias", "view", "reshape", "contiguous", "clone", "lift_fresh_copy"}
NO_LATER = {"clamp", "clamp_min", "relu", "abs"}
"""What leaves the distance to an earlier token as it is; of later ones, which are hidden, it may make anything."""
POSITIVE = {"exp", "sigmoid"}


class NotLinear(Exception):
    """Why a product is no linear attention that is understood."""


@dataclass(frozen=True)
class Decays:
    """What is kept of a token. `kind` says what `node` holds: "sums" log decays [..., T], "channels" log decays [..., T, D], "rate" one log
    decay for all tokens, "base" exp of that (a number, or [..., 1, 1]). `nearest` as in causal_edge.py, where later tokens get none."""

    kind: str
    node: Any
    nearest: int | None = None

    def logs(self, value: Tensor | float, like: Tensor) -> Tensor:
        """Log decays [..., T or 1, D or 1] of the node's value."""
        x = value if isinstance(value, Tensor) else like.new_full((1, 1), value)
        if self.kind in ("rate", "base"):
            x = x[(None,) * (2 - x.dim())]
            return x.log() if self.kind == "base" else x
        return x.unsqueeze(-1) if self.kind == "sums" else x


def of_pairs(node: fx.Node, tokens: Any) -> Decays:
    """The decays of a node exp(...) or pow(...) [..., T, T].

    Raises:
        NotLinear: its exponent is neither a difference of one running sum nor a distance.
    """
    if op_name(node) != "pow":
        return _exponent(operands(node)[0], tokens)
    base, exponent = node.args[:2]
    told = _distance(exponent)
    if told is None or told.sign > 0:
        raise NotLinear("the exponent of its decays is no distance from a row back to a key")
    if isinstance(base, fx.Node) and not positive(base):
        raise NotLinear("the base of its decays is neither exp nor sigmoid of anything: whether it is positive is not known")
    return Decays("base", _one_a_head(base))


def is_distant(node: fx.Node, tokens: Any) -> bool:
    """Whether a node is exp or pow of distances between tokens."""
    if op_name(node) == "pow":
        return _distance(node.args[1]) is not None
    try:
        return op_name(node) == "exp" and of_pairs(node, tokens).kind == "rate"
    except NotLinear:
        return False


def _exponent(node: fx.Node, tokens: Any) -> Decays:
    """Log decays of all pairs."""
    name = op_name(node)
    if name == "tril" and lower(node) in (0, 1):
        return _exponent(operands(node)[0], tokens)
    if name in FILLED and (told := filled(node)) is not None and told[1] == float("-inf"):
        inner = _exponent(told[0], tokens)
        return Decays(inner.kind, inner.node, max(told[2], inner.nearest or 0))
    if name == "mul" and (rate := _rate(node)) is not None:
        return Decays("rate", rate)
    if name != "sub" or len(operands(node)) != 2 or argument(node, "alpha", 1) != 1:
        raise NotLinear(f"its decays are exp of {name}, not of a difference of sums, nor of a distance")
    late, early = operands(node)
    rows, columns = _summed(late, -1), _summed(early, -2)
    if rows is None or rows is not columns or not same_size(shape(rows)[-1], tokens):
        raise NotLinear("its decays are no differences of one running sum")
    return Decays("sums", operands(rows)[0])


def _rate(node: fx.Node) -> Any:
    """What multiplies the distance from a row back to a key; None where nothing does."""
    for rate, distance in (node.args[:2], node.args[1::-1]):
        told = _distance(distance)
        if told is not None and told.sign < 0:
            return _one_a_head(rate)
    return None


def _one_a_head(value: Any) -> Any:
    """A number, or a node that differs neither from row to row nor from key to key."""
    told = number(value)
    if told is not None:
        return told
    if not isinstance(value, fx.Node) or any(not same_size(size, 1) for size in shape(value)[-2:]):
        raise NotLinear("what is kept from token to token differs among tokens, and is no running sum")
    return value


def _distance(node: Any, depth: int = 6) -> Distance | None:
    """How far a key stands behind its row, where it does."""
    told = evaluate(node, {})
    if isinstance(told, Distance):
        return told if told.offset == 0 else None
    if not isinstance(node, fx.Node) or node.op != "call_function" or depth == 0 or not operands(node):
        return None
    name, inner = op_name(node), operands(node)[0]
    same = same_sizes(shape(inner)[-2:], shape(node)[-2:])
    plain = name in LAID_OUT or (name == "tril" and lower(node) in (0, 1)) or (name in NO_LATER and _from_zero(node))
    found = _distance(inner, depth - 1) if same and plain else None
    return found if found is None or name in LAID_OUT or found.sign < 0 else None


def _from_zero(node: fx.Node) -> bool:
    return op_name(node) in ("relu", "abs") or (argument(node, "min") == 0 and argument(node, "max") is None)


def positive(node: fx.Node) -> bool:
    """Whether a node is exp or sigmoid of something, laid out or not."""
    looks = LAID_OUT | {"select", "slice", "transpose"}
    while node.op == "call_function" and op_name(node) in looks and operands(node):
        node = operands(node)[0]
    return node.op == "call_function" and op_name(node) in POSITIVE


def _summed(node: fx.Node, dim: int) -> fx.Node | None:
    """The running sum [..., T] that a node [..., T, T] has along all but `dim`."""
    rank = len(shape(node))
    if op_name(node) in ("transpose", "mT") and dim == -2:
        return _summed(operands(node)[0], -1) if swaps(node) else None
    if op_name(node) != "unsqueeze" or argument(node, "dim") % rank != rank + dim:
        return None
    inner = operands(node)[0]
    summed = op_name(inner) == "cumsum" and argument(inner, "dim") % len(shape(inner)) == len(shape(inner)) - 1
    return inner if summed and val(inner).dtype == val(operands(inner)[0]).dtype else None


def swaps(node: fx.Node) -> bool:
    """Whether a node only swaps the last two dimensions."""
    rank = len(shape(node))
    swapped = op_name(node) == "transpose" and {d % rank for d in node.args[1:3]} == {rank - 1, rank - 2}  # type: ignore[operator]
    return swapped or op_name(node) == "mT"


def of_channels(q: fx.Node, kt: fx.Node) -> tuple[fx.Node, fx.Node, Decays] | None:
    """(q, k, decays for each channel of the keys) of (q exp(b)) (k exp(-b))' with one running sum b over tokens."""
    k = operands(kt)[0] if swaps(kt) else None
    shrunk = None if k is None else _shrunk(k)
    if k is None or shrunk is None or op_name(q) != "mul" or len(operands(q)) != 2:
        return None
    for grows, plain in (operands(q), operands(q)[::-1]):
        sums = operands(grows)[0] if op_name(grows) == "exp" else None
        if sums is None or shrunk[1] is not sums or op_name(sums) != "cumsum":
            continue
        along = argument(sums, "dim") % len(shape(sums)) == len(shape(sums)) - 2
        if along and same_sizes(shape(plain), shape(q)) and same_sizes(shape(shrunk[0]), shape(k)):
            return plain, shrunk[0], Decays("channels", operands(sums)[0])
    return None


def _shrunk(k: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(k, b) of k exp(-b) or k / exp(b)."""
    parts = operands(k)
    if len(parts) != 2:
        return None
    if op_name(k) == "div" and op_name(parts[1]) == "exp":
        return parts[0], operands(parts[1])[0]
    for shrinks, inner in (parts, parts[::-1]) if op_name(k) == "mul" else ():
        if op_name(shrinks) == "exp" and op_name(operands(shrinks)[0]) == "neg":
            return inner, operands(operands(shrinks)[0])[0]
    return None
