"""Loops over tokens that a capture wrote out become one node; what is no such recurrence stays, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from graphs import program
from torch.nn import functional as F

import dyncc
from dyncc.evidence import relative_error
from dyncc.ir import op_name
from dyncc.layers.gated_delta_rule import GatedDeltaRule
from dyncc.layers.gated_linear_attention import GatedLinearAttention
from dyncc.layers.two_way_linear_attention import TwoWayLinearAttention
from dyncc.own_ops import spelled_out
from dyncc.passes import unrolled_recurrence
from dyncc.passes.fuse_linear_attention import FuseLinearAttention
from dyncc.rewrite import Applied, Context, apply_pass, fingerprint

B, H, T, D = 2, 3, 9, 4
OPS = {"gated_linear_attention", "gated_delta_rule"}


def given(tokens: int = T) -> list[torch.Tensor]:
    """q, k, v [B, H, T, D], log decays a channel, and a state."""
    torch.manual_seed(0)
    return [*torch.randn(3, B, H, tokens, D), -torch.rand(B, H, tokens, D), torch.randn(B, H, D, D)]


def by_sums(q: Any, k: Any, v: Any, a: Any, s: Any) -> Any:
    outs = []
    for t in range(q.shape[2]):
        s = s * a[:, :, t, :, None].exp() + k[:, :, t, :, None] * v[:, :, t, None, :]
        outs.append((q[:, :, t, :, None] * D**-0.5 * s).sum(-2))
    return torch.stack(outs, 2), s


def by_products(q: Any, k: Any, v: Any, a: Any, s: Any) -> Any:
    outs = []
    for t in range(q.shape[2]):
        s = k[:, :, t, None].mT @ v[:, :, t, None] + torch.exp(a[:, :, t])[..., None] * s
        outs.append(q[:, :, t, None] @ s)
    return torch.cat(outs, 2)


def one_decay_a_head(q: Any, k: Any, v: Any, a: Any, s: Any) -> Any:
    """RetNet's: it never changes; outputs [T, B, H, D]."""
    outs, kept = [], torch.sigmoid(a[0, :, 0, 0]).view(H, 1, 1)
    for t in range(q.shape[2]):
        s = kept * s + k[:, :, t].unsqueeze(-1) * v[:, :, t].unsqueeze(-2)
        outs.append((s * q[:, :, t].unsqueeze(-1)).sum(2))
    return torch.stack(outs)


def no_decay_and_features(q: Any, k: Any, v: Any, a: Any, s: Any) -> Any:
    """A feature map in each step: what the steps take is stacked."""
    outs = []
    for t in range(q.shape[2]):
        s = s + (F.elu(k[:, :, t]) + 1)[..., None] * v[:, :, t, None]
        outs.append(((F.elu(q[:, :, t]) + 1)[..., None] * s).sum(-2))
    return torch.stack(outs, -2)


def a_number(q: Any, k: Any, v: Any, a: Any, s: Any) -> Any:
    """One head that is no dimension."""
    q, k, v, s = q[:, 0], k[:, 0], v[:, 0], s[:, 0]
    outs = []
    for t in range(q.shape[1]):
        s = s * 0.9 + k[:, t, :, None] * v[:, t, None]
        outs.append((q[:, t, :, None] * s).sum(1))
    return torch.stack(outs, 1), s


def delta(q: Any, k: Any, v: Any, a: Any, s: Any) -> Any:
    outs, beta, kept = [], torch.sigmoid(a[..., :1]), torch.exp(a[..., 1])
    k = F.normalize(k, dim=-1)
    for t in range(q.shape[2]):
        s = s * kept[:, :, t, None, None]
        wrong = v[:, :, t] - (k[:, :, t].unsqueeze(-1) * s).sum(-2)
        s = s + k[:, :, t].unsqueeze(-1) * (beta[:, :, t] * wrong).unsqueeze(-2)
        outs.append((q[:, :, t].unsqueeze(-1) * s).sum(-2))
    return torch.stack(outs, 2), s


