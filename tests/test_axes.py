"""Axis classes: which dimension is the same axis, through every family of ops; sizes alone never decide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import entry, node, program
from torch.nn import functional as F

from dyncc.analysis.axes import Axes, find, quotient

B, T, C = 2, 6, 8
X = torch.randn(B, T, C)


def places(function: Callable[..., Any], name: str, *values: torch.Tensor, dynamic: Any = None) -> list[int]:
    """Where dimension 1 of the first input stands in the last node of that op."""
    captured = program(function, *(values or (X,)), dynamic=dynamic)
    axes = Axes(captured.graph)
    return axes.places(node(captured, name), axes.dims(entry(captured))[1])


CARRIED = [
    ("elementwise", lambda x: (x * 2).relu(), "relu", [1]),
    ("broadcast", lambda x: x + x.new_ones(C), "add", [1]),
    ("transpose", lambda x: x.transpose(1, 2).relu(), "relu", [2]),
    ("permute", lambda x: x.permute(2, 1, 0).relu(), "relu", [1]),
    ("unsqueeze", lambda x: x.unsqueeze(1).relu(), "relu", [2]),
    ("squeeze", lambda x: x.unsqueeze(1).squeeze(1).relu(), "relu", [1]),
    ("heads split", lambda x: x.view(B, T, 2, 4).transpose(1, 2).relu(), "relu", [2]),
    ("heads merged", lambda x: x.view(B, T, 2, 4).transpose(1, 2).transpose(1, 2).reshape(B, T, C).relu(), "relu", [1]),
    ("rows flattened", lambda x: x.view(B * T, C).relu(), "relu", [0]),
    ("rows flattened and split", lambda x: x.view(B * T, C).relu().view(B, T, C).sin(), "sin", [1]),
    ("expand", lambda x: x.unsqueeze(1).expand(B, 3, T, C).relu(), "relu", [2]),
    ("layer norm", lambda x: F.layer_norm(x, (C,)).relu(), "relu", [1]),
    ("linear", lambda x: F.linear(x, x.new_ones(5, C)).relu(), "relu", [1]),
    ("softmax beside", lambda x: x.softmax(-1).relu(), "relu", [1]),
    ("slice beside", lambda x: x[:, :, :3].relu(), "relu", [1]),
    ("cat beside", lambda x: torch.cat([x, x], 2).relu(), "relu", [1]),
    ("reduced beside", lambda x: x.mean(-1).relu(), "relu", [1]),
    ("scores", lambda x: (x @ x.transpose(1, 2)).softmax(-1).relu(), "relu", [1, 2]),
    ("split beside", lambda x: x.chunk(2, -1)[1].relu(), "relu", [1]),
]
BROKEN = [
    ("slice", lambda x: x[:, 1:].relu(), "relu"),
    ("select", lambda x: x[:, 0].relu(), "relu"),
    ("mean", lambda x: x.mean(1).relu(), "relu"),
    ("cat", lambda x: torch.cat([x[:, :1], x], 1).relu(), "relu"),
    ("pad", lambda x: F.pad(x, (0, 0, 1, 0)).relu(), "relu"),
    ("no rule", lambda x: torch.cdist(x, x).relu(), "relu"),
]


@pytest.mark.parametrize(("function", "name", "expected"), [c[1:] for c in CARRIED], ids=[c[0] for c in CARRIED])
def test_the_axis_is_followed(function: Any, name: str, expected: list[int]) -> None:
    assert places(function, name) == expected


@pytest.mark.parametrize(("function", "name"), [c[1:] for c in BROKEN], ids=[c[0] for c in BROKEN])
def test_the_axis_ends(function: Any, name: str) -> None:
    assert places(function, name) == []


def test_equal_sizes_are_not_one_axis() -> None:
    square = torch.randn(T, T, T)
    captured = program(lambda x: x.relu(), square)
    axes = Axes(captured.graph)
    dims = axes.dims(node(captured, "relu"))
    assert len({id(d[0]) for d in dims}) == 3


def test_the_axis_is_followed_where_all_sizes_are_equal() -> None:
    square = torch.randn(4, 4, 4)
    assert places(lambda x: x.view(16, 4).relu().view(4, 4, 4).transpose(0, 1).sin(), "sin", square) == [0]


def test_a_symbolic_length_is_followed_through_a_flattened_view() -> None:
    length = torch.export.Dim("length", min=2, max=64)

    def flat(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, C).relu().view(x.shape[0], -1, C).sin()

    assert places(flat, "sin", X, dynamic=({1: length},)) == [1]


def test_queries_and_keys_are_two_occurrences_of_one_axis() -> None:
    captured = program(lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]), X)
    axes, sdpa = Axes(captured.graph), node(captured, "scaled_dot_product_attention")
    token = axes.dims(entry(captured))[1]
    assert axes.places(sdpa, token) == [2]
    (inner, keys) = axes.ops[sdpa].contracts
    assert (keys.slot, keys.dim, keys.other, keys.other_dim) == (1, 2, 2, 2)
    assert inner.dim == 3


def test_a_mask_is_united_with_rows_and_keys() -> None:
    mask = torch.ones(T, T, dtype=torch.bool)
    captured = program(lambda x, m: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=m), X, mask)
    axes = Axes(captured.graph)
    assert axes.places(entry(captured, 1), axes.dims(entry(captured))[1]) == [0, 1]


def test_past_and_new_tokens_are_other_axes_than_all_of_them() -> None:
    captured = program(lambda x, past: torch.cat([past, x], 1).relu(), X, torch.randn(B, 3, C))
    axes, relu = Axes(captured.graph), node(captured, "relu")
    for i in (0, 1):
        assert axes.places(relu, axes.dims(entry(captured, i))[1]) == []
    reads = axes.ops[node(captured, "cat")].reads
    assert {(r.slot, r.dim) for r in reads} == {(0, 1), (1, 1)} and "concatenates" in reads[0].why


def test_an_op_says_what_it_reads() -> None:
    captured = program(lambda x: x.mean(1) + x[:, 0] + x.cumsum(1)[:, 0], X)
    axes = Axes(captured.graph)
    assert [r.why for r in axes.ops[node(captured, "mean")].reads] == ["reduces over it"]
    assert [r.why for r in axes.ops[node(captured, "select")].reads] == ["reads positions along it"]
    assert [r.why for r in axes.ops[node(captured, "cumsum")].reads] == ["reads positions along it"]


def test_quotients_and_find() -> None:
    assert quotient(12, 4) == 3 and quotient(12, 5) is None and quotient(7, 1) == 7
    captured = program(lambda x: x.view(B * T, C), X)
    axes = Axes(captured.graph)
    batch, token, _ = axes.dims(entry(captured))
    merged = axes.dims(node(captured, "view"))[0]
    assert find(merged, batch) == 0 and find(merged, token) == 1 and find(merged, ()) == -1
