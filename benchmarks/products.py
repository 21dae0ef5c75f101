"""A model's matrix products alone, by PyTorch and by ONNX Runtime: no engine that multiplies so fast runs the model faster."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dyncc.backends.onnxruntime import runtime, session_options

Product = tuple[int, int, int, int]
"""[batch, m, k] times [batch, k, n]; batch is 1 where the right side is a weight."""
aten = torch.ops.aten


class Products(TorchDispatchMode):
    """Notes the matrix products that run inside it; those of an attention are two."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Product] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in (aten.mm.default, aten.addmm.default):
            left, right = args[-2:]
            self.found.append((1, *left.shape, right.shape[1]))
        elif op is aten.bmm.default:
            self.found.append((*args[0].shape, args[1].shape[2]))
        elif "scaled_dot_product" in op.name():
            (q, k, v), heads = args[:3], math.prod(args[0].shape[:2])
            self.found += [(heads, q.shape[2], q.shape[3], k.shape[2]), (heads, q.shape[2], k.shape[2], v.shape[3])]
        return op(*args, **(kwargs or {}))


def products(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Product]:
    """The matrix products of one call, in order."""
    with torch.no_grad(), Products() as mode:
        model(**inputs)
    return mode.found


def by_torch(sizes: list[Product]) -> Callable[[], Any]:
    """All of them, each with operands of its own."""
    pairs = [(torch.randn(b, m, k), torch.randn(b, k, n)) for b, m, k, n in sizes]
    return lambda: [a @ b for a, b in pairs]


def by_onnxruntime(sizes: list[Product]) -> Callable[[], Any]:
    """The same in one graph, weights as initialisers."""
    rng, made, feeds = np.random.default_rng(0), onnx.helper, {}
    nodes, inputs, outputs, weights = [], [], [], []
    for i, (b, m, k, n) in enumerate(sizes):
        feeds[f"a{i}"] = rng.standard_normal((b, m, k), dtype=np.float32)
        inputs.append(made.make_tensor_value_info(f"a{i}", onnx.TensorProto.FLOAT, (b, m, k)))
        right = rng.standard_normal((b, k, n), dtype=np.float32)
        if b == 1:
            weights.append(onnx.numpy_helper.from_array(right[0], f"b{i}"))
        else:
            feeds[f"b{i}"] = right
            inputs.append(made.make_tensor_value_info(f"b{i}", onnx.TensorProto.FLOAT, (b, k, n)))
        nodes.append(made.make_node("MatMul", [f"a{i}", f"b{i}"], [f"c{i}"]))
        outputs.append(made.make_tensor_value_info(f"c{i}", onnx.TensorProto.FLOAT, (b, m, n)))
    graph = made.make_model(made.make_graph(nodes, "products", inputs, outputs, weights), opset_imports=[made.make_opsetid("", 20)])
    graph.ir_version = 10
    session = runtime().InferenceSession(graph.SerializeToString(), session_options(), providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feeds)
