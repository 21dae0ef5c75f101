"""The truths of the kernels against NumPy and against a full softmax; law 11 (selection, ties included)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyncc.kernels.attention_rows import attention_row_logits, attention_rows, take_rows
from dyncc.kernels.select_rows import alive_rows, rank_rows, select_rows

drawn = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@st.composite
def selections(draw: st.DrawFn) -> dict[str, Any]:
    """Scores with many ties (and NaN, infinities), and every way to force or forbid rows."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    value = st.sampled_from((0.0, 1.0, 2.0, -1.0, float("nan"), float("inf"), float("-inf")))
    table = st.lists(st.lists(value, min_size=length, max_size=length), min_size=batch, max_size=batch)
    flags = st.none() | st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=batch, max_size=batch)
    small = st.integers(0, 2)
    return {
        "score": draw(table),
        "first": draw(small),
        "last": draw(small),
        "valid": draw(flags),
        "force": draw(flags),
        "pinned": (draw(small), draw(small)),
    }


def numpy_order(given: dict[str, Any]) -> np.ndarray:
    """The rows from best to worst: pinned and forced, then valid ones by score (ends first), then the others; ties by position."""
    score = np.nan_to_num(np.array(given["score"], dtype=np.float32), nan=0.0, posinf=1e30, neginf=-1e30)
    length = score.shape[1]
    orders = []
    for b, row in enumerate(score):
        keys = []
        for i, value in enumerate(row):
            valid = given["valid"] is None or given["valid"][b][i]
            ends = i < given["first"] or i >= length - given["last"]
            pinned = i < given["pinned"][0] or i >= length - given["pinned"][1]
            forced = pinned or (given["force"] is not None and given["force"][b][i])
            key = np.inf if forced or (valid and ends) else value if valid else -np.inf
            keys.append((-key, i))
        orders.append([i for _, i in sorted(keys)])
    return np.array(orders)


def tensors(given: dict[str, Any]) -> tuple[Any, ...]:
    flags = [None if given[n] is None else torch.tensor(given[n]) for n in ("valid", "force")]
    return torch.tensor(given["score"]), given["first"], given["last"], *flags, given["pinned"]


@drawn
@given(selections())
def test_the_order_is_that_of_numpy(given: dict[str, Any]) -> None:
    assert rank_rows(*tensors(given)).tolist() == numpy_order(given).tolist()


@drawn
@given(selections(), st.integers(1, 12))
def test_the_selection_is_that_of_numpy_and_sorted(given: dict[str, Any], count: int) -> None:
    score, *rest = tensors(given)
    expected = np.sort(numpy_order(given)[:, :count], axis=1)
    assert select_rows(score, count, *rest).tolist() == expected.tolist()


@drawn
@given(selections(), st.integers(1, 12))
def test_a_larger_budget_keeps_what_a_smaller_one_kept(given: dict[str, Any], count: int) -> None:
    score, *rest = tensors(given)
    few, many = (select_rows(score, c, *rest).tolist() for c in (count, count + 1))
    assert all(set(a) <= set(b) for a, b in zip(few, many, strict=True))


@drawn
@given(selections(), st.lists(st.integers(0, 12), min_size=3, max_size=3))
def test_alive_rows_are_the_first_of_each_order(given: dict[str, Any], counts: list[int]) -> None:
    order = rank_rows(*tensors(given))
    alive = alive_rows(order, torch.tensor(counts[: order.shape[0]]))
    expected = np.zeros(order.shape, dtype=bool)
    for b, row in enumerate(order.tolist()):
        expected[b, row[: counts[b]]] = True
    assert alive.tolist() == expected.tolist()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "row", "flat"])
@pytest.mark.parametrize("each", [False, True], ids=["same rows", "rows of each sequence"])
def test_attention_rows_are_rows_of_the_full_softmax(groups: int, causal: bool, mask: str, each: bool) -> None:
    generator = torch.Generator().manual_seed(groups)
    q, k = (torch.randn(3, heads, 7, 4, generator=generator) for heads in (4, groups))
    seen = torch.rand(3, 1, 7, 7, generator=generator) > 0.3
    seen |= torch.eye(7, dtype=torch.bool)
    given = {"none": None, "bool": seen, "float": seen * -3.0, "row": seen[:, :, :1] | True, "flat": seen[0, 0]}[mask]
    logits = q @ k.repeat_interleave(4 // groups, 1).transpose(-1, -2) * 0.5
    if causal:
        logits = logits.masked_fill(~torch.ones(7, 7).tril().bool(), float("-inf"))
    if given is not None:
        logits = logits.masked_fill(~given, float("-inf")) if given.dtype == torch.bool else logits + given
    rows = torch.tensor([[6, 2], [0, 5], [3, 3]]) if each else torch.tensor([6, 0, 2])
    picked = torch.stack([full[:, at] for full, at in zip(logits.softmax(-1), rows if each else rows.expand(3, -1), strict=True)])
    assert torch.allclose(attention_rows(q, k, rows, given, is_causal=causal), picked, atol=1e-6)


def test_scale_is_that_of_the_head_width_unless_given() -> None:
    q, k, rows = torch.ones(1, 1, 2, 4), torch.ones(1, 1, 3, 4), torch.tensor([1])
    assert attention_row_logits(q, k, rows).flatten().tolist() == [2.0, 2.0, 2.0]
    assert attention_row_logits(q, k, rows, scale=1.0).flatten().tolist() == [4.0, 4.0, 4.0]


def test_take_rows_of_a_mask_without_a_batch() -> None:
    mask = torch.arange(6).view(3, 2)
    assert take_rows(mask, torch.tensor([2])).tolist() == [[4, 5]]
    assert take_rows(mask, torch.tensor([[0], [1]])).tolist() == [[[[0, 1]]], [[[2, 3]]]]
