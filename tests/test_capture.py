"""Capture by both doors, and the canonical form they share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import Calls, node, program
from tiny import Tiny, inputs
from torch import nn
from torch.nn import functional as F

from dyncc.analysis.facts import analyse
from dyncc.capture import CaptureError, count, from_dynamo, from_model, higher_order_op
from dyncc.ir import Program, emit, is_mutating, op_name, outputs, refresh
from dyncc.rewrite import fingerprint

X = torch.randn(2, 6, 8)


def door1(model: Any, *values: Any, dynamic: bool | None = None) -> list[Program]:
    """The programs that torch.compile's graphs become."""
    found: list[Program] = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        found.append(from_dynamo(gm, example_inputs))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=dynamic)(*values)
    return found


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "spelled out"])
def test_both_doors_give_the_same_facts(kind: str, fused: bool) -> None:
    tiny = Tiny(kind=kind, returns="last", fused=fused, positions="rope")
    model, values = tiny.build(), inputs(tiny, 2, 9)
    (first,), (second, _) = door1(model, *values), from_model(model, values)
    for captured, door in ((first, 1), (second, 2)):
        facts = analyse(captured)
        assert captured.door == door
        assert facts.found == facts.expected == tiny.layers
        assert [len(s.layers) for s in facts.stacks] == [tiny.layers]
    assert count(first.graph, "linear") == count(second.graph, "linear") == 6 * tiny.layers + 1


def test_door_1_does_not_run_the_model() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            x.add_(1)
            return self.norm(x)

    model, x = Counts().train(), torch.zeros(2, 6, 8)
    (captured,) = door1(model, x)
    assert model.calls == 1 and model.norm.num_batches_tracked == 1 and bool((x == 1).all()), "only the call itself ran"
    assert {i.kind for i in captured.inputs} >= {"input", "buffer", "parameter"}
    assert len(analyse(captured).mutated) >= 2


def test_a_symbolic_length_survives_both_doors() -> None:
    tiny = Tiny(kind="encoder")
    model, (ids,) = tiny.build(), inputs(tiny, 2, 9)
    length = torch.export.Dim("length", min=2, max=64)
    (first,), (second, _) = door1(model, ids, dynamic=True), from_model(model, (ids,), dynamic_shapes=({1: length},))
    for captured in (first, second):
        sdpa = node(captured, "scaled_dot_product_attention")
        assert isinstance(sdpa.meta["val"].shape[2], torch.SymInt)


def test_a_captured_program_runs_as_the_model() -> None:
    tiny = Tiny(kind="decoder", returns="last", keys=True)
    model, values = tiny.build(), inputs(tiny, 2, 9, padded=True)
    captured, signature = from_model(model, values)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(*values), captured.module(*signature.state, *values), strict=True))


def test_a_copy_can_be_edited_without_touching_the_program() -> None:
    captured = program(lambda x: x.relu().sin(), X)
    before, copied = fingerprint(captured.graph), captured.copy()
    assert fingerprint(copied.graph) == before
    relu = node(copied, "relu")
    relu.replace_all_uses_with(relu.args[0])
    assert fingerprint(captured.graph) == before != fingerprint(copied.graph)


def test_addmm_becomes_linear() -> None:
    captured = program(lambda x: torch.addmm(x.new_ones(3), x[0], x.new_ones(8, 3)), X)
    assert count(captured.graph, "addmm") == 0 and count(captured.graph, "linear") == 1


def test_an_addmm_that_scales_stays() -> None:
    captured = program(lambda x: torch.addmm(x.new_ones(3), x[0], x.new_ones(8, 3), beta=0.5), X)
    assert count(captured.graph, "addmm") == 1


def test_dropout_goes_in_evaluation_only() -> None:
    captured = program(lambda x: F.dropout(x, 0.5, training=False).relu(), X)
    active = program(lambda x: F.dropout(x, 0.5, training=True).relu(), X)
    assert count(captured.graph, "dropout") == 0 and count(active.graph, "dropout") == 1


def test_no_op_conversions_and_whole_slices_go() -> None:
    captured = program(lambda x: x.to(torch.float32)[:, 0:].contiguous().view(2, 6, 8).relu(), X)
    assert [op_name(n) for n in captured.graph.nodes if n.op == "call_function"] == ["relu"]


def test_in_place_arithmetic_that_nobody_sees_becomes_ordinary() -> None:
    captured = program(lambda x: (x @ x.mT).add_(1).masked_fill_(x[..., :1] > 0, 0.0).div_(2), X)
    assert {op_name(n) for n in captured.graph.nodes} >= {"add", "masked_fill", "div"}
    assert not any(is_mutating(n) for n in captured.graph.nodes)
    assert torch.equal(captured.module(X)[0], (X @ X.mT + 1).masked_fill(X[..., :1] > 0, 0.0) / 2)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(6, 16).add_(1),
        lambda x: (lambda y: (y[0], y.add_(1)))(x @ x.mT),
        lambda x: (x.half() * 2).add_(x),
    ],
    ids=["an input", "seen by a view", "rounded"],
)
def test_other_writes_stay_in_place(function: Any) -> None:
    captured = program(function, X.clone())
    assert any(is_mutating(n) for n in captured.graph.nodes)


def test_a_symbolic_length_survives_new_values() -> None:
    dims = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("length", min=2, max=64)}
    captured = program(lambda x: F.linear(x, x.new_ones(3, 8)), X, dynamic=(dims,))
    linear = node(captured, "linear")
    refresh(linear)
    assert all(isinstance(size, torch.SymInt) for size in linear.meta["val"].shape[:2])
    assert emit(linear, F.linear, *linear.args).meta["val"].shape == linear.meta["val"].shape


def test_an_output_that_is_an_alias_stays_one() -> None:
    captured = program(lambda x: (x[:, 0:], x.relu()), X)
    first = outputs(captured.graph)[0]
    assert first.op == "call_function" and op_name(first) in ("slice", "alias")


def test_einsum_is_written_out() -> None:
    captured = program(lambda x: torch.einsum("btc,bsc->bts", x, x), X)
    assert count(captured.graph, "einsum") == 0 and count(captured.graph, "bmm", "matmul") == 1


def test_a_grad_mode_region_is_inlined() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = x.sin()
        return y + x

    captured = program(function, X)
    assert [op_name(n) for n in captured.graph.nodes if n.op == "call_function"] == ["sin", "add"]


def test_a_constant_argument_is_baked_in() -> None:
    class Scales(nn.Module):
        def forward(self, x: torch.Tensor, by: float) -> torch.Tensor:
            return x * by

    captured, signature = from_model(Scales(), (X, 2.5))
    assert [i.kind for i in captured.inputs] == ["input"]
    assert signature.constants == ((1, 2.5),)
    assert node(captured, "mul").args[1] == 2.5


def test_a_model_that_cannot_be_exported_says_why() -> None:
    with pytest.raises(CaptureError, match="torch.export failed: "):
        from_model(Calls(lambda x: x + 1 if bool(x.sum() > 0) else x), (X,))


def test_a_higher_order_op_is_named() -> None:
    from torch.utils.checkpoint import checkpoint

    names: list[str | None] = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        names.append(higher_order_op(gm.graph))
        with pytest.raises(CaptureError, match="higher-order op"):
            from_dynamo(gm, example_inputs)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(lambda x: checkpoint(torch.sin, x, use_reentrant=False), backend=backend)(X.clone().requires_grad_())
    assert names and "checkpoint" in str(names[0])
