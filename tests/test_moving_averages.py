"""Averages that move, without keys: written as a matrix of powers of a decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import program
from torch.nn import functional as F

from dyncc.evidence import relative_error
from dyncc.ir import shape
from dyncc.passes.fuse_linear_attention import FuseLinearAttention
from dyncc.rewrite import Applied, Context, apply_pass, fingerprint

B, H, T, D = 2, 3, 301, 4


def given() -> list[torch.Tensor]:
    """Values [B, H, T, D], and what decays a head are made of [H]."""
    torch.manual_seed(0)
    return [torch.randn(B, H, T, D), torch.randn(H)]


def apart(tokens: int = T) -> Any:
    at = torch.arange(tokens)
    return (at.unsqueeze(1) - at).clamp(min=0)


def of_a_number(v: Any, raw: Any) -> Any:
    return (0.9 ** apart()).tril().to(v.dtype) @ v


def of_heads(v: Any, raw: Any) -> Any:
    """An exponential moving average: what comes new is weighted by what is not kept."""
    kept = torch.sigmoid(raw)[:, None, None]
    return ((1 - kept) * (kept ** apart()).tril()) @ v


def by_rates(v: Any, raw: Any) -> Any:
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    return torch.exp(-F.softplus(raw).view(H, 1, 1) * apart()).masked_fill(~seen, 0.0) * 0.5 @ v


def of_earlier_tokens(v: Any, raw: Any) -> Any:
    return (0.8 ** apart()).tril(-1).to(v.dtype) @ v[:, 0]


def computed(function: Any) -> tuple[Any, Applied]:
    captured = program(function, *given())
    return captured, apply_pass(captured, FuseLinearAttention(), Context())


POWERS = (of_heads, of_earlier_tokens, *(pytest.param(f, marks=pytest.mark.full) for f in (of_a_number, by_rates)))


@pytest.mark.parametrize("function", POWERS)
def test_a_matrix_of_powers_becomes_one_node(function: Any) -> None:
    _, applied = computed(function)
    assert applied.applied and (applied.result.found, applied.result.expected) == (1, 1), applied.reason
    assert not any(shape(n)[-2:] == (T, T) for n in applied.program.graph.nodes)
    want = function(*(x.double() for x in given())).float()
    assert relative_error(want, applied.program.module(*given())[0]) < 1e-5


def few(v: Any, raw: Any) -> Any:
    return (0.9 ** apart(70)).tril() @ v[:, :, :70]


def seen_by_all(v: Any, raw: Any) -> Any:
    at = torch.arange(T)
    return torch.exp(-0.1 * (at.unsqueeze(1) - at)) @ v


def of_rows(v: Any, raw: Any) -> Any:
    return (torch.sigmoid(v[..., :1]) ** apart()).tril() @ v


KEPT = (
    (few, "as fast as chunks up to some hundred tokens, and these are 70"),
    (seen_by_all, "hide no later tokens"),
    (of_rows, "what is kept from token to token differs among tokens"),
)


@pytest.mark.parametrize(("function", "reason"), KEPT)
def test_what_is_none_stays_with_the_reason(function: Any, reason: str) -> None:
    captured, applied = computed(function)
    assert not applied.applied and reason in applied.reason, applied.reason
    assert fingerprint(applied.program.graph) == fingerprint(captured.graph)


def test_lengths_that_vary_are_told() -> None:
    def powers(v: Any) -> Any:
        return (0.9 ** apart(v.shape[1])).tril().to(v.dtype) @ v

    captured = program(powers, torch.randn(2, T, D), dynamic=[{1: torch.export.Dim("length", min=2, max=512)}])
    applied = apply_pass(captured, FuseLinearAttention(), Context())
    assert applied.reason == "faster from 256 tokens on; the graph serves any number"
    v = torch.randn(2, 33, D)
    assert relative_error(powers(v.double()).float(), applied.program.module(v)[0]) < 1e-5
