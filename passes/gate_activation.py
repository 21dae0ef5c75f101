"""A gate taken apart: the function that it went through last, and what stands before that."""

from __future__ import annotations

import torch
from torch import fx

from dyncc.ir import op_name, operands, refresh, val
from dyncc.passes.gate_product import ACTIVATIONS, CASTS, LAYOUT
from dyncc.restrict import Refusal

PROJECTIONS = {"linear", "addmm", "matmul", "bmm"}


def activated(node: fx.Node) -> tuple[str, fx.Node]:
    """(activation, the gate before it laid out as behind it): what only looks at a gate another way may do so before it is activated.

    Raises:
        Refusal: it went through a function that the fused attention does not have.
    """
    chain: list[fx.Node] = []
    current = node
    while current.op == "call_function" and op_name(current) in LAYOUT | CASTS and isinstance(current.args[0], fx.Node):
        chain.append(current)
        current = current.args[0]
    if op_name(current) in PROJECTIONS and current.op == "call_function":
        return "none", node
    activation, gate = ACTIVATIONS.get(op_name(current)), operands(current)[:1]
    if op_name(current) == "mul" and (inner := _silu_by_hand(current)) is not None:
        activation, gate = "silu", [inner]
    if current.op != "call_function" or activation is None:
        told = op_name(current) if current.op == "call_function" else "nothing"
        raise Refusal(f"what multiplies it went through {told}; gates through sigmoid or silu are known, and projections")
    made = _before_cast(gate[0], val(node).dtype)
    for link in reversed(chain):
        if op_name(link) not in CASTS:
            made = twin_of(link, operands(link)[0], made, link)
    return activation, made


def _before_cast(gate: fx.Node, dtype: torch.dtype) -> fx.Node:
    """A gate that is activated in a wider type and cast back, in its own type: it is rounded to that in the end."""
    while val(gate).dtype != dtype and op_name(gate) in CASTS:
        gate = operands(gate)[0]
    return gate


def _silu_by_hand(node: fx.Node) -> fx.Node | None:
    """x of x * sigmoid(x)."""
    a, b = (*operands(node), None, None)[:2]
    for x, y in ((a, b), (b, a)):
        if x is not None and y is not None and op_name(y) == "sigmoid" and y.args[0] is x:
            return x
    return None


def twin_of(node: fx.Node, source: fx.Node, instead: fx.Node, before: fx.Node) -> fx.Node:
    """A copy of a node that looks at another value; a view may have to copy there."""
    with node.graph.inserting_before(before):
        twin = node.graph.node_copy(node, lambda n: instead if n is source else n)
    if twin.target is torch.ops.aten.view.default:
        twin.target = torch.ops.aten.reshape.default
    refresh(twin)
    return twin
