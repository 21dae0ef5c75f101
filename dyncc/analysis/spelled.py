"""Attention that is spelled out, read back into its parts: queries, keys, values, scale, soft cap, masks and sinks.

From a softmax backward to the product of queries and keys, and forward to the product with values. Every step in between must be one whose
meaning is known; the first that is not ends the reading, with its reason. What is read:

    softmax(cap tanh(scale q k' / cap) + masks, or fills, with sinks beside the keys) v
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from dyncc.analysis.attention import MATMUL, SOFTMAX
from dyncc.ir import argument, is_mutating, is_tensor, op_name, operands, same_size, shape, val

HIDING = -1e4
"""A fill or an addend from here down leaves a key no weight beside one that is seen."""
STEPS = 40
PASSING = {"to", "_to_copy", "type_as", "clone", "contiguous", "alias", "detach", "dropout", "view", "reshape", "_unsafe_view"}
TIMES = {"mul", "div", "true_divide"}
SUM = {"add", "sub"}
GUARDS = {"nan_to_num", "where", "masked_fill"}


class NotRead(Exception):
    """Why a softmax is not the middle of an attention that is understood."""


@dataclass(frozen=True)
class Mask:
    """Something said about logits: `node` is added (times `factor`), or logits are hidden where `node` is true (or false: `seen`).

    `at` is the node that held the masked logits: its sizes say what the mask was broadcast to.
    """

    node: fx.Node
    kind: str
    at: fx.Node
    factor: float = 1.0
    value: float = 0.0


@dataclass
class Spelled:
    """One attention. `kt` is [..., D, Tk], as the product takes it; `inside` are the nodes that nobody else reads. `shifted`: something
    that is the same for all keys was added, which a softmax over keys alone does not see."""

    softmax: fx.Node
    product: fx.Node | None = None
    out: fx.Node | None = None
    v: fx.Node | None = None
    scale: float = 1.0
    scales: list[fx.Node] = field(default_factory=list)
    cap: float = 0.0
    masks: list[Mask] = field(default_factory=list)
    sinks: fx.Node | None = None
    shifted: bool = False
    inside: set[fx.Node] = field(default_factory=set)

    @property
    def q(self) -> fx.Node:
        return operands(self.product)[-2]  # type: ignore[arg-type]

    @property
    def kt(self) -> fx.Node:
        return operands(self.product)[-1]  # type: ignore[arg-type]


def softmaxes(graph: fx.Graph) -> list[fx.Node]:
    """Every softmax of a graph."""
    return [n for n in graph.nodes if n.op == "call_function" and op_name(n) in SOFTMAX]


def read(softmax: fx.Node, inside: Collection[fx.Node] = ()) -> Spelled:
    """The attention around a softmax; `inside` are more nodes that nobody else may read.

    Raises:
        NotRead: with the first thing that is not understood.
    """
    rank = len(shape(softmax))
    if rank < 2 or argument(softmax, "dim") not in (-1, rank - 1):
        raise NotRead("the softmax is not along the last dimension")
    found = Spelled(softmax)
    chain = _to_product(softmax)
    found.product, found.inside = chain[-1], {softmax, *chain, *inside}
    for node, inner in zip(reversed(chain[:-1]), reversed(chain[1:]), strict=True):
        _step(found, node, inner)
    if op_name(found.product) == "baddbmm":
        _added_product(found)
    _to_values(found)
    _check_alone(found)
    return found


def _to_product(softmax: fx.Node) -> list[fx.Node]:
    """The nodes from the softmax's operand back to the product of queries and keys."""
    chain: list[fx.Node] = []
    node = operands(softmax)[0]
    while op_name(node) not in MATMUL:
        chain.append(node)
        nexts = [n for n in _towards(node) if _reaches_product(n)]
        if not nexts or len(chain) > STEPS:
            raise NotRead("no product of queries and keys feeds this softmax")
        if is_mutating(node):
            raise NotRead(f"{op_name(node)} writes in place between the product and the softmax")
        node = nexts[0]
    return [*chain, node]


def _towards(node: fx.Node) -> list[fx.Node]:
    """The operands that may hold logits: those as wide as the node's own."""
    if node.op != "call_function":
        return []
    wide = [n for n in operands(node) if is_tensor(n) and len(shape(n)) > 1 and val(n).is_floating_point()]
    if op_name(node) == "cat":
        return wide[:1]
    return [n for n in wide if same_size(shape(n)[-1], shape(node)[-1]) and same_size(shape(n)[-2], shape(node)[-2])]


