"""Attention to learned slots, read from how it was written: gelu(c s / max(|s|, eps)) V with s = x K' (Pattention, Wang et al. 2024).

From the product with values backward to that with keys. Candidates are products of weights that an activation makes of scores divided by
their own length; the first thing that is not known ends the reading, with its reason.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import fx

from dyncc.analysis.spelled import number
from dyncc.ir import argument, is_mutating, op_name, operands, same_sizes, shape, val

PRODUCTS = {"matmul", "mm", "linear"}
ACTIVATIONS = {"gelu", "relu", "silu", "tanh", "sigmoid"}
LENGTHS = {"linalg_vector_norm", "norm"}
PASSING = {"clone", "contiguous", "alias", "detach", "expand", "expand_as"}
FLOORS = {"clamp_min", "clamp"}
TIMES = {"mul", "div", "true_divide"}


class NotSlots(Exception):
    """Why weights of unit length are no attention to slots that is understood."""


@dataclass(frozen=True)
class Slots:
    """One attention: `out` the product with values, `scores` that with keys, and what stands between them."""

    out: fx.Node
    scores: fx.Node
    scale: float
    eps: float
    approximate: str


def slots(graph: fx.Graph) -> list[fx.Node]:
    """Products whose weights come from an activation and from scores divided by their length, in any order."""
    found = []
    for node in graph.nodes:
        if node.op == "call_function" and op_name(node) in PRODUCTS:
            names = [op_name(n) for n in _chain(operands(node)[0])]
            if ACTIVATIONS & set(names) and any(_divided(n) for n in _chain(operands(node)[0])):
                found.append(node)
    return found


def read_slots(out: fx.Node) -> Slots:
    """The attention whose product with values is `out`.

    Raises:
        NotSlots: with the first thing that is not understood.
    """
    chain = _chain(operands(out)[0])
    if op_name(chain[-1]) not in PRODUCTS:
        raise NotSlots(f"{op_name(chain[-1])} stands between its weights and a product with keys")
    found = _Found(set(chain))
    for node, inner in itertools.pairwise(chain):
        _step(found, node, inner)
    if found.unit not in (None, chain[-1]):
        raise NotSlots("its scores are divided by the length of something else")
    if found.eps is None or not found.approximate:
        raise NotSlots("no gelu of scores of unit length makes its weights")
    _check(out, chain[-1], found.inside)
    return Slots(out, chain[-1], found.scale, found.eps, found.approximate)


@dataclass
class _Found:
    """What was read so far, from the weights backward; `eps` is known behind the division, `approximate` behind gelu. `unit` are the scores
    whose length was taken, until they are reached."""

    inside: set[fx.Node]
    scale: float = 1.0
    eps: float | None = None
    approximate: str = ""
    unit: fx.Node | None = None


def _step(found: _Found, node: fx.Node, inner: fx.Node) -> None:
    """What one node that makes weights of `inner` says."""
    name = op_name(node)
    if node is found.unit:
        found.unit = None
    if name in ACTIVATIONS:
        _activation(found, node)
    elif _divided(node):
        if found.eps is not None or not found.approximate:
            raise NotSlots("its scores are divided by their length behind the activation, or twice; once in front of it is known")
        found.eps, found.unit, parts = _length(node)
        found.inside |= parts
    elif name in TIMES:
        _times(found, _factor(node, inner))


def _activation(found: _Found, node: fx.Node) -> None:
    if op_name(node) != "gelu" or found.approximate:
        raise NotSlots(f"its weights are made by {op_name(node)}, not by one gelu alone")
    if found.eps is not None:
        raise NotSlots("its scores are divided by their length twice")
    found.approximate = str(argument(node, "approximate"))


def _times(found: _Found, factor: float) -> None:
    """A factor behind gelu is none that scores have; one in front of the length leaves its least value alone."""
    if not found.approximate:
        raise NotSlots("its weights are multiplied behind the activation")
    if found.eps is None or found.unit is not None:
        found.scale *= factor
    elif not factor > 0:
        raise NotSlots(f"its scores are scaled by {factor} before their length is taken")
    else:
        found.eps /= factor


def _chain(node: fx.Node) -> list[fx.Node]:
    """From weights back to the product that makes scores: at each step the first operand that is as large."""
    chain = [node]
    while node.op == "call_function" and op_name(node) in PASSING | TIMES | ACTIVATIONS and operands(node):
        node = operands(node)[0]
        chain.append(node)
    return chain


def _divided(node: fx.Node) -> bool:
    """Whether a node divides by a length."""
    return op_name(node) in ("div", "true_divide") and _norm(node) is not None


def _norm(node: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """The length that a node divides by, and what stands between."""
    by, passed = node.args[1], []
    while isinstance(by, fx.Node) and by.op == "call_function" and op_name(by) in PASSING | FLOORS:
        passed.append(by)
        by = operands(by)[0]
    return (by, passed) if isinstance(by, fx.Node) and op_name(by) in LENGTHS else None


def _length(node: fx.Node) -> tuple[float, fx.Node, set[fx.Node]]:
    """The least length that a node divides by, of which scores it is, and its nodes.

    Raises:
        NotSlots: it is another length than the Euclidean one of a row's scores.
    """
    norm, passed = _norm(node)  # type: ignore[misc]
    scores, dims = operands(norm)[0], argument(norm, "dim")
    rank = len(shape(scores))
    order = argument(norm, "ord", argument(norm, "p", 2))
    if order not in (2, 2.0) or not argument(norm, "keepdim", False) or argument(norm, "dtype") is not None:
        raise NotSlots(f"its scores are divided by a norm of order {order}; their Euclidean length is known")
    if [d % rank for d in ([dims] if isinstance(dims, int) else dims or [])] != [rank - 1]:
        raise NotSlots("its scores are divided by a length along another dimension than that of slots")
    eps = 0.0
    for floor in (n for n in passed if op_name(n) in FLOORS):
        least = number(argument(floor, "min"))
        if least is None or least < 0 or argument(floor, "max") is not None:
            raise NotSlots("the length that its scores are divided by is bounded by something else than a least number")
        eps = max(eps, least)
    return eps, scores, {norm, *passed}


def _factor(node: fx.Node, inner: fx.Node) -> float:
    other = number(node.args[1]) if node.args[0] is inner else None
    if other is None or (op_name(node) != "mul" and not other):
        raise NotSlots("its scores are multiplied by a tensor")
    return other if op_name(node) == "mul" else 1 / other


def _check(out: fx.Node, scores: fx.Node, inside: set[fx.Node]) -> None:
    """NotSlots where slots differ among rows, a bias moves scores, types differ, or something between the products is read elsewhere."""
    keys, values = operands(scores)[1], operands(out)[1]
    if len(shape(keys)) != 2 or len(shape(values)) != 2:
        raise NotSlots("its keys and values differ among rows of the batch")
    if len(operands(scores)) > 2:
        raise NotSlots("a bias is added to its scores")
    if not same_sizes(shape(scores), shape(operands(out)[0])) or len({val(n).dtype for n in (*inside, *operands(scores), values)}) > 1:
        raise NotSlots("its scores, weights and values are not of one type and size")
    if any(is_mutating(n) for n in inside):
        raise NotSlots("something between its products is written in place")
    if any(user not in inside and user is not out for n in inside for user in n.users):
        raise NotSlots("its scores or weights are read elsewhere")
    order = {n: i for i, n in enumerate(out.graph.nodes)}
    if any(is_mutating(n) and order[scores] < i < order[out] for n, i in order.items()):
        raise NotSlots("something is written in place between its products")
