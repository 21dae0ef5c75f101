"""`dyncc::attend`: a few rows at a time on a CPU, against its truth, which is checked by hand and against SDPA."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from graphs import node, program
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dyncc.ir import argument, is_attention, shape
from dyncc.kernels.fused_attention import ATTEND, attend, cpu
from dyncc.passes.fuse_attention import FuseAttention
from dyncc.passes.simplify_mask import SimplifyMask
from dyncc.passes.slice_last_token import SliceLastToken
from dyncc.rewrite import Context, apply_pass

CLOSE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def values(batch: int, heads: int, groups: int, rows: int, keys: int, width: int, wide: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys and values laid out as [B, T, H, D], as models do."""
    sizes = ((heads, rows, width), (groups, keys, width), (groups, keys, wide))
    return [torch.randn(batch, t, h, d).transpose(1, 2).to(dtype) for h, t, d in sizes]


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_rows_at_a_time_compute_the_truth(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 99)))
    groups, times, batch = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    rows, keys = draw(st.sampled_from([1, 7, 63, 130])), draw(st.sampled_from([1, 5, 64, 131]))
    width, wide = draw(st.sampled_from([(8, 8), (3, 5), (20, 20)]))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64]))
    q, k, v = values(batch, groups * times, groups, rows, keys, width, wide, dtype)
    causal = draw(st.booleans())
    more: dict[str, Any] = {"scale": draw(st.sampled_from([None, 0.3])), "cap": draw(st.sampled_from([0.0, 2.0]))}
    more["window"] = draw(st.sampled_from([0, 1, 6])) if causal else 0
    mask = draw(st.sampled_from([None, "bool", "added", "row"]))
    if mask is not None:
        size = (batch, 1, rows, keys) if mask != "row" else (1, keys)
        seen = torch.rand(size) > 0.4
        mask = seen if mask != "added" else torch.where(seen, torch.randn(size), float("-inf")).to(dtype)
    if draw(st.booleans()):
        more["sinks"] = torch.randn(groups * times).to(dtype).view(1, -1, 1, 1)
    if draw(st.booleans()):
        more |= {"gate": torch.randn(batch, groups * times, rows, wide).to(dtype), "activation": draw(st.sampled_from(["silu", "sigmoid"]))}
    want = attend(q, k, v, mask, 0.0, causal, **more)
    got = ATTEND(q, k, v, mask, 0.0, causal, **more)
    assert got.transpose(1, 2).is_contiguous() and want.transpose(1, 2).is_contiguous() and got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=CLOSE[dtype], atol=CLOSE[dtype])


def test_with_nothing_more_it_is_sdpa() -> None:
    q, k, v = values(2, 6, 2, 9, 9, 8, 8, torch.float32)
    for causal in (False, True):
        want = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        torch.testing.assert_close(attend(q, k, v, None, 0.0, causal), want, rtol=1e-5, atol=1e-6)


def test_by_hand() -> None:
    one = torch.ones(1, 1, 1, 1)
    v = torch.tensor([[[[1.0], [5.0]]]])
    capped = attend(one * 100, torch.tensor([[[[1.0], [-1.0]]]]), v, scale=1.0, cap=1.0)
    weight = torch.sigmoid(torch.tensor(2.0))  # tanh(100) = 1, tanh(-100) = -1
    torch.testing.assert_close(capped.squeeze(), weight + 5 * (1 - weight))
    sunk = attend(one, torch.zeros(1, 1, 2, 1), v, sinks=torch.zeros(1, 1, 1, 1))
    torch.testing.assert_close(sunk.squeeze(), torch.tensor(2.0))  # a third of the weight each, and the sink has no value
    shut = attend(one, torch.zeros(1, 1, 2, 1), v, gate=torch.zeros(1, 1, 1, 1))
    torch.testing.assert_close(shut.squeeze(), torch.tensor(1.5))


@pytest.mark.parametrize("kernel", [attend, cpu.attend_by_rows])
def test_a_row_that_sees_nothing_gives_zeros(kernel: Any) -> None:
    q, k, v = values(1, 2, 2, 4, 4, 8, 8, torch.float32)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    mask[:, :, 2] = False
    for more in ({}, {"cap": 3.0}, {"sinks": torch.zeros(1, 2, 1, 1)}):
        out = kernel(q, k, v, mask, **more)
        assert not out[:, :, 2].any() and out.isfinite().all() and out[:, :, 1].any()


@pytest.mark.parametrize("kernel", [attend, cpu.attend_by_rows])
def test_a_window_behind_all_keys_gives_zeros(kernel: Any) -> None:
    q, k, v = values(1, 2, 2, 7, 3, 8, 8, torch.float32)
    out = kernel(q, k, v, None, 0.0, True, window=2)
    assert out.isfinite().all() and out[:, :, :4].ne(0).all() and not out[:, :, 4:].any()


