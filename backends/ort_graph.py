"""ONNX Runtime's own fused ops on an exported model: RMS norms with their residual, bias with GELU, projections that read the same rows.

Most of it is onnxscript's `optimize_for_ort`; what it does not do is merging sibling projections, so that one product reads the rows once,
and what it does that does not help is undone (`part_norms`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import sympy
from onnx_ir.passes import common as common_passes
from onnxscript.rewriter.ort_fusions import optimize_for_ort

from dyncc.backends.ort_rows import attend_to_rows

if TYPE_CHECKING:
    import onnx

FUSED = ("SkipSimplifiedLayerNormalization", "BiasGelu", "GroupQueryAttention", "QuickGelu")


def optimise(model: ir.Model) -> Counter[str]:
    """Edit a model in place; how many of each fused op it holds then, `packed` projections, and RMS `norms` behind a residual."""
    found = Counter({"norms": sum(_has_residual(n) for n in model.graph if n.op_type == "RMSNormalization")})
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
    part_norms(model.graph)
    found["packed"] = pack_projections(model.graph)
    _pack_attention_inputs(model.graph)
    found["rows"] = attend_to_rows(model.graph)
    found["shareable"] = share_cache(model)
    common_passes.CommonSubexpressionEliminationPass()(model)
    common_passes.RemoveUnusedNodesPass()(model)
    model.opset_imports.setdefault("com.microsoft", 1)
    found.update(n.op_type for n in model.graph if n.op_type in FUSED)
    return found


def for_session(model: onnx.ModelProto, held: Collection[str]) -> onnx.ModelProto:
    """A model as a session of ONNX Runtime runs it best; what the session fuses by itself when it is made is left to it."""
    made = ir.from_proto(model)
    pack_projections(made.graph, held)
    attend_to_rows(made.graph)
    common_passes.RemoveUnusedNodesPass()(made)
    proto: onnx.ModelProto = ir.to_proto(made)
    return proto


def part_norms(graph: ir.Graph) -> None:
    """Additions and a norm in place of each SkipLayerNormalization, which on a CPU takes 4 to 5 times as long (ONNX Runtime 1.31).

    The bias comes last: in front of the residual it would be what a session fuses again when it is made.
    """
    for node in [n for n in graph if n.op_type == "SkipLayerNormalization"]:
        rows, skip, weight, shift, bias = (*node.inputs, None, None)[:5]
        sums = [ir.node("Add", [rows, skip])]
        if bias is not None:
            sums.append(ir.node("Add", [sums[0].outputs[0], bias]))
        told = {"axis": -1, "epsilon": node.attributes.get_float("epsilon", 1e-12)}
        norm = ir.node("LayerNormalization", [sums[-1].outputs[0], weight, shift], attributes=told)
        for made in sums:
            made.outputs[0].type, made.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        old, new = [node.outputs[0]], [norm.outputs[0]]
        if len(node.outputs) > 3:
            old.append(node.outputs[3])
            new.append(sums[-1].outputs[0])
        ir.convenience.replace_nodes_and_values(graph, node, [node], [*sums, norm], old, new)


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


def pack_projections(graph: ir.Graph, held: Collection[str] = ()) -> int:
    """One product in place of several of the same rows with weights [in, out] that stay the same, biases alike; how many went in.

    `held` names the graph inputs that a session holds as constants: their weights are joined when it is made.
    """
    siblings: dict[tuple[Any, bool], list[ir.Node]] = defaultdict(list)
    for node in graph:
        if node.op_type == "MatMul" and _stays(node.inputs[1], 2, held) and not node.outputs[0].is_graph_output():
            siblings[node.inputs[0], _bias(node, held) is not None].append(node)
    packed = sum(_pack(graph, nodes, biased, held) for (_, biased), nodes in siblings.items() if len(nodes) > 1)
    graph.sort()  # a sibling's weight may be transposed behind the first product
    return packed


def _stays(value: ir.Value | None, rank: int, held: Collection[str]) -> bool:
    """Whether a value of known size is the same in every call: a constant, one that the session holds, or such a one transposed."""
    if value is None or value.shape is None or len(value.shape) != rank or not all(isinstance(size, int) for size in value.shape):
        return False
    producer = value.producer()
    if producer is not None and producer.op_type == "Transpose":
        return _stays(producer.inputs[0], rank, held)
    return value.const_value is not None or value.name in held


def _bias(product: ir.Node, held: Collection[str]) -> ir.Node | None:
    """The addition of a vector that stays the same to a product, where it is the product's only use."""
    uses = list(product.outputs[0].uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add" or product.outputs[0].is_graph_output():
        return None
    other, weight = uses[0].node.inputs[1 - uses[0].idx], product.inputs[1]
    width = weight.shape[1] if weight is not None and weight.shape is not None else None
    stays = other is not None and _stays(other, 1, held) and other.shape is not None and other.shape[0] == width
    return uses[0].node if stays else None


def _pack(graph: ir.Graph, products: list[ir.Node], biased: bool, held: Collection[str]) -> int:
    weights = [value for n in products if (value := n.inputs[1]) is not None]
    if len({w.dtype for w in weights}) != 1:
        return 0
    first, name = products[0], f"{products[0].name}_packed"
    ends = [end for n in products if (end := _bias(n, held) if biased else n) is not None]
    product = ir.node("MatMul", [first.inputs[0], _joined(graph, first, weights, 1, f"{name}_weight")], name=name)
    new, result = [product], product.outputs[0]
    if biased:
        vectors = [next(v for v in end.inputs if _stays(v, 1, held)) for end in ends]
        new.append(ir.node("Add", [result, _joined(graph, first, vectors, 0, f"{name}_bias")]))
        result = new[-1].outputs[0]
    widths = [w.shape[1] for w in weights if w.shape is not None]
    sizes = _constant(graph, f"{name}_sizes", np.array(widths))
    split = ir.node("Split", [result, sizes], attributes={"axis": -1}, num_outputs=len(widths))
    graph.insert_before(first, [*new, split])
    for end, part in zip(ends, split.outputs, strict=True):
        part.shape, part.type = end.outputs[0].shape, end.outputs[0].type
        end.outputs[0].replace_all_uses_with(part)
    for node in dict.fromkeys([*(ends if biased else ()), *products]):
        graph.remove(node, safe=True)
    return len(products)


def _joined(graph: ir.Graph, before: ir.Node, values: Sequence[ir.Value | None], axis: int, name: str) -> ir.Value:
    """The values side by side: a constant where all are, else to be computed (once, where a session holds them)."""
    arrays = [v.const_value.numpy() for v in values if v is not None and v.const_value is not None]
    if len(arrays) == len(values):
        return _constant(graph, name, np.concatenate(arrays, axis=axis))
    made = ir.node("Concat", values, attributes={"axis": axis}, name=name)
    graph.insert_before(before, made)
    return made.outputs[0]


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
