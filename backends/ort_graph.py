"""ONNX Runtime's own fused ops on an exported model: norms with their residual, bias with GELU, projections that read the same rows.

Most of it is onnxscript's `optimize_for_ort`; what it does not do is merging sibling projections, so that one product reads the rows once.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy
from onnx_ir.passes import common as common_passes
from onnxscript.rewriter.ort_fusions import optimize_for_ort

FUSED = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "BiasGelu", "GroupQueryAttention", "QuickGelu")


def optimise(model: ir.Model) -> Counter[str]:
    """Edit a model in place; how many of each fused op it holds then, `packed` projections, and `norms` that had a residual before them."""
    found = Counter({"norms": sum(_has_residual(n) for n in model.graph if n.op_type in ("LayerNormalization", "RMSNormalization"))})
    for node in model.graph:
        if node.op_type == "RMSNormalization" and node.attributes.get_int("axis", -1) == -1:
            node.op_type = "SimplifiedLayerNormalization"  # the name under which ONNX Runtime knows it and its fusions
    fused = [n for n in model.graph if n.op_type == "GroupQueryAttention" and n.inputs[0] is not None and n.inputs[0].dtype is not None]
    kinds = {value: n.inputs[0].dtype for n in fused for value in n.outputs if n.inputs[0] is not None}
    optimize_for_ort(model)
    for value, kind in kinds.items():
        value.type = ir.TensorType(kind) if kind is not None else None  # nothing else tells the types of an op that onnx does not know
    for node in model.graph:
        if node.op_type == "SimplifiedLayerNormalization":
            node.op_type = "RMSNormalization"  # those left over go back to the standard's name
    found["packed"] = _pack_projections(model.graph)
    _pack_attention_inputs(model.graph)
    found["shareable"] = share_cache(model)
    common_passes.CommonSubexpressionEliminationPass()(model)
    common_passes.RemoveUnusedNodesPass()(model)
    model.opset_imports.setdefault("com.microsoft", 1)
    found.update(n.op_type for n in model.graph if n.op_type in FUSED)
    return found


def share_cache(model: ir.Model) -> bool:
    """Take the length of the past from the attention mask, so that past and present may be bound to one larger buffer.

    Returns whether that holds: then no op but GroupQueryAttention looks at the past, whose own size no longer counts.
    """
    past = {v: v.shape[2] for v in model.graph.inputs if v.name and v.name.startswith("past_key_values.") and v.shape is not None}
    masks = {v.name: v for v in model.graph.inputs if v not in past and v.shape is not None and len(v.shape) == 2}
    mask = masks.get("attention_mask")
    if not past or mask is None or mask.shape is None or len(set(past.values())) != 1:
        return False
    surplus = sympy.sympify(f"({mask.shape[1]}) - ({next(iter(past.values()))})")
    readers = [use.node for value in past for use in value.uses()]
    sizes = [n for n in readers if n.op_type == "Shape" and (n.attributes.get_int("start", 0), n.attributes.get_int("end", 9)) == (2, 3)]
    if not surplus.is_Integer or any(n.op_type != "GroupQueryAttention" and n not in sizes for n in readers):
        return False
    for node in sizes:
        whole = ir.node("Shape", [mask], attributes={"start": 1, "end": 2})
        constant = _constant(model.graph, f"{node.name}_new_rows", np.array([int(surplus)]))
        rest = ir.node("Sub", [whole.outputs[0], constant])
        model.graph.insert_before(node, [whole, rest])
        node.outputs[0].replace_all_uses_with(rest.outputs[0])
        model.graph.remove(node, safe=True)
    for value in model.graph.outputs:
        if value.name and value.name.startswith("present.") and value.shape is not None:
            value.shape = ir.Shape([*value.shape[:2], "present_sequence_length", value.shape[3]])
    return True


def _has_residual(norm: ir.Node) -> bool:
    producer = norm.inputs[0].producer() if norm.inputs[0] is not None else None
    return producer is not None and producer.op_type == "Add" and all(v is not None and v.const_value is None for v in producer.inputs)


def _pack_projections(graph: ir.Graph) -> int:
    """One product in place of several of the same rows with constant weights [in, out], biases alike; how many went in."""
    siblings: dict[tuple[Any, bool], list[ir.Node]] = defaultdict(list)
    for node in graph:
        if node.op_type == "MatMul" and node.inputs[1] is not None and _matrix(node.inputs[1]) is not None:
            siblings[node.inputs[0], _bias(node) is not None].append(node)
    return sum(_pack(graph, nodes, biased) for (_, biased), nodes in siblings.items() if len(nodes) > 1)


def _matrix(value: ir.Value | None) -> np.ndarray | None:
    array = value.const_value.numpy() if value is not None and value.const_value is not None else None
    return array if array is not None and array.ndim == 2 else None


def _bias(product: ir.Node) -> ir.Node | None:
    """The addition of a constant vector to a product, where it is the product's only use."""
    uses = list(product.outputs[0].uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add" or product.outputs[0].is_graph_output():
        return None
    other = uses[0].node.inputs[1 - uses[0].idx]
    width = product.inputs[1].shape[1] if product.inputs[1] is not None and product.inputs[1].shape is not None else None
    constant = other is not None and other.const_value is not None and list(other.const_value.shape) == [width]
    return uses[0].node if constant else None


def _pack(graph: ir.Graph, products: list[ir.Node], biased: bool) -> int:
    weights = [_matrix(n.inputs[1]) for n in products]
    if len({w.dtype for w in weights if w is not None}) != 1 or any(n.outputs[0].is_graph_output() for n in products):
        return 0
    first, name = products[0], f"{products[0].name}_packed"
    widths = [w.shape[1] for w in weights if w is not None]
    weight = _constant(graph, f"{name}_weight", np.concatenate([w for w in weights if w is not None], axis=1))
    product = ir.node("MatMul", [first.inputs[0], weight], name=name)
    new, result = [product], product.outputs[0]
    ends = [_bias(n) if biased else n for n in products]
    if biased:
        vectors = [next(v for v in end.inputs if v is not None and v.const_value is not None) for end in ends if end is not None]
        vector = _constant(graph, f"{name}_bias", np.concatenate([v.const_value.numpy() for v in vectors if v.const_value is not None]))
        new.append(ir.node("Add", [result, vector]))
        result = new[-1].outputs[0]
    sizes = _constant(graph, f"{name}_sizes", np.array(widths))
    split = ir.node("Split", [result, sizes], attributes={"axis": -1}, num_outputs=len(widths))
    graph.insert_before(first, [*new, split])
    for end, part in zip(ends, split.outputs, strict=True):
        assert end is not None
        part.shape, part.type = end.outputs[0].shape, end.outputs[0].type
        end.outputs[0].replace_all_uses_with(part)
    for node in dict.fromkeys([*(e for e in ends if e is not None and biased), *products]):
        graph.remove(node, safe=True)
    return len(products)


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
    value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    graph.register_initializer(value)
    return value


def _pack_attention_inputs(graph: ir.Graph) -> None:
    """GroupQueryAttention takes queries, keys and values as they come from one product: the split in front of it goes."""
    for node in graph:
        if node.op_type != "GroupQueryAttention":
            continue
        parts = list(node.inputs[:3])
        split = parts[0].producer() if parts[0] is not None else None
        if split is not None and split.op_type == "Split" and list(split.outputs) == parts:
            node.replace_input_with(0, split.inputs[0])
            node.replace_input_with(1, None)
            node.replace_input_with(2, None)
