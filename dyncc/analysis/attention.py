"""Attention regions, fused or spelled out, found by dataflow and never by model name.

Fused: one node, SDPA or `dyncc::attend`. Spelled out: a softmax whose input comes, through scaling, masking, soft caps and casts, from a
matmul of queries with keys, and whose output reaches, through casts, NaN guards and dropout, a matmul with values.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from dyncc.ir import argument, is_attention, is_tensor, op_name, operands, shape

SOFTMAX = {"softmax", "_softmax", "_safe_softmax"}
MATMUL = {"matmul", "bmm", "baddbmm"}
BETWEEN = {
    "add", "sub", "mul", "div", "to", "_to_copy", "type_as", "where", "masked_fill", "tanh", "clamp", "clamp_min", "maximum", "clone",
    "contiguous", "view", "reshape", "dropout", "float_power", "expand", "sub_", "add_", "mul_", "div_", "masked_fill_", "nan_to_num",
    "alias",
}
CARRY = {
    "view", "reshape", "expand", "unsqueeze", "slice", "transpose", "permute", "clone", "contiguous", "to", "alias", "cat", "index_copy",
    "index_copy_", "repeat_interleave", "partly_read", "spread",
}


@dataclass(frozen=True)
class AttentionRegion:
    """One attention: `q` [..., Tq, D] and `k` as the product takes them, `softmax` (None when fused), `mask`, and `out`, the result."""

    index: int
    fused: bool
    q: fx.Node
    k: fx.Node
    v: fx.Node
    out: fx.Node
    softmax: fx.Node | None
    mask: fx.Node | None

    @property
    def core(self) -> fx.Node:
        """The node in which keys are weighed: SDPA itself, or the softmax."""
        return self.out if self.softmax is None else self.softmax

    @property
    def extras(self) -> str:
        """Words about what a fused attention does beyond SDPA, '' where it does nothing: for passes that compute logits anew."""
        if op_name(self.out) != "attend":
            return ""
        told = [name for name in ("cap", "sinks", "window", "prefix", "slopes", "gate") if argument(self.out, name)]
        return f"it is fused with {' and '.join(told)}; put fuse-attention behind this pass" if told else ""


def find_attention(graph: fx.Graph) -> tuple[tuple[AttentionRegion, ...], int, tuple[str, ...]]:
    """The regions in graph order, how many to expect (softmaxes and SDPAs), and why any softmax is no region."""
    regions: list[AttentionRegion] = []
    misses: list[str] = []
    expected = 0
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if is_attention(node):
            expected += 1
            slots, mask = operands(node), argument(node, "attn_mask")
            regions.append(AttentionRegion(len(regions), True, slots[0], slots[1], slots[2], node, None, mask))
        elif op_name(node) in SOFTMAX and node.args and isinstance(node.args[0], fx.Node):
            expected += 1
            found = _spelled(node, len(regions))
            if isinstance(found, str):
                misses.append(f"{node.name}: {found}")
            else:
                regions.append(found)
    return tuple(regions), expected, tuple(misses)


def _spelled(softmax: fx.Node, index: int) -> AttentionRegion | str:
    product, mask = _query_key_product(softmax)
    if product is None:
        return "no matmul of queries and keys feeds this softmax"
    out = _value_product(softmax)
    if out is None:
        return "no matmul with values follows this softmax"
    pair = operands(product)[-2:]
    values = next(n for n in operands(out)[-2:] if not _comes_from(n, softmax))
    return AttentionRegion(index, False, pair[0], pair[1], values, out, softmax, mask)


def _query_key_product(softmax: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    node, mask = softmax.args[0], None
    for _ in range(24):
        if not isinstance(node, fx.Node) or node.op != "call_function":
            return None, None
        name = op_name(node)
        if name in MATMUL:
            return node, mask
        if name not in BETWEEN:
            return None, None
        tensors = [n for n in operands(node) if is_tensor(n)]
        rows = shape(softmax)[-1]
        nexts = [n for n in tensors if _reaches_product(n)]
        if not nexts:
            return None, None
        others = [n for n in tensors if n is not nexts[0] and shape(n) and shape(n)[-1] == rows]
        if name in ("add", "add_", "where", "masked_fill", "masked_fill_", "sub") and others and mask is None:
            mask = others[0]
        node = nexts[0]
    return None, None


def _reaches_product(node: fx.Node, depth: int = 24) -> bool:
    for _ in range(depth):
        if node.op != "call_function":
            return False
        name = op_name(node)
        if name in MATMUL:
            return True
        if name not in BETWEEN:
            return False
        tensors = [n for n in operands(node) if is_tensor(n)]
        if not tensors:
            return False
        if len(tensors) > 1:
            return any(_reaches_product(n, depth - 1) for n in tensors)
        node = tensors[0]
    return False


def _value_product(softmax: fx.Node) -> fx.Node | None:
    seen, stack = set(), [softmax]
    while stack:
        node = stack.pop(0)
        for user in node.users:
            if user in seen or user.op != "call_function":
                continue
            seen.add(user)
            if op_name(user) in MATMUL:
                return user
            if op_name(user) in BETWEEN:
                stack.append(user)
    return None


def _comes_from(node: fx.Node, source: fx.Node, depth: int = 12) -> bool:
    stack = [(node, 0)]
    while stack:
        n, d = stack.pop()
        if n is source:
            return True
        if d < depth and n.op == "call_function" and op_name(n) in BETWEEN:
            stack.extend((m, d + 1) for m in operands(n))
    return False


def kv_sources(region: AttentionRegion) -> set[fx.Node]:
    """The nodes that hold this region's keys and values on their way to it: reshapes, casts, cache writes (not the projections)."""
    found: set[fx.Node] = set()
    stack = [region.k, region.v]
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found.add(node)
        if node.op == "call_function" and op_name(node) in CARRY:
            stack.extend(n for n in operands(node) if is_tensor(n))
    return found
