"""Autocast regions are barriers: inside one graph they refuse every pass; around a compiled call they change nothing."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import dyncc


class Attending(nn.Module):
    """One attention block over [2, 7, 16], its last row returned; `inside` switches autocast on in the model itself."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.inside = nn.Linear(16, 48), nn.Linear(16, 16), inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.inside:
            return self.block(x)
        with torch.autocast("cpu", torch.bfloat16):
            return self.block(x)

    def block(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(2, 7, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 7, 16)
        return (x + self.out(mixed))[:, -1]


def test_autocast_inside_refuses_passes_and_keeps_the_result() -> None:
    torch._dynamo.reset()
    model, x = Attending(inside=True).eval(), torch.randn(2, 7, 16)
    with torch.no_grad():
        compiled = torch.compile(model, backend="dyncc", options={"engine": "reference"})
        assert torch.equal(compiled(x), model(x))
        offline = dyncc.optimize(model, (x,), engine="reference", evidence="numeric")
        assert torch.equal(offline(x), model(x))
    for report in (dyncc.reports()[-2], offline.report):
        assert all(not r.applied and "autocast" in r.reason for r in report.rewrites)
        assert report.fallback is None


def test_autocast_around_a_compiled_call_holds() -> None:
    torch._dynamo.reset()
    model, x = Attending(inside=False).eval(), torch.randn(2, 7, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(model, backend="dyncc", options={"engine": "reference"})
        ours, theirs = compiled(x), model(x)
    assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    applied = {r.name: r.applied for r in dyncc.reports()[-1].rewrites}
    assert applied["slice-last-token"]
