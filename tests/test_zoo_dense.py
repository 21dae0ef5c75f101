"""With no lossy pass, dyncc's captured graphs compute what eager computes, by both doors, and every attention is found."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from zoo import alternating, every_case
from zoo_model import Attn, ZooModel, outputs_of, relative_error

import dyncc

LAYERS, TOLERANCE = 2, 1e-5
pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """No compiled code of an earlier test, and no gradients."""
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def _check_report(report: dyncc.Report, model: ZooModel) -> None:
    assert report.fallback is None
    assert report.found_attention == report.expected_attention == model.expected_attention(LAYERS)


def _check_result(actual: object, expected: object) -> None:
    for ours, theirs in zip(outputs_of(actual), outputs_of(expected), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert relative_error(actual, expected) <= TOLERANCE


@pytest.mark.parametrize(("model", "attn"), alternating(0))
def test_door_1_agrees_with_eager(model: ZooModel, attn: Attn) -> None:
    module, inputs = model.build(attn, LAYERS), model.inputs()
    before = len(dyncc.reports())
    compiled = torch.compile(module, backend="dyncc", options={"engine": "reference"})
    _check_result(compiled(*inputs), module(*inputs))
    (report,) = dyncc.reports()[before:]
    _check_report(report, model)


@pytest.mark.parametrize(("model", "attn"), every_case())
def test_door_2_agrees_with_eager(model: ZooModel, attn: Attn) -> None:
    module, inputs = model.build(attn, LAYERS), model.inputs(padding=model.has_mask)
    optimized = dyncc.optimize(module, inputs, passes="", engine="reference", evidence="off")
    _check_result(optimized(*inputs), module(*inputs))
    _check_report(optimized.report, model)


@pytest.mark.parametrize(("model", "attn"), alternating(1, dynamic=True))
def test_door_2_agrees_at_another_batch_and_length(model: ZooModel, attn: Attn) -> None:
    module, padding = model.build(attn, LAYERS), model.has_mask and attn == model.attns[-1]
    optimized = dyncc.optimize(
        module,
        model.inputs(padding=padding),
        passes="",
        dynamic_shapes=model.dynamic_shapes(padding),
        engine="reference",
        evidence="off",
    )
    other = model.inputs(batch=4, length=17, seed=5, padding=padding)
    _check_result(optimized(*other), module(*other))
    _check_report(optimized.report, model)
