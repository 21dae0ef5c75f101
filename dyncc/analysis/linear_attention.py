"""Linear attention that pairs all tokens, read from the product with values back to the product of queries and keys.

    (scale q k' * decays * causal / mass) v        decays_ij = exp(a_{j+1} + ... + a_i)

Every step in between must be one whose meaning is known; the first that is not ends the reading, with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from dyncc.ir import argument, is_tensor, op_name, operands, same_size, same_sizes, shape, val

PRODUCTS = {"matmul", "bmm"}
PASSING = {"clone", "contiguous", "alias", "detach", "expand", "_unsafe_view", "view", "reshape"}
LAID_OUT = {"unsqueeze", "expand", "to", "_to_copy", "alias", "view", "reshape", "contiguous", "clone", "lift_fresh_copy"}
FILLED = {"masked_fill", "where"}
STEPS = 20


class NotLinear(Exception):
    """Why a product is no linear attention that is understood."""


def pairs(out: fx.Node) -> bool:
    """Whether the left operand of a product is [..., T, T] and comes from another product, with no softmax between."""
    node = operands(out)[0]
    for _ in range(STEPS):
        sizes = shape(node)
        if node.op != "call_function" or len(sizes) not in (3, 4) or not same_size(sizes[-1], sizes[-2]) or "softmax" in op_name(node):
            return False
        if op_name(node) in PRODUCTS:
            return True
        wide = _towards(node)
        if wide is None:
            return False
        node = wide
    return False


def _towards(node: fx.Node) -> fx.Node | None:
    """The operand that holds the weights: the one as large as the node that comes from a product."""
    alike = [n for n in operands(node) if is_tensor(n) and same_sizes(shape(n), shape(node)) and val(n).is_floating_point()]
    return next((n for n in alike if _from_product(n)), None)


def _from_product(node: fx.Node, depth: int = 0) -> bool:
    if node.op != "call_function" or depth > STEPS:
        return False
    return op_name(node) in PRODUCTS or any(_from_product(n, depth + 1) for n in operands(node) if same_sizes(shape(n), shape(node)))


@dataclass
class Linear:
    """One linear attention: `q`, `kt` [..., D, T] (where `by_channel` [..., T, D]) and `v` are operands of its products, which stand before
    `out`. `scale` is a number, `causal` whether later tokens are hidden, `log_decay` [..., T], or [..., T, D] where `by_channel`. `masses`
    are sums of its weights over keys, with what the weights are multiplied by behind each; `rows` are what multiplies ("mul") or divides
    the weights row by row."""

    out: fx.Node
    tokens: Any
    q: fx.Node
    kt: fx.Node
    v: fx.Node
    scale: float = 1.0
    causal: bool = False
    log_decay: fx.Node | None = None
    by_channel: bool = False
    masses: list[tuple[fx.Node, float]] = field(default_factory=list)
    rows: list[tuple[str, fx.Node]] = field(default_factory=list)

    @property
    def parts(self) -> list[fx.Node]:
        return [self.q, self.kt, self.v, *([] if self.log_decay is None else [self.log_decay])]


def read_linear(out: fx.Node) -> Linear:
    """The linear attention whose product with values is `out`.

    Raises:
        NotLinear: with the first thing that is not understood.
    """
    node, v = operands(out)
    found = Linear(out, shape(out)[-2], node, node, v)
    while op_name(node) not in PRODUCTS:
        inner = _towards(node)
        assert inner is not None
        _alone(found, node)
        _step(found, node, inner)
        node = inner
    _alone(found, node)
    found.q, found.kt = operands(node)
    q, kt = found.q, found.kt
    rows = shape(q)[:-1]
    if not (same_sizes(rows, shape(out)[:-1]) and same_sizes(shape(v)[:-1], rows) and same_sizes(shape(kt)[:-2], rows[:-1])):
        raise NotLinear("queries, keys and values are not one batch of heads with one number of tokens")
    if len({val(n).dtype for n in (q, kt, v, out)}) > 1:
        raise NotLinear("queries, keys and values have different types")
    if found.log_decay is not None and not found.causal:
        raise NotLinear("its weights decay, and hide no later tokens")
    _read_channels(found)
    return found


def _alone(found: Linear, node: fx.Node) -> None:
    """Besides the next step, only sums over keys may read weights: those behind which nothing more is hidden."""
    others = [u for u in node.users if op_name(u) == "sum" and _over_keys(u, len(shape(node)))]
    if len(node.users) - len(others) != 1:
        raise NotLinear("its weights are read elsewhere too")
    if others and (found.causal or found.log_decay is not None):
        raise NotLinear("its weights are summed over keys before they are masked")
    found.masses += [(u, found.scale) for u in others]


def _over_keys(node: fx.Node, rank: int) -> bool:
    return [d % rank for d in argument(node, "dim") or []] == [rank - 1] and argument(node, "dtype") is None


def _read_channels(found: Linear) -> None:
    """(q exp(b)) (k exp(-b))' with one running sum b over tokens: decays for each channel of the keys."""
    k = operands(found.kt)[0] if _swaps(found.kt) else None
    shrunk = None if k is None else _shrunk(k)
    if not found.causal or found.log_decay is not None or shrunk is None or op_name(found.q) != "mul" or len(operands(found.q)) != 2:
        return
    for grows, q in (operands(found.q), operands(found.q)[::-1]):
        sums = operands(grows)[0] if op_name(grows) == "exp" else None
        if sums is None or shrunk[1] is not sums or op_name(sums) != "cumsum":
            continue
        along = argument(sums, "dim") % len(shape(sums)) == len(shape(sums)) - 2
        if along and same_sizes(shape(q), shape(found.q)) and same_sizes(shape(shrunk[0]), shape(k)):  # type: ignore[arg-type]
            found.q, found.kt, found.log_decay, found.by_channel = q, shrunk[0], operands(sums)[0], True
            return


