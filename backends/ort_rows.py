"""Attention on rows [B, T, H D] instead of on heads [B, H, T, D]: the same op reads both, and the transposes around it go.

ONNX's `Attention` (opset 23) takes 3-D queries, keys and values with the numbers of heads as attributes.
"""

from __future__ import annotations

import onnx_ir as ir

SPLIT = [0, 2, 1, 3]
"""The permutation between [B, T, H, D] and [B, H, T, D], both ways."""


def attend_to_rows(graph: ir.Graph) -> int:
    """Edit a graph in place; how many attentions take rows now. One with a cache, or with heads made otherwise, stays as it is."""
    return sum(_to_rows(graph, node) for node in list(graph) if node.op_type == "Attention" and node.domain == "")


def _to_rows(graph: ir.Graph, node: ir.Node) -> bool:
    if any(v is not None for v in node.inputs[4:]) or any(v.uses() for v in node.outputs[1:]) or node.outputs[0].is_graph_output():
        return False
    rows = [_rows_of(value) for value in node.inputs[:3]]
    end = _merged(node.outputs[0])
    if end is None or any(r is None for r in rows):
        return False
    heads = [size for v in node.inputs[:2] if v is not None and v.shape is not None and isinstance(size := v.shape[1], int)]
    if len(heads) != 2:
        return False
    for slot, value in enumerate(rows):
        node.replace_input_with(slot, value)
    node.attributes["q_num_heads"] = ir.AttrInt64("q_num_heads", heads[0])
    node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", heads[1])
    node.outputs[0].shape = end.shape
    ir.convenience.replace_all_uses_with(end, node.outputs[0])
    return True


def _rows_of(value: ir.Value | None) -> ir.Value | None:
    """The [B, T, H D] that heads [B, H, T, D] were made of by one reshape and one transpose."""
    transpose = value.producer() if value is not None else None
    if transpose is None or transpose.op_type != "Transpose" or list(transpose.attributes.get_ints("perm", [])) != SPLIT:
        return None
    reshape = transpose.inputs[0].producer() if transpose.inputs[0] is not None else None
    source = reshape.inputs[0] if reshape is not None and reshape.op_type == "Reshape" else None
    heads = value.shape if value is not None else None
    if source is None or source.shape is None or len(source.shape) != 3 or heads is None or len(heads) != 4:
        return None
    sizes = (heads[1], heads[3], source.shape[2])
    same = all(isinstance(s, int) for s in sizes) and sizes[0] * sizes[1] == sizes[2]  # type: ignore[operator]
    return source if same and _same(source.shape[1], heads[2]) and _same(source.shape[0], heads[0]) else None


def _merged(heads: ir.Value) -> ir.Value | None:
    """The [B, T, H D] that heads are merged to, where nothing else reads them."""
    uses = list(heads.uses())
    if len(uses) != 1 or uses[0].node.op_type != "Transpose" or list(uses[0].node.attributes.get_ints("perm", [])) != SPLIT:
        return None
    turned = uses[0].node.outputs[0]
    uses = list(turned.uses())
    if len(uses) != 1 or uses[0].node.op_type != "Reshape" or turned.is_graph_output():
        return None
    end = uses[0].node.outputs[0]
    fits = end.shape is not None and heads.shape is not None and len(end.shape) == 3 and not end.is_graph_output()
    return end if fits and _same(end.shape[1], heads.shape[2]) and _same(end.shape[0], heads.shape[0]) else None  # type: ignore[index]


def _same(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> bool:
    """Whether two sizes are known to be equal."""
    return a == b and getattr(a, "value", a) is not None
