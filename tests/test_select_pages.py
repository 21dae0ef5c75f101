"""select-kv by pages and by spans that are refined to keys (HISA, HiP): what masking all other keys computes, chosen by loops in NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from test_evict_kv import compiled, conversation, read
from test_kv_cache import tiny_llama
from test_onnx import GROUPS, HEADS, LAYERS, STEP_SIZES, WIDTH, decoder, step
from test_select_kv import MaskedForm, close, optimized
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

import dyncc
from dyncc.decoding import Decode
from dyncc.errors import BadOptionValue
from dyncc.kernels.select_keys import page_keys, page_means, page_middles, select_keys
from dyncc.kernels.select_keys.refine import key_states, refine_pages, span_scores
from dyncc.kv_pages import PageMeans
from dyncc.passes.select_kv import SelectKV
from dyncc.pipeline import build

pytestmark = pytest.mark.usefixtures("no_grad")


class RefinedForm(MaskedForm):
    """SDPA that hides what a search from pages down to keys, span by span in plain words, does not choose."""

    partly_hidden_stay = False

    def choose(self, q: Tensor, k: Tensor, seen: Tensor) -> np.ndarray:
        heads = q.shape[1]
        per = {"layer": heads, "group": heads // GROUPS, "head": 1}[self.passed.share]
        chosen = np.zeros((*q.shape[:2], k.shape[2]), dtype=bool)
        for row, first in np.ndindex(q.shape[0], heads // per):
            together = slice(first * per, (first + 1) * per)
            found = self.find(q[row, together, 0].numpy(), k[row, together].numpy(), seen[row, 0, 0].numpy())
            chosen[row, together, [[key] for key in found]] = True
        return chosen

    def find(self, q: np.ndarray, k: np.ndarray, visible: np.ndarray) -> list[int]:
        passed, keys = self.passed, k.shape[1]
        real = [j for j in range(keys) if visible[j]]
        forced = set(real[: passed.sinks]) | set(real[len(real) - passed.recents :] if passed.recents else [])
        size, beam, branch = passed.page, passed.beam or passed.budget // passed.page, passed.branch or passed.page
        spans = list(range(-(-keys // size)))

        def value(span: int) -> float:
            own = list(range(span * size, min((span + 1) * size, keys)))
            shown = [j for j in own if visible[j]]
            if not shown or forced & set(own):
                return np.inf if shown else -np.inf
            if passed.score == "bound" and size == passed.page:
                low, high = k[:, shown].min(1), k[:, shown].max(1)
                return float(np.maximum(q * low, q * high).sum(1).mean())
            if passed.score == "mean" and size == passed.page:
                if self.partly_hidden_stay and len(shown) < len(own):
                    return 1e20
                return float((q * k[:, shown].mean(1)).sum(1).mean())
            middle = min(span * size + size // 2, keys - 1)
            return float((q * k[:, middle]).sum(1).mean()) if visible[middle] else 1e20

        while True:
            count = passed.budget if size == 1 else beam
            spans = sorted(sorted(spans, key=lambda s: (-value(s), s))[:count])
            if size == 1 or passed.beam is None:
                return [j for s in spans for j in range(s * size, min((s + 1) * size, keys))]
            size //= branch
            spans = [s * branch + i for s in spans for i in range(branch) if (s * branch + i) * size < keys]


def masked_form(passed: SelectKV, call: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", RefinedForm(passed, F.scaled_dot_product_attention))
        return Decode(decoder())(*call)


HIP = "hip{budget=16 page=8 beam=8 dense=0}"
CASES = [
    "score=mean share=group page=4 beam=3 sinks=1 recents=1",
    "score=mean share=layer page=5 beam=3 sinks=0 recents=2",
    "score=mean share=head page=5 sinks=0 recents=1",
    "score=bound share=head page=4 beam=4 sinks=1 recents=2",
    "score=middle share=head page=8 branch=2 beam=5 sinks=1 recents=1",
    "score=middle share=group page=9 branch=3 beam=4 sinks=0 recents=1",
    "score=middle share=layer page=3 sinks=0 recents=1",
    "score=middle share=head page=1 beam=12 sinks=1 recents=1",
]


@pytest.mark.parametrize("options", [pytest.param(o, marks=[pytest.mark.full] if i else []) for i, o in enumerate(CASES)])
def test_a_search_from_pages_to_keys_equals_its_masked_form(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"select-kv{{budget=10 {options}}}"
    made, passed = optimized(step(60), text, STEP_SIZES), build(text)[0]
    rewrite = made.report.rewrites[0]
    assert rewrite.applied and (rewrite.found, rewrite.expected) == (LAYERS, LAYERS), rewrite.reason
    for keys in (24, 27, 31, 41, 9):  # three pads stand in front, and the last page is ragged for some
        call = step(keys)
        close(made(*call), masked_form(passed, call, monkeypatch))
    assert (made(*step(41))[0] - Decode(decoder())(*step(41))[0]).abs().max() > 1e-3  # it does leave keys out


@pytest.mark.full
@pytest.mark.parametrize("options", ["score=mean share=group page=8 beam=6", "score=middle share=head page=8 branch=2 beam=20"])
def test_a_budget_of_all_keys_is_the_dense_model_at_any_length(options: str) -> None:
    made = optimized(step(80), f"select-kv{{budget=40 sinks=1 recents=1 {options}}}", STEP_SIZES)
    assert made.report.rewrites[0].applied
    for keys in (2, 9, 35, 39):
        call = step(keys)
        close(made(*call), Decode(decoder())(*call))


@pytest.mark.full
@pytest.mark.parametrize("options", ["score=mean share=group page=4 beam=3", "score=middle share=head page=8 branch=2 beam=5"])
def test_batch_and_padding_do_not_change_a_row(options: str) -> None:
    ids, mask, *past = step(24)
    made = optimized((ids, mask, *past), f"select-kv{{budget=8 sinks=1 recents=1 {options}}}", STEP_SIZES)
    both = made(ids, mask, *past)[0]
    torch.testing.assert_close(made(ids[[1, 0]], mask[[1, 0]], *(t[[1, 0]] for t in past))[0][[1, 0]], both, rtol=1e-4, atol=1e-5)
    other = [t.clone() for t in past]
    for t in other:
        t[0, :, :3], t[1] = 50.0, -t[1]
    torch.testing.assert_close(made(ids, mask, *other)[0][:1], both[:1], rtol=1e-4, atol=1e-5)


def searched(q: Tensor, k: Tensor, score: Tensor, page: int, branch: int, beam: int, budget: int, share: str = "head") -> Tensor:
    visible = torch.ones(k.shape[0], 1, k.shape[2], dtype=torch.bool)
    states = key_states(visible, 0, 0, (score.shape[2] + beam) * page)
    found = refine_pages(q, k, score, None, states, page, branch, beam, budget, share)
    return page_keys(found, branch) if found.shape[2] < budget else found


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 60), st.sampled_from([1, 2, 4, 8]), st.integers(1, 12), st.integers(0, 99))
def test_all_pages_give_the_flat_choice_and_fewer_give_keys_of_theirs(keys: int, page: int, budget: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 4, 1, 8, generator=generator), torch.randn(2, 2, keys, 8, generator=generator)
    for share in ("head", "group", "layer"):
        score = span_scores(q, page_means(k, page), share)
        flat = select_keys(span_scores(q, k, share), budget)
        whole = searched(q, k, score, page, page, max(budget, score.shape[2]), budget, share)
        assert torch.equal(whole[:, :, : flat.shape[2]], flat) and (whole[:, :, flat.shape[2] :] >= keys).all()
        few = -(-budget // page)
        best = select_keys(score[:, :, :-1], few)
        for row, choice in np.ndindex(*best.shape[:2]):
            chosen = searched(q, k, score, page, page, few if page > 1 else budget, budget, share)[row, choice]
            assert set((chosen[chosen < keys] // page).tolist()) <= set(best[row, choice].tolist())


def test_halving_finds_the_best_keys_where_products_rise_and_may_miss_a_needle() -> None:
    q = torch.ones(1, 1, 1, 1)
    k = torch.arange(100.0).view(1, 1, 100, 1)
    assert searched(q, k, span_scores(q, page_middles(k, 8), "head"), 8, 2, 6, 12)[0, 0].tolist() == list(range(88, 100))
    k[0, 0, 17] = 1000.0  # not the key in the middle of any span of 8, 4 or 2
    assert 17 not in searched(q, k, span_scores(q, page_middles(k, 8), "head"), 8, 2, 4, 8)[0, 0].tolist()


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 99))
def test_means_of_pages_are_kept_up_to_date(keys: int, page: int, seed: int) -> None:
    k = torch.randn(2, 2, keys, 8, generator=torch.Generator().manual_seed(seed))
    expected = torch.stack([part.mean(2) for part in k.split(page, 2)], 2)
    torch.testing.assert_close(page_means(k, page)[:, :, :-1], expected)
    kept, start = PageMeans(page), max(1, keys // 2)
    found = kept.append(k[:, :, :start], start, start + 3)
    for end in range(start + 1, keys + 1):
        found = kept.append(k[:, :, :end], 1, end + 3)
    torch.testing.assert_close(found[0], expected)
    visible = torch.rand(2, 1, keys, generator=torch.Generator().manual_seed(seed)) < 0.5
    hidden = k.masked_fill(~visible.unsqueeze(-1), 99.0)
    torch.testing.assert_close(page_means(hidden, page, visible), page_means(k, page, visible))


def test_cost_is_one_row_a_span_and_level_and_the_chosen_keys() -> None:
    made = optimized(step(40), "select-kv{budget=6 score=middle share=head page=8 branch=2 beam=4 sinks=0 recents=1}")
    product = 2 * HEADS * WIDTH
    spent = product * (7 + 3 * 8) + 2 * product * 6  # 6 pages and a spare one, 4 spans halved three times, 6 keys
    assert made.report.flops["dense"] - made.report.flops["now"] == 2 * LAYERS * (2 * product * 41 - spent)


@pytest.mark.full
@pytest.mark.parametrize("passes", ["hisa{budget=16 page=4 beam=6}", HIP])
def test_a_cache_keeps_the_means_and_steps_equal_their_masked_form(passes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of which pads are a part always stay, since the cache's means count them."""
    calls = [(ids.contiguous(), mask.contiguous()) for ids, mask in conversation((40, *[1] * 8))]
    model, cache, form = tiny_llama(), dyncc.KVCache(passes), RefinedForm(build(passes)[0], F.scaled_dot_product_attention)
    form.partly_hidden_stay = True
    expected, plain = [], DynamicCache()
    read(model, plain, *calls[0])
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", form)
        expected += [read(model, plain, ids, mask)[:, -1] for ids, mask in calls[1:]]
    run, before = compiled(model), len(dyncc.reports())
    read(run, cache, *calls[0])
    for (ids, mask), then in zip(calls[1:], expected, strict=True):
        torch.testing.assert_close(read(run, cache, ids, mask)[:, -1], then, rtol=1e-4, atol=1e-5)
    assert len(dyncc.reports()) - before <= 3 and not any(r.fallback for r in dyncc.reports()[before:])
    if passes.startswith("hisa"):
        keys = cache.layers[0].keys
        torch.testing.assert_close(cache.layers[0].pages.append(keys, 2, 50)[0], page_means(keys, 4)[:, :, :-1])