def _swaps(node: fx.Node) -> bool:
    """Whether a node only swaps the last two dimensions."""
    rank = len(shape(node))
    swapped = op_name(node) == "transpose" and {d % rank for d in node.args[1:3]} == {rank - 1, rank - 2}  # type: ignore[operator]
    return swapped or op_name(node) == "mT"


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


def _step(found: Linear, node: fx.Node, inner: fx.Node) -> None:
    """What one node between the products says."""
    name = op_name(node)
    if name in PASSING or (name in ("to", "_to_copy") and val(node).dtype == val(inner).dtype):
        return
    if name == "tril":
        if argument(node, "diagonal", 0) != 0:
            raise NotLinear(f"tril keeps the diagonals up to {argument(node, 'diagonal')}, not up to a token's own")
        found.causal = True
    elif name in FILLED:
        if _fill(node) != 0.0 or not _hides(node, inner):
            raise NotLinear(f"{name} fills in something else than 0 for later tokens")
        found.causal = True
    elif name in ("mul", "div"):
        other = next((a for a in node.args if a is not inner), inner)
        if isinstance(other, (int, float)):
            if node.args[0] is not inner and name == "div":
                raise NotLinear("a number is divided by its weights")
            found.scale *= other if name == "mul" else 1 / other
        elif isinstance(other, fx.Node) and shape(other) and same_size(shape(other)[-1], 1) and (name == "mul" or node.args[0] is inner):
            if found.masses:
                raise NotLinear("its weights are summed over keys, and then scaled row by row")
            found.rows.append((name, other))
        elif name == "div" or not isinstance(other, fx.Node):
            raise NotLinear("its weights are divided by a tensor that differs from key to key")
        else:
            _factor(found, other)
    else:
        raise NotLinear(f"{name} stands between its products")


def _factor(found: Linear, node: fx.Node) -> None:
    """What multiplies the weights: a causal mask of ones, decays, or a product of such."""
    name, inner = op_name(node), operands(node)[:1]
    known = _all_pairs(found, node)
    if known and _causal(node) is True:
        found.causal = True
    elif known and name in LAID_OUT and inner and _in_front(node, inner[0]):
        _factor(found, inner[0])
    elif known and name == "mul" and len(operands(node)) == 2:
        for part in operands(node):
            _factor(found, part)
    elif known and name == "tril" and argument(node, "diagonal", 0) == 0:
        found.causal = True
        _factor(found, inner[0])
    elif known and name in FILLED and _fill(node) == 0.0 and _hides(node, kept := _kept(node)):
        found.causal = True
        _factor(found, kept)
    elif known and name == "exp" and found.log_decay is None:
        _exponent(found, inner[0])
    else:
        told = name if node.op == "call_function" else "an input"
        raise NotLinear(f"{told} multiplies its weights, no decay or causal mask that is known")


def _all_pairs(found: Linear, node: fx.Node) -> bool:
    """Whether a node is [..., T, T]: one that is broadcast means something else."""
    return len(shape(node)) > 1 and all(same_size(size, found.tokens) for size in shape(node)[-2:])


def _in_front(node: fx.Node, inner: fx.Node) -> bool:
    """Whether a node only adds dimensions in front of what it looks at, as broadcasting does."""
    if op_name(node) == "unsqueeze":
        return argument(node, "dim") in (0, -len(shape(node)))
    return op_name(node) == "expand" or same_sizes(shape(inner), shape(node))


