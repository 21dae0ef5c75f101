"""Branches: the three realisations compute the same, of any rows; what cannot be left out for some rows is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import entry, node, program
from torch import Tensor
from torch.nn import functional as F

from dyncc.analysis.axes import Axes
from dyncc.branch import Branch, active_rows, branch, taken_back
from dyncc.flops import count_flops
from dyncc.ir import Program, emit
from dyncc.region import Rows, find_region
from dyncc.restrict import Refusal

B, T, C = 6, 3, 4


def layers(x: Tensor, bias: Tensor, weight: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """A region from `tanh` to `relu` and `amax` that merges the batch into its rows, and reads an operand [B, T] besides weights."""
    start = x.tanh()
    inner = F.linear(start.view(B * T, C), weight).view(B, T, C) + bias.unsqueeze(-1)
    return inner.relu(), inner.amax(1), live.logical_not()


def picked(x: Tensor, bias: Tensor, weight: Tensor, live: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same region with one row of each sequence, read by index as classifiers do."""
    inner = F.linear(x.tanh(), weight)
    row = inner[torch.arange(B), bias.argmax(1)]
    return inner.relu(), row.unsqueeze(1).amax(1), live.logical_not()


def example(seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=draw) for s in ((B, T, C), (B, T), (C, C))]


def built(realise: Any, buckets: tuple[int, ...] = (), function: Callable[..., Any] = layers) -> Program:
    captured = program(function, *example(), torch.ones(B, dtype=torch.bool))
    start = node(captured, "tanh")
    region = find_region([start], [node(captured, "relu"), node(captured, "amax")])
    axes = Axes(captured.graph)
    rest = start, emit(start.next, lambda x: x.sum(1), start)
    made = Branch(region, entry(captured, 3), rest, Rows(axes, axes.dims(start)[0]))
    branch(captured, made, realise, buckets)
    captured.graph.lint()
    captured.module.recompile()
    return captured


def expected(x: Tensor, bias: Tensor, weight: Tensor, live: Tensor, function: Callable[..., Any] = layers) -> list[Tensor]:
    rows, best, _ = function(x, bias, weight, live)
    start = x.tanh()
    return [torch.where(live[:, None, None], rows, start), torch.where(live[:, None], best, start.sum(1))]


ROWS = [[i in kept for i in range(B)] for kept in ((), (0,), (5,), (1, 4), (0, 2, 3), (0, 1, 2, 3), tuple(range(B)))]


@pytest.mark.parametrize(("realise", "buckets"), [("select", ()), ("cond", ()), ("compact", ()), ("compact", (1, 2, 4)), ("compact", (3,))])
@pytest.mark.parametrize("function", [layers, picked])
def test_realisations_agree(realise: str, buckets: tuple[int, ...], function: Callable[..., Any]) -> None:
    made = built(realise, buckets, function)
    for number, live in enumerate(ROWS):
        values = [*example(number), torch.tensor(live)]
        found = made.module(*values)
        for a, b in zip(expected(*values, function), found, strict=False):
            torch.testing.assert_close(b, a)


@pytest.mark.parametrize("count", range(1, B + 1))
def test_rows_go_and_come_back_in_order(count: int) -> None:
    for live in map(torch.tensor, ROWS):
        if int(live.sum()) > count:
            continue
        values = torch.arange(B)
        index = active_rows(live, count)
        assert index[: int(live.sum())].tolist() == values[live].tolist()
        back = taken_back(live, values[index], torch.full((B,), -1))
        assert back.tolist() == torch.where(live, values, -1).tolist()


def test_the_dearer_side_of_a_condition_counts() -> None:
    dense = count_flops(built("select").graph)
    assert dense == 2 * B * T * C * C
    assert count_flops(built("compact", (2,)).graph) == dense


def test_a_region_that_writes_in_place_is_refused() -> None:
    captured = program(lambda x, y: y.add_(x.tanh().mul(2)).relu(), torch.randn(2, 3), torch.randn(2, 3))
    with pytest.raises(Refusal, match="writes in place or draws random numbers"):
        find_region([node(captured, "tanh")], [node(captured, "relu")])


def test_a_value_read_outside_is_named() -> None:
    def two(x: Tensor) -> tuple[Tensor, Tensor]:
        inner = x.tanh().mul(2)
        return inner.relu(), inner

    captured = program(two, torch.randn(2, 3))
    with pytest.raises(Refusal, match="output 1 is made inside the part that would be left out"):
        find_region([node(captured, "tanh")], [node(captured, "relu")])


def test_a_sum_over_the_batch_is_refused() -> None:
    def mixed(x: Tensor, bias: Tensor, weight: Tensor, live: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inner = F.linear(x.tanh(), weight)
        inner = inner - inner.mean(0, keepdim=True)
        return inner.relu(), inner.amax(1), live.logical_not()

    with pytest.raises(Refusal, match=r"mean .* mixes the rows of the batch"):
        built("compact", (2,), mixed)


def test_rows_of_the_batch_read_out_of_order_are_refused() -> None:
    def turned(x: Tensor, bias: Tensor, weight: Tensor, live: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inner = F.linear(x.tanh(), weight)
        row = inner[torch.arange(B).flip(0), bias.argmax(1)]
        return inner.relu(), row.unsqueeze(1).amax(1), live.logical_not()

    with pytest.raises(Refusal, match=r"index .* mixes the rows of the batch \(reads positions along the batch\)"):
        built("compact", (2,), turned)
