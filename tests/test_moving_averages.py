"""Averages that move, without keys: written as a matrix of powers of a decay, or as a loop whose results are its states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import program
from torch.nn import functional as F

import dyncc
from dyncc.backends import inductor
from dyncc.evidence import relative_error
from dyncc.ir import op_name, shape
from dyncc.kernels.decayed_sum import DECAYED_SUM
from dyncc.kernels.decayed_sum.op import WIDE
from dyncc.layers.decay_mixer import DecayMixer
from dyncc.own_ops import spelled_out
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


def drawn(tokens: int = 21) -> list[torch.Tensor]:
    """Values [B, T, C], what decays are made of [B, T, C], and a state [B, C]."""
    torch.manual_seed(0)
    return [torch.randn(B, tokens, 6), torch.randn(B, tokens, 6), torch.randn(B, 6)]


def loop(step: Callable[..., Any], x: Any, a: Any, s: Any) -> tuple[Any, Any]:
    outs = []
    for t in range(x.shape[1]):
        s = step(s, x[:, t], a[:, t])
        outs.append(s)
    return torch.stack(outs, 1), s


def of_channels(x: Any, a: Any, s: Any) -> Any:
    kept = torch.sigmoid(a[0, 0])
    return loop(lambda s, x, a: kept * s + (1 - kept) * x, x, a, s)


def gated(x: Any, a: Any, s: Any) -> Any:
    """A gate a token and channel, as in minimal GRUs: 1 - z is what is kept."""
    return loop(lambda s, x, a: (1 - torch.sigmoid(a)) * s + torch.sigmoid(a) * x, x, a, s)


def of_one_number(x: Any, a: Any, s: Any) -> Any:
    return loop(lambda s, x, a: 0.1 * x + s * 0.9, x, a, s)[0]


def signed(x: Any, a: Any, s: Any) -> Any:
    """Decays of any sign that differ among rows of the batch alone."""
    return loop(lambda s, x, a: torch.tanh(a[:, :1]) * s + x, x, a, s)


def plain_sums(x: Any, a: Any, s: Any) -> Any:
    return loop(lambda s, x, a: s + x, x, a, s)


def begun_by_a_token(x: Any, a: Any, s: Any) -> Any:
    outs, kept = [x[:, 0]], torch.exp(-a[0, 0].abs())
    for t in range(1, x.shape[1]):
        outs.append(outs[-1] * kept + x[:, t])
    return torch.stack(outs)


def joined_by_cat(x: Any, a: Any, s: Any) -> Any:
    outs, s = [], s[:, None]
    for t in range(x.shape[1]):
        s = s * 0.5 + x[:, t : t + 1]
        outs.append(s)
    return torch.cat(outs, 1)


LOOPS = (of_channels, begun_by_a_token, *(pytest.param(f, marks=pytest.mark.full) for f in (
    gated, of_one_number, signed, plain_sums, joined_by_cat)))  # fmt: skip


def outputs(made: Any) -> tuple[Any, ...]:
    return made if isinstance(made, (tuple, list)) else (made,)


def fused(function: Callable[..., Any], tokens: int = 21) -> tuple[Any, Applied]:
    captured = program(function, *drawn(tokens))
    return captured, apply_pass(captured, FuseLinearAttention(), Context())


@pytest.mark.parametrize("function", LOOPS)
def test_a_loop_becomes_one_node(function: Any) -> None:
    _, applied = fused(function)
    assert applied.applied and (applied.result.found, applied.result.expected) == (1, 1), applied.reason
    names = [op_name(n) for n in applied.program.graph.nodes]
    assert names.count("decayed_sum") == 1 and "add" not in names
    want = outputs(function(*(x.double() for x in drawn())))
    for made in (applied.program, spelled_out(applied.program)):
        for a, b in zip(want, outputs(made.module(*drawn())), strict=True):
            assert a.shape == b.shape and relative_error(a.float(), b) < 1e-5


def grows(x: Any, a: Any, s: Any) -> Any:
    return loop(lambda s, x, a: s * 1.01 + x, x, a, s)


def of_any_size(x: Any, a: Any, s: Any) -> Any:
    return loop(lambda s, x, a: s * a + x, x, a, s)


def changes(x: Any, a: Any, s: Any) -> Any:
    outs = []
    for t in range(x.shape[1]):
        s = s * (0.5 if t < 9 else 0.6) + x[:, t]
        outs.append(s)
    return torch.stack(outs, 1)


def skips(x: Any, a: Any, s: Any) -> Any:
    outs = [s]
    for t in range(x.shape[1]):
        outs.append(outs[-1 if t < 9 else -2] * 0.5 + x[:, t])
    return torch.stack(outs, 1)


def nonlinear(x: Any, a: Any, s: Any) -> Any:
    return loop(lambda s, x, a: torch.tanh(s * 0.5 + x), x, a, s)


def read_in_the_middle(x: Any, a: Any, s: Any) -> Any:
    outs, states = [], []
    for t in range(x.shape[1]):
        s = s * 0.5 + x[:, t]
        outs.append(s)
        states.append(s)
    return torch.stack(outs, 1), states[4] * 2


STAY = (
    (grows, "a state is multiplied by 1.01, and grows"),
    (of_any_size, "whether they are at most 1 is not known"),
    (changes, "its decays are 0.5, 0.6"),
    (skips, "the state of token 10 is not computed as that of token 1"),
    (nonlinear, "it stays token after token"),
    (read_in_the_middle, "a state in the middle is read elsewhere"),
)


@pytest.mark.parametrize(("function", "reason"), STAY)
def test_loops_that_are_none_stay_with_the_reason(function: Any, reason: str) -> None:
    captured, applied = fused(function)
    assert not applied.applied and reason in applied.reason, applied.reason
    assert fingerprint(applied.program.graph) == fingerprint(captured.graph)


def test_few_tokens_stay() -> None:
    assert "a loop over 3 tokens whose results are its states is read from 5 to 512 tokens on" in fused(of_channels, 3)[1].reason


def test_wide_states_stay() -> None:
    wide = [torch.randn(2, 6, 1024), torch.randn(2, 6, 1024), torch.randn(2, 1024)]
    applied = apply_pass(program(of_one_number, *wide), FuseLinearAttention(), Context())
    assert "a state of 2048 numbers is as fast token after token; fewer than 2048 become one node" in applied.reason



def test_the_layer_and_its_state() -> None:
    torch.manual_seed(0)
    layer, x = DecayMixer(16, 2).eval(), torch.randn(2, 37, 16)
    with torch.no_grad():
        made = dyncc.optimize(layer, (x,), passes="fuse-linear-attention", engine="reference", evidence="numeric")
        assert made.report.rewrites[0].applied, made.report.rewrites[0].reason
        for a, b in zip(layer(x), made(x), strict=True):
            assert relative_error(a, b) < 1e-5


@pytest.mark.full
@pytest.mark.parametrize("tokens", [17, 40])
def test_inductor_compiles_a_narrow_sum(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ATen that it fuses: the op is not called."""
    lowered: list[Any] = []
    compile_graph = inductor.compile_graph
    monkeypatch.setattr(inductor, "compile_graph", lambda module, inputs: lowered.append(module) or compile_graph(module, inputs))
    torch.manual_seed(0)
    layer, x = DecayMixer(16, 2), torch.randn(1, tokens, 16)
    fast = torch.compile(layer, backend="dyncc", options={"passes": "fuse-linear-attention"}, dynamic=False)
    with torch.no_grad():
        for one, other in zip(fast(x), layer(x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert "fuse-linear-attention" in [r.name for r in dyncc.reports()[-1].rewrites if r.applied]
    assert [n for n in lowered[-1].graph.nodes if n.target is DECAYED_SUM] == []


def test_sums_that_are_wide_or_of_any_length_stay_an_op() -> None:
    def graph(numbers: int) -> Any:
        return program(lambda x, f: DECAYED_SUM(x, f), torch.randn(1, 40, numbers), torch.rand(1, 1, numbers))

    pays = inductor.COMPILED[DECAYED_SUM][1]
    assert [pays(n) for count in (64, WIDE) for n in graph(count).graph.nodes if n.target is DECAYED_SUM] == [True, False]
