"""restrict: what runs short, what refuses and in which words, and the gathers and scatters it is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import entry, node, program
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dyncc.analysis.attention import find_attention
from dyncc.analysis.axes import Axes
from dyncc.ir import op_name
from dyncc.restrict import Plan, Refusal, gather_rows, plan_backward, plan_forward, scatter_rows, shorten

B, T, C = 2, 6, 8
X = torch.randn(B, T, C)


def forward(function: Callable[..., Any], *values: torch.Tensor, cut: str = "relu", stop: str | None = None) -> Plan:
    """The plan behind the first `cut`, whose dimension 1 holds the tokens; no read is harmless."""
    captured = program(function, *(values or (X,)))
    axes, at = Axes(captured.graph), node(captured, cut, 0)
    regions = find_attention(captured.graph)[0]
    end = None if stop is None else node(captured, stop)
    return plan_forward(axes, axes.dims(at)[1], at, 1, end, regions, lambda n, read: False)


def short(plan: Plan, name: str) -> list[set[int]]:
    return [dims for n, dims in plan.short.items() if op_name(n) == name]


REFUSED = [
    ("no rule", lambda x: torch.cdist(x.relu(), x), "cdist .* has no axis rule"),
    ("mean", lambda x: x.relu().mean(1), "mean .* reduces over the token axis"),
    ("select", lambda x: x.relu()[:, 0], "select .* reads positions along the token axis"),
    ("flip", lambda x: x.relu().flip(1), "flip .* reads positions along the token axis"),
    ("cumsum", lambda x: x.relu().cumsum(1), "cumsum .* reads positions along the token axis"),
    ("roll", lambda x: x.relu().roll(1, 1), "roll .* reads positions along the token axis"),
    ("windows", lambda x: x.relu().view(B, 2, 3, C).transpose(1, 2).sin(), "splits the token axis|windows"),
    ("mixing", lambda x: x.relu().transpose(1, 2) @ x, "matmul .* sums over the token axis outside of attention"),
    ("convolution", lambda x: F.conv1d(x.relu().transpose(1, 2), x.new_ones(C, C, 3)), "conv1d .* convolves over the token axis"),
    ("padding", lambda x: F.pad(x.relu(), (0, 0, 1, 0)), "pad.* pads the token axis"),
    ("cat", lambda x: torch.cat([x[:, :1], x.relu()], 1), "cat .* concatenates the token axis with other rows"),
    ("softmax", lambda x: x.relu().softmax(1), "softmax .* takes a softmax over the token axis"),
]


@pytest.mark.parametrize(("function", "words"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
def test_a_refusal_names_the_op_and_what_it_does(function: Any, words: str) -> None:
    with pytest.raises(Refusal, match=words):
        forward(function)


def test_a_refusal_names_the_source_line() -> None:
    with pytest.raises(Refusal, match=r"graphs\.py:\d+"):
        forward(lambda x: x.relu().mean(1))


def test_in_place_writes_refuse() -> None:
    with pytest.raises(Refusal, match="writes in place along the token axis"):
        forward(lambda x: x.relu().mul_(2))


def test_everything_row_wise_runs_short() -> None:
    plan = forward(lambda x: F.gelu(F.layer_norm(x.relu(), (C,))).view(B * T, C).sin())
    assert short(plan, "gelu") == [{1}] and short(plan, "sin") == [{0}]


def test_attention_runs_short_on_rows_and_keys() -> None:
    plan = forward(lambda x: F.scaled_dot_product_attention(*[x.relu()[:, None]] * 3).sin())
    assert short(plan, "sin") == [{2}]


def test_spelled_out_attention_runs_short_on_both_axes_of_its_scores() -> None:
    def attention(x: torch.Tensor) -> torch.Tensor:
        q = x.relu()
        return (q @ q.transpose(1, 2)).softmax(-1) @ q

    plan = forward(attention)
    assert short(plan, "softmax") == [{1, 2}]


def test_nothing_behind_the_stop_runs_short() -> None:
    plan = forward(lambda x: x.relu().sin().cos().mean(1), stop="sin")
    assert short(plan, "sin") == [{1}] and short(plan, "cos") == []


def test_backward_from_a_slice_stops_at_what_mixes_rows() -> None:
    captured = program(lambda x: F.gelu((x @ x.transpose(1, 2)).softmax(-1) @ x)[:, -1], X)
    axes, end = Axes(captured.graph), node(captured, "select")
    plan = plan_backward(axes, axes.dims(entry(captured))[1], end, 1)
    assert short(plan, "gelu") == [{1}]
    assert short(plan, "softmax") == [{1}], "one row of scores, over all keys"
    assert entry(captured) not in plan.short


def test_backward_leaves_alone_what_others_use() -> None:
    captured = program(lambda x: (F.gelu(x)[:, -1], F.gelu(x).mean(1)), X)
    shared = program(lambda x: (lambda y: (y[:, -1], y.mean(1)))(F.gelu(x)), X)
    for made, expected in ((captured, 1), (shared, 0)):
        axes = Axes(made.graph)
        plan = plan_backward(axes, axes.dims(entry(made))[1], node(made, "select"), 1)
        assert len(plan.short) == expected


def test_shorten_takes_operands_and_rewrites_sizes() -> None:
    def function(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return (x.relu() + table).view(B, T, 2, 4).transpose(1, 2).sin()

    captured = program(function, X, torch.randn(T, C))
    axes, at = Axes(captured.graph), node(captured, "relu")
    plan = plan_forward(axes, axes.dims(at)[1], at, 1, None, (), lambda n, read: False)
    with captured.graph.inserting_after(at):
        kept = captured.graph.call_function(torch.ops.aten.slice.Tensor, (at, 1, 0, 4))
    kept.meta["val"] = at.meta["val"][:, :4]
    taken: list[tuple[str, set[int]]] = []

    def take(before: Any, operand: Any, dims: set[int], user: Any, slot: int) -> Any:
        taken.append((operand.op, dims))
        with captured.graph.inserting_before(before):
            made = captured.graph.call_function(torch.ops.aten.slice.Tensor, (operand, min(dims), 0, 4))
        made.meta["val"] = operand.meta["val"][:4]
        return made

    shorten(axes, plan, at, kept, 4, None, take, T)
    captured.graph.lint()
    captured.module.recompile()
    assert taken == [("placeholder", {0})]
    assert node(captured, "sin").meta["val"].shape == (B, 2, 4, 4)
    values = [torch.randn(B, T, C), torch.randn(T, C)]
    assert torch.equal(captured.module(*values)[0], function(*values)[:, :, :4])


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.permutations(range(3)), st.booleans(), st.integers(1, T))
def test_gather_rows_takes_along_any_dimension(order: list[int], batched: bool, count: int) -> None:
    value = X.permute(order)
    dim, batch = order.index(1), order.index(0)
    index = torch.stack([torch.randperm(T, generator=torch.Generator().manual_seed(i))[:count].sort().values for i in range(B)])
    found = gather_rows(value, index, dim, batch if batched else None).permute([order.index(i) for i in range(3)])
    expected = torch.stack([X[b][index[b if batched else 0]] for b in range(B)])
    assert torch.equal(found, expected)


def test_gather_rows_gives_a_batch_to_an_operand_that_has_none() -> None:
    table, index = torch.arange(4.0).view(1, 4, 1), torch.tensor([[0, 3], [1, 2]])
    assert gather_rows(table, index, 1, 0).squeeze(-1).tolist() == [[0.0, 3.0], [1.0, 2.0]]


def test_scatter_rows_is_the_inverse_of_gather_rows() -> None:
    index = torch.tensor([[0, 2, 5], [1, 3, 4]])
    rows = gather_rows(X, index, 1, 0)
    assert torch.equal(scatter_rows(rows, X, index, 1), X)
    zeros = scatter_rows(rows, torch.zeros_like(X), index, 1)
    assert torch.equal(gather_rows(zeros, index, 1, 0), rows) and int((zeros != 0).any(-1).sum()) == 6
