"""Inductor's own attention fusion takes any permuted keys for transposed ones; what dyncc hands to Inductor must survive it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import Calls, node, program

import dyncc
from dyncc.backends.permuted_keys import permutation, spelled_safely


def attend(q: Any, k: Any, v: Any) -> Any:
    """Spelled-out attention over k as the product takes it."""
    return torch.softmax(q @ k * 0.5, -1) @ v


FORMS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "rows behind features": (lambda q, k, v: attend(q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)), (8, 4, 4, 4)),
    "three dimensions": (lambda q, k, v: torch.bmm(torch.bmm(q, k.permute(2, 1, 0)).softmax(-1), v), (4, 4, 4)),
    "features as heads": (lambda q, k, v: attend(q.permute(0, 2, 1, 3), k.permute(0, 3, 1, 2), v.permute(0, 2, 1, 3)), (4, 4, 4, 4)),
    "unequal sizes": (lambda q, k, v: attend(q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)), (2, 16, 4, 8)),
}


@pytest.mark.parametrize(("form", "door"), list(zip(FORMS, (1, 1, 2, 2), strict=True)))
@torch.no_grad()
def test_permuted_keys_are_what_eager_computes(form: str, door: int) -> None:
    function, sizes = FORMS[form]
    torch.manual_seed(0)
    values = [torch.randn(sizes) for _ in range(3)]
    torch._dynamo.reset()
    if door == 1:
        got = torch.compile(Calls(function), backend="dyncc", options={"strict": False, "evidence": "off"})(*values)
    else:
        got = dyncc.optimize(Calls(function), tuple(values), evidence="off")(*values)
    torch.testing.assert_close(got, function(*values), rtol=1e-5, atol=1e-5)
    assert dyncc.reports()[-1].fallback is None


ORDERS = [(0, 2, 3, 1), (0, 3, 1, 2), (2, 1, 3, 0), (0, 2, 1, 3), (3, 2, 1, 0), (1, 0, 3, 2)]


@pytest.mark.parametrize("order", ORDERS)
@torch.no_grad()
def test_the_respelled_graph_computes_the_same(order: tuple[int, ...]) -> None:
    captured = program(lambda q, k, v: attend(q, k.permute(order), v), *(torch.randn(4, 4, 4, 4) for _ in range(3)))
    values = [torch.randn(4, 4, 4, 4) for _ in range(3)]
    safe = spelled_safely(captured)
    assert safe is not captured
    assert permutation(node(safe, "transpose")) == (0, 1, 3, 2)
    torch.testing.assert_close(safe.module(*values)[0], captured.module(*values)[0], rtol=0, atol=0)


@torch.no_grad()
def test_odd_permutations_of_queries_and_values_are_computed() -> None:
    def function(q: Any, k: Any, v: Any) -> Any:
        return attend(q.permute(0, 3, 1, 2), k.permute(0, 2, 1, 3).transpose(-1, -2), v.permute(0, 3, 2, 1))

    values = [torch.randn(3, 4, 4, 4) for _ in range(3)]
    safe = spelled_safely(program(function, *values))
    assert [n.name for n in safe.graph.nodes if "clone" in n.name] != []
    torch.testing.assert_close(safe.module(*values)[0], function(*values))


def test_a_permutation_that_moves_nothing_is_a_view() -> None:
    values = [torch.randn(4, 1, 4, 4), torch.randn(1, 4, 4, 4), torch.randn(4, 1, 4, 4)]
    safe = spelled_safely(program(lambda q, k, v: attend(q, k.permute(1, 0, 2, 3).transpose(-1, -2), v), *values))
    assert permutation(node(safe, "transpose")) == (0, 1, 3, 2)
    assert node(safe, "view").args[1] == [4, 1, 4, 4]


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: attend(q.transpose(1, 2), k.transpose(1, 2).transpose(2, 3), v.transpose(1, 2)),
        lambda q, k, v: attend(q, k.mT, v),
        lambda q, k, v: q @ k.permute(0, 2, 3, 1) @ v,
        lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k.permute(0, 2, 3, 1), v).softmax(-1),
    ],
    ids=["heads and rows", "transposed", "no softmax", "fused"],
)
def test_what_is_read_right_stays_as_it_is(function: Callable[..., Any]) -> None:
    captured = program(function, *(torch.randn(2, 4, 4, 4) for _ in range(3)))
    assert spelled_safely(captured) is captured