def _exponent(found: Linear, node: fx.Node) -> None:
    """Log decays of all pairs: what row i has summed up less what row j has."""
    name = op_name(node)
    if name == "tril" and argument(node, "diagonal", 0) == 0:
        _exponent(found, operands(node)[0])
        return
    if name in FILLED and _fill(node) == float("-inf") and _hides(node, kept := _kept(node)):
        found.causal = True
        _exponent(found, kept)
        return
    if name != "sub" or len(operands(node)) != 2 or argument(node, "alpha", 1) != 1:
        raise NotLinear(f"its decays are exp of {name}, not of a difference of sums")
    late, early = operands(node)
    rows, columns = _summed(late, -1), _summed(early, -2)
    if rows is None or rows is not columns or not same_size(shape(rows)[-1], found.tokens):
        raise NotLinear("its decays are no differences of one running sum")
    found.log_decay = operands(rows)[0]


def _summed(node: fx.Node, dim: int) -> fx.Node | None:
    """The running sum [..., T] that a node [..., T, T] has along all but `dim`."""
    rank = len(shape(node))
    if op_name(node) in ("transpose", "mT") and dim == -2:
        return _summed(operands(node)[0], -1) if _swaps(node) else None
    if op_name(node) != "unsqueeze" or argument(node, "dim") % rank != rank + dim:
        return None
    inner = operands(node)[0]
    summed = op_name(inner) == "cumsum" and argument(inner, "dim") % len(shape(inner)) == len(shape(inner)) - 1
    return inner if summed and val(inner).dtype == val(operands(inner)[0]).dtype else None


def _fill(node: fx.Node) -> Any:
    """The number that a masked_fill or where puts in; None for anything else."""
    value = argument(node, "value") if op_name(node) == "masked_fill" else node.args[2] if len(node.args) > 2 else None
    if isinstance(value, fx.Node) and op_name(value) in ("scalar_tensor", "full", "zeros", "zeros_like"):
        value = 0.0 if "zeros" in op_name(value) else value.args[-1]
    return float(value) if isinstance(value, (int, float)) else None


def _kept(node: fx.Node) -> fx.Node:
    kept = node.args[0] if op_name(node) == "masked_fill" else node.args[1]
    if not isinstance(kept, fx.Node):
        raise NotLinear("a mask fills in numbers on both sides")
    return kept


def _hides(node: fx.Node, kept: fx.Node) -> bool:
    """Whether a masked_fill or where keeps `kept` where a token reads itself or an earlier one, and nowhere else."""
    mask = node.args[1] if op_name(node) == "masked_fill" else node.args[0]
    if not isinstance(mask, fx.Node) or not same_sizes(shape(mask)[-2:], shape(node)[-2:]):
        return False
    return _kept(node) is kept and _causal(mask) is (op_name(node) == "where")


def _causal(node: fx.Node, depth: int = 0) -> bool | None:
    """True for what is 1 at tokens up to a row's own and 0 behind, False for the opposite, None for anything else."""
    name, inner = op_name(node), operands(node)
    if node.op != "call_function" or depth > STEPS:
        return None
    if name in ("tril", "triu") and _ones(inner[0]):
        sizes, diagonal = shape(node), argument(node, "diagonal", 0)
        return (name == "tril" if diagonal == (name == "triu") else None) if same_size(sizes[-1], sizes[-2]) else None
    if name in LAID_OUT and inner and same_sizes(shape(inner[0])[-2:], shape(node)[-2:]):
        return _causal(inner[0], depth + 1)
    if name in ("bitwise_not", "logical_not") or (name == "eq" and node.args[1] == 0):
        told = _causal(inner[0], depth + 1)
        return None if told is None else not told
    if name in ("ge", "le", "gt", "lt") and len(inner) == 2:
        rows, columns = _numbers(inner[0]), _numbers(inner[1])
        if {rows, columns} == {-1, -2}:
            return {"ge": True, "lt": False}.get(name) if rows == -1 else {"le": True, "gt": False}.get(name)
    return None


def _ones(node: fx.Node) -> bool:
    if op_name(node) in ("to", "_to_copy"):
        return _ones(operands(node)[0])
    return op_name(node) in ("ones", "ones_like") or (op_name(node) == "full" and node.args[1] in (1, True))


def _numbers(node: fx.Node) -> int | None:
    """-1 for row numbers [T, 1] from 0 on, -2 for column numbers [1, T] or [T]."""
    if op_name(node) == "unsqueeze" and _numbers(operands(node)[0]) == -2 and len(shape(node)) == 2:
        return -1 if argument(node, "dim") % 2 == 1 else -2
    plain = op_name(node) == "arange" and node.target._overloadname == "default"  # type: ignore[union-attr]
    return -2 if plain and len(shape(node)) == 1 else None