def _reaches_product(node: fx.Node, depth: int = 0) -> bool:
    if op_name(node) in MATMUL:
        return node.op == "call_function"
    return depth < STEPS and _known(node) and any(_reaches_product(n, depth + 1) for n in _towards(node))


def _known(node: fx.Node) -> bool:
    name = op_name(node).removesuffix("_")
    return node.op == "call_function" and (name in PASSING | TIMES | SUM | GUARDS or name in ("tanh", "cat"))


def _step(found: Spelled, node: fx.Node, inner: fx.Node) -> None:
    """What one node on the way from the product to the softmax says about the logits `inner`."""
    name = op_name(node)
    if name in PASSING:
        _pass_on(node, inner)
    elif found.sinks is not None and name not in SUM:
        raise NotRead(f"{name} stands between the sinks and the softmax")
    elif name in TIMES:
        _times(found, node, inner)
    elif name in SUM:
        _plus(found, node, inner)
    elif name == "tanh":
        if found.masks or found.cap or found.shifted:
            raise NotRead("tanh stands behind a mask or a sum")
        found.cap = 1.0
    elif name == "cat":
        _sink(found, node, inner)
    else:
        _fill(found, node, inner)


def _pass_on(node: fx.Node, inner: fx.Node) -> None:
    if op_name(node) == "dropout" and argument(node, "train", False):
        raise NotRead("dropout is active")
    if not all(same_size(a, b) for a, b in zip(shape(node)[-2:], shape(inner)[-2:], strict=True)):
        raise NotRead(f"{op_name(node)} regroups rows and keys")


def _times(found: Spelled, node: fx.Node, inner: fx.Node) -> None:
    first, second = node.args[:2]
    if second is inner and op_name(node) != "mul":
        raise NotRead("something is divided by the logits")
    other = second if first is inner else first
    factor = number(other)
    if factor is None:
        if not is_tensor(other) or found.masks or found.cap or op_name(node) != "mul":
            raise NotRead("the logits are multiplied by a tensor behind a mask or soft cap")
        if shape(other) and not same_size(shape(other)[-1], 1):  # type: ignore[arg-type]
            raise NotRead("the logits are multiplied by something that differs from key to key")
        found.scales.append(other)  # type: ignore[arg-type]
        return
    factor = 1 / factor if op_name(node) != "mul" and factor else factor
    if not factor > 0 or not math.isfinite(factor):
        raise NotRead(f"the logits are scaled by {factor}")
    if found.cap:
        found.cap *= factor
    else:
        found.scale *= factor
    found.masks = [Mask(m.node, m.kind, m.at, m.factor * factor, m.value * factor) for m in found.masks]


def _plus(found: Spelled, node: fx.Node, inner: fx.Node) -> None:
    first, second = node.args[:2]
    alpha = float(argument(node, "alpha", 1))
    if op_name(node) == "sub" and second is inner:
        raise NotRead("the logits are subtracted from something")
    if second is inner and alpha != 1:
        raise NotRead("the logits are scaled while something is added")
    other = second if first is inner else first
    if other is inner or number(other) is not None:
        if other is inner:
            raise NotRead("the logits are added to themselves")
        found.shifted = True
        return
    assert isinstance(other, fx.Node)
    if not shape(other) or (same_size(shape(other)[-1], 1) and not same_size(shape(node)[-1], 1)):
        found.inside |= _reducers(other, inner)
        found.shifted = True
        return
    if found.sinks is not None:
        raise NotRead("something is added to keys and sinks alike")
    found.masks.append(Mask(other, "added", node, -alpha if op_name(node) == "sub" else alpha))


def _reducers(node: fx.Node, logits: fx.Node, depth: int = 4) -> set[fx.Node]:
    """The nodes that make a row's maximum out of the logits."""
    if node is logits or depth == 0:
        return set()
    below: set[fx.Node] = set().union(*(_reducers(n, logits, depth - 1) for n in node.all_input_nodes))
    return {node, *below} if below or logits in node.all_input_nodes else set()


