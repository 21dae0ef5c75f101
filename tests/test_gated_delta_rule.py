"""The gated delta rule: step and chunk compute the same, judged by the recurrence in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dyncc.kernels.gated_delta_rule import GATED_DELTA_RULE, TRUTHS, chunk, step


def drawn(tokens: int, decay: str = "mild", dtype: torch.dtype = torch.float32) -> list[Any]:
    torch.manual_seed(tokens)
    q, k = (F.normalize(x, dim=-1) for x in torch.randn(2, 2, 3, tokens, 5))
    logs = {"none": None, "mild": -torch.rand(2, 3, tokens), "steep": torch.full((2, 3, tokens), -60.0)}
    logs["forgets"] = torch.where(torch.rand(2, 3, tokens) > 0.8, float("-inf"), -0.1)
    values = [q, k, torch.randn(2, 3, tokens, 4), torch.rand(2, 3, tokens), logs[decay]]
    return [None if x is None else x.to(dtype) for x in values]


def judged(*values: Any) -> tuple[Tensor, Tensor]:
    return step(*(None if x is None else x.double() for x in values))


def close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], error: float = 1e-5) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=error, atol=error)


@pytest.mark.parametrize("decay", [*(pytest.param(name, marks=pytest.mark.full) for name in ("none", "steep")), "mild", "forgets"])
@pytest.mark.parametrize("tokens", [0, 5, 65, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 64, 150))])
def test_all_forms_compute_the_recurrence(tokens: int, decay: str) -> None:
    values = drawn(tokens, decay)
    for state in (None, torch.randn(2, 3, 5, 4)):
        want = judged(*values, state)
        close(step(*values, state), want)
        close(GATED_DELTA_RULE(*values, state), want)
        for size in (1, 16, 64):
            close(chunk(*values, state, size), want)


def test_a_sequence_in_two_parts_is_one_call() -> None:
    q, k, v, beta, decay = drawn(90)
    outs, state = [], None
    for part in (slice(0, 37), slice(37, 90)):
        out, state = GATED_DELTA_RULE(*(x[:, :, part] for x in (q, k, v, beta, decay)), state)
        outs.append(out)
    close((torch.cat(outs, 2), state), judged(q, k, v, beta, decay))  # type: ignore[arg-type]


def test_a_key_that_comes_again_holds_its_last_value() -> None:
    """Beta 1, no decay: what the key held is replaced."""
    k = torch.eye(3)[torch.tensor([0, 1, 0, 2])][None, None]
    v = torch.arange(4.0)[None, None, :, None] + 1
    _, state = GATED_DELTA_RULE(k, k, v, torch.ones(1, 1, 4))
    assert state.flatten().tolist() == [3.0, 2.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_state_is_wide_and_the_result_has_the_type_of_values(dtype: torch.dtype) -> None:
    values = drawn(70, dtype=dtype)
    out, state = GATED_DELTA_RULE(*values)
    assert out.dtype == dtype and state.dtype == torch.promote_types(dtype, torch.float32)
    close((out, state), judged(*values), {torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype])


def test_gradients_of_the_chunk_form_are_those_of_the_recurrence() -> None:
    values = [x.requires_grad_() for x in drawn(21, dtype=torch.float64)]
    grads = [torch.autograd.grad(form(*values)[0].sin().sum(), values) for form in (step, lambda *x: chunk(*x, size=8))]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_its_fake_and_its_refusals() -> None:
    q, k, v, beta, decay = drawn(5)
    torch.library.opcheck(GATED_DELTA_RULE, (q, k, v, beta, decay), test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(ValueError, match=r"beta and log_decay \[B, H, T\], got"):
        step(q, k, v, beta.unsqueeze(-1))
    with pytest.raises(ValueError, match=r"the state of these keys and values is \[2, 3, 5, 4\]"):
        chunk(q, k, v, beta, None, torch.zeros(2, 3, 4, 5))
    with pytest.raises(ValueError, match="a chunk is a power of two, got size=48"):
        chunk(q, k, v, beta, size=48)
    assert TRUTHS[GATED_DELTA_RULE] is chunk


def test_keys_that_are_all_alike_are_no_trouble() -> None:
    """The triangular system is then as far from the identity as it gets."""
    k = torch.ones(1, 1, 128, 4) / 2
    v, beta = torch.randn(1, 1, 128, 3), torch.ones(1, 1, 128)
    close(GATED_DELTA_RULE(k, k, v, beta), judged(k, k, v, beta))
