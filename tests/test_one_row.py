"""The C++ kernel for one query row a head against its truths, over odd sizes, strides, dtypes, hidden rows and extreme logits."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dyncc.kernels.native import problem
from dyncc.kernels.one_row import ATTEND_BEST_PAGES, ATTEND_ROW, SCORE_KEYS, SCORE_PAGES, SELECT_BEST, TRUTHS, cpu
from dyncc.kernels.one_row.best_pages import attend_best_pages
from dyncc.kernels.select_keys import page_bounds, visible_pages

pytestmark = pytest.mark.skipif(bool(problem()), reason="needs a C++ compiler")
HEADS = [(4, 4), (8, 1), (9, 3)]
BOTH = [
    *((torch.float32, *heads) for heads in HEADS),
    (torch.bfloat16, 9, 3),
    *(pytest.param(torch.bfloat16, *h, marks=pytest.mark.full) for h in HEADS[:2]),
]
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 2e-6}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


def drawn(heads: int, groups: int, keys: int, width: int = 24, batch: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries and, as views of a longer buffer whose rows stand in between, keys and values."""
    generator = torch.Generator().manual_seed(heads * 100 + keys)
    q = torch.randn(batch, heads, 1, width, generator=generator)
    k, v = (torch.randn(batch, groups, keys + 3, width, generator=generator) for _ in range(2))
    k[:, :, keys:], v[:, :, keys:] = torch.nan, torch.nan
    return [q.to(dtype), k.to(dtype)[:, :, :keys], v.to(dtype)[:, :, :keys]]


