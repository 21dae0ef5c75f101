"""Linear attention that pairs all tokens, read from the product with values back to the product of queries and keys.

    (scale q k' * decays * causal / mass) v        and without queries and keys: (scale decays causal) v, an average that moves

Every step in between must be one whose meaning is known; the first that is not ends the reading, with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from dyncc.analysis.causal_edge import FILLED, filled, lower, nearest_seen
from dyncc.analysis.decays import LAID_OUT, Decays, NotLinear, is_distant, of_channels, of_pairs
from dyncc.ir import argument, is_tensor, op_name, operands, same_size, same_sizes, shape, val

PRODUCTS = {"matmul", "bmm"}
PASSING = {"clone", "contiguous", "alias", "detach", "expand", "_unsafe_view", "view", "reshape"}
STEPS = 20


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


def powers(out: fx.Node) -> bool:
    """Whether the left operand of a product is [..., T, T], and decays of distances alone."""
    weights, rank = operands(out)[0], len(shape(out))
    square = len(shape(weights)) > 1 and same_size(*shape(weights)[-2:]) and not pairs(out)
    return square and rank in (3, 4) and same_sizes(shape(operands(out)[1]), shape(out)) and _of_distances(weights, shape(weights)[-1])


def _of_distances(node: fx.Node, tokens: Any, depth: int = 8) -> bool:
    if node.op != "call_function" or depth == 0:
        return False
    wide = [n for n in operands(node) if same_sizes(shape(n)[-2:], shape(node)[-2:])]
    known = op_name(node) in FILLED | LAID_OUT | {"tril", "mul", "div"}
    return is_distant(node, tokens) or (known and any(_of_distances(n, tokens, depth - 1) for n in wide))


@dataclass
class Linear:
    """One linear attention: `q`, `kt` [..., D, T] (where decays differ among channels [..., T, D]) and `v` are operands of its products,
    which stand before `out`; without queries and keys both are None. `scale` is a number; `nearest` says how far behind its row the nearest
    key stands that it sees, where later ones are hidden. `masses` are sums of its weights over keys, with what the weights are multiplied
    by behind each; `rows` are what multiplies ("mul") or divides the weights row by row."""

    out: fx.Node
    tokens: Any
    q: fx.Node | None
    kt: fx.Node | None
    v: fx.Node
    scale: float = 1.0
    nearest: int | None = None
    decays: Decays | None = None
    masses: list[tuple[fx.Node, float]] = field(default_factory=list)
    rows: list[tuple[str, fx.Node]] = field(default_factory=list)

    @property
    def causal(self) -> bool:
        return self.nearest is not None

    @property
    def parts(self) -> list[fx.Node]:
        """The nodes that its value is computed from, less `rows`."""
        decays = None if self.decays is None else self.decays.node
        return [n for n in (self.q, self.kt, self.v, decays) if isinstance(n, fx.Node)]

    def hide(self, nearest: int | None) -> None:
        """Note a mask, beside those that are known."""
        if nearest is not None:
            self.nearest = max(nearest, self.nearest or 0)


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
    q, kt = operands(node)
    rows = shape(q)[:-1]
    if not (same_sizes(rows, shape(out)[:-1]) and same_sizes(shape(v)[:-1], rows) and same_sizes(shape(kt)[:-2], rows[:-1])):
        raise NotLinear("queries, keys and values are not one batch of heads with one number of tokens")
    if len({val(n).dtype for n in (q, kt, v, out)}) > 1:
        raise NotLinear("queries, keys and values have different types")
    if found.causal and found.decays is None and (told := of_channels(q, kt)) is not None:
        q, kt, found.decays = told
    found.q, found.kt = q, kt
    _check(found)
    return found


def read_powers(out: fx.Node) -> Linear:
    """The moving average that a product of `powers` and values is.

    Raises:
        NotLinear: with the first thing that is not understood.
    """
    weights, v = operands(out)
    found = Linear(out, shape(out)[-2], None, None, v)
    _factor(found, weights)
    if not found.causal:
        raise NotLinear("its weights decay, and hide no later tokens")
    if val(v).dtype != val(out).dtype:
        raise NotLinear("weights and values have different types")
    _check(found)
    return found


def _check(found: Linear) -> None:
    if found.decays is not None and not found.causal:
        raise NotLinear("its weights decay, and hide no later tokens")
    if found.nearest is not None and found.nearest > 1:
        raise NotLinear(f"its weights hide the {found.nearest} nearest tokens; a token's own may be hidden")


def _alone(found: Linear, node: fx.Node) -> None:
    """Besides the next step, only sums over keys may read weights: those behind which nothing more is hidden."""
    others = [u for u in node.users if op_name(u) == "sum" and _over_keys(u, len(shape(node)))]
    if len(node.users) - len(others) != 1:
        raise NotLinear("its weights are read elsewhere too")
    if others and (found.causal or found.decays is not None):
        raise NotLinear("its weights are summed over keys before they are masked")
    found.masses += [(u, found.scale) for u in others]


def _over_keys(node: fx.Node, rank: int) -> bool:
    return [d % rank for d in argument(node, "dim") or []] == [rank - 1] and argument(node, "dtype") is None


def _step(found: Linear, node: fx.Node, inner: fx.Node) -> None:
    """What one node between the products says."""
    name = op_name(node)
    if name in PASSING or (name in ("to", "_to_copy") and val(node).dtype == val(inner).dtype):
        return
    if name == "tril":
        nearest = lower(node)
        if nearest is None:
            raise NotLinear(f"tril keeps the diagonals up to {argument(node, 'diagonal')}, not up to a token's own")
        found.hide(nearest)
    elif name in FILLED:
        told = filled(node)
        if told is None or told[0] is not inner or told[1] != 0.0:
            raise NotLinear(f"{name} fills in something else than 0 for later tokens")
        found.hide(told[2])
    elif name in ("mul", "div"):
        _times(found, node, inner)
    else:
        raise NotLinear(f"{name} stands between its products")


def _times(found: Linear, node: fx.Node, inner: fx.Node) -> None:
    """What multiplies or divides weights: a number, something for each row, or a factor for each pair."""
    name = op_name(node)
    other = next((a for a in node.args if a is not inner), inner)
    if name == "div" and node.args[0] is not inner:
        raise NotLinear("something is divided by its weights")
    if isinstance(other, (int, float)):
        found.scale *= other if name == "mul" else 1 / other
    elif isinstance(other, fx.Node) and shape(other) and same_size(shape(other)[-1], 1):
        if found.masses:
            raise NotLinear("its weights are summed over keys, and then scaled row by row")
        found.rows.append((name, other))
    elif name == "div" or not isinstance(other, fx.Node):
        raise NotLinear("its weights are divided by a tensor that differs from key to key")
    else:
        _factor(found, other)


def _factor(found: Linear, node: fx.Node) -> None:
    """What multiplies the weights: a causal mask of ones, decays, or a product of such."""
    name, inner = op_name(node), operands(node)[:1]
    known = node.op == "call_function" and _all_pairs(found, node)
    wide = [n for n in operands(node) if _all_pairs(found, n)]
    if known and (nearest := nearest_seen(node)) is not None:
        found.hide(nearest)
    elif known and name in LAID_OUT and inner and _in_front(node, inner[0]):
        _factor(found, inner[0])
    elif known and name == "mul" and len(wide) == 2:
        for part in operands(node):
            _factor(found, part)
    elif known and name == "tril" and (nearest := lower(node)) is not None:
        found.hide(nearest)
        _factor(found, inner[0])
    elif known and name in FILLED and (told := filled(node)) is not None and told[1] == 0.0:
        found.hide(told[2])
        _factor(found, told[0])
    elif known and name in ("exp", "pow") and found.decays is None:
        found.decays = of_pairs(node, found.tokens)
        found.hide(found.decays.nearest)
    elif known and name in ("mul", "div") and found.q is None and len(wide) == 1:
        _times(found, node, wide[0])
        _factor(found, wide[0])
    else:
        told_name = name if node.op == "call_function" else "an input"
        raise NotLinear(f"{told_name} multiplies its weights, no decay or causal mask that is known")


def _all_pairs(found: Linear, node: fx.Node) -> bool:
    """Whether a node is [..., T, T]: one that is broadcast means something else."""
    return len(shape(node)) > 1 and all(same_size(size, found.tokens) for size in shape(node)[-2:])


def _in_front(node: fx.Node, inner: fx.Node) -> bool:
    """Whether a node only adds dimensions in front of what it looks at, as broadcasting does."""
    if op_name(node) == "unsqueeze":
        return argument(node, "dim") in (0, -len(shape(node)))
    return op_name(node) == "expand" or same_sizes(shape(inner), shape(node))
