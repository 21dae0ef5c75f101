"""Tokens are followed through reshapes, packed linears, patch grids, caches and sizes that coincide; else the op is named."""

from __future__ import annotations

import re
from typing import Any

import pytest
import structures as st
import torch
from torch import nn
from zoo_model import relative_error

import dyncc
from dyncc import pipeline
from dyncc.capture import from_model
from dyncc.rewrite import Context, apply_pass

pytestmark = pytest.mark.usefixtures("no_grad")

TOLERANCE = 1e-5
HALF = "prune-tokens{keep=0.5 layers=0 score=cls-attention}"
BATCH = 2


def optimize(model: nn.Module, *inputs: torch.Tensor, passes: str = HALF, **more: Any) -> Any:
    return dyncc.optimize(model, inputs, passes=passes, engine="reference", evidence="off", masked=True, **more)


def rewritten(model: nn.Module, *inputs: torch.Tensor, passes: str = HALF, **more: Any) -> Any:
    """The optimized model; every pass applied, every attention was found, and the result is that of the masked form."""
    optimized = optimize(model, *inputs, passes=passes, **more)
    assert [r.reason for r in optimized.report.rewrites if not r.applied] == []
    assert optimized.report.found_attention == len(model.layers)
    assert relative_error(optimized(*inputs), optimized.masked(*inputs)) <= TOLERANCE
    return optimized


@pytest.mark.parametrize("layer", [st.Layer, st.Flattened, st.Packed])
@pytest.mark.parametrize("model", [st.Stack, st.AllRows])
def test_projections(model: type[st.Stack], layer: type[st.Layer]) -> None:
    module, x = st.build(model, layer), st.numbers(BATCH, 10, st.SIZE)
    optimized = rewritten(module, x)
    assert optimized.flops < optimized.dense_flops
    assert relative_error(optimize(module, x, passes="prune-tokens{keep=1.0 layers=0}")(x), module(x)) <= TOLERANCE


@pytest.mark.parametrize("layer", [st.Layer, st.Flattened, st.Packed])
def test_projections_with_batch_and_length_free(layer: type[st.Layer]) -> None:
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=64)}
    optimized = rewritten(st.build(st.AllRows, layer), st.numbers(BATCH, 10, st.SIZE), dynamic_shapes=(sizes,))
    other = st.numbers(5, 7, st.SIZE)
    assert relative_error(optimized(other), optimized.masked(other)) <= TOLERANCE


def test_patch_grid_to_tokens() -> None:
    pixels = st.numbers(BATCH, 3, 8, 8)
    optimized = rewritten(st.build(st.Patches), pixels)
    assert optimized.flops < optimized.dense_flops


def _past(layers: int, length: int) -> list[torch.Tensor]:
    return [st.numbers(BATCH, st.HEADS, length, st.HEAD_DIM, seed=i) for i in range(2 * layers)]


@pytest.mark.parametrize("length", [1, 5])
def test_past_and_new_keys_stay_whole_when_the_last_row_is_sliced(length: int) -> None:
    module, x, past = st.build(st.Continued), st.numbers(BATCH, length, st.SIZE), _past(3, 7)
    optimized = optimize(module, x, *past, passes="slice-last-token")
    assert relative_error(optimized(x, *past), module(x, *past)) <= TOLERANCE
    assert optimized.report.found_attention == 3
    if length > 1:
        assert optimized.report.rewrites[0].applied and optimized.flops < optimized.dense_flops


def test_new_tokens_behind_past_keys_are_not_pruned() -> None:
    module, x, past = st.build(st.Continued), st.numbers(BATCH, 5, st.SIZE), _past(3, 7)
    optimized = optimize(module, x, *past, passes="prune-tokens{keep=0.5 layers=0 score=last-attention}")
    (rewrite,) = optimized.report.rewrites
    assert not rewrite.applied and re.match(r"cat \(.*\) concatenates the token axis with other rows", rewrite.reason), rewrite.reason
    assert relative_error(optimized(x, *past), module(x, *past)) <= TOLERANCE


@pytest.mark.parametrize(
    ("batch", "length"), [(6, 6), (2, st.SIZE), (2, st.HEADS), (2, st.HEAD_DIM)], ids=["batch", "width", "heads", "head width"]
)
@pytest.mark.parametrize("layer", [st.Layer, st.Flattened, st.Packed])
def test_a_length_that_equals_another_size(layer: type[st.Layer], batch: int, length: int) -> None:
    optimized = rewritten(st.build(st.AllRows, layer), st.numbers(batch, length, st.SIZE))
    assert optimized.flops < optimized.dense_flops


