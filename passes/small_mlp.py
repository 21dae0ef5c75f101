"""A small MLP beside a layer's own: the same operations on narrower weights, which are given.

Its weights are `up`, `gate` where two linear layers read the MLP's input (the gate is the one that an activation follows), and `down`.
Alizadeh et al., Duo-LLM: A Framework for Studying Adaptive Computation in Large Language Models, 2024.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from dyncc.analysis.layers import Layer, Stack
from dyncc.ir import ancestors, argument, descendants, op_name, operands, refresh, shape
from dyncc.restrict import Refusal, where

PRODUCTS = {"linear", "addmm", "mm", "matmul"}


def small_mlp(layer: Layer, given: Callable[[str], fx.Node]) -> fx.Node:
    """The state behind a layer [B, T, D] whose MLP is the small one, of all rows, in front of the layer's end.

    Args:
        layer: starts where its MLP does.
        given: the node of a weight by its name, such as "up.weight".
    Raises:
        Refusal: the MLP is not of two linear layers or three, or has sizes written into it.
    """
    up, gate, down = _linears(layer)
    known: dict[fx.Node, fx.Node] = {}
    for name, linear in (("up", up), ("gate", gate), ("down", down)):
        for part, slot in (("weight", 1), ("bias", 2)) if linear is not None else ():
            if linear is not None and len(operands(linear)) > slot:
                known[operands(linear)[slot]] = given(f"{name}.{part}")
    first = [n for n in (up, gate) if n is not None]
    inside = set().union(*({n, *descendants(n)} for n in first)) & ancestors([layer.end])
    end = layer.end
    for node in [n for n in end.graph.nodes if n in inside]:
        with end.graph.inserting_before(end):
            known[node] = end.graph.node_copy(node, lambda n: known.get(n, n))
        try:
            refresh(known[node])
        except Exception as problem:
            raise Refusal(f"{where(node)} does not take a narrower MLP: {str(problem).splitlines()[0]}") from problem
    if shape(known[end]) != shape(end):
        raise Refusal(f"{where(end)} does not take a narrower MLP")
    return known[end]


def mlp_start(stack: Stack, layer: Layer) -> fx.Node:
    """The state that a layer's MLP reads and is added to: the last of the stream in front of its first product.

    Raises:
        Refusal: nothing is multiplied behind the attention.
    """
    inside = descendants(layer.middle) & ancestors([layer.end])
    first = next((n for n in layer.end.graph.nodes if n in inside and op_name(n) in PRODUCTS), None)
    if first is None:
        raise Refusal(f"layer {layer.index} has no MLP behind its attention")
    before = ancestors([first])
    return [n for n in stack.spine if n in before][-1]


def _linears(layer: Layer) -> tuple[fx.Node, fx.Node | None, fx.Node]:
    """The linear layers of an MLP: up, gate (or None) and down."""
    inside = descendants(layer.start) & ancestors([layer.end])
    found = [n for n in layer.end.graph.nodes if n in inside and op_name(n) == "linear"]
    first = [n for n in found if not ancestors([n]) & (set(found) - {n})]
    last = [n for n in found if not descendants(n) & set(found)]
    if len(last) != 1 or len(first) not in (1, 2) or len(found) != len(first) + 1 or len({operands(n)[0] for n in first}) > 1:
        raise Refusal(f"the MLP of layer {layer.index} is no two linear layers, nor three with a gate, so it has no small form")
    if any(argument(n, "weight").op != "placeholder" for n in found):
        raise Refusal(f"the MLP of layer {layer.index} computes its weights, so it has no small form")
    if len(first) == 1:
        return first[0], None, last[0]
    plain = [n for n in first if all(op_name(u) == "mul" for u in n.users)]
    if len(plain) != 1:
        raise Refusal(f"the MLP of layer {layer.index} does not say which of its linear layers is the gate")
    gate = next(n for n in first if n is not plain[0])
    return plain[0], gate, last[0]
