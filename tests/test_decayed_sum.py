"""Decayed sums: all forms compute the recurrence, judged in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dyncc.kernels.decayed_sum import DECAYED_SUM, TRUTHS, at_once, in_chunks, step


def drawn(tokens: int, kind: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(tokens)
    x = torch.randn(2, tokens, 5)
    factors = {
        "number": torch.full((1, 1, 1), 0.9), "channels": torch.rand(1, 1, 5), "signed": torch.rand(2, tokens, 5) * 2 - 1,
        "forgets": (torch.rand(2, tokens, 1) > 0.3).float(),
    }  # fmt: skip
    return x, factors[kind]


def judged(x: Tensor, factor: Tensor, state: Tensor | None) -> Tensor:
    """A loop of its own in float64."""
    factor, held = factor.double().expand(x.shape), torch.zeros(2, 5).double() if state is None else state.double()
    outs = []
    for t in range(x.shape[1]):
        held = held * factor[:, t] + x[:, t].double()
        outs.append(held)
    return torch.stack(outs, 1) if outs else x.double()


@pytest.mark.parametrize("kind", ["number", "channels", "signed", "forgets"])
@pytest.mark.parametrize("tokens", [0, 1, 7, 65, *(pytest.param(n, marks=pytest.mark.full) for n in (64, 257, 1000))])
def test_all_forms_compute_the_recurrence(tokens: int, kind: str) -> None:
    x, factor = drawn(tokens, kind)
    for state in (None, torch.randn(2, 5)):
        for form in (step, in_chunks, at_once, DECAYED_SUM):
            torch.testing.assert_close(form(x, factor, state).double(), judged(x, factor, state), rtol=1e-5, atol=1e-5)


def test_wide_tokens_take_one_step_each() -> None:
    x, factor = torch.randn(2, 40, 1500), torch.rand(1, 1, 1500)
    torch.testing.assert_close(DECAYED_SUM(x, factor), at_once(x, factor), rtol=1e-5, atol=1e-5)


def test_half_precision_is_computed_in_float32() -> None:
    x, factor = drawn(300, "channels")
    made = DECAYED_SUM(x.bfloat16(), factor.bfloat16())
    want = judged(x.bfloat16(), factor.bfloat16(), None)
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made.double(), want, rtol=1e-2, atol=1e-2)


def test_gradients_are_those_of_the_recurrence() -> None:
    x, factor = (v.double().requires_grad_() for v in drawn(21, "signed"))
    grads: list[Any] = [torch.autograd.grad(form(x, factor).sin().sum(), (x, factor)) for form in (step, DECAYED_SUM)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_its_fake_and_its_refusals() -> None:
    x, factor = drawn(5, "channels")
    torch.library.opcheck(DECAYED_SUM, (x, factor), test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(ValueError, match=r"factors that are broadcast to it, got \[2, 5, 5\], \[1, 1, 4\]"):
        step(x, factor[..., :4])
    with pytest.raises(ValueError, match=r"the state of these tokens is \[2, 5\], got \[2, 4\]"):
        at_once(x, factor, torch.zeros(2, 4))
    assert TRUTHS[DECAYED_SUM] is at_once