@pytest.mark.parametrize("layer", [st.Layer, st.Flattened, st.Packed])
def test_one_token(layer: type[st.Layer]) -> None:
    module, x = st.build(st.Stack, layer), st.numbers(BATCH, 1, st.SIZE)
    for passes in ("slice-last-token drop-repeat-kv", HALF):
        optimized = optimize(module, x, passes=passes)
        assert relative_error(optimized(x), module(x)) <= TOLERANCE
        assert optimized.report.found_attention == 3 and optimized.flops <= optimized.dense_flops


@pytest.mark.parametrize(("passes", "same"), [("prune-tokens{keep=64 layers=0 score=cls-attention}", True), (HALF, False)])
def test_compiled_at_4096_tokens_and_called_with_16(passes: str, same: bool) -> None:
    module = st.build(st.Stack, st.Packed, 2)
    sizes = {1: torch.export.Dim("length", min=2, max=8192)}
    optimized = optimize(module, st.numbers(1, 4096, st.SIZE), passes=passes, dynamic_shapes=(sizes,))
    assert optimized.report.rewrites[0].applied, optimized.report.rewrites[0].reason
    few = st.numbers(1, 16, st.SIZE, seed=1)
    assert relative_error(optimized(few), optimized.masked(few)) <= TOLERANCE
    assert (relative_error(optimized(few), module(few)) <= TOLERANCE) == same


def test_compiled_at_4096_tokens_and_called_with_16_by_torch_compile() -> None:
    torch._dynamo.reset()
    module, before = st.build(st.Stack, st.Packed, 2), len(dyncc.reports())
    compiled = torch.compile(module, backend="dyncc", dynamic=True, options={"engine": "reference"})
    for length in (4096, 16):
        x = st.numbers(1, length, st.SIZE)
        assert relative_error(compiled(x), module(x)) <= TOLERANCE
    (report,) = dyncc.reports()[before:]
    assert report.fallback is None and "slice-last-token" in [r.name for r in report.rewrites if r.applied]


REFUSED = [
    pytest.param(st.Windows, r"reshape \(.*structures\.py:\d+\) splits the token axis", id="windows"),
    pytest.param(st.Rolled, r"roll \(.*structures\.py:\d+\) reads positions along the token axis", id="roll"),
    pytest.param(st.Opaque, r"opaque \(.*structures\.py:\d+\) has no axis rule, so tokens cannot be followed through it", id="unknown op"),
]


@pytest.mark.parametrize(("layer", "reason"), REFUSED)
def test_what_cannot_be_followed_is_named(layer: type[st.Layer], reason: str) -> None:
    module, x = st.build(st.Stack, layer), st.numbers(BATCH, 16, st.SIZE)
    optimized = optimize(module, x)
    (rewrite,) = optimized.report.rewrites
    assert not rewrite.applied and re.fullmatch(reason, rewrite.reason), rewrite.reason
    assert relative_error(optimized(x), module(x)) <= TOLERANCE


@pytest.mark.parametrize("keep", [7, 5])
def test_the_fused_row_is_the_lost_rows_times_their_attention(keep: int) -> None:
    """With one row lost nothing is saved, so the pass is applied by itself, without the cost model."""
    module, x = st.build(st.Stack, st.Packed), st.numbers(1, 8, st.SIZE)
    program, signature = from_model(module, (x,))
    (fused,) = pipeline.build(f"prune-tokens{{keep={keep} layers=0 score=cls-attention fuse=true}}")
    applied = apply_pass(program, fused, Context())
    assert applied.applied and applied.modified, applied.reason
    first = module.layers[0]
    q, k, _ = first.project(first.before(x))
    attention = (q[:, :, :1] @ k.transpose(-1, -2) * st.HEAD_DIM**-0.5).softmax(-1).mean(1)[0, 0]
    hidden = first(x)
    lost = (attention[1:].topk(8 - keep, largest=False).indices + 1).tolist()
    others = [row for row in range(8) if row not in lost]
    merged = (attention[lost, None] * hidden[:, lost]).sum(1, keepdim=True)
    expected = module.read(module.run(torch.cat([hidden[:, others], merged], 1), 1))
    (result,) = applied.program.module(*signature.state, x)
    assert relative_error(result, expected) <= TOLERANCE
