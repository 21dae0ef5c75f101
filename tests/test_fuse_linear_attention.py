"""fuse-linear-attention: causal linear attention that is spelled out becomes one node; what is none stays, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import node, program
from torch.nn import functional as F

import dyncc
from dyncc.evidence import relative_error
from dyncc.flops import count_flops
from dyncc.ir import op_name, shape
from dyncc.own_ops import spelled_out
from dyncc.passes.fuse_linear_attention import FuseLinearAttention
from dyncc.rewrite import Applied, Context, apply_pass, fingerprint

B, H, T, D = 2, 3, 70, 8


def given() -> list[torch.Tensor]:
    """Queries, keys, values, and log decays [B, H, T]."""
    torch.manual_seed(0)
    return [*torch.randn(3, B, H, T, D), -torch.rand(B, H, T)]


def by_tril(q: Any, k: Any, v: Any, a: Any) -> Any:
    return torch.tril(q @ k.transpose(2, 3) * D**-0.5) @ v


def by_mask_of_ones(q: Any, k: Any, v: Any, a: Any) -> Any:
    """Behind a feature map, and einsums for products."""
    weights = torch.einsum("bhid,bhjd->bhij", F.elu(q) + 1, F.elu(k) + 1)
    return torch.einsum("bhij,bhjd->bhid", weights * torch.tril(torch.ones(T, T)), v)


def by_fill(q: Any, k: Any, v: Any, a: Any) -> Any:
    later = torch.triu(torch.ones(T, T, dtype=torch.bool), diagonal=1)
    return (q @ k.mT).masked_fill(later[None, None], 0.0) @ v


def by_positions(q: Any, k: Any, v: Any, a: Any) -> Any:
    at = torch.arange(T)
    return torch.where(at[None, :] <= at[:, None], q @ k.mT / 4, 0.0) @ v


def decayed(q: Any, k: Any, v: Any, a: Any) -> Any:
    """Running sums subtracted, hidden with -inf before exp."""
    since = a.cumsum(-1)
    seen = torch.tril(torch.ones(T, T, dtype=torch.bool))
    kept = (since.unsqueeze(-1) - since.unsqueeze(-2)).masked_fill(~seen, float("-inf")).exp()
    return (q @ k.transpose(-1, -2) * kept) @ v


def decayed_then_tril(q: Any, k: Any, v: Any, a: Any) -> Any:
    since = torch.cumsum(a, dim=2)[..., None]
    return ((q * D**-0.5) @ k.mT * torch.exp(since - since.transpose(2, 3)).tril()) @ v


def heads_merged(q: Any, k: Any, v: Any, a: Any) -> Any:
    since = a.flatten(0, 1).cumsum(-1)
    kept = (since.unsqueeze(2) - since.unsqueeze(1)).exp()
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    return (torch.bmm(q, k.transpose(1, 2)) * kept).tril().bmm(v)


def shared_by_the_batch(q: Any, k: Any, v: Any, a: Any) -> Any:
    since = a[0].cumsum(-1)
    return ((q @ k.mT) * (since.unsqueeze(-1) - since.unsqueeze(-2)).exp().tril()[None]) @ v


def by_an_input(q: Any, k: Any, v: Any, a: Any) -> Any:
    """A number for each row."""
    return ((q @ k.mT) * a[..., None]).tril() @ v


def normalised(q: Any, k: Any, v: Any, a: Any) -> Any:
    weights = (F.relu(q) @ F.relu(k).mT).tril()
    return (weights / (weights.sum(-1, keepdim=True) + 1e-3)) @ v * 2


def normalised_behind(q: Any, k: Any, v: Any, a: Any) -> Any:
    weights = torch.tril(F.relu(q) @ F.relu(k).mT)
    return (weights * 0.5) @ v / weights.sum(-1).clamp(min=1e-2)[..., None]


def by_channel(q: Any, k: Any, v: Any, a: Any) -> Any:
    """As papers write it: both factors may leave what fp32 can hold, the recurrence does not."""
    since = (a[..., None] * torch.linspace(0.1, 0.5, D)).cumsum(-2)
    return ((q * since.exp()) @ (k * torch.exp(-since)).transpose(-1, -2) * D**-0.5).tril() @ v


def by_channel_divided(q: Any, k: Any, v: Any, a: Any) -> Any:
    since = torch.cumsum(a[..., None] * torch.linspace(0.1, 0.5, D), dim=2)
    weights = (torch.exp(since) * q) @ (k / torch.exp(since)).mT
    return weights.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), 0.0) @ v


def earlier(q: Any, k: Any, v: Any, a: Any) -> Any:
    """A token does not see itself."""
    return (q @ k.mT * D**-0.5).tril(-1) @ v


def earlier_by_fill(q: Any, k: Any, v: Any, a: Any) -> Any:
    at = torch.arange(T)
    return torch.where(at >= at[:, None], 0.0, q @ k.mT) @ v


def earlier_by_mask(q: Any, k: Any, v: Any, a: Any) -> Any:
    seen = torch.ones(T, T, dtype=torch.bool).tril(-1)
    return (q @ k.mT).masked_fill(~seen, 0.0) @ v


def earlier_decayed(q: Any, k: Any, v: Any, a: Any) -> Any:
    since = a.cumsum(-1)
    kept = (since.unsqueeze(-1) - since.unsqueeze(-2)).masked_fill(torch.ones(T, T).triu(0) == 1, float("-inf")).exp()
    return (q @ k.mT * kept) @ v


def earlier_by_channel(q: Any, k: Any, v: Any, a: Any) -> Any:
    since = (a[..., None] * torch.linspace(0.1, 0.5, D)).cumsum(-2)
    return ((q * since.exp()) @ (k * torch.exp(-since)).mT).tril(-1) @ v


def earlier_normalised(q: Any, k: Any, v: Any, a: Any) -> Any:
    weights = (F.relu(q) @ F.relu(k).mT).tril(-1)
    return weights / (weights.sum(-1, keepdim=True) + 1.0) @ v


def powers_a_head(q: Any, k: Any, v: Any, a: Any) -> Any:
    """RetNet's: one decay a head, to the power of the distance."""
    at = torch.arange(T)
    kept = torch.sigmoid(a[0, :, :1, None]) ** (at[:, None] - at).clamp(min=0)
    return (q @ k.mT * kept.tril()) @ v


