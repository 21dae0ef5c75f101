"""fuse-attention: masks by how they are built (prefixes, windows, ALiBi), and softmax written as exponentials over their sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from graphs import program
from torch import fx

from dyncc.evidence import relative_error
from dyncc.ir import argument, is_attention, op_name
from dyncc.kernels.fused_attention import ATTEND, attend
from dyncc.passes import fuse_attention
from dyncc.passes.fuse_attention import FuseAttention
from dyncc.passes.simplify_mask import SimplifyMask
from dyncc.passes.slice_last_token import SliceLastToken
from dyncc.rewrite import Applied, Context, apply_pass, fingerprint

B, H, T, D = 2, 4, 12, 8
LEAST = torch.finfo(torch.float32).min


def given() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return list(torch.randn(3, B, H, T, D))


def logits(q: Any, k: Any) -> Any:
    return q @ k.transpose(2, 3) * D**-0.5


def at() -> torch.Tensor:
    return torch.arange(T)


def fused(function: Callable[..., Any], *inputs: torch.Tensor, needs_grad: bool = False) -> tuple[fx.Node, Applied]:
    """The attention that is left when fuse-attention and simplify-mask are done."""
    spelled = apply_pass(replace(program(function, *inputs), needs_grad=needs_grad), FuseAttention(), Context())
    assert spelled.applied, spelled.reason
    simple = apply_pass(spelled.program, SimplifyMask(), Context())
    (found,) = [n for n in simple.program.graph.nodes if is_attention(n)]
    return found, simple


def prefix_where(q: Any, k: Any, v: Any) -> Any:
    seen = (at()[None] <= at()[:, None]) | (at()[None] < 5)
    return torch.softmax(torch.where(seen, logits(q, k), float("-inf")), -1) @ v


def prefix_of_ones(q: Any, k: Any, v: Any) -> Any:
    seen = torch.ones(T, T, dtype=torch.bool).tril() | ~(at() >= 5)
    return torch.softmax(logits(q, k) + torch.zeros(T, T).masked_fill(~seen, LEAST), -1) @ v


def prefix_and_cap(q: Any, k: Any, v: Any) -> Any:
    seen = torch.logical_or(at()[:, None] >= at()[None], at()[None] <= 4)
    return torch.softmax((torch.tanh(logits(q, k) / 3) * 3).masked_fill(~seen, -1e9), -1) @ v


def window_by_distance(q: Any, k: Any, v: Any) -> Any:
    behind = at()[:, None] - at()[None]
    return torch.softmax(logits(q, k).masked_fill((behind < 0) | (behind >= 4), LEAST), -1) @ v


@pytest.mark.parametrize("function", [prefix_where, prefix_of_ones, prefix_and_cap, window_by_distance])
def test_long_masks_that_count_keys_become_numbers(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_attention, "LONG", T)
    node, applied = fused(function, *given())
    assert node.target is ATTEND and argument(node, "attn_mask") is None and argument(node, "is_causal")
    assert (argument(node, "window"), argument(node, "prefix")) == ((4, 0) if function is window_by_distance else (0, 5))
    assert relative_error(function(*given()), applied.program.module(*given())[0]) < 1e-5


def of_an_input(q: Any, k: Any, v: Any) -> Any:
    return torch.softmax(logits(q, k).masked_fill((at()[None] > at()[:, None]) & (v[0, 0, :, 0] > 0), LEAST), -1) @ v


def prefix_of_rows(q: Any, k: Any, v: Any) -> Any:
    return torch.softmax(logits(q, k).masked_fill((at()[None] > at()[:, None]) & (at()[:, None] >= 5), LEAST), -1) @ v


def hidden_prefix(q: Any, k: Any, v: Any) -> Any:
    return torch.softmax(logits(q, k).masked_fill((at()[None] > at()[:, None]) | ((at() < 3) & (at()[:, None] > 5)), LEAST), -1) @ v


def written_prefix(q: Any, k: Any, v: Any) -> Any:
    """A triangle into which somebody writes afterwards is no triangle."""
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    seen[:, :5].fill_(True)
    return torch.softmax(logits(q, k).masked_fill(~seen, LEAST), -1) @ v


@pytest.mark.parametrize("function", [of_an_input, prefix_of_rows, hidden_prefix, written_prefix])
def test_masks_of_another_make_stay_masks(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_attention, "LONG", T)
    node, applied = fused(function, *given())
    assert argument(node, "attn_mask") is not None and not applied.applied
    assert applied.reason == "attention 0: its mask depends on the inputs, or hides more than later keys"
    assert relative_error(function(*given()), applied.program.module(*given())[0]) < 1e-5


def slopes() -> torch.Tensor:
    return (2.0 ** -torch.arange(1, H + 1)).view(H, 1, 1)


def alibi(q: Any, k: Any, v: Any) -> Any:
    bias = slopes() * (at()[None] - at()[:, None])
    return torch.softmax(logits(q, k) + bias + torch.full((T, T), float("-inf")).triu(1), -1) @ v


def alibi_in_its_mask(q: Any, k: Any, v: Any) -> Any:
    bias = -slopes()[None] * (at()[:, None] - at()[None]).to(q.dtype)
    return torch.softmax(logits(q, k) - bias.masked_fill(at()[None] > at()[:, None], 1e9), -1) @ v


def alibi_summed(q: Any, k: Any, v: Any) -> Any:
    mask = torch.zeros(T, T).masked_fill(at()[None] > at()[:, None], LEAST)
    return torch.softmax(logits(q, k) + ((at()[None] - at()[:, None]) * 0.25 + mask), -1) @ v


def alibi_backwards(q: Any, k: Any, v: Any) -> Any:
    bias = slopes() * -(at()[:, None] - at()[None])
    return torch.softmax((logits(q, k) + bias).masked_fill(at()[None] > at()[:, None], -1e9), -1) @ v


def alibi_of_all(q: Any, k: Any, v: Any) -> Any:
    return torch.softmax(logits(q, k) + slopes() * (at()[None] - at()[:, None]), -1) @ v


@pytest.mark.parametrize("function", [alibi, alibi_summed, alibi_backwards, alibi_of_all])
def test_slopes_times_distances_become_slopes(function: Any) -> None:
    node, applied = fused(function, *given())
    assert argument(node, "slopes") is not None and argument(node, "attn_mask") is None
    assert argument(node, "is_causal") is (function is not alibi_of_all)
    assert relative_error(function(*given()), applied.program.module(*given())[0]) < 1e-5


def alibi_of_keys(q: Any, k: Any, v: Any) -> Any:
    """One row of numbers a head: no matrix, and so an added mask as any."""
    return torch.softmax(logits(q, k) + slopes() * at(), -1) @ v


def alibi_by_size(q: Any, k: Any, v: Any) -> Any:
    return torch.softmax(logits(q, k) - slopes() * (at()[None] - at()[:, None]).abs(), -1) @ v


@pytest.mark.parametrize("function", [alibi_of_keys, alibi_by_size, alibi_in_its_mask])
def test_other_biases_are_added(function: Any) -> None:
    node, applied = fused(function, *given())
    assert argument(node, "slopes") is None and argument(node, "attn_mask") is not None
    assert relative_error(function(*given()), applied.program.module(*given())[0]) < 1e-5


def test_with_gradients_slopes_stay_a_mask_and_gradients_are_right() -> None:
    with torch.enable_grad():
        leaves = [[x.clone().requires_grad_() for x in given()] for _ in range(2)]
        node, applied = fused(alibi, *leaves[0], needs_grad=True)
        assert op_name(node) == "scaled_dot_product_attention"
        for some, function in zip(leaves, (alibi, lambda *x: applied.program.module(*x)[0]), strict=True):
            function(*some).square().sum().backward()
    for a, b in zip(*leaves, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [alibi, prefix_where, pytest.param(alibi_of_all, marks=pytest.mark.full)])
@pytest.mark.parametrize("rows", [pytest.param(slice(-1, None), marks=pytest.mark.full), slice(2, 4)])
def test_rows_that_are_sliced_keep_their_distances(function: Any, rows: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_attention, "LONG", T)
    weight = torch.randn(D, D)

    def last(x: Any, weight: Any) -> Any:
        q, k, v = ((x @ weight).view(B, T, H, D).transpose(1, 2) for _ in range(3))
        return (x + function(q, k, v).transpose(1, 2).reshape(B, T, H * D))[:, rows]

    weight, x = torch.randn(H * D, H * D), torch.randn(B, T, H * D)
    _, simple = fused(last, x, weight)
    applied = apply_pass(simple.program, SliceLastToken(), Context())
    assert applied.applied, applied.reason
    assert relative_error(last(x, weight), applied.program.module(x, weight)[0]) < 1e-5


def over_sum(q: Any, k: Any, v: Any) -> Any:
    weights = torch.exp(logits(q, k))
    return (weights / weights.sum(-1, keepdim=True)) @ v


def less_the_highest(q: Any, k: Any, v: Any) -> Any:
    x = logits(q, k).masked_fill(at()[None] > at()[:, None], float("-inf"))
    weights = (x - x.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhij,bhjd->bhid", weights / weights.sum(3)[..., None], v)


def divided_last(q: Any, k: Any, v: Any) -> Any:
    x = logits(q, k)
    weights = torch.exp(x - x.max(-1, keepdim=True).values)
    return (weights @ v) / weights.sum(dim=-1, keepdim=True)


def hidden_behind_exp(q: Any, k: Any, v: Any) -> Any:
    weights = logits(q, k).exp().masked_fill(at()[None] > at()[:, None], 0.0)
    return (weights / weights.sum(-1, keepdim=True)) @ v


def by_logsumexp(q: Any, k: Any, v: Any) -> Any:
    x = torch.where(at()[None] <= at()[:, None], logits(q, k), LEAST)
    return torch.exp(x - torch.logsumexp(x, -1, keepdim=True)) @ v


def by_log_softmax(q: Any, k: Any, v: Any) -> Any:
    return torch.log_softmax(logits(q, k), -1).exp() @ v


@pytest.mark.parametrize("function", [over_sum, less_the_highest, divided_last, hidden_behind_exp, by_logsumexp, by_log_softmax])
def test_exponentials_over_their_sum_are_a_softmax(function: Any) -> None:
    captured = program(function, *given())
    applied = apply_pass(captured, FuseAttention(), Context())
    assert applied.applied, applied.reason
    assert (applied.result.found, applied.result.expected) == (1, 1)
    names = {op_name(n) for n in applied.program.graph.nodes if n.op == "call_function"}
    assert "scaled_dot_product_attention" in names and not {"exp", "softmax", "matmul", "bmm", "sum"} & names
    assert relative_error(function(*given()), applied.program.module(*given())[0]) < 1e-5


def with_epsilon(q: Any, k: Any, v: Any) -> Any:
    weights = torch.exp(logits(q, k))
    return (weights / (weights.sum(-1, keepdim=True) + 1e-6)) @ v


def over_rows(q: Any, k: Any, v: Any) -> Any:
    weights = torch.exp(logits(q, k))
    return (weights / weights.sum(-2, keepdim=True)) @ v


def weighed(q: Any, k: Any, v: Any) -> Any:
    weights = torch.exp(logits(q, k)) * torch.arange(T)
    return (weights / weights.sum(-1, keepdim=True)) @ v


def read_twice(q: Any, k: Any, v: Any) -> Any:
    weights = torch.exp(logits(q, k))
    return (weights / weights.sum(-1, keepdim=True)) @ v, weights.sum(-1)


def mass_read(q: Any, k: Any, v: Any) -> Any:
    weights = torch.exp(logits(q, k))
    mass = weights.sum(-1, keepdim=True)
    return (weights @ v) / mass, mass


def of_features(q: Any, k: Any, v: Any) -> Any:
    return (q.exp() / q.exp().sum(-1, keepdim=True)) @ (k.mT @ v)


NEAR = (
    (with_epsilon, "the sum of exponentials goes through add before it divides"),
    (over_rows, "exponentials are summed over another dimension than the last"),
    (weighed, "exponentials go through mul before they are summed"),
    (read_twice, "its logits or weights are read elsewhere"),
    (mass_read, "its logits or weights are read elsewhere"),
    (of_features, "no softmax in the graph"),
)


@pytest.mark.parametrize(("function", "reason"), NEAR)
def test_exponentials_that_are_no_softmax_stay(function: Any, reason: str) -> None:
    captured = program(function, *given())
    before = fingerprint(captured.graph)
    applied = apply_pass(captured, FuseAttention(), Context())
    assert not applied.applied and reason in applied.reason, applied.reason
    assert applied.program is captured and fingerprint(captured.graph) == before


def test_what_stays_beside_what_is_fused_stays_as_it_was() -> None:
    def both(q: Any, k: Any, v: Any) -> Any:
        gates = torch.exp(q.mean(1))
        return over_sum(q, k, v), gates / gates.sum(-1, keepdim=True)

    applied = apply_pass(program(both, *given()), FuseAttention(), Context())
    assert (applied.result.found, applied.result.expected) == (1, 2)
    names = [op_name(n) for n in applied.program.graph.nodes if n.op == "call_function"]
    assert names.count("exp") == 1 and "softmax" not in names


@pytest.mark.parametrize("prefix", [3, 9, *(pytest.param(n, marks=pytest.mark.full) for n in (0, 50))])
@pytest.mark.parametrize("more", ["", "mask", "added", "cap", "slopes", "sinks"])
def test_a_prefix_and_slopes_on_a_cpu_are_what_they_mean(prefix: int, more: str) -> None:
    torch.manual_seed(0)
    q, (k, v) = torch.randn(B, H, 10, D), torch.randn(2, B, H // 2, T, D)
    mask = {"mask": torch.rand(B, 1, 10, T) > 0.3, "added": torch.randn(H, 1, T)}.get(more)
    told: dict[str, Any] = {"cap": {"cap": 2.0}, "slopes": {"slopes": slopes()}, "sinks": {"sinks": torch.randn(H, 1, 1)}}.get(more, {})
    want = attend(q, k, v, mask, 0.0, True, prefix=prefix, **told)
    torch.testing.assert_close(ATTEND(q, k, v, mask, 0.0, True, prefix=prefix, **told), want, rtol=1e-5, atol=1e-5)
    seen = (torch.arange(T) <= torch.arange(10)[:, None]) | (torch.arange(T) < prefix)
    bias = told.pop("slopes", torch.zeros(1, 1, 1)) * (torch.arange(T) - torch.arange(10)[:, None])
    bias = bias + torch.where(seen, 0.0, float("-inf"))
    bias = bias if mask is None else bias.masked_fill(~mask, float("-inf")) if more == "mask" else bias + mask
    torch.testing.assert_close(attend(q, k, v, bias, **told), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"prefix": 3}, "needs is_causal=True"),
        ({"prefix": 3, "window": 2, "is_causal": True}, "and no window"),
        ({"slopes": torch.ones(H)}, r"got \[4\]"),
    ],
)
def test_what_attend_does_not_mean_is_told(more: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        attend(*given(), **more)
