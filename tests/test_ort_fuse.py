"""Attention with its cache as one op: its truth, what is fused, and what must not be; masks over symbolic positions."""

from __future__ import annotations

import graphs
import pytest
import torch
from torch.export import Dim

from dyncc.analysis.facts import analyse
from dyncc.analysis.mask_values import CAUSAL, Const, evaluate
from dyncc.backends.ort_fuse import fuse_attention
from dyncc.backends.rotary import find_rotary
from dyncc.ir import op_name
from dyncc.kernels.group_query_attention import OP, group_query_attention

B, H, G, S, P, D = 2, 4, 2, 3, 5, 8
sdpa = torch.nn.functional.scaled_dot_product_attention


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + torch.cat([-x[..., D // 2 :], x[..., : D // 2]], dim=-1) * sin


def angles(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    half = torch.arange(rows)[:, None] / 10.0 ** torch.arange(D // 2)
    both = torch.cat([half, half], dim=-1)[None, None]
    return both.cos(), both.sin()


def values(rows: int = S, past: int = P) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    sizes = ((B, H, rows, D), (B, G, rows, D), (B, G, rows, D), (B, G, past, D), (B, G, past, D))
    return tuple(torch.randn(size, generator=generator) for size in sizes)


def merged(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)


def test_the_truth_is_causal_grouped_attention_over_past_and_new() -> None:
    q, k, v, past_k, past_v = values()
    cos, sin = angles(P + S)
    places = torch.arange(P, P + S).expand(B, S)
    bias = torch.randn(B, 1, S, P + S, generator=torch.Generator().manual_seed(9))
    tables = (cos[0, 0, :, : D // 2], sin[0, 0, :, : D // 2], places)
    lengths, total = torch.full((B,), P + S - 1, dtype=torch.int32), torch.tensor(P + S, dtype=torch.int32)
    out, keys, held = OP(*map(merged, (q, k, v)), past_k, past_v, lengths, total, *tables, bias, H, G, 0.3)
    q, k = (rotate(x, cos[:, :, P:], sin[:, :, P:]) for x in (q, k))
    keys_now, values_now = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    seen = torch.ones(S, P + S, dtype=torch.bool).tril(P)
    wide = [x.repeat_interleave(H // G, 1) for x in (keys_now, values_now)]
    wanted = torch.softmax((q @ wide[0].mT * 0.3 + bias).masked_fill(~seen, float("-inf")), -1) @ wide[1]
    torch.testing.assert_close(out, merged(wanted))
    torch.testing.assert_close((keys, held), (keys_now, values_now))


def test_the_truth_of_no_past_is_plain_causal_attention() -> None:
    q, k, v, *_ = values()
    nothing = (None, None, torch.zeros(B, dtype=torch.int32), torch.tensor(S, dtype=torch.int32), None, None, None, None)
    out, keys, held = group_query_attention(*map(merged, (q, k, v)), *nothing, H, G, D**-0.5)
    torch.testing.assert_close(out, merged(sdpa(q, k, v, is_causal=True, enable_gqa=True)))
    assert torch.equal(keys, k) and torch.equal(held, v)


def step(q, k, v, past_k, past_v, cos, sin):  # type: ignore[no-untyped-def]
    """One row after a cache, cosine and sine [B, S, D] repeating their halves inside the graph."""
    cos, sin = (torch.cat([x, x], -1).unsqueeze(1) for x in (cos, sin))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    keys, held = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    return merged(sdpa(q, keys, held, enable_gqa=True)), keys, held


def tables(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = angles(rows)
    return cos[0, :, :, : D // 2], sin[0, :, :, : D // 2]


def test_one_row_after_a_cache_is_fused_with_its_rotary_embedding() -> None:
    given = (*values(rows=1), *tables(1))
    program = graphs.program(step, *given)
    fused, counts = fuse_attention(program)
    assert counts == {"expected": 1, "attention": 1, "rotary": 1}
    assert "scaled_dot_product_attention" not in {op_name(n) for n in fused.graph.nodes if n.op == "call_function"}
    for got, wanted in zip(fused.module(*given), program.module(*given), strict=True):
        torch.testing.assert_close(got, wanted)


def test_interleaved_rotary_embedding_stays_outside() -> None:
    def turned(x, cos):  # type: ignore[no-untyped-def]
        pairs = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return x * cos + pairs * cos

    program = graphs.program(turned, torch.randn(B, H, S, D), torch.randn(1, 1, S, D))
    assert find_rotary(graphs.node(program, "add")) is None


@pytest.mark.parametrize("mask", [None, "full"])
def test_attention_that_sees_later_keys_is_not_fused(mask: str | None) -> None:
    q, k, v, *_ = values()
    hidden = () if mask is None else (torch.ones(S, S, dtype=torch.bool),)
    program = graphs.program(lambda q, k, v, *m: sdpa(q, k, v, *m, enable_gqa=True), q, k, v, *hidden)
    fused, counts = fuse_attention(program)
    assert fused is program and counts["attention"] == 0


def test_several_rows_after_a_cache_are_not_fused_because_the_flag_would_mean_other_keys() -> None:
    q, k, v, past_k, past_v = values()

    def grown(q, k, v, a, b):  # type: ignore[no-untyped-def]
        return sdpa(q, torch.cat([a, k], 2), torch.cat([b, v], 2), enable_gqa=True)

    program = graphs.program(grown, q, k, v, past_k, past_v)
    assert fuse_attention(program)[1]["attention"] == 0


def test_a_causal_mask_with_padding_is_fused_and_rows_that_see_nothing_stay_zero() -> None:
    def masked(q, k, v, pads):  # type: ignore[no-untyped-def]
        causal = torch.ones(S, S, dtype=torch.bool).tril()
        return merged(sdpa(q, k, v, causal & pads[:, None, None, :], enable_gqa=True))

    q, k, v, *_ = values()
    pads = torch.tensor([[False, True, True], [True, True, True]])
    program = graphs.program(masked, q, k, v, pads)
    fused, counts = fuse_attention(program)
    assert counts["attention"] == 1
    (got,), (wanted,) = fused.module(q, k, v, pads), program.module(q, k, v, pads)
    torch.testing.assert_close(got, wanted)
    assert not got[0, 0].any()


def positions(new: int):  # type: ignore[no-untyped-def]
    def mask(past: torch.Tensor) -> torch.Tensor:
        held = past.shape[1]
        keys, rows = torch.arange(held + new), torch.arange(new) + held
        return keys[None, None, None, :] <= rows[None, None, :, None]

    return mask


@pytest.mark.parametrize(("new", "wanted"), [(1, Const(True)), (2, None)])
def test_masks_over_a_past_of_any_length_are_understood_where_they_hide_nothing(new: int, wanted: object) -> None:
    program = graphs.program(positions(new), torch.zeros(2, 7), dynamic=({1: Dim("past", min=2, max=99)},))
    assert evaluate(graphs.node(program, "le"), {}) == wanted != CAUSAL
    assert analyse(program).expected == 0