def exp_of_distances(q: Any, k: Any, v: Any, a: Any) -> Any:
    at = torch.arange(T)
    return (q @ k.mT * torch.exp(-0.3 * (at[:, None] - at)).tril(-1)) @ v


FUSED = (
    *(earlier, earlier_by_fill, earlier_decayed, powers_a_head), *(pytest.param(f, marks=pytest.mark.full) for f in (
        earlier_by_mask, earlier_by_channel, earlier_normalised, exp_of_distances)),
    by_tril, by_mask_of_ones, by_fill, by_positions, decayed, decayed_then_tril, heads_merged, shared_by_the_batch, by_an_input, normalised,
    normalised_behind, by_channel, by_channel_divided,
)  # fmt: skip


def all_seen(q: Any, k: Any, v: Any, a: Any) -> Any:
    return (q @ k.mT * 0.5) @ v


def all_seen_and_normalised(q: Any, k: Any, v: Any, a: Any) -> Any:
    """Over an image's tokens, as LINA writes it when all pairs are made."""
    weights = (F.relu(q) + 1e-6) @ (F.relu(k) + 1e-6).mT
    return (weights / weights.sum(-1, keepdim=True)) @ v


def differential(q: Any, k: Any, v: Any, a: Any) -> Any:
    """DyDiLA's: differences of features on both sides."""
    q, k = F.elu(q) + 1 - 0.3 * F.relu(q), F.elu(k) + 1 - 0.3 * F.relu(k)
    return torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k), v) / T


def two_channels(q: Any, k: Any, v: Any, a: Any) -> Any:
    """Keys grow by another sum than queries: the factors are what queries and keys are, and no decay."""
    since = (a[..., None] * torch.linspace(0.1, 0.5, D)).cumsum(-2)
    return ((q * since.exp()) @ (k * torch.exp(-since.flip(-1))).mT) @ v


def by_a_mask_of_one(q: Any, k: Any, v: Any, a: Any) -> Any:
    """It is broadcast, and so hides nothing."""
    return (q @ k.mT * torch.ones(1, 1).tril()) @ v


OPEN = (all_seen, by_a_mask_of_one, two_channels, all_seen_and_normalised, differential)


def softmaxed(q: Any, k: Any, v: Any, a: Any) -> Any:
    return torch.softmax(q @ k.mT, -1) @ v


