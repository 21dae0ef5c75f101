"""Attention on rows and joined projections: the same outputs with fewer ops, in files and in sessions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from torch.nn import functional as F

import dyncc
from dyncc.backends import onnxruntime, ort_graph
from dyncc.backends.onnxruntime import session_options
from dyncc.backends.ort_graph import pack_projections
from dyncc.backends.ort_rows import attend_to_rows

B, T, H, D = 2, 5, 2, 4


def attention(perm: list[int] | None = None, twice: bool = False) -> onnx.ModelProto:
    """x [B, T, H D] as queries, keys and values of one attention, spelled on heads."""
    sizes = onnx.numpy_helper.from_array(np.array([0, 0, H, D]), "heads")
    merged = onnx.numpy_helper.from_array(np.array([0, 0, H * D]), "rows")
    nodes = []
    for name in "qkv":
        nodes.append(helper.make_node("Reshape", [name, "heads"], [f"{name}r"]))
        nodes.append(helper.make_node("Transpose", [f"{name}r"], [f"{name}h"], perm=perm or [0, 2, 1, 3]))
    nodes.append(helper.make_node("Attention", ["qh", "kh", "vh"], ["o"]))
    nodes.append(helper.make_node("Transpose", ["o"], ["t"], perm=[0, 2, 1, 3]))
    nodes.append(helper.make_node("Reshape", ["t", "rows"], ["m"]))
    nodes.append(helper.make_node("Identity", ["m"], ["y"]))
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [B, T, H * D])]
    if twice:
        outputs.append(helper.make_tensor_value_info("t", TensorProto.FLOAT, [B, T, H, D]))
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [B, T, H * D]) for name in "qkv"]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [sizes, merged])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {v.name: feed[v.name] for v in session.get_inputs()}))


def feed() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal((B, T, H * D)).astype(np.float32) for name in "qkv"}


def test_the_transposes_around_an_attention_go() -> None:
    model = attention()
    made = ir.from_proto(model)
    assert attend_to_rows(made.graph) == 1
    ir.passes.common.RemoveUnusedNodesPass()(made)
    after = ir.to_proto(made)
    assert Counter(n.op_type for n in after.graph.node) == {"Attention": 1, "Identity": 1}
    onnx.checker.check_model(after)
    np.testing.assert_allclose(run(after, feed())[0], run(model, feed())[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", [{"perm": [0, 2, 3, 1]}, {"twice": True}])
def test_heads_made_otherwise_or_read_elsewhere_stay(how: dict[str, Any]) -> None:
    made = ir.from_proto(attention(**how)) if "twice" in how else ir.from_proto(attention())
    if "perm" in how:
        node = next(n for n in made.graph if n.op_type == "Transpose")
        node.attributes["perm"] = ir.AttrInt64s("perm", how["perm"])
    assert attend_to_rows(made.graph) == 0


class Block(nn.Module):
    """One attention block, its projections apart."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(H * D, H * D) for _ in range(4))

    def forward(self, x: Any) -> Any:
        q, k, v = (p(x).unflatten(-1, (H, D)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("sizes", [None, ({0: torch.export.Dim("batch", min=2, max=9), 1: torch.export.Dim("length", min=2, max=99)},)])
@torch.no_grad()
def test_a_file_has_one_product_for_three_and_no_transposes(tmp_path: Path, sizes: Any) -> None:
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(B, T, H * D)
    made = dyncc.optimize(model, (x,), dynamic_shapes=sizes, engine="reference", evidence="off").export_onnx(tmp_path / "m.onnx")
    ops = Counter(n.op_type for n in onnx.load(made.path).graph.node)
    assert ops["Attention"] == 1 and ops["Transpose"] == 0 and ops["MatMul"] + ops["Gemm"] == 2
    assert made.fused["packed"] == 3 and made.fused["rows"] == 1 and all(row.holds for row in made.parity)


@torch.no_grad()
def test_a_session_joins_the_weights_that_it_holds_and_sees_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(B, T, H * D)
    made: list[onnx.ModelProto] = []
    plain = ort_graph.for_session
    monkeypatch.setattr(ort_graph, "for_session", lambda *given: made.append(plain(*given)) or made[-1])
    fast = dyncc.optimize(model, (x,), engine="onnxruntime", evidence="off")
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
    ops = Counter(n.op_type for n in made[0].graph.node)
    assert ops["MatMul"] == 2 and ops["Concat"] == 2 and ops["Split"] == 1
    model.k.weight.mul_(3.0)
    model.v.bias.add_(1.0)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)


def test_weights_that_may_change_from_call_to_call_are_not_joined() -> None:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [B, 4])]
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 3]) for name in ("a", "b")]
    nodes = [helper.make_node("MatMul", ["x", name], [f"y{name}"]) for name in ("a", "b")]
    nodes.append(helper.make_node("Add", ["ya", "yb"], ["y"]))
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [B, 3])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    infer = onnx.shape_inference.infer_shapes(model)
    assert pack_projections(ir.from_proto(infer).graph) == 0
    assert pack_projections(ir.from_proto(infer).graph, {"a"}) == 0
    assert pack_projections(ir.from_proto(infer).graph, {"a", "b"}) == 2


class Residuals(nn.Module):
    """Projections with a bias, each added to the rows and normalised; the sum of the second one goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(8, eps=0.5) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norms[0](x + self.layers[0](x))
        total = x + self.layers[1](x)
        return self.norms[1](total) + total


def test_norms_stay_apart_from_their_residuals_in_files_and_in_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The op that takes both in is slower on a CPU: exporters and sessions fuse it by themselves."""
    model, x = Residuals().eval(), torch.randn(2, 5, 8)
    made = dyncc.optimize(model, (x,), passes="", evidence="off")
    for portable in (False, True):
        file = tmp_path / f"{portable}.onnx"
        made.export_onnx(file, portable=portable)
        ops = Counter(n.op_type for n in onnx.load(file).graph.node)
        assert ops["LayerNormalization"] == 2 and not ops["SkipLayerNormalization"]
        found = ort.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), model(x))
    options, written = session_options(), tmp_path / "session.onnx"
    options.optimized_model_filepath = str(written)
    monkeypatch.setattr(onnxruntime, "session_options", lambda: options)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="dyncc", options={"engine": "onnxruntime"})(x), model(x))
    ops = Counter(n.op_type for n in onnx.load(written).graph.node)
    assert ops["LayerNormalization"] == 2 and not ops["SkipLayerNormalization"]