@pytest.mark.full
@pytest.mark.parametrize("passes", ["hisa{budget=16 page=4 beam=6}", HIP])
def test_it_exports_to_onnx_and_inductor_agrees(passes: str, tmp_path: Path) -> None:
    made = optimized(step(40), passes, STEP_SIZES)
    written = made.export_onnx(tmp_path / "step.onnx")
    assert len({row.sizes for row in written.parity}) == 3 and all(row.holds for row in written.parity)
    fast = dyncc.optimize(Decode(decoder()), step(40), passes=passes, evidence="numeric", dynamic_shapes=STEP_SIZES)
    for keys in (9, 33):
        close(fast(*step(keys)), made(*step(keys)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("beam=4", "single keys are scored; pages that can be split need score=bound, mean or middle"),
        ("score=middle branch=2", "give beam= too"),
        ("score=mean beam=0", "1 is the least"),
        ("score=mean page=16 beam=64 branch=2", "pages by their mean are split into keys at once; score=middle has levels"),
        ("score=middle page=24 beam=512 branch=2", "page=24 must be a power of it"),
        ("score=mean page=16 beam=31", "so many spans of 16 keys must hold the budget of 512"),
        ("score=mean page=512 beam=1 recents=1", "it must hold the spans of 512 keys with the 4 sinks and 1 recents"),
        ("score=mean page=16 budget=40 recents=17", "must hold the 2 first and 2 last pages of 16 keys"),
    ],
)
def test_options_that_do_not_fit_are_told(text: str, words: str) -> None:
    with pytest.raises(BadOptionValue, match=words):
        build(f"select-kv{{{text}}}")
