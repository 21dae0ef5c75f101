"""select-kv: a decoding step attends to its best keys, and computes what masking all other keys computes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import make_decode_table as table
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from test_kv_cache import prompt, tiny_llama
from test_onnx import GROUPS, HEADS, LAYERS, STEP_SIZES, WIDTH, decoder, step
from torch import Tensor
from torch.nn import functional as F
from zoo_model import Attn, ZooModel

import dyncc
from dyncc.decoding import Decode, Prefill
from dyncc.errors import BadOptionValue
from dyncc.ir import op_name, shape
from dyncc.kernels.select_keys import attend_selected, key_scores, near_bounds, page_bounds, page_means, page_scores, select_keys
from dyncc.kv_pages import PageBounds
from dyncc.options import Layers
from dyncc.passes.select_kv import SelectKV
from dyncc.pipeline import build

pytestmark = pytest.mark.usefixtures("no_grad")

SHARES = ("layer", "group", "head")
SCORES = ("vote", "logits", "recents")


def reference(score: np.ndarray, visible: np.ndarray, budget: int, sinks: int, recents: int) -> list[int]:
    """The choice of one row, in words of its own: forced keys, then by score, ties to the lower index, hidden keys last."""
    real = [j for j in range(len(score)) if visible[j]]
    forced = set(real[:sinks]) | set(real[len(real) - recents :] if recents else [])
    rank = sorted(range(len(score)), key=lambda j: (not visible[j], j not in forced, -score[j] if visible[j] else 0.0, j))
    return sorted(rank[:budget])


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_the_choice_equals_a_numpy_reference_ties_included(data: st.DataObject) -> None:
    keys = data.draw(st.integers(1, 12))
    numbers = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=keys, max_size=keys)
    score = torch.tensor(data.draw(st.lists(numbers, min_size=2, max_size=2)))[None]
    visible = torch.tensor(data.draw(st.lists(st.booleans(), min_size=keys, max_size=keys)))[None, None]
    sinks, recents = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
    budget = data.draw(st.integers(max(1, sinks + recents), 13))
    found = select_keys(score, budget, visible, sinks, recents)
    for head in range(2):
        assert found[0, head].tolist() == reference(score[0, head].numpy(), visible[0, 0].numpy(), budget, sinks, recents)
    everything = torch.ones_like(visible)
    assert torch.equal(select_keys(score, budget, None, sinks, recents), select_keys(score, budget, everything, sinks, recents))


def test_numbers_that_are_none_are_not_lost() -> None:
    score = torch.tensor([[[math.nan, math.inf, -math.inf, 1.0]]])
    assert select_keys(score, 4).tolist() == [[[0, 1, 2, 3]]] and select_keys(score, 2).tolist() == [[[1, 3]]]


def drawn(keys: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 4, 1, 8), (2, 2, keys, 8), (2, 2, keys, 6))
    q, k, v = (torch.randn(size, generator=generator) for size in sizes)
    return q, k, v


def test_scores_are_what_they_say() -> None:
    q, k, _ = drawn()
    wide = k.repeat_interleave(2, 1)
    logits = (q @ wide.transpose(2, 3))[:, :, 0] * 8**-0.5
    torch.testing.assert_close(key_scores(q, k, None, "logits", "head"), logits)
    torch.testing.assert_close(key_scores(q, k, None, "logits", "group"), logits.view(2, 2, 2, 9).mean(2))
    torch.testing.assert_close(key_scores(q, k, None, "vote", "layer"), torch.softmax(logits, -1).mean(1, keepdim=True))
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[0, ..., :4] = False
    vote = key_scores(q, k, mask, "vote", "layer")
    assert (vote[0, 0, :4] == 0).all()
    torch.testing.assert_close(vote.sum(-1), torch.ones(2, 1))
    one = key_scores(q[:, :1], k[:, :1], None, "vote", "layer")
    assert torch.equal(one.argsort(-1), key_scores(q[:, :1], k[:, :1], None, "logits", "head").argsort(-1))


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_attention_over_chosen_keys_is_masking_the_others(share: str, kind: str) -> None:
    q, k, v = drawn()
    mask = None
    if kind != "none":
        mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
        mask[1, ..., :3] = False
        mask = mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    index = select_keys(key_scores(q, k, None, "logits", share), 4)
    chosen = torch.zeros(2, index.shape[1], 9, dtype=torch.bool).scatter(2, index, True)
    chosen = chosen.repeat_interleave(4 // chosen.shape[1], 1)[:, :, None]
    hidden = chosen if mask is None else chosen & (mask if kind == "bool" else mask == 0)
    wide = [t.repeat_interleave(2, 1) for t in (k, v)]
    torch.testing.assert_close(attend_selected(q, k, v, mask, index), F.scaled_dot_product_attention(q, *wide, attn_mask=hidden))


class MaskedForm:
    """SDPA that computes everything and hides what the policy, in NumPy, does not choose."""

    def __init__(self, passed: SelectKV, plain: Callable[..., Tensor]) -> None:
        self.passed, self.plain, self.calls = passed, plain, 0
        self.chosen: np.ndarray | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, **more: Any) -> Tensor:
        packed = q.shape  # eager transformers packs the query heads of a group as rows
        q = q.reshape(q.shape[0], -1, 1, q.shape[3])
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        seen = torch.ones(q.shape[0], 1, 1, k.shape[2], dtype=torch.bool) if attn_mask is None else attn_mask
        call, self.calls = self.calls, self.calls + 1
        if call >= self.passed.dense:
            due = (call - self.passed.dense) % (self.passed.reuse + 1) == 0
            if self.passed.layers is not None:
                due = call in self.passed.layers.places
            if chooses := self.chosen is None or due:
                self.chosen = self.choose(q, k, seen)
            if not (chooses and self.passed.full):
                seen = seen & torch.from_numpy(self.chosen)[:, :, None]
        return self.plain(q, k, v, attn_mask=seen, scale=more.get("scale")).reshape(*packed[:3], v.shape[3])

    def choose(self, q: Tensor, k: Tensor, seen: Tensor) -> np.ndarray:
        if self.passed.score == "bound":
            return self.choose_pages(q, k, seen)
        logits = (q @ k.transpose(2, 3))[:, :, 0] * q.shape[-1] ** -0.5
        score = logits if self.passed.score == "logits" else torch.softmax(logits.masked_fill(~seen[:, :, 0], -torch.inf), -1)
        if self.passed.score == "recents":
            score = torch.arange(k.shape[2]).expand_as(logits).float()
        heads, per = q.shape[1], {"layer": q.shape[1], "group": q.shape[1] // GROUPS, "head": 1}[self.passed.share]
        shared = score.view(score.shape[0], heads // per, per, -1).mean(2).repeat_interleave(per, 1).numpy()
        chosen = np.zeros(shared.shape, dtype=bool)
        for row, head in np.ndindex(*shared.shape[:2]):
            visible = seen[row, 0, 0].numpy()
            picked = reference(shared[row, head], visible, self.passed.budget, self.passed.sinks, self.passed.recents)
            chosen[row, head, picked] = True
        return chosen


    def choose_pages(self, q: Tensor, k: Tensor, seen: Tensor) -> np.ndarray:
        """Each head's pages, or those that matter most to any head of a group, by loops."""
        page, keys = self.passed.page, k.shape[2]
        starts = range(0, keys, page)
        sinks = len([s for s in starts if s < self.passed.sinks])
        recents = (self.passed.recents + page - 2) // page + 1 if self.passed.recents else 0
        chosen = np.zeros((*q.shape[:2], keys), dtype=bool)
        for row in range(q.shape[0]):
            visible = seen[row, 0, 0].numpy()
            shown = np.array([visible[s : s + page].any() for s in starts])
            score = np.zeros((q.shape[1], len(starts)))
            for head, (number, start) in itertools.product(range(q.shape[1]), enumerate(starts)):
                real = [j for j in range(start, min(start + page, keys)) if visible[j]]
                held, one = k[row, head, real].numpy(), q[row, head, 0].numpy()
                bound, mean = (np.maximum(one * held.min(0), one * held.max(0)).sum(), one @ held.mean(0)) if real else (0.0, 0.0)
                score[head, number] = self.passed.slack * bound + (1 - self.passed.slack) * mean
            if self.passed.share == "any":
                weights = np.exp(score * q.shape[3] ** -0.5) * shown
                shares = (weights / weights.sum(1, keepdims=True)).reshape(GROUPS, -1, len(starts)).max(1)
                score = shares.repeat(q.shape[1] // GROUPS, 0)
            for head in range(q.shape[1]):
                for number in reference(score[head], shown, self.passed.budget // page, sinks, recents):
                    chosen[row, head, number * page : (number + 1) * page] = True
        return chosen


def masked_form(passed: SelectKV, model: Any, call: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", MaskedForm(passed, F.scaled_dot_product_attention))
        return model(*call)


def optimized(call: tuple[Any, ...], passes: str, sizes: Any = None) -> Any:
    return dyncc.optimize(Decode(decoder()), call, passes=passes, engine="reference", evidence="numeric", dynamic_shapes=sizes)


def close(a: Any, b: Any) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


PAGES = [(1, 2, 2), (4, 0, 1), (4, 3, 6)]
ANY = "budget=12 score=bound share=any page=4 slack=0.4 sinks=1 recents=1"
"""Pages that matter to any head of a group."""


@pytest.mark.parametrize(("recents", "lengths"), [(1, (24,)), *(pytest.param(r, (24, 41, 9), marks=pytest.mark.full) for r in (0, 1, 5))])
def test_pages_for_any_head_equal_their_masked_form(recents: int, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three pads stand in front, and the last page is ragged for some lengths."""
    text = f"select-kv{{{ANY.replace('recents=1', f'recents={recents}')}}}"
    made, passed = optimized(step(24), text, STEP_SIZES if len(lengths) > 1 else None), build(text)[0]
    rewrite = made.report.rewrites[0]
    assert rewrite.applied and (rewrite.found, rewrite.expected) == (LAYERS, LAYERS), rewrite.reason
    choices = [shape(n.args[4]) for n in made._outcome.program.graph.nodes if op_name(n) == "attend_row"]
    assert [c[:2] for c in choices] == [(2, GROUPS)] * LAYERS
    for keys in lengths:
        call = step(keys)
        close(made(*call), masked_form(passed, Decode(decoder()), call, monkeypatch))
    assert (made(*step(24))[0] - Decode(decoder())(*step(24))[0]).abs().max() > 1e-3  # it does leave keys out


@pytest.mark.parametrize("slack", [0.3, 1.0])
def test_a_group_takes_the_pages_that_matter_most_to_any_of_its_heads(slack: float) -> None:
    """One head's products are a hundred times the other's: by their mean it would choose alone."""
    q, k = torch.zeros(1, 2, 1, 8), torch.zeros(1, 1, 32, 8)
    q[0, 0, 0, 0], q[0, 1, 0, 1] = 100.0, 1.0
    k[0, 0, 4:8, 0], k[0, 0, 12:16, 0], k[0, 0, 20:24, 1] = 1.0, 0.9, 30.0
    bounds = near_bounds(k, 4, slack)
    assert select_keys(page_scores(q, *bounds, "any"), 2).tolist() == [[[1, 5]]]
    assert select_keys(page_scores(q, *bounds, "group"), 2).tolist() == [[[1, 3]]]


@pytest.mark.full
@pytest.mark.parametrize(("page", "sinks", "recents"), PAGES)
def test_pages_equal_their_masked_form(page: int, sinks: int, recents: int, monkeypatch: pytest.MonkeyPatch) -> None:
    call, passed = step(24), SelectKV(budget=16, score="bound", share="head", page=page, sinks=sinks, recents=recents)
    made = optimized(call, f"select-kv{{budget=16 score=bound share=head page={page} sinks={sinks} recents={recents}}}", STEP_SIZES)
    rewrite = made.report.rewrites[0]
    assert rewrite.applied and (rewrite.found, rewrite.expected) == (LAYERS, LAYERS), rewrite.reason
    for keys in (24, 27, 31, 9):  # the last page is ragged for some
        call = step(keys)
        close(made(*call), masked_form(passed, Decode(decoder()), call, monkeypatch))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 99))
def test_bounds_of_pages_bound_and_are_kept_up_to_date(keys: int, page: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 4, 1, 8, generator=generator), torch.randn(2, 2, keys, 8, generator=generator)
    low, high = page_bounds(k, page)
    score = page_scores(q, low, high, "head")
    logits = (q @ k.repeat_interleave(2, 1).transpose(2, 3))[:, :, 0]
    for number in range(low.shape[2]):
        inside = slice(number * page, (number + 1) * page)
        assert (score[:, :, number] >= logits[:, :, inside].amax(2) - 1e-5).all()
    if page == 1:
        torch.testing.assert_close(score, logits)
    mixed = torch.cat([part[:, :, torch.randperm(part.shape[2], generator=generator)] for part in k.split(page, 2)], 2)
    assert all(torch.equal(a, b) for a, b in zip(page_bounds(mixed, page), (low, high), strict=True))
    means = page_means(k, page)[:, :, :-1]
    for slack, wanted in ((1.0, (low, high)), (0.25, [means + 0.25 * (side - means) for side in (low, high)])):
        kept, start = PageBounds(page, slack), max(1, keys // 2)
        found = kept.append(k[:, :, :start], start, start + 3)
        for end in range(start + 1, keys + 1):
            found = kept.append(k[:, :, :end], 1, end + 3)
        for side, told in zip(found, wanted, strict=True):
            torch.testing.assert_close(side, told, rtol=0.0 if slack == 1.0 else 1e-4, atol=0.0 if slack == 1.0 else 1e-5)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("share", SHARES)
def test_it_equals_its_masked_form(score: str, share: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, passed = step(24), SelectKV(budget=7, score=score, share=share, sinks=2, recents=2)  # type: ignore[arg-type]
    made = optimized(call, f"select-kv{{budget=7 score={score} share={share} sinks=2 recents=2}}")
    rewrite = made.report.rewrites[0]
    assert rewrite.applied and (rewrite.found, rewrite.expected) == (LAYERS, LAYERS), rewrite.reason
    dense = Decode(decoder())(*call)
    close(made(*call), masked_form(passed, Decode(decoder()), call, monkeypatch))
    assert (made(*call)[0] - dense[0]).abs().max() > 1e-3  # it does leave keys out


@pytest.mark.parametrize(("score", "share"), [("vote", "layer"), ("logits", "head"), ("logits", "group"), ("recents", "layer")])
def test_spelled_out_attention_chooses_by_its_logits(score: str, share: str) -> None:
    call, model = step(24), decoder()
    model.set_attn_implementation("eager")
    text = f"select-kv{{budget=7 score={score} share={share} sinks=2 recents=2}}"
    made = dyncc.optimize(Decode(model), call, passes=text, engine="reference")
    rewrite = made.report.rewrites[0]
    assert rewrite.applied and (rewrite.found, rewrite.expected) == (LAYERS, LAYERS), rewrite.reason
    close(made(*call), optimized(call, text)(*call))


def test_a_choice_that_is_reused_and_layers_that_see_all(monkeypatch: pytest.MonkeyPatch) -> None:
    call = step(24)
    for text, passed, choices in (
        ("reuse=1", SelectKV(8, reuse=1, sinks=1, recents=1), 1),
        ("dense=1", SelectKV(8, dense=1, sinks=1, recents=1), 1),
        ("reuse=0", SelectKV(8, sinks=1, recents=1), 2),
        ("layers=0 full=true", SelectKV(8, sinks=1, recents=1, layers=Layers("0"), full=True), 1),
    ):
        made = optimized(call, f"select-kv{{budget=8 sinks=1 recents=1 {text}}}")
        assert [op_name(n) for n in made._outcome.program.graph.nodes].count("select_best") == choices
        close(made(*call), masked_form(passed, Decode(decoder()), call, monkeypatch))


@pytest.mark.parametrize(
    ("options", "least"), [("budget=36 sinks=2 recents=2", 2), pytest.param(ANY.replace("=12", "=36"), 4, marks=pytest.mark.full)]
)
def test_a_budget_of_all_keys_is_the_dense_model_at_any_length(options: str, least: int) -> None:
    made = optimized(step(40), f"select-kv{{{options}}}", STEP_SIZES)
    assert made.report.rewrites[0].applied
    for keys in (least, 9, 35):
        call = step(keys)
        close(made(*call), Decode(decoder())(*call))
    call = step(60, batch=3)
    assert made(*call)[0].shape == (3, 1, 99)
    assert [tuple(t.shape) for t in made(*call)[1:]] == [(3, GROUPS, 61, WIDTH)] * (2 * LAYERS)


@pytest.mark.parametrize(
    "options", [*(f"budget=8 share={share} sinks=2 recents=2" for share in SHARES), pytest.param(ANY, marks=pytest.mark.full)]
)
def test_batch_and_padding_do_not_change_a_row(options: str) -> None:
    """Row 0 has three pads: neither what stands in them nor the other row nor the order of rows has a say."""
    ids, mask, *past = step(24)
    passes = f"select-kv{{{options}}}"
    call = (ids, mask, *past)
    both = optimized(call, passes)(*call)[0]
    order = [1, 0]
    turned = (ids[order], mask[order], *(t[order] for t in past))
    torch.testing.assert_close(optimized(turned, passes)(*turned)[0][order], both, rtol=1e-4, atol=1e-5)
    other = [t.clone() for t in past]
    for t in other:
        t[0, :, :3], t[1] = 50.0, -t[1]
    torch.testing.assert_close(optimized(call, passes)(ids, mask, *other)[0][:1], both[:1], rtol=1e-4, atol=1e-5)


def test_a_larger_budget_never_drops_a_key() -> None:
    score = torch.randn(1, 2, 30, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    chosen = [select_keys(score, budget) for budget in range(1, 31)]
    for small, large in itertools.pairwise(chosen):
        assert all(set(a.tolist()) <= set(b.tolist()) for a, b in zip(small[0], large[0], strict=True))


def test_cost_is_scores_and_the_chosen_keys() -> None:
    made = optimized(step(40), "select-kv{budget=8 sinks=1 recents=1}")
    saved = 2 * LAYERS * (4 * HEADS * WIDTH * 41 - 2 * HEADS * WIDTH * 41 - 4 * HEADS * WIDTH * 8)
    assert made.report.flops["dense"] - made.report.flops["now"] == saved


def test_a_choice_that_costs_more_than_it_saves_is_refused_unless_the_keys_grow() -> None:
    fixed = optimized(step(12), "select-kv{budget=10 sinks=1 recents=1}").report.rewrites[0]
    assert not fixed.applied and "it would cost more than it saves by the cost model" in fixed.reason
    growing = optimized(step(12), "select-kv{budget=10 sinks=1 recents=1}", STEP_SIZES).report.rewrites[0]
    assert growing.applied and growing.reason == "fewer operations from 20 keys on, by the cost model; the graph serves any number"


def test_refusals_say_why() -> None:
    prefill = dyncc.optimize(Prefill(decoder()), (torch.ones(1, 9, dtype=torch.long),), passes="select-kv", engine="reference")
    assert prefill.report.rewrites[0].reason.startswith("attention 0: it has 9 query rows; select-kv acts on decoding steps")
    model = decoder()
    model.set_attn_implementation("eager")
    eager = dyncc.optimize(Decode(model), step(24), passes="quest{budget=8 page=4 dense=0}", engine="reference")
    assert "it is spelled out, and score=bound needs its plain queries and keys" in eager.report.rewrites[0].reason
    none = dyncc.optimize(Decode(decoder()), step(24), passes="select-kv{dense=2}", engine="reference")
    assert none.report.rewrites[0].reason == "dense=2 leaves none of the 2 attentions"
    whole = dyncc.optimize(Decode(decoder()), step(24), passes="select-kv{full=true}", engine="reference")
    assert whole.report.rewrites[0].reason == "every attention chooses and sees all keys; give reuse= or layers="


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("budget=0", "1 is the least"),
        ("sinks=-1", "0 is the least"),
        ("budget=10 recents=9 sinks=4", "must hold the 4 sinks and 9 recents"),
        ("score=bound budget=40 page=16 sinks=4 recents=17", "must hold the 1 first and 2 last pages of 16 keys"),
        ("score=bound slack=0", "without any it is score=mean"),
        ("score=mean slack=0.5", "it draws the bounds of pages towards their mean: score=bound"),
        ("score=vote share=any", "any compares what whole pages are to each head"),
        ("score=bound share=any beam=64", "score=bound, without beam="),
    ],
)
def test_options_that_do_not_fit_are_told(text: str, words: str) -> None:
    with pytest.raises(BadOptionValue, match=words):
        dyncc.optimize(Decode(decoder()), step(9), passes=f"select-kv{{{text}}}")


@pytest.mark.parametrize("budget", [pytest.param(512, marks=pytest.mark.full), 24])
def test_generation_with_a_cache_that_appends_in_place(budget: int) -> None:
    torch._dynamo.reset()
    model, given = tiny_llama(), prompt(2, 30, pads=2)
    options = {**given, "max_new_tokens": 40, "do_sample": False}
    expected = model.generate(**options)
    before = len(dyncc.reports())
    passes = f"select-kv{{budget={budget} sinks=2 recents=4}}"
    model.compile(backend="dyncc", options={"engine": "reference", "passes": passes})
    found = model.generate(**options, past_key_values=dyncc.KVCache())
    reports = dyncc.reports()[before:]
    assert 2 <= len(reports) <= 3 and not any(r.fallback for r in reports)
    assert "query rows" in reports[0].rewrites[0].reason and reports[-1].rewrites[0].applied
    for report in reports[1:-1]:  # a first step of one fixed length may be too short to gain
        assert report.rewrites[0].applied or "it would cost more than it saves" in report.rewrites[0].reason
    assert found.shape == expected.shape and (budget < 100 or torch.equal(found, expected))
    torch._dynamo.reset()


@pytest.mark.full
@pytest.mark.parametrize("options", ["budget=12 sinks=2 recents=2", ANY])
def test_it_exports_to_onnx_with_past(options: str, tmp_path: Path) -> None:
    made = optimized(step(40), f"select-kv{{{options}}} drop-repeat-kv", STEP_SIZES)
    assert made.report.rewrites[0].applied
    written = made.export_onnx(tmp_path / "step.onnx")
    assert len({row.sizes for row in written.parity}) == 3 and all(row.holds for row in written.parity)


@pytest.mark.parametrize(
    ("recipe", "plain"),
    [
        ("tokenselect{budget=8 sinks=1 recents=2}", "select-kv{budget=8 score=vote share=layer sinks=1 recents=2}"),
        ("sink-window{budget=8}", "select-kv{budget=8 score=recents share=layer sinks=4 recents=0}"),
    ],
)
def test_recipes_are_settings_of_the_pass(recipe: str, plain: str) -> None:
    call = step(24)
    made = optimized(call, recipe)
    assert made.report.rewrites[0].applied
    close(made(*call), optimized(call, plain)(*call))


@pytest.mark.full
@pytest.mark.parametrize("options", ["budget=8 sinks=1 recents=1", ANY])
def test_the_inductor_engine_agrees(options: str) -> None:
    call = step(24)
    text = f"select-kv{{{options}}}"
    made = dyncc.optimize(Decode(decoder()), call, passes=text, evidence="numeric")
    assert made.report.rewrites[0].applied
    close(made(*call), optimized(call, text)(*call))


def test_sizes_of_choices() -> None:
    made = optimized(step(24), "select-kv{budget=8 share=group sinks=1 recents=1}")
    attentions = [n for n in made._outcome.program.graph.nodes if op_name(n) == "attend_row"]
    assert [shape(n.args[4]) for n in attentions] == [(2, GROUPS, 8)] * LAYERS


ROWS = [pytest.param(m, a, id=f"{m.name}-{a}", marks=[pytest.mark.full] if a == "eager" else []) for m, a in table.CASES]


@pytest.mark.parametrize(("model", "attn"), ROWS)
def test_no_decoder_turned_from_applied_to_refused(model: ZooModel, attn: Attn) -> None:
    then = {(row["model"], row["attention"]): row for row in table.checked_in()}[model.name, attn]
    now = table.row(model, attn)
    assert now["applied"] >= then["applied"], now["reason"]
    assert now["evict"] >= then["evict"], now["evict_reason"]
    assert now["expected"] == then["expected"] and (now["reason"] or now["applied"] == now["expected"])
    assert now["evict_reason"] or now["evict"] == now["expected"]
    assert table.error_with_all_keys(model, attn) <= 1e-5


def test_the_readable_table_is_that_of_the_rows() -> None:
    assert (table.DOCS / "decoding.md").read_text() == table.markdown(table.checked_in())