def _fill(found: Spelled, node: fx.Node, inner: fx.Node) -> None:
    """Logits replaced by a number where a condition holds."""
    if op_name(node) == "masked_fill":
        condition, value, kind = node.args[1], number(node.args[2]), "hidden"
    elif op_name(node) == "where" and len(node.args) == 3:
        kind = "seen" if node.args[1] is inner else "hidden"
        condition, value = node.args[0], number(node.args[2 if kind == "seen" else 1])
    else:
        raise NotRead(f"{op_name(node)} changes the logits")
    if value is None or value > HIDING:
        raise NotRead(f"logits are replaced by {'a tensor' if value is None else value}, which does not hide a key for certain")
    found.masks.append(Mask(condition, kind, node, 1.0, value))  # type: ignore[arg-type]


def _sink(found: Spelled, node: fx.Node, inner: fx.Node) -> None:
    pieces = node.args[0]
    rank = len(shape(node))
    if found.shifted:
        raise NotRead("something is added to the logits of keys, and not to the sinks")
    if not isinstance(pieces, (list, tuple)) or len(pieces) != 2 or pieces[0] is not inner or found.sinks is not None:
        raise NotRead("logits are joined with something that is no sink")
    if argument(node, "dim", 0) not in (-1, rank - 1) or not same_size(shape(pieces[1])[-1], 1):  # type: ignore[arg-type]
        raise NotRead("more than one column is joined to the logits")
    found.sinks = pieces[1]  # type: ignore[assignment]


def _added_product(found: Spelled) -> None:
    """baddbmm(bias, q, k', beta, alpha) is alpha q k' + beta bias."""
    node = found.product
    assert node is not None
    if found.cap or argument(node, "alpha", 1) <= 0:
        raise NotRead("a soft cap stands behind a bias")
    behind = found.scale
    beta, found.scale = float(argument(node, "beta", 1)) * behind, behind * float(argument(node, "alpha", 1))
    if beta:
        found.masks.insert(0, Mask(operands(node)[0], "added", node, beta))


def _to_values(found: Spelled) -> None:
    """From the softmax forward to the product with values."""
    node, dropped = found.softmax, found.sinks is None
    while True:
        users = [u for u in node.users if op_name(u) != "isnan"]
        found.inside |= {u for u in node.users if op_name(u) == "isnan"}
        if len(users) != 1:
            raise NotRead("its weights are read elsewhere (a model that returns attention weights needs them)")
        user, name = users[0], op_name(users[0])
        if name in MATMUL:
            break
        if name == "slice" and not dropped:
            dropped = _drops_last(user, node)
        elif name in PASSING:
            _pass_on(user, node)
        elif not _guards(user, node, found):
            raise NotRead(f"{name if user.op == 'call_function' else user.op} reads the weights behind the softmax")
        found.inside.add(user)
        node = user
    if name == "baddbmm" or operands(user)[0] is not node or operands(user)[1] is node:
        raise NotRead("the weights are not the left side of a product with values")
    if not dropped:
        raise NotRead("the sinks' weights are not left out")
    found.out, found.v = user, operands(user)[1]


def _drops_last(node: fx.Node, source: fx.Node) -> bool:
    dim, rank = argument(node, "dim", 0), len(shape(node))
    if dim % rank != rank - 1 or argument(node, "start", 0) not in (0, None) or argument(node, "step", 1) != 1:
        raise NotRead("other weights than the sinks' are left out")
    if not same_size(shape(node)[-1] + 1, shape(source)[-1]):
        raise NotRead("other weights than the sinks' are left out")
    return True


def _guards(node: fx.Node, source: fx.Node, found: Spelled) -> bool:
    """A row that sees no key gets zeros in place of NaN: fused attention gives them anyway."""
    name = op_name(node)
    if name == "nan_to_num":
        return not argument(node, "nan")
    if name == "masked_fill":
        return node.args[1] in found.inside and number(node.args[2]) == 0
    return name == "where" and node.args[0] in found.inside and node.args[2] is source and number(node.args[1]) == 0


def _check_alone(found: Spelled) -> None:
    for node in found.inside:
        if not all(u in found.inside or u is found.out for u in node.users):
            raise NotRead("its logits or weights are read elsewhere (a model that returns attention weights needs them)")


def number(node: Any) -> float | None:
    """A Python number, or the one that a constant node holds everywhere."""
    if isinstance(node, (bool, int, float)):
        return float(node)
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    name = op_name(node)
    if name in ("full", "new_full", "full_like", "scalar_tensor"):
        return number(argument(node, "s" if name == "scalar_tensor" else "fill_value"))
    if name in ("zeros", "new_zeros", "zeros_like"):
        return 0.0
    return number(node.args[0]) if name in ("to", "_to_copy", "clone", "alias", "lift_fresh_copy", "expand", "detach") else None