def two_later(q: Any, k: Any, v: Any, a: Any) -> Any:
    return torch.tril(q @ k.mT, diagonal=2) @ v


def two_earlier(q: Any, k: Any, v: Any, a: Any) -> Any:
    return torch.tril(q @ k.mT, diagonal=-2) @ v


def a_window(q: Any, k: Any, v: Any, a: Any) -> Any:
    seen = torch.ones(T, T, dtype=torch.bool).tril() & torch.ones(T, T, dtype=torch.bool).triu(-8)
    return (q @ k.mT).masked_fill(~seen, 0.0) @ v


def powers_of_a_row(q: Any, k: Any, v: Any, a: Any) -> Any:
    at = torch.arange(T)
    return (q @ k.mT * (torch.sigmoid(a[..., None]) ** (at[:, None] - at).clamp(min=0)).tril()) @ v


def powers_that_grow(q: Any, k: Any, v: Any, a: Any) -> Any:
    at = torch.arange(T)
    return (q @ k.mT * (0.9 ** (at - at[:, None]).clamp(max=0)).tril()) @ v


def powers_of_any_sign(q: Any, k: Any, v: Any, a: Any) -> Any:
    at = torch.arange(T)
    return (q @ k.mT * (a[0, :, :1, None] ** (at[:, None] - at).clamp(min=0)).tril()) @ v


def squared(q: Any, k: Any, v: Any, a: Any) -> Any:
    return torch.relu(q @ k.mT).tril() @ v


def read(q: Any, k: Any, v: Any, a: Any) -> Any:
    weights = (q @ k.mT).tril()
    return weights @ v, weights.sum(-2)


def two_sums(q: Any, k: Any, v: Any, a: Any) -> Any:
    one, other = a.cumsum(-1), (a * 2).cumsum(-1)
    return ((q @ k.mT) * (one.unsqueeze(-1) - other.unsqueeze(-2)).exp().tril()) @ v


def backwards(q: Any, k: Any, v: Any, a: Any) -> Any:
    since = a.cumsum(-1)
    return ((q @ k.mT) * (since.unsqueeze(-2) - since.unsqueeze(-1)).exp().tril()) @ v


def of_the_batch(q: Any, k: Any, v: Any, a: Any) -> Any:
    since = a[:, 0].cumsum(-1)
    return ((q @ k.mT) * (since.unsqueeze(-1) - since.unsqueeze(-2)).exp().tril().unsqueeze(1)) @ v


def summed_before_its_mask(q: Any, k: Any, v: Any, a: Any) -> Any:
    weights = q @ k.mT
    return (weights / weights.sum(-1, keepdim=True)).tril() @ v


def summed_when_normalised(q: Any, k: Any, v: Any, a: Any) -> Any:
    weights = (q @ k.mT).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    return weights @ v + weights.sum(-1, keepdim=True)


def divided_by_keys(q: Any, k: Any, v: Any, a: Any) -> Any:
    return ((q @ k.mT).tril() / torch.arange(1, T + 1)) @ v


def values_of_sums(q: Any, k: Any, v: Any, a: Any) -> Any:
    weights = (q @ k.mT).tril()
    return weights @ (v + weights.sum(-1, keepdim=True))


def filled_with_more(q: Any, k: Any, v: Any, a: Any) -> Any:
    return (q @ k.mT).masked_fill(torch.ones(T, T).triu(1) == 1, 1.0) @ v


def by_keys(q: Any, k: Any, v: Any, a: Any) -> Any:
    return ((q @ k.mT) * a[..., None, :]).tril() @ v


KEPT = (
    (softmaxed, "a softmax makes its weights"),
    (summed_before_its_mask, "summed over keys before they are masked"),
    (summed_when_normalised, "summed over keys, and then scaled row by row"),
    (divided_by_keys, "divided by a tensor that differs from key to key"),
    (values_of_sums, "its values are computed from the sums of its weights"),
    (two_later, "diagonals up to 2"),
    (two_earlier, "its weights hide the 2 nearest tokens; a token's own may be hidden"),
    (a_window, "fills in something else than 0 for later tokens"),
    (powers_of_a_row, "what is kept from token to token differs among tokens"),
    (powers_that_grow, "is no distance from a row back to a key"),
    (powers_of_any_sign, "whether it is positive is not known"),
    (squared, "relu stands between its products"),
    (read, "read elsewhere too"),
    (two_sums, "no differences of one running sum"),
    (backwards, "no differences of one running sum"),
    (of_the_batch, "unsqueeze multiplies its weights"),
    (filled_with_more, "fills in something else than 0"),
    (by_keys, "multiplies its weights"),
)


