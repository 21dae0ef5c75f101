"""Gradients of fused ops: those of their truths by autograd, in eager and compiled code, and where the truth's own would be NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from dyncc.kernels import fused_attention, gated_delta_rule, gated_linear_attention
from dyncc.kernels.fused_attention import ATTEND
from dyncc.kernels.gated_delta_rule import GATED_DELTA_RULE
from dyncc.kernels.gated_linear_attention import GATED_LINEAR_ATTENTION

Case = tuple[Callable[..., Any], Callable[..., Any], list[Tensor]]


def cases(tokens: int = 70) -> dict[str, Case]:
    """An op, its truth, and what both are called on."""
    torch.manual_seed(0)
    q, k, v, gate, log_decay = (torch.randn(2, 2, tokens, 4, dtype=torch.float64) for _ in range(5))
    state = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    k, log_decay, beta = torch.nn.functional.normalize(k, dim=-1), -log_decay.abs(), torch.rand(2, 2, tokens, dtype=torch.float64)
    shown = torch.rand(2, 1, tokens, tokens) > 0.4
    shown[:, :, 0] = False  # a row that sees nothing

    def attention(**more: Any) -> Case:
        def of(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda q, k, v, gate: form(q, k, v, gate=gate, **more)

        return of(ATTEND), of(fused_attention.attend), [q, k, v, gate]

    return {
        "attend": attention(is_causal=True),
        "attend, hidden rows": attention(attn_mask=shown, activation="silu"),
        "attend, cap and window": attention(is_causal=True, cap=3.0, window=9),
        "gated linear attention": (GATED_LINEAR_ATTENTION, gated_linear_attention.step, [q, k, v, log_decay, state]),
        "gated delta rule": (GATED_DELTA_RULE, gated_delta_rule.step, [q, k, v, beta, log_decay[..., 0], state]),
    }


def loss(results: Any) -> Tensor:
    """Of every result."""
    return sum(x.sin().sum() for x in (results if isinstance(results, tuple) else (results,)))  # type: ignore[return-value]


def gradients(form: Callable[..., Any], values: list[Tensor]) -> tuple[Tensor, ...]:
    given = [x.clone().requires_grad_() for x in values]
    return torch.autograd.grad(loss(form(*given)), given)


@pytest.mark.parametrize("name", cases())
@pytest.mark.filterwarnings("error")
def test_gradients_are_those_of_the_truth(name: str) -> None:
    op, truth, values = cases()[name]
    want, got = gradients(truth, values), gradients(op, values)
    assert all(x.isfinite().all() and x.abs().sum() > 0 for x in want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name",
    [
        "attend",
        pytest.param("gated linear attention", marks=pytest.mark.full),
        pytest.param("gated delta rule", marks=pytest.mark.full),
    ],
)
@pytest.mark.filterwarnings("error:dyncc")
def test_gradients_of_compiled_code_are_those_of_the_truth(name: str) -> None:
    op, truth, values = cases(21)[name]
    compiled = torch.compile(lambda *x: op(*x), backend="aot_eager")
    for a, b in zip(gradients(compiled, values), gradients(truth, values), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", cases())
def test_a_tangent_is_not_lost(name: str) -> None:
    op, truth, values = cases(9)[name]
    with forward_ad.dual_level():
        given = [forward_ad.make_dual(x, torch.ones_like(x)) for x in values]
        got, want = (forward_ad.unpack_dual(loss(form(*given))).tangent for form in (op, truth))
    assert got is not None and want is not None
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", cases())
def test_without_a_gradient_the_kernel_runs(name: str) -> None:
    op, truth, values = cases()[name]
    leaf = [x.clone().requires_grad_() for x in values]
    with torch.no_grad():
        results = op(*leaf)
    for a, b in zip(*((x,) if isinstance(x, Tensor) else x for x in (results, truth(*values))), strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tokens", [0, 1, 70])
@pytest.mark.parametrize("name", ["gated linear attention", "gated delta rule"])
def test_results_with_gradients_lie_as_those_without(name: str, tokens: int) -> None:
    op, _, values = cases(tokens)[name] if tokens else (cases()[name][0], None, [x[:, :, :0] for x in cases()[name][2][:-1]])
    for a, b in zip(op(*[x.clone().requires_grad_() for x in values]), op(*values), strict=True):
        assert a.shape == b.shape and a.stride() == b.stride() and a.requires_grad >= bool(tokens)
