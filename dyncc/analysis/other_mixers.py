"""What mixes tokens in a graph without a linear attention in it: the words for a refusal, found by dataflow."""

from __future__ import annotations

from torch import fx

from dyncc.ir import descendants, op_name, operands

PRODUCTS = {"matmul", "bmm"}
PASSING = {"clone", "contiguous", "expand", "_unsafe_view", "view", "reshape", "transpose", "permute", "div", "mul", "to", "_to_copy"}
JOINS = {"stack", "cat"}
ACTIVATIONS = {"gelu", "relu", "silu", "tanh", "sigmoid"}


def why_none(graph: fx.Graph) -> str:
    """Why there is no linear attention: the first of what is known to stand in its place, or that nothing does."""
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    for known in (_solved, _looped, _read_at_once, _keys_first, _softmax, _activated):
        for node in nodes:
            told = known(node)
            if told:
                return f"{node.name}: {told}"
    return "no product of queries and keys meets values without a softmax, and no loop over tokens"


def _solved(node: fx.Node) -> str:
    if op_name(node) != "linalg_solve_triangular":
        return ""
    return "a triangular solve over tokens is one operation already, and no recurrence with a state of fixed size"


def _looped(node: fx.Node) -> str:
    """A loop over tokens whose results are its state."""
    pieces = _pieces(node)
    if len(pieces) < 3 or pieces[2] not in descendants(pieces[1]):
        return ""
    joined = [s for s in descendants(pieces[0]) if s is not node and op_name(s) in JOINS and pieces[2] in descendants(s)]
    if joined:
        return "a loop in which each token reads earlier results in another way than by weights; it stays token after token"
    return "a loop whose state is what it gives, in another way than decayed with something added; it stays token after token"


def _read_at_once(node: fx.Node) -> str:
    pieces = _pieces(node)
    if len(pieces) < 2 or any(op_name(p) not in PRODUCTS for p in pieces[:2]):
        return ""
    one, two = (operands(p)[1] for p in pieces[:2])
    if one is two or two not in descendants(one):
        return ""
    return "a loop in which several tokens read one state; a loop that reads the state once for each token is known"


def _keys_first(node: fx.Node) -> str:
    if op_name(node) not in PRODUCTS or op_name(_behind(operands(node)[1])) not in PRODUCTS:
        return ""
    return "values meet keys first already, in time that grows with the tokens alone"


def _softmax(node: fx.Node) -> str:
    if "softmax" not in op_name(node) and op_name(node) != "scaled_dot_product_attention":
        return ""
    return "a softmax makes its weights; fuse-attention and fuse-gated-attention are the passes for those"


def _activated(node: fx.Node) -> str:
    name = op_name(_behind(operands(node)[0])) if op_name(node) in (*PRODUCTS, "linear") else ""
    return f"{name} stands between its products, which no recurrence computes" if name in ACTIVATIONS else ""


def _behind(node: fx.Node) -> fx.Node:
    """What a node lays out or scales."""
    while op_name(node) in PASSING and operands(node):
        node = operands(node)[0]
    return node


def _pieces(node: fx.Node) -> list[fx.Node]:
    found = node.args[0] if op_name(node) in JOINS and node.args else ()
    return [p for p in found if isinstance(p, fx.Node)] if isinstance(found, (list, tuple)) else []