def fused(function: Callable[..., Any]) -> tuple[Any, Applied]:
    captured = program(function, *given())
    return captured, apply_pass(captured, FuseLinearAttention(), Context())


@pytest.mark.parametrize("function", FUSED)
def test_however_it_is_written_it_becomes_one_node(function: Any) -> None:
    _, applied = fused(function)
    assert applied.applied and applied.modified, applied.reason
    assert (applied.result.found, applied.result.expected) == (1, 1)
    assert node(applied.program, "gated_linear_attention") is not None
    wide = D + ("sum" in {op_name(n) for n in program(function, *given()).graph.nodes})  # a column of ones gives the sums
    assert count_flops(applied.program.graph) == 4 * B * H * T * D * wide
    values, want = given(), function(*(x.double() for x in given())).float()
    for made in (applied.program, spelled_out(applied.program)):
        assert not any(op_name(n) == "gated_linear_attention" for n in made.graph.nodes) or made is applied.program
        assert relative_error(want, made.module(*values)[0]) < 1e-5


@pytest.mark.parametrize("function", OPEN)
def test_where_nothing_is_hidden_values_meet_keys_first(function: Any) -> None:
    captured, applied = fused(function)
    assert applied.applied, applied.reason
    assert relative_error(function(*(x.double() for x in given())).float(), applied.program.module(*given())[0]) < 1e-5
    assert count_flops(applied.program.graph) < count_flops(captured.graph) / 4
    assert not any(shape(n)[-2:] == (T, T) for n in applied.program.graph.nodes)


def test_few_tokens_keep_the_order_of_their_products() -> None:
    few = [x[:, :, :6] for x in given()]
    applied = apply_pass(program(all_seen, *few), FuseLinearAttention(), Context())
    assert "6 tokens are too few for another order of its products" in applied.reason


def test_lengths_that_vary_are_told() -> None:
    length = torch.export.Dim("length", min=2, max=512)
    captured = program(all_seen_and_normalised, *given(), dynamic=[{2: length}] * 4)
    applied = apply_pass(captured, FuseLinearAttention(), Context())
    assert applied.applied and applied.reason == "fewer operations from 9 tokens on; the graph serves any number"
    some = [x[:, :, :33] for x in given()]
    assert relative_error(all_seen_and_normalised(*some), applied.program.module(*some)[0]) < 1e-5


def test_channels_that_overflow_when_written_out_do_not_when_fused() -> None:
    q, k, v, a = given()
    a = a * 15
    _, applied = fused(by_channel)
    assert not by_channel(q, k, v, a).isfinite().all()
    want = by_channel(*(x.double() for x in (q, k, v, a))).float()
    assert relative_error(want, applied.program.module(q, k, v, a)[0]) < 1e-5


@pytest.mark.parametrize(("function", "reason"), KEPT)
def test_what_is_none_stays_with_the_reason(function: Any, reason: str) -> None:
    captured, applied = fused(function)
    assert not applied.applied and reason in applied.reason, applied.reason
    assert fingerprint(applied.program.graph) == fingerprint(captured.graph)


def test_it_is_offered_to_users_with_evidence() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any, a: Any) -> Any:
            return decayed(q, k, v, a)

    made = dyncc.optimize(Model(), given(), passes="fuse-linear-attention", engine="reference", evidence="numeric")
    assert relative_error(decayed(*given()), made(*given())) < 1e-5
    assert [r.name for r in made.report.rewrites if r.applied] == ["fuse-linear-attention"]


@pytest.mark.full
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_computes_it_at_fixed_and_at_varying_sizes(dynamic: bool) -> None:
    fast = torch.compile(decayed_then_tril, backend="dyncc", options={"passes": "fuse-linear-attention"}, dynamic=dynamic)
    for tokens in (70, 200, 130) if dynamic else (70,):
        q, k, v, a = *torch.randn(3, B, H, tokens, D), -torch.rand(B, H, tokens)
        with torch.no_grad():
            assert relative_error(decayed_then_tril(q, k, v, a), fast(q, k, v, a)) < 1e-5
    assert any("gated_linear_attention" in str(report) for report in dyncc.reports())
