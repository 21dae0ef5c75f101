"""Compiled by Inductor with the default options, dyncc is as close to eager as plain Inductor is."""

from __future__ import annotations

import pytest
import torch
from zoo import ZOO, by_name
from zoo_model import relative_error

import dyncc

LAYERS, SLACK, TOLERANCE = 2, 1e-6, 1e-5
QUICK = ("vit", "llama-last")
NAMES = [pytest.param(model.name, marks=() if model.name in QUICK else pytest.mark.full) for model in ZOO]


@pytest.mark.parametrize("name", NAMES)
def test_inductor_is_never_over_twice_plain_inductors_error(name: str) -> None:
    model = by_name(name)
    module, inputs = model.build(model.able[0], LAYERS), model.inputs()
    before = len(dyncc.reports())
    with torch.no_grad():
        eager = module(*inputs)
        torch._dynamo.reset()
        plain = relative_error(torch.compile(module, backend="inductor")(*inputs), eager)
        torch._dynamo.reset()
        ours = relative_error(torch.compile(module, backend="dyncc", options={"engine": "inductor"})(*inputs), eager)
    (report,) = dyncc.reports()[before:]
    assert report.fallback is None and report.engine == "inductor"
    assert report.found_attention == model.expected_attention(LAYERS)
    assert ours <= min(2 * plain + SLACK, TOLERANCE)
