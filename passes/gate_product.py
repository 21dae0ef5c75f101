"""Where the result of an attention is multiplied by a gate, how it lies there, and what is gated instead where nothing multiplies it."""

from __future__ import annotations

from torch import fx

from dyncc.ir import argument, is_tensor, op_name, operands, same_size, same_sizes, shape
from dyncc.restrict import Refusal

MERGES = {"view", "reshape", "_unsafe_view", "flatten"}
KEEPS = {"contiguous", "clone", "alias"}
LAYOUT = MERGES | KEEPS | {"transpose", "permute", "unsqueeze", "squeeze", "expand", "slice", "select", "unflatten"}
CASTS = {"to", "_to_copy"}
ACTIVATIONS = {"sigmoid": "sigmoid", "silu": "silu"}
NORMS = {"rms_norm", "_fused_rms_norm", "layer_norm", "group_norm", "rsqrt", "pow", "var_mean"}


def product_of(attention: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(the product, its operand that holds the attention's result), or None where something else reads the result first."""
    node = attention
    while True:
        users = [u for u in node.users if op_name(u) in ("mul", "mul_")] or list(node.users)
        if not users:
            return None
        if op_name(users[0]) in ("mul", "mul_"):
            return (users[0], node) if len([n for n in operands(users[0]) if is_tensor(n)]) == 2 else None
        if op_name(users[0]) not in MERGES | KEEPS | {"transpose", "permute"}:
            return None
        node = users[0]


def state_of(attention: fx.Node, result: fx.Node) -> tuple[str, fx.Node]:
    """How the result lies where the gate meets it, "heads" [B, H, T, D], "tokens" [B, T, H, D] or "merged" [B, T, H D]; and the node that
    is [B, H, T, D]: what comes behind the attention where that has the heads of a group as rows.

    Raises:
        Refusal: the result is read elsewhere too, or is laid out in a way that is not known.
    """
    state, node, heads = "heads", attention, attention
    while True:
        if len(node.users) != 1:
            raise Refusal("its result is read elsewhere too, before the gate")
        if node is result:
            return state, heads
        source, node = node, next(iter(node.users))
        name, rank = op_name(node), len(shape(node))
        if name in KEEPS or (name in MERGES and same_sizes(shape(node), shape(source))):
            continue
        if name in MERGES and source is heads and rank == 4 and same_sizes(shape(node)[::3], shape(source)[::3]):
            heads = node
        elif state == "heads" and rank == 4 and _swaps(node):
            state = "tokens"
        elif state == "tokens" and name in MERGES and rank == 3 and same_size(shape(node)[1], shape(heads)[2]):
            state = "merged"
        else:
            raise Refusal(f"{name} ({list(shape(node))}) stands between it and the gate")


def _swaps(node: fx.Node) -> bool:
    if op_name(node) == "permute":
        return list(argument(node, "dims")) == [0, 2, 1, 3]
    return op_name(node) == "transpose" and {d % 4 for d in node.args[1:3]} == {1, 2}  # type: ignore[operator]


def why_none(attention: fx.Node) -> str:
    """What is gated instead of an attention's result; ''."""
    for name, operand in zip(("queries", "keys", "values"), operands(attention), strict=False):
        while operand.op == "call_function" and op_name(operand) in LAYOUT | CASTS:
            operand = operands(operand)[0]
        if op_name(operand) == "mul" and any(op_name(n) in ACTIVATIONS for n in _sources(operand)):
            return f"its {name} are gated, not its result: engines fuse that product with the projection in front of it"
    node = attention
    while len(node.users) == 1 and op_name(next(iter(node.users))) in LAYOUT | CASTS:
        node = next(iter(node.users))
    if any(op_name(u) in NORMS for u in node.users):
        return "its result is normalised before anything multiplies it: such a gate belongs to the norm"
    return ""


def _sources(product: fx.Node) -> list[fx.Node]:
    """The operands of a product, before they were laid out."""
    found = []
    for node in operands(product):
        while node.op == "call_function" and op_name(node) in LAYOUT | CASTS:
            node = operands(node)[0]
        found.append(node)
    return found