def blocks_read(q: Any, k: Any, v: Any, a: Any, s: Any) -> Any:
    """Three tokens at a time read the state in front of them, and are then written, by the delta rule."""
    outs, beta, kept = [], torch.sigmoid(a[..., :1]), torch.exp(a[..., 1])
    k = F.normalize(k, dim=-1)
    for first in range(0, q.shape[2], 3):
        outs.append(F.normalize(q[:, :, first : first + 3], dim=-1) @ s)
        for t in range(first, first + 3):
            s = s * kept[:, :, t, None, None]
            wrong = v[:, :, t] - (k[:, :, t].unsqueeze(-1) * s).sum(-2)
            s = s + k[:, :, t].unsqueeze(-1) * (beta[:, :, t] * wrong).unsqueeze(-2)
    return torch.cat(outs, 2)


def read_before_written(q: Any, k: Any, v: Any, a: Any, s: Any) -> Any:
    """Each token reads what came before it; one head that is no dimension."""
    q, k, v, a, s = q[:, 0], k[:, 0], v[:, 0], a[:, 0], s[:, 0]
    outs = []
    for t in range(q.shape[1]):
        outs.append(q[:, t, None] @ s)
        s = s * a[:, t, :, None].exp() + k[:, t, :, None] * v[:, t, None]
    return torch.cat(outs, 1)


FUSED = (
    by_sums, blocks_read, no_decay_and_features, delta, *(pytest.param(f, marks=pytest.mark.full) for f in (
        by_products, one_decay_a_head, a_number, read_before_written)),
)  # fmt: skip


def fused(function: Callable[..., Any], tokens: int = T) -> tuple[Any, Applied]:
    captured = program(function, *given(tokens))
    return captured, apply_pass(captured, FuseLinearAttention(), Context())


def both(function: Callable[..., Any], values: list[torch.Tensor]) -> Any:
    made = function(*values)
    return made if isinstance(made, (tuple, list)) else (made,)


@pytest.mark.parametrize("function", FUSED)
def test_a_loop_becomes_one_node(function: Any) -> None:
    _, applied = fused(function)
    assert applied.applied and (applied.result.found, applied.result.expected) == (1, 1), applied.reason
    names = [op_name(n) for n in applied.program.graph.nodes if n.op == "call_function"]
    assert sum(n in OPS for n in names) == 1 and not {"sum", "matmul"} & set(names)
    assert ("gated_delta_rule" in names) is (function in (delta, blocks_read))
    for made in (applied.program, spelled_out(applied.program)):
        for want, got in zip(both(function, given()), both(made.module, given()), strict=True):
            assert got.shape == want.shape and relative_error(want, got) < 1e-5


@pytest.mark.parametrize("function", [by_sums, delta])
def test_tokens_are_taken_whole(function: Any) -> None:
    """What is token t of one tensor is that tensor: nothing is taken apart and put together again."""
    names = [op_name(n) for n in fused(function)[1].program.graph.nodes if n.op == "call_function"]
    assert "stack" not in names and names.count("select") <= 1


def read_in_the_middle(q: Any, k: Any, v: Any, a: Any, s: Any) -> Any:
    out, states = [], []
    for t in range(q.shape[2]):
        s = s * 0.5 + k[:, :, t, :, None] * v[:, :, t, None]
        states.append(s)
        out.append((q[:, :, t, :, None] * s).sum(-2))
    return torch.stack(out, 2), states[3]


def of_any_sign(q: Any, k: Any, v: Any, a: Any, s: Any) -> Any:
    out = []
    for t in range(q.shape[2]):
        s = s * a[:, :, t, :, None] + k[:, :, t, :, None] * v[:, :, t, None]
        out.append((q[:, :, t, :, None] * s).sum(-2))
    return torch.stack(out, 2)


def of_any_sign_once(q: Any, k: Any, v: Any, a: Any, s: Any) -> Any:
    out = []
    for t in range(q.shape[2]):
        s = s * (a[:, :, t].exp() if t != 4 else a[:, :, t].abs())[..., None] + k[:, :, t, :, None] * v[:, :, t, None]
        out.append((q[:, :, t, :, None] * s).sum(-2))
    return torch.stack(out, 2)


def of_values(q: Any, k: Any, v: Any, a: Any, s: Any) -> Any:
    out = []
    for t in range(q.shape[2]):
        s = s * a[:, :, t, None].exp() + k[:, :, t, :, None] * v[:, :, t, None]
        out.append((q[:, :, t, :, None] * s).sum(-2))
    return torch.stack(out, 2)


