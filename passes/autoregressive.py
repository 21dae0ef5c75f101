"""Whether a model is autoregressive, and whether it answers at every position: there, a choice among tokens would look ahead."""

from __future__ import annotations

from torch import fx

from dyncc.analysis.facts import Facts
from dyncc.analysis.layers import Layer, Stack
from dyncc.ir import Program, argument, op_name, outputs
from dyncc.restrict import Refusal


def refuse_looking_ahead(program: Program, facts: Facts, stack: Stack) -> None:
    """Refusal where an output of an autoregressive model holds a row of every token."""
    if not any(is_causal(x) for x in stack.layers):
        return
    named = [(i, n) for i, n in enumerate(outputs(program.graph)) if isinstance(n, fx.Node) and i not in facts.kv_outputs]
    whole = [i for i, n in named if facts.axes.places(n, stack.axis)]
    if whole:
        raise Refusal(
            f"output {whole[0]} of this autoregressive model covers all positions, and which tokens stay depends on later ones; "
            "ask for the last position only (such as logits_to_keep=1)"
        )


def is_causal(layer: Layer) -> bool:
    """Whether the attention is autoregressive: SDPA's flag, or a mask made by comparing positions of rows and keys."""
    region = layer.attention
    if region.fused and argument(region.out, "is_causal", False):
        return True
    stack, seen = [region.mask] if region.mask is not None else [], set()
    while stack:
        node = stack.pop()
        if node in seen or op_name(node) == "embedding":
            continue
        seen.add(node)
        if op_name(node) in ("le", "ge", "lt", "gt", "tril", "triu") and len(node.meta["val"].shape) >= 2 and _two_positions(node):
            return True
        stack.extend(node.all_input_nodes)
    return False


def _two_positions(node: fx.Node) -> bool:
    sizes = node.meta["val"].shape
    return op_name(node) in ("tril", "triu") or all(not (isinstance(s, int) and s == 1) for s in sizes[-2:])
