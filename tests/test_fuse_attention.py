"""fuse-attention: however attention is spelled out, one node computes it; what is no plain attention stays, with the reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import Calls, program
from torch.nn import functional as F

import dyncc
from dyncc.evidence import relative_error
from dyncc.ir import is_attention, op_name
from dyncc.passes.fuse_attention import FuseAttention
from dyncc.passes.simplify_mask import SimplifyMask
from dyncc.rewrite import Applied, Context, apply_pass, fingerprint

B, H, G, T, D = 2, 6, 2, 7, 4
LEAST = torch.finfo(torch.float32).min
Attend = Callable[..., Any]


def given(groups: int = H, rows: int = T) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, H, rows, D), torch.randn(B, groups, T, D), torch.randn(B, groups, T, D)]


def flat() -> list[torch.Tensor]:
    """Queries, keys and values as [B, T, H, D]."""
    return [x.transpose(1, 2).contiguous() for x in given()]


def fused(function: Attend, *inputs: torch.Tensor) -> tuple[Any, Applied]:
    captured = program(function, *inputs)
    return captured, apply_pass(captured, FuseAttention(), Context())


def later(x: torch.Tensor) -> torch.Tensor:
    """[T, T] bool: keys beyond their row."""
    return torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).triu(1)


def plain(q: Any, k: Any, v: Any) -> Any:
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(D), dim=-1) @ v


def scaled_before(q: Any, k: Any, v: Any) -> Any:
    return torch.softmax((q * D**-0.25) @ (k * D**-0.25).transpose(2, 3), -1) @ v


def upcast(q: Any, k: Any, v: Any) -> Any:
    return torch.softmax((q @ k.transpose(2, 3)) * 0.3, -1, dtype=torch.float32).to(q.dtype) @ v


def added_mask(q: Any, k: Any, v: Any) -> Any:
    mask = torch.zeros(T, T).masked_fill(later(q), LEAST)[None, None]
    return F.dropout(torch.softmax(q @ k.transpose(2, 3) * 0.5 + mask, -1), 0.1, training=False) @ v


def filled_mask(q: Any, k: Any, v: Any) -> Any:
    return torch.softmax((q @ k.transpose(2, 3) * 0.5).masked_fill(later(q), -1e9), -1) @ v


def where_mask(q: Any, k: Any, v: Any) -> Any:
    logits = q @ k.transpose(2, 3) * 0.5
    weights = torch.softmax(torch.where(~later(q), logits, float("-inf")), -1)
    return torch.where(torch.isnan(weights), 0.0, weights) @ v


def triangle(q: Any, k: Any, v: Any) -> Any:
    return torch.softmax(q @ k.transpose(2, 3) + torch.full((T, T), float("-inf")).triu(1), -1) @ v


def old_style(q: Any, k: Any, v: Any) -> Any:
    seen = torch.ones(T, T).tril()[None, None]
    return torch.softmax(q @ k.transpose(2, 3) * 0.5 + (1.0 - seen) * -10000.0, -1) @ v


def einsum(q: Any, k: Any, v: Any) -> Any:
    weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.5, -1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def merged_heads(q: Any, k: Any, v: Any) -> Any:
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.5, -1), v).view(B, H, T, D)


def biased_product(q: Any, k: Any, v: Any) -> Any:
    """Heads merged for the products alone, a bias in the first, a mask behind it."""
    slopes = (torch.arange(B * H).view(B * H, 1, 1) / 10) * torch.arange(T)
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    logits = torch.baddbmm(slopes, q, k.transpose(1, 2), beta=0.5, alpha=0.7).view(B, H, T, T)
    weights = torch.softmax(logits.masked_fill(later(q), LEAST), -1)
    return torch.bmm(weights.view(B * H, T, T), v).view(B, H, T, D)


def stabilised(q: Any, k: Any, v: Any) -> Any:
    logits = q @ k.transpose(2, 3) * 0.5
    return torch.softmax(logits - logits.max(-1, keepdim=True).values, -1) @ v


def two_biases(q: Any, k: Any, v: Any) -> Any:
    bias = torch.linspace(0, 1, H * T * T).view(1, H, T, T)
    hidden = (torch.arange(T) > 4).float().view(1, 1, 1, T) * LEAST
    return torch.softmax((q @ k.transpose(2, 3) + bias) * 0.5 + hidden, -1) @ v


def temperature(q: Any, k: Any, v: Any) -> Any:
    """Cosine attention with a scale of each head."""
    scale = torch.arange(1, H + 1).float().view(H, 1, 1)
    return torch.softmax(F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(2, 3) * scale, -1) @ v


def soft_cap(q: Any, k: Any, v: Any) -> Any:
    logits = torch.tanh(q @ k.transpose(2, 3) * 2.0 / 3.0) * 3.0
    return torch.softmax(logits + torch.zeros(T, T).masked_fill(later(q), LEAST), -1) @ v


def with_sinks(q: Any, k: Any, v: Any) -> Any:
    sinks = torch.linspace(-1, 2, H).reshape(1, -1, 1, 1).expand(B, -1, q.shape[-2], -1)
    logits = torch.cat([q @ k.transpose(2, 3) * 0.5, sinks], -1)
    logits = logits - logits.max(dim=-1, keepdim=True).values
    return torch.softmax(logits, -1)[..., :-1] @ v


def alone(q: Any, k: Any, v: Any) -> Any:
    """One head of one sequence."""
    return torch.softmax(q[0, 0] @ k[0, 0].T * 0.5, -1) @ v[0, 0]


def memory(q: Any, k: Any, v: Any) -> Any:
    """All tokens of all rows read one learned memory, as a layer [B, T, D] does."""
    keys, values = k[0, 0], v[0, 0]
    return torch.softmax(q[:, 0] @ keys.T, -1) @ values


def memory_of_heads(q: Any, k: Any, v: Any) -> Any:
    keys, values = k[0, 0], v[0, 0]
    return torch.softmax((q @ keys.T * 0.5).masked_fill(torch.arange(T) == 2, LEAST), -1) @ values


FUSED = {
    f.__name__: (f, flat if f is einsum else given)
    for f in (
        plain, scaled_before, upcast, added_mask, filled_mask, where_mask, triangle, old_style, einsum, merged_heads, biased_product,
        stabilised, two_biases, temperature, soft_cap, with_sinks, alone, memory,
        memory_of_heads,
    )
}  # fmt: skip
CAUSAL = {"added_mask", "filled_mask", "where_mask", "triangle", "old_style", "soft_cap"}


@pytest.mark.parametrize("name", FUSED)
def test_however_it_is_spelled_it_becomes_one_node(name: str) -> None:
    function, inputs = FUSED[name][0], FUSED[name][1]()
    _, applied = fused(function, *inputs)
    assert applied.applied and applied.modified, applied.reason
    assert (applied.result.found, applied.result.expected, applied.result.misses) == (1, 1, ())
    names = [op_name(n) for n in applied.program.graph.nodes if n.op == "call_function"]
    assert sum(n in ("attend", "scaled_dot_product_attention") for n in names) == 1
    assert not {"softmax", "matmul", "bmm"} & set(names)
    assert relative_error(function(*inputs), applied.program.module(*inputs)[0]) < 1e-5


@pytest.mark.parametrize("name", sorted(CAUSAL))
def test_masks_that_hide_later_keys_become_the_flag(name: str) -> None:
    function, inputs = FUSED[name][0], given()
    _, applied = fused(function, *inputs)
    flagged = apply_pass(applied.program, SimplifyMask(), Context())
    assert flagged.applied, flagged.reason
    (node,) = [n for n in flagged.program.graph.nodes if is_attention(n)]
    assert node.args[3:6] == (None, 0.0, True)
    assert relative_error(function(*inputs), flagged.program.module(*inputs)[0]) < 1e-5


def grouped(repeat: Attend) -> Attend:
    def attend(q: Any, k: Any, v: Any) -> Any:
        return torch.softmax(q @ repeat(k).transpose(2, 3) * 0.5, -1) @ repeat(v)

    return attend


def shared(q: Any, k: Any, v: Any) -> Any:
    """The heads of a group as a dimension of their own, over which keys are broadcast."""
    q, k, v = q.view(B, -1, H // k.shape[1], T, D), k.unsqueeze(2), v.unsqueeze(2)
    hidden = torch.zeros(T, T).masked_fill(later(q), LEAST)
    return (torch.softmax(q @ k.transpose(-1, -2) * 0.5 + hidden, -1) @ v).reshape(B, H, T, D)


def by_einsum(q: Any, k: Any, v: Any) -> Any:
    q = q.view(B, -1, H // k.shape[1], T, D)
    weights = torch.softmax(torch.einsum("bgrqd,bgkd->bgrqk", q, k), -1)
    return torch.einsum("bgrqk,bgkd->bgrqd", weights, v).reshape(B, H, T, D)


GROUPED = {
    "repeat_interleave": (grouped(lambda x: x.repeat_interleave(H // G, 1)), G),
    "shared": (shared, G),
    "einsum": (by_einsum, G),
    "one head": (lambda q, k, v: plain(q, k, v), 1),
    "one group": (shared, 1),
}


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_keys(name: str) -> None:
    function, groups = GROUPED[name]
    inputs = given(groups)
    _, applied = fused(function, *inputs)
    assert applied.applied, applied.reason
    assert relative_error(function(*inputs), applied.program.module(*inputs)[0]) < 1e-5
    (node,) = [n for n in applied.program.graph.nodes if is_attention(n)]
    assert bool(node.kwargs.get("enable_gqa")) is (name != "repeat_interleave")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["plain", "added_mask", "soft_cap", "with_sinks", "stabilised"])
def test_other_dtypes_keep_their_own(name: str, dtype: torch.dtype) -> None:
    function, inputs = FUSED[name][0], [x.to(dtype) for x in given()]
    if name in ("added_mask", "soft_cap", "with_sinks"):
        inputs = [*inputs[:2], inputs[2].to(torch.promote_types(dtype, torch.float32))]  # their masks and sinks are fp32
    _, applied = fused(function, *inputs)
    assert applied.applied, applied.reason
    want, got = function(*inputs), applied.program.module(*inputs)[0]
    assert got.dtype == want.dtype
    assert relative_error(want, got) < {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float64: 1e-10}[dtype]


@pytest.mark.parametrize("name", ["plain", "filled_mask", "soft_cap", "with_sinks", "merged_heads"])
def test_lengths_that_vary(name: str) -> None:
    def function(q: Any, k: Any, v: Any) -> Any:
        size = q.shape[2]
        logits = q @ k.transpose(2, 3) * 0.5
        if name == "merged_heads":
            q, k, v = (x.reshape(-1, size, D) for x in (q, k, v))
            return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.5, -1), v).view(-1, H, size, D)
        if name == "filled_mask":
            logits = logits.masked_fill(torch.ones(size, size, dtype=torch.bool).triu(1), LEAST)
        if name == "soft_cap":
            logits = torch.tanh(logits)
        if name == "with_sinks":
            sinks = torch.linspace(-1, 2, H).view(1, -1, 1, 1).expand(q.shape[0], -1, size, -1)
            return torch.softmax(torch.cat([logits, sinks], -1), -1)[..., :-1] @ v
        return torch.softmax(logits, -1) @ v

    sizes = {0: torch.export.Dim("batch", min=2, max=8), 2: torch.export.Dim("length", min=2, max=64)}
    captured = program(function, *given(), dynamic=[sizes] * 3)
    applied = apply_pass(captured, FuseAttention(), Context())
    assert applied.applied, applied.reason
    flagged = apply_pass(applied.program, SimplifyMask(), Context())
    assert flagged.applied is (name == "filled_mask")
    inputs = [torch.randn(3, H, 11, D) for _ in range(3)]
    assert relative_error(function(*inputs), flagged.program.module(*inputs)[0]) < 1e-5


def test_gradients_are_kept_where_attention_is_plain() -> None:
    inputs = given()
    with torch.enable_grad():
        leaves = [[x.clone().requires_grad_() for x in inputs] for _ in range(2)]
        _, applied = fused(added_mask, *inputs)
        for some, function in zip(leaves, (added_mask, lambda *x: applied.program.module(*x)[0]), strict=True):
            function(*some).square().sum().backward()
    for a, b in zip(*leaves, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_attention_that_is_shared_is_fused_for_all_who_read_it() -> None:
    def twice(q: Any, k: Any, v: Any) -> Any:
        out = merged_heads(q, k, v)
        return out.transpose(1, 2).reshape(B, T, H * D), out.sum(-1)

    inputs = given()
    _, applied = fused(twice, *inputs)
    assert applied.applied, applied.reason
    for want, got in zip(twice(*inputs), applied.program.module(*inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def reads_weights(q: Any, k: Any, v: Any) -> Any:
    weights = torch.softmax(q @ k.transpose(2, 3), -1)
    return weights @ v, weights


def reads_logits(q: Any, k: Any, v: Any) -> Any:
    logits = q @ k.transpose(2, 3)
    return torch.softmax(logits, -1) @ v, logits.mean()


def cap_behind_mask(q: Any, k: Any, v: Any) -> Any:
    logits = (q @ k.transpose(2, 3)).masked_fill(later(q), LEAST)
    return torch.softmax(torch.tanh(logits) * 50, -1) @ v


def number_before_sinks(q: Any, k: Any, v: Any) -> Any:
    return torch.softmax(torch.cat([q @ k.transpose(2, 3) + 2.0, torch.ones(B, H, q.shape[2], 1)], -1), -1)[..., :-1] @ v


def both_sides(q: Any, k: Any, v: Any) -> Any:
    logits = q @ k.transpose(2, 3)
    return torch.softmax(logits * logits, -1) @ v


REFUSED: dict[str, tuple[Attend, str]] = {
    "weights are returned": (reads_weights, "its weights are read elsewhere"),
    "logits are returned": (reads_logits, "its logits or weights are read elsewhere"),
    "over rows": (lambda q, k, v: torch.softmax(q @ k.transpose(2, 3), -2) @ v, "the softmax is not along the last dimension"),
    "a weak fill": (
        lambda q, k, v: torch.softmax((q @ k.transpose(2, 3)).masked_fill(later(q), -5.0), -1) @ v,
        "logits are replaced by -5.0, which does not hide a key for certain",
    ),
    "cap behind a mask": (cap_behind_mask, "tanh stands behind a mask"),
    "cap behind a number": (
        lambda q, k, v: torch.softmax(torch.tanh(q @ k.transpose(2, 3) + 3.0) * 5.0, -1) @ v,
        "tanh stands behind a mask or a sum",
    ),
    "cap behind a sum for each row": (
        lambda q, k, v: torch.softmax(torch.tanh(q @ k.transpose(2, 3) + q[..., :1]) * 5.0, -1) @ v,
        "tanh stands behind a mask or a sum",
    ),
    "a number that sinks do not get": (number_before_sinks, "something is added to the logits of keys, and not to the sinks"),
    "weights scaled": (lambda q, k, v: (torch.softmax(q @ k.transpose(2, 3), -1) * 0.5) @ v, "mul reads the weights behind the softmax"),
    "dropout": (lambda q, k, v: F.dropout(torch.softmax(q @ k.transpose(2, 3), -1), 0.5, training=True) @ v, "dropout is active"),
    "a scale of each key": (
        lambda q, k, v: torch.softmax(q @ k.transpose(2, 3) * torch.arange(T).float(), -1) @ v,
        "the logits are multiplied by something that differs from key to key",
    ),
    "a negative scale": (lambda q, k, v: torch.softmax(q @ k.transpose(2, 3) * -1.0, -1) @ v, "the logits are scaled by -1.0"),
    "squared": (both_sides, "the logits are multiplied by something that differs from key to key"),
    "no attention": (lambda q, k, v: torch.softmax(q.mean(1), -1), "no product of queries and keys feeds this softmax"),
    "clamped": (lambda q, k, v: torch.softmax((q @ k.transpose(2, 3)).clamp(max=3), -1) @ v, "clamp changes the logits"),
    "transposed weights": (lambda q, k, v: v.mT @ torch.softmax(q @ k.transpose(2, 3), -1), "the weights are not the left side"),
    "fused already": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), "no softmax in the graph: its attention is fused already"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_attention_stays(name: str) -> None:
    function, reason = REFUSED[name]
    inputs = given()
    captured, applied = fused(function, *inputs)
    before = fingerprint(captured.graph)
    assert not applied.applied
    assert reason in applied.reason
    assert applied.program is captured
    assert fingerprint(captured.graph) == before


@pytest.mark.parametrize("name", ["with_sinks", "soft_cap"])
def test_engines_that_do_not_know_the_op_get_its_truth(name: str, tmp_path: Path) -> None:
    inputs = given()
    optimized = dyncc.optimize(Calls(FUSED[name][0]), inputs, passes="fuse-attention", engine="reference", strict=True)
    assert optimized.report.rewrites[0].evidence["error"] < 1e-5
    assert relative_error(FUSED[name][0](*inputs), optimized(*inputs)) < 1e-5
    written = optimized.export_onnx(tmp_path / "attention.onnx")
    assert max(row.error for row in written.parity) < 1e-5
