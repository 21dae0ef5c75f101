"""Gated linear attention: step, dense and chunk forms compute the same, in fp32 judged by the recurrence in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dyncc.kernels.gated_linear_attention import GATED_LINEAR_ATTENTION, TRUTHS, chunk, dense, step
from dyncc.kernels.gated_linear_attention.chunks import chunk_by_chunk

FORMS = {"step": step, "dense": dense, "chunk": chunk, "chunk_by_chunk": chunk_by_chunk, "op": GATED_LINEAR_ATTENTION}
DECAYS = ("none", "zero", "mild", "steep", "forgets", "one a head", "one a token", "mixed")


def decays(kind: str, sizes: tuple[int, ...]) -> Tensor | None:
    batch, heads, tokens, _ = sizes
    return {
        "none": None,
        "zero": torch.zeros(sizes),
        "mild": -torch.rand(sizes) / 16,
        "steep": torch.full(sizes, -50.0),
        "forgets": torch.where(torch.rand(sizes) > 0.8, float("-inf"), -0.1),
        "one a head": torch.linspace(-2, -0.01, heads).view(1, heads, 1, 1),
        "one a token": -torch.rand(batch, heads, tokens, 1),
        "mixed": torch.where(torch.rand(sizes) > 0.5, -50.0, -1e-3),
    }[kind]


def drawn(batch: int, heads: int, tokens: int, width: int, wide: int, kind: str = "mild") -> tuple[Any, ...]:
    q, k = torch.randn(2, batch, heads, tokens, width)
    return q, k, torch.randn(batch, heads, tokens, wide), decays(kind, (batch, heads, tokens, width))


def judged(*values: Any, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    return step(*(x.double() if isinstance(x, Tensor) else x for x in values), scale=scale)


def close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], error: float = 1e-5) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=error, atol=error * max(1.0, b.abs().max().item() if b.numel() else 0.0))


@settings(deadline=None, max_examples=25, derandomize=True, database=None)
@given(data=st.data())
def test_all_forms_compute_the_recurrence(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 99)))
    sizes = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([0, 1, 2, 5, 31, 64, 65, 100])), draw(st.integers(1, 5))
    values = drawn(*sizes, draw(st.integers(1, 4)), draw(st.sampled_from(DECAYS)))
    state = draw(st.sampled_from([None, torch.randn(*sizes[:2], sizes[3], values[2].shape[3])]))
    scale = draw(st.sampled_from([1.0, 0.3]))
    size = draw(st.sampled_from([1, 2, 16, 32, 64]))
    want = judged(*values, state, scale=scale)
    for name, form in FORMS.items():
        close(form(*values, state, scale, **({"size": size} if name.startswith("chunk") else {})), want)


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("name", ["chunk", "op"])
def test_a_sequence_in_two_parts_is_one_call(name: str, kind: str) -> None:
    torch.manual_seed(0)
    q, k, v, decay = drawn(1, 2, 90, 4, 3, "mild")
    decay = decays(kind, (1, 2, 90, 4))
    form, state, outs = FORMS[name], None, []
    for part in (slice(0, 37), slice(37, 37), slice(37, 90)):
        there = decay if decay is None or decay.shape[2] == 1 else decay[:, :, part]
        out, state = form(q[:, :, part], k[:, :, part], v[:, :, part], there, state)
        outs.append(out)
    close((torch.cat(outs, 2), state), judged(q, k, v, decay))


@pytest.mark.parametrize("name", FORMS)
def test_without_decay_it_is_causal_linear_attention_and_with_all_of_it_each_token_reads_itself(name: str) -> None:
    torch.manual_seed(0)
    q, k, v, _ = drawn(2, 2, 70, 4, 6)
    torch.testing.assert_close(FORMS[name](q, k, v)[0], (q @ k.mT).tril() @ v, rtol=1e-4, atol=1e-4)
    alone = FORMS[name](q, k, v, torch.full(k.shape, float("-inf")))[0]
    torch.testing.assert_close(alone, (q * k).sum(-1, keepdim=True) * v, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [chunk, chunk_by_chunk])
def test_a_weak_decay_behind_a_strong_one_is_not_lost(form: Any) -> None:
    """Sums since the chunk's start reach 1600 here, where fp32 rounds to 1e-4: differences of them would be that wrong."""
    decay = torch.cat([torch.full((1, 1, 32, 1), -50.0), torch.full((1, 1, 32, 1), -1e-4)], 2)
    one = torch.ones(1, 1, 64, 1)
    want, _ = judged(one, one, one, decay)
    assert (form(one, one, one, decay)[0].double() - want).abs().max() < 2e-5


def test_a_prompt_that_is_padded_leaves_the_state_as_it_is() -> None:
    torch.manual_seed(0)
    q, k, v, decay = drawn(1, 2, 40, 4, 3)
    k[:, :, 30:], decay[:, :, 30:] = 0.0, 0.0
    close((q, GATED_LINEAR_ATTENTION(q, k, v, decay)[1]), (q, judged(*(x[:, :, :30] for x in (q, k, v, decay)))[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_state_is_wide_and_the_result_has_the_type_of_values(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = [x.to(dtype) for x in drawn(1, 2, 70, 4, 3)]
    out, state = GATED_LINEAR_ATTENTION(*values)
    assert out.dtype == dtype and state.dtype == torch.promote_types(dtype, torch.float32)
    close((out, state), judged(*values), {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-12}[dtype])


def test_gradients_of_the_chunk_form_are_those_of_the_recurrence() -> None:
    torch.manual_seed(0)
    values = [x.double().requires_grad_() for x in drawn(1, 2, 21, 3, 2)]
    grads = [torch.autograd.grad(form(*values)[0].sin().sum(), values) for form in (step, lambda *x: chunk(*x, size=8))]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("tokens", [0, 1, 4, 70])
def test_shapes_on_fakes_are_those_of_the_op(tokens: int) -> None:
    values = drawn(1, 2, tokens, 4, 3)
    torch.library.opcheck(GATED_LINEAR_ATTENTION, (*values, torch.randn(1, 2, 4, 3)), test_utils=("test_schema", "test_faketensor"))


def test_sizes_that_do_not_fit_are_told() -> None:
    q, k, v, decay = drawn(1, 2, 5, 4, 3)
    with pytest.raises(ValueError, match=r"takes q and k \[B, H, T, Dk\]"):
        step(q, k[:, :, :3], v, decay)
    with pytest.raises(ValueError, match=r"the state of these keys and values is \[1, 2, 4, 3\]"):
        chunk(q, k, v, decay, torch.zeros(1, 2, 3, 4))
    with pytest.raises(ValueError, match="a chunk is a power of two, got size=48"):
        chunk(q, k, v, decay, size=48)
    assert TRUTHS[GATED_LINEAR_ATTENTION] is chunk