@pytest.mark.parametrize("kernel", [attend, cpu.attend_by_rows])
def test_extreme_logits_and_keys_behind_a_mask_that_hold_nan(kernel: Any) -> None:
    q, k, v = values(1, 2, 2, 40, 40, 8, 8, torch.float32)
    out = kernel(q * 1e4, k * 1e4, v, None, 0.0, True, cap=30.0)
    assert out.isfinite().all()
    q, k = q * 1e3, k * 1e3
    torch.testing.assert_close(kernel(q, k, v, None, 0.0, True), F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_memory_does_not_grow_with_rows_times_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest piece of logits, counted where weights are made of them."""
    largest = 0
    real = cpu._weights

    def counted(logits: torch.Tensor, *more: Any) -> Any:
        nonlocal largest
        largest = max(largest, logits.numel())
        return real(logits, *more)

    monkeypatch.setattr(cpu, "_weights", counted)
    q, k, v = values(1, 1, 1, 3000, 3000, 4, 4, torch.float32)
    ATTEND(q, k, v, None, 0.0, True, cap=5.0)
    assert 0 < largest <= cpu.LOGITS


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"dropout_p": 0.1}, "has no dropout"),
        ({"window": 3}, "needs is_causal=True"),
        ({"activation": "relu"}, "'relu' is not one of sigmoid, silu, none"),
    ],
)
def test_what_it_does_not_mean_is_told(more: dict[str, Any], words: str) -> None:
    q, k, v = values(1, 2, 2, 3, 3, 4, 4, torch.float32)
    with pytest.raises(ValueError, match=words):
        attend(q, k, v, **more)
    with pytest.raises(ValueError, match=words):
        cpu.attend_by_rows(q, k, v, **more)


def test_heads_that_groups_cannot_share() -> None:
    q, k, v = values(1, 3, 2, 3, 3, 4, 4, torch.float32)
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key heads evenly"):
        attend(q, k, v)


def capped_window(q: Any, k: Any, v: Any) -> Any:
    rows, keys = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])[None]
    hidden = torch.where((keys <= rows) & (keys > rows - 3), 0.0, torch.finfo(torch.float32).min)
    return torch.softmax(torch.tanh(q @ k.transpose(2, 3) / 2) * 2 + hidden, -1) @ v


def test_a_window_is_read_off_how_the_mask_is_built() -> None:
    inputs = values(2, 4, 4, 9, 9, 8, 8, torch.float32)
    fused = apply_pass(program(capped_window, *inputs), FuseAttention(), Context())
    flagged = apply_pass(fused.program, SimplifyMask(), Context())
    assert flagged.applied, flagged.reason
    made = node(flagged.program, "attend")
    assert argument(made, "is_causal") is True and argument(made, "window") == 3 and argument(made, "attn_mask") is None
    torch.testing.assert_close(flagged.program.module(*inputs)[0], capped_window(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [slice(-1, None), slice(-3, None), slice(0, 2)])
def test_fewer_rows_of_a_window_get_their_mask(rows: slice) -> None:
    """Two layers, of which the output reads some rows."""

    def layer(x: Any, weights: Any) -> Any:
        q, k, v = ((x @ w).view(2, -1, 4, 4).transpose(1, 2) for w in weights)
        return x + capped_window(q, k, v).transpose(1, 2).reshape(2, -1, 16) @ weights[0]

    def model(x: Any, weights: Any) -> Any:
        return layer(layer(x, weights), weights)[:, rows] @ weights[1]

    inputs = [torch.randn(2, 9, 16), torch.randn(3, 16, 16) * 0.2]
    current = program(model, *inputs)
    for passed in (FuseAttention(), SimplifyMask(), SliceLastToken()):
        applied = apply_pass(current, passed, Context())
        assert applied.applied, applied.reason
        current = applied.program
    short = [n for n in current.graph.nodes if is_attention(n)][-1]
    assert shape(short)[2] == len(range(9)[rows]) and not argument(short, "window", 0)
    torch.testing.assert_close(current.module(*inputs)[0], model(*inputs), rtol=1e-4, atol=1e-5)


INTERPRETED = """
import torch
from dyncc.kernels.fused_attention import attend
from dyncc.kernels.fused_attention.gpu import attend_by_kernel, takes
torch.manual_seed(0)
q, k, v = torch.randn(2, 21, 4, 24).transpose(1, 2), torch.randn(2, 2, 21, 24), torch.randn(2, 2, 21, 40)
mask = torch.rand(2, 1, 21, 21) > 0.4
mask[:, :, 7] = False
sink, gate = torch.randn(1, 4, 1, 1), torch.randn(2, 4, 21, 1)
for attn_mask, causal, more in (
    (None, True, {"cap": 2.0, "window": 5, "sinks": sink, "gate": gate}),
    (mask, False, {"gate": gate, "activation": "silu", "scale": 0.3}),
    (torch.randn(21, 21), False, {"sinks": torch.randn(1), "gate": gate, "activation": "none"}),
):
    assert takes(q, k, v, attn_mask, more.get("sinks"), gate)
    got = attend_by_kernel(q, k, v, attn_mask, 0.0, causal, enable_gqa=True, **more)
    torch.testing.assert_close(got, attend(q, k, v, attn_mask, 0.0, causal, **more), rtol=2e-5, atol=2e-5)
    assert got.transpose(1, 2).is_contiguous()
sinks_of_rows = torch.randn(1, 1, 21, 1)
assert not takes(q, k, v, None, sinks_of_rows, None) and not takes(q.double(), k.double(), v.double(), None, None, None)
torch.testing.assert_close(attend_by_kernel(q, k, v, sinks=sinks_of_rows), attend(q, k, v, sinks=sinks_of_rows))
print("compared")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has wheels for Linux only")
def test_on_a_gpu_a_generated_kernel_computes_it() -> None:
    """In Triton's interpreter, which has to be asked for before Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "compared"