def hidden(batch: int, keys: int) -> Tensor:
    """[B, 1, 1, N], the first keys hidden as pads are, others here and there, the last visible."""
    mask = torch.rand(batch, 1, 1, keys, generator=torch.Generator().manual_seed(keys)) > 0.3
    mask[0, ..., : keys // 3] = False
    mask[..., -1] = True
    return mask


@pytest.mark.parametrize(("dtype", "heads", "groups"), BOTH)
def test_attention_over_all_keys(heads: int, groups: int, dtype: torch.dtype) -> None:
    widths = {(9, 3): (20, 136), (8, 1): (64,)}.get((heads, groups), (24,))
    for keys, width in itertools.product((1, 63, 128, 129, 777), widths):
        q, k, v = drawn(heads, groups, keys, width, dtype=dtype)
        mask = hidden(2, keys)
        added = torch.randn(2, heads, 1, keys).masked_fill(~mask, -torch.inf).to(dtype)
        for shown in (None, mask, mask.expand(2, heads, 1, keys), added, added[:1, :1]):
            args = (q, k, v, shown, None, 1, None)
            torch.testing.assert_close(ATTEND_ROW(*args), TRUTHS[ATTEND_ROW](*args), **CLOSE[dtype])


@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize("page", [1, 4])
def test_attention_over_chosen_keys(heads: int, groups: int, page: int) -> None:
    for keys, choices, masked in itertools.product((5, 130), {1, groups, heads}, (False, True)):
        q, k, v = drawn(heads, groups, keys)
        units = -(-keys // page)
        order = torch.rand(2, choices, units).argsort(2)
        index = order[..., : max(1, units // 2)].sort(2).values
        args = (q, k, v, hidden(2, keys) if masked else None, index, page, 0.3)
        torch.testing.assert_close(ATTEND_ROW(*args), TRUTHS[ATTEND_ROW](*args).nan_to_num(), **CLOSE[torch.float32])


def test_values_may_be_wider_than_keys_and_channels_need_not_lie_side_by_side() -> None:
    q, k, _ = drawn(6, 2, 70, 16)
    v = torch.randn(2, 2, 33, 70).transpose(2, 3)
    args = (q, k, v, None, None, 1, None)
    torch.testing.assert_close(ATTEND_ROW(*args), TRUTHS[ATTEND_ROW](*args), **CLOSE[torch.float32])


def test_a_row_that_sees_nothing_is_zero_and_extreme_logits_stay_finite() -> None:
    q, k, v = drawn(4, 2, 100)
    nothing = torch.zeros(2, 1, 1, 100, dtype=torch.bool)
    assert torch.equal(ATTEND_ROW(q, k, v, nothing, None, 1, None), torch.zeros(2, 4, 1, 24))
    for factor in (1e4, -1e4, 1e18):
        args = (q * factor, k, v, None, None, 1, None)
        torch.testing.assert_close(ATTEND_ROW(*args), TRUTHS[ATTEND_ROW](*args), **CLOSE[torch.float32])
    k[0, 0, 7] = torch.nan
    found = ATTEND_ROW(q, k, v, None, None, 1, None)
    assert found[0, :2].isnan().all() and found[0, 2:].isfinite().all() and found[1].isfinite().all()


@pytest.mark.parametrize(("dtype", "heads", "groups"), BOTH)
def test_scores_of_keys(heads: int, groups: int, dtype: torch.dtype) -> None:
    for keys, share, score, masked in itertools.product((1, 300), ("head", "group", "layer"), ("vote", "logits"), (False, True)):
        q, k, _ = drawn(heads, groups, keys, dtype=dtype)
        args = (q, k, hidden(2, keys)[:, :, 0] if masked else None, score, share, None)
        found, wanted = SCORE_KEYS(*args), TRUTHS[SCORE_KEYS](*args)
        assert found.shape == wanted.shape and found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=1e-4 if dtype == torch.float32 else 3e-2, atol=1e-6 if score == "vote" else 3e-2)


@pytest.mark.parametrize(("heads", "groups"), HEADS)
def test_scores_of_pages(heads: int, groups: int) -> None:
    for keys, share, width in itertools.product((3, 70), ("head", "group", "layer"), (24, 20) if heads == 9 else (24,)):
        q, k, _ = drawn(heads, groups, keys, width)
        low, high = page_bounds(k, 4, hidden(2, keys)[:, :, 0])
        args = (q, low, high, share)
        torch.testing.assert_close(SCORE_PAGES(*args), TRUTHS[SCORE_PAGES](*args), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "heads", "groups"), BOTH)
def test_scores_of_pages_for_any_head_of_a_group(heads: int, groups: int, dtype: torch.dtype) -> None:
    for keys, scale, masked in itertools.product((3, 70, 1100), (None, 2.0), (False, True)):
        q, k, _ = drawn(heads, groups, keys, dtype=dtype)
        visible = hidden(2, keys)[:, :, 0] if masked else None
        low, high = page_bounds(k, 4, visible)
        more = ("any", None, visible_pages(visible, 4) if visible is not None else None, scale)
        found, wanted = SCORE_PAGES(q, low, high, *more), TRUTHS[SCORE_PAGES](q.float(), low.float(), high.float(), *more)
        assert found.shape == wanted.shape == (2, groups, low.shape[2])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert (found.exp().sum(2) >= 1 - 1e-3).all()  # the heads' shares of each sum to one


def test_the_best_are_those_of_the_truth_with_ties_pads_sinks_and_recents() -> None:
    generator = torch.Generator().manual_seed(0)
    for keys, budget, choices in itertools.product((1, 9, 200), (1, 7, 500), (1, 3)):
        score = torch.randint(0, 6, (2, choices, keys), generator=generator).float()
        score[0, 0, 0], score[1, 0, -1] = torch.nan, torch.inf
        for visible, (sinks, recents) in itertools.product((None, hidden(2, keys)[:, :, 0]), ((0, 0), (1, 0), (2, 3))):
            if sinks + recents <= budget:
                args = (score, budget, visible, sinks, recents)
                assert torch.equal(SELECT_BEST(*args), TRUTHS[SELECT_BEST](*args))


def test_visible_pages_choose_as_the_truth_does() -> None:
    visible = hidden(2, 70)[:, :, 0]
    score = torch.rand(2, 3, 18)
    args = (score, 5, visible_pages(visible, 4), 1, 2)
    assert torch.equal(SELECT_BEST(*args), TRUTHS[SELECT_BEST](*args))


@pytest.mark.parametrize(("dtype", "heads", "groups"), BOTH)
def test_attention_to_the_best_pages_is_scores_choice_and_attention(
    heads: int, groups: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for keys, share, masked in itertools.product((3, 70, 1100), ("head", "group", "layer", "any"), (False, True)):
        q, k, v = drawn(heads, groups, keys, 20 if heads == 9 else 24, dtype=dtype)
        mask = hidden(2, keys) if masked else None
        low, high = page_bounds(k, 4, None if mask is None else mask[:, :, 0])
        shown = None if mask is None else visible_pages(mask[:, :, 0], 4)
        score = SCORE_PAGES(q, low, high, share, None, shown if share == "any" else None, 0.3)
        index = SELECT_BEST(score, 9, shown, 1, 2)
        wanted = ATTEND_ROW(q, k, v, mask, index, 4, 0.3)
        for threads in (1, 3):
            monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
            found = ATTEND_BEST_PAGES(q, k, v, low, high, mask, shown, share, 9, 1, 2, 4, 0.3)
            torch.testing.assert_close(found, wanted, **CLOSE[dtype])
        if dtype == torch.float32:
            torch.testing.assert_close(attend_best_pages(q, k, v, low, high, mask, shown, share, 9, 1, 2, 4, 0.3), wanted, **CLOSE[dtype])


@pytest.mark.parametrize("share", ["head", "any"])
def test_many_pages_are_shared_among_threads(share: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many that waking others pays; ten calls, since who takes what differs from one to the next."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    q, k, v = drawn(9, 3, 20001)
    args = (q, k, v, *page_bounds(k, 4), None, None, share, 300, 1, 2, 4, None)
    wanted = attend_best_pages(*args)
    for _ in range(10):
        torch.testing.assert_close(ATTEND_BEST_PAGES(*args), wanted, **CLOSE[torch.float32])


def test_other_dtypes_are_computed_by_the_truth() -> None:
    q, k, v = (t.to(torch.float16) for t in drawn(4, 2, 50))
    assert not cpu.takes(q, k, v) and not cpu.takes(q.float(), k)
    args = (q, k, v, None, None, 1, None)
    torch.testing.assert_close(ATTEND_ROW(*args), TRUTHS[ATTEND_ROW](*args))


def test_without_a_compiler_the_truth_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "problem", lambda: "no C++ kernel can be built (no compiler)")
    q, k, v = drawn(4, 2, 50)
    args = (q, k, v, None, None, 1, None)
    assert torch.equal(ATTEND_ROW(*args), TRUTHS[ATTEND_ROW](*args))


@pytest.mark.parametrize("op", [ATTEND_ROW, SCORE_KEYS, SCORE_PAGES, SELECT_BEST, ATTEND_BEST_PAGES], ids=str)
def test_shapes_on_fakes_are_those_of_the_op(op: object) -> None:
    q, k, v = drawn(6, 2, 40)
    low, high = page_bounds(k, 4)
    args = {
        ATTEND_ROW: (q, k, v, None, None, 1, None), SCORE_KEYS: (q, k, None, "vote", "group", None), SCORE_PAGES: (q, low, high, "head"),
        SELECT_BEST: (torch.rand(2, 3, 40), 7, None, 0, 1),
        ATTEND_BEST_PAGES: (q, k, v, low, high, None, None, "group", 3, 1, 1, 4, None),
    }[op]  # fmt: skip
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("heads", "groups"), HEADS)
def test_rows_of_the_batch_that_need_no_scores_get_none(heads: int, groups: int) -> None:
    q, k, _ = drawn(heads, groups, 70)
    k[1, :, 5] = torch.nan  # which has no say where its row is skipped
    low, high = page_bounds(k, 4)
    for skip, share in itertools.product(([False, True], [True, True]), ("head", "layer", "any")):
        flags = torch.tensor([[s, not s] for s in skip])[:, 0]  # which lie apart
        by_keys = [] if share == "any" else [(SCORE_KEYS, (q, k, None, "vote", share, None, flags))]
        for op, args in (*by_keys, (SCORE_PAGES, (q, low, high, share, flags))):
            found = op(*args)
            torch.testing.assert_close(found, TRUTHS[op](*args), rtol=1e-4, atol=1e-5)
            assert not found[flags].any() and found[~flags].isfinite().all()