def of_query_values(q: Any, k: Any, v: Any, a: Any, s: Any) -> Any:
    out = []
    for t in range(q.shape[2]):
        s = s * 0.5 + k[:, :, t, :, None] * v[:, :, t, None]
        out.append((q[:, :, t, None] * s).sum(-2))
    return torch.stack(out, 2)


def skips(q: Any, k: Any, v: Any, a: Any, s: Any) -> Any:
    """Every other output is of the state before."""
    out = []
    for t in range(q.shape[2]):
        last, s = s, s * 0.5 + k[:, :, t, :, None] * v[:, :, t, None]
        out.append((q[:, :, t, :, None] * (s if t % 3 else last)).sum(-2) if t else (q[:, :, t, :, None] * s).sum(-2))
    return torch.stack(out, 2)


def changes(q: Any, k: Any, v: Any, a: Any, s: Any) -> Any:
    out = []
    for t in range(q.shape[2]):
        s = s * (0.5 if t < 4 else 0.6) + k[:, :, t, :, None] * v[:, :, t, None]
        out.append((q[:, :, t, :, None] * s).sum(-2))
    return torch.stack(out, 2)


def a_nonlinear_one(q: Any, k: Any, v: Any, a: Any, s: Any) -> Any:
    out = []
    for t in range(q.shape[2]):
        s = torch.tanh(s * 0.5 + k[:, :, t, :, None] * v[:, :, t, None])
        out.append((q[:, :, t, :, None] * s).sum(-2))
    return torch.stack(out, 2)


def blocks_of_all_lengths(q: Any, k: Any, v: Any, a: Any, s: Any) -> Any:
    out = []
    for first, last in ((0, 2), (2, 6), (6, 9)):
        out.append(q[:, :, first : first + 2] @ s)
        for t in range(first, last):
            s = s * 0.5 + k[:, :, t, :, None] * v[:, :, t, None]
    return torch.cat(out, 2)


KEPT = (
    (read_in_the_middle, "a state or output in the middle is read elsewhere"),
    (of_any_sign, "neither exp nor sigmoid of anything"),
    (of_any_sign_once, "neither exp nor sigmoid of anything"),
    (of_values, "differ among the channels of values"),
    (of_query_values, "no loop over tokens"),
    (skips, "does not follow from the one before"),
    (changes, "its decays are 0.5, 0.6"),
    (a_nonlinear_one, "no loop over tokens"),
    (blocks_of_all_lengths, "are read after 2, 4 tokens, and not always after equally many"),
)


@pytest.mark.parametrize(("function", "reason"), KEPT)
def test_what_is_no_such_recurrence_stays_with_the_reason(function: Any, reason: str) -> None:
    captured, applied = fused(function)
    assert not applied.applied and reason in applied.reason, applied.reason
    assert fingerprint(applied.program.graph) == fingerprint(captured.graph)


def test_few_tokens_and_too_many_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "3 tokens one after the other are faster than a chunk" in fused(by_sums, 3)[1].reason
    monkeypatch.setattr(unrolled_recurrence, "LONGEST", 8)
    assert "a loop over 9 tokens is written out, which is read up to 8" in fused(by_sums)[1].reason


LOOPS = [GatedDeltaRule, *(pytest.param(kind, marks=pytest.mark.full) for kind in (GatedLinearAttention, TwoWayLinearAttention))]


@pytest.mark.parametrize("kind", LOOPS)
def test_layers_that_loop(kind: Any) -> None:
    torch.manual_seed(0)
    layer, x = kind(16, heads=2).eval(), torch.randn(2, 11, 16)
    with torch.no_grad():
        made = dyncc.optimize(layer, (x,), passes="fuse-linear-attention", engine="reference", evidence="numeric")
        (rewrite,) = made.report.rewrites
        assert rewrite.applied and rewrite.found == (2 if kind is TwoWayLinearAttention else 1), rewrite.reason
        for want, got in zip(both(layer, [x]), both(made, [x]), strict=True):
            assert relative_error(want, got) < 1e-5


def test_with_gradients_it_refuses() -> None:
    applied = apply_pass(replace(program(by_sums, *given()), needs_grad=True), FuseLinearAttention(), Context())
    assert not applied.applied and "gradients are on" in applied.reason
