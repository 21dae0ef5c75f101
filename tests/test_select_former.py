"""select-kv that takes the former step's choice again: row by row what NumPy, with bookkeeping of its own, masks step by step."""

from __future__ import annotations

import copy
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from test_evict_kv import compiled, conversation, read
from test_kv_cache import VOCABULARY, prompt, tiny_llama
from test_onnx import GROUPS, HEADS, LAYERS, decoder, step
from test_select_kv import MaskedForm, optimized, reference
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

import dyncc
from dyncc.decoding import Decode
from dyncc.errors import BadOptionValue
from dyncc.kernels.select_keys.former import alike, choose_spans, former_scores
from dyncc.kv_cache import _policy
from dyncc.kv_layers import PolicyLayer
from dyncc.passes.select_kv import SelectKV
from dyncc.pipeline import build

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "no_grad")

TOKENSELECT = "tokenselect{budget=8 sinks=1 recents=2 similar=0.8}"
CASES = {
    "tokenselect": TOKENSELECT,
    "logits": "select-kv{budget=9 score=logits share=group sinks=0 recents=1 similar=0.7 cosine=heads compare=step}",
    "bound": "select-kv{budget=16 score=bound share=group page=4 sinks=1 recents=1 similar=0.7 compare=step}",
    "louiskv": "louiskv{budget=24 page=4 sinks=1 recents=2}",
    "middle": "select-kv{budget=20 score=middle share=layer page=4 sinks=0 recents=1 similar=0.8}",
}


class FormerForm(MaskedForm):
    """SDPA that hides what the policy does not choose, or has not chosen, for each row; `told` notes who took a choice again."""

    def __init__(self, passed: SelectKV) -> None:
        super().__init__(passed, F.scaled_dot_product_attention)
        self.rows: dict[tuple[int, int], tuple[np.ndarray, list[list[int]]]] = {}
        self.told: list[bool] = []

    def choose(self, q: Tensor, k: Tensor, seen: Tensor) -> np.ndarray:
        layer, page = self.calls - 1, self.passed.page if self.passed.score in ("bound", "mean", "middle") else 1
        together = HEADS if self.passed.share == "layer" else HEADS // GROUPS
        chosen = np.zeros((*q.shape[:2], k.shape[2]), dtype=bool)
        for row in range(q.shape[0]):
            query, visible = q[row, :, 0].numpy().astype(np.float64), seen[row, 0, 0].numpy()
            then, former = self.rows.get((layer, row), (None, []))
            again = then is not None and self.cosine(query, then) >= self.passed.similar
            self.told.append(again)
            picks = []
            for number, first in enumerate(range(0, HEADS, together)):
                heads = slice(first, first + together)
                picks.append(self.pick(query[heads], k[row, heads].numpy(), visible, former[number] if again else None))
                for span in picks[-1]:
                    chosen[row, heads, span * page : (span + 1) * page] = True
            self.rows[layer, row] = (then if again and self.passed.compare == "choice" else query, picks)
        return chosen

    def cosine(self, a: np.ndarray, b: np.ndarray) -> float:
        if self.passed.cosine == "whole":
            a, b = a.reshape(1, -1), b.reshape(1, -1)
        return float(np.mean([x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b, strict=True)]))

    def pick(self, q: np.ndarray, k: np.ndarray, visible: np.ndarray, former: list[int] | None) -> list[int]:
        """Keys or pages, as many at any length: those behind the last count as hidden."""
        passed = self.passed
        if passed.score in ("bound", "mean", "middle"):
            return self.pick_pages(q, k, visible, former)
        logits = (q[:, None] * k).sum(2) * q.shape[1] ** -0.5
        if passed.score == "vote":
            weights = np.exp(np.where(visible, logits - logits.max(1, keepdims=True), -np.inf))
            logits = weights / weights.sum(1, keepdims=True)
        score = np.append(logits.mean(0), np.zeros(passed.budget))
        if former is not None:
            score = np.isin(np.arange(len(score)), former).astype(float)
        return reference(score, np.append(visible, np.zeros(passed.budget, bool)), passed.budget, passed.sinks, passed.recents)

    def pick_pages(self, q: np.ndarray, k: np.ndarray, visible: np.ndarray, former: list[int] | None) -> list[int]:
        passed, keys, size = self.passed, k.shape[1], self.passed.page
        count = passed.budget // size
        pages = [list(range(s, min(s + size, keys))) for s in range(0, keys, size)]
        real = [j for j in range(keys) if visible[j]]
        shown = [[j for j in page if visible[j]] for page in pages]
        score = np.zeros(len(pages) + count)
        for number, (page, held) in enumerate(zip(pages, shown, strict=True)):
            if former is not None:
                score[number] = number in former
            elif passed.score == "bound" and held:
                score[number] = np.maximum(q * k[:, held].min(1), q * k[:, held].max(1)).sum(1).mean()
            elif passed.score == "mean":
                score[number] = (q * k[:, page].mean(1)).sum(1).mean()
            elif passed.score == "middle":
                score[number] = (q * k[:, min(page[0] + size // 2, keys - 1)]).sum(1).mean()
            if passed.score == "mean" and 0 < len(held) < len(page):
                score[number] = 1e20  # a cache's means count pads, so that such pages stay
            if passed.score == "middle" and held and not visible[min(page[0] + size // 2, keys - 1)]:
                score[number] = 1e20
            forced = {*real[: passed.sinks], *real[len(real) - passed.recents :]}
            if passed.score != "bound" and forced & set(page):
                score[number] = 1e30
        seen = np.array([bool(held) for held in shown] + [False] * count)
        sinks, recents = (passed.pages.forced_pages() if passed.score == "bound" else (0, 0))
        return reference(score, seen, count, sinks, recents)


def masked_steps(
    text: str, calls: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch, kind: type[FormerForm] = FormerForm
) -> tuple[list[Tensor], Any]:
    """Logits of each step behind the first call, by the masked form over a cache that keeps everything."""
    model, plain, form, found = tiny_llama(), DynamicCache(), kind(build(text)[0]), []
    read(model, plain, *calls[0])
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", form)
        for ids, mask in calls[1:]:
            form.calls = 0
            found.append(read(model, plain, ids, mask)[:, -1])
    return found, form


def steps(run: Any, cache: Any, calls: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [read(run, cache, ids, mask)[:, -1] for ids, mask in calls]


def talk(prompt_length: int = 40, count: int = 12) -> list[tuple[Tensor, Tensor]]:
    """A text in which some tokens follow themselves, so that queries are alike now and then; the first row begins with pads."""
    calls = conversation((prompt_length, *[1] * count))
    said = torch.tensor([[5, 5, 5, 60, 60, 7, 7, 7, 7, 33, 2, 2], [9, 80, 80, 80, 80, 11, 40, 40, 3, 3, 3, 3]])
    given = [calls[0], *((said[:, i : i + 1], mask) for i, (_, mask) in enumerate(calls[1:]))]
    return [(ids.contiguous(), mask.contiguous()) for ids, mask in given]  # strides that change are other graphs


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
def test_steps_equal_their_masked_form(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = talk()
    expected, form = masked_steps(CASES[case], calls, monkeypatch)
    assert 0 < sum(form.told) < len(form.told) - 2 * LAYERS  # both happen, and not in the first step alone
    before = len(dyncc.reports())
    found = steps(compiled(tiny_llama()), dyncc.KVCache(CASES[case]), calls)[1:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    reports = dyncc.reports()[before:]
    assert len(reports) <= 3 and not any(r.fallback for r in reports) and reports[-1].rewrites[0].applied


@pytest.mark.full
def test_a_threshold_above_one_chooses_each_step_and_one_of_minus_one_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = talk()
    texts = [f"tokenselect{{budget=8 sinks=1 recents=2 similar={least}}}" for least in ("1.01", "none")]
    anew, plain = (steps(compiled(tiny_llama()), dyncc.KVCache(text), calls) for text in texts)
    torch.testing.assert_close(anew, plain)
    expected, form = masked_steps("tokenselect{budget=8 sinks=1 recents=2 similar=-1}", calls, monkeypatch)
    assert form.told == [False] * (2 * LAYERS) + [True] * (len(form.told) - 2 * LAYERS)
    found = steps(compiled(tiny_llama()), dyncc.KVCache("tokenselect{budget=8 sinks=1 recents=2 similar=-1}"), calls)
    torch.testing.assert_close(found[1:], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("text", ["tokenselect{budget=64 sinks=1 recents=2 similar=-1}", "louiskv{budget=64 page=4 sinks=1 recents=2}"])
def test_a_budget_of_all_keys_is_the_dense_model(text: str) -> None:
    calls = talk(20)
    dense = steps(tiny_llama(), DynamicCache(), calls)
    torch.testing.assert_close(steps(compiled(tiny_llama()), dyncc.KVCache(text), calls), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_a_row_is_alone_and_sequences_do_not_leak() -> None:
    calls, run = talk(), compiled(tiny_llama())
    both = steps(run, dyncc.KVCache(TOKENSELECT), calls)
    turned = steps(run, dyncc.KVCache(TOKENSELECT), [(ids[[1, 0]], mask[[1, 0]]) for ids, mask in calls])
    torch.testing.assert_close([x[[1, 0]] for x in turned], both, rtol=1e-4, atol=1e-5)
    padded = [(ids.clone(), mask) for ids, mask in calls]
    padded[0][0][0, :3] = 44  # what stands in pads has no say
    padded = [(torch.stack([ids[0], (ids[1] * 7 + 1) % VOCABULARY]), mask) for ids, mask in padded]
    torch.testing.assert_close([x[0] for x in steps(run, dyncc.KVCache(TOKENSELECT), padded)], [x[0] for x in both], rtol=1e-4, atol=1e-5)
    a, b, found = dyncc.KVCache(TOKENSELECT), dyncc.KVCache(TOKENSELECT), []
    for number, (ids, mask) in enumerate(calls):
        twin = copy.copy(a) if number == 6 else None
        found.append(read(run, a, ids, mask)[:, -1])
        read(run, b, (ids + 7) % VOCABULARY, mask)
        if twin is not None:
            read(run, twin, (ids + 3) % VOCABULARY, mask)
    torch.testing.assert_close(found, both)
    a.reset()
    torch.testing.assert_close(steps(run, a, calls), both)
    read(run, a, torch.ones(2, 3, dtype=torch.long), torch.ones(2, 55, dtype=torch.long))
    assert a.layers[0].state is None  # a second prompt


def test_another_order_of_the_batch_takes_choices_along_and_other_keys_forget_them() -> None:
    layer, keys = PolicyLayer(_policy(TOKENSELECT)), torch.randn(2, GROUPS, 9, 16)

    def anew() -> list[Tensor]:
        layer.reset()
        assert layer.state is None
        layer.lazy_initialization(keys, keys)
        layer.store.append(keys, keys)
        layer.seen, layer.state = 9, layer.policy.former.state(keys)
        assert [tuple(x.shape) for x in layer.state] == [(2, 128, 16), (2, 1, 8)] and not any(x.any() for x in layer.state)
        layer.state = [x + torch.arange(2).view(2, 1, 1) for x in layer.state]
        return layer.state

    query, choice = anew()
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.state[0], query[[1, 0]]) and torch.equal(layer.state[1], choice[[1, 0]])
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.state[1], choice[[1, 1, 0, 0]])
    layer.batch_select_indices(torch.tensor([3]))
    assert torch.equal(layer.state[0], query[:1])
    anew()
    twin = copy.copy(layer)
    layer.crop(-1)
    assert layer.state is None and twin.state is not None


class DensityForm(FormerForm):
    """SDPA in which each layer shows as many keys as the entropies of the step before allow."""

    def __init__(self, passed: SelectKV) -> None:
        super().__init__(passed)
        self.former: dict[tuple[int, int], float] = {}
        self.now: dict[tuple[int, int], float] = {}
        self.counts: list[int] = []

    def choose(self, q: Tensor, k: Tensor, seen: Tensor) -> np.ndarray:
        layer, chosen = self.calls - 1, np.zeros((*q.shape[:2], k.shape[2]), dtype=bool)
        if layer == 0:
            self.former, self.now = self.now, {}
        for row in range(q.shape[0]):
            visible = seen[row, 0, 0].numpy()
            logits = np.where(visible, (q[row].numpy() * k[row].numpy()).sum(2) * q.shape[3] ** -0.5, -np.inf).astype(np.float64)
            weights = np.exp(logits - logits.max(1, keepdims=True))
            votes = (weights / weights.sum(1, keepdims=True)).mean(0)
            self.now[layer, row] = -float((votes[votes > 0] * np.log(votes[votes > 0])).sum())
            count = self.passed.budget
            if self.former:
                mean = np.mean([self.former[other, row] for other in range(LAYERS)])
                count = int(min(2 * count, max(self.passed.sinks + self.passed.recents, 1, count * self.former[layer, row] // mean)))
            self.counts.append(count)
            held = visible.sum() if visible.sum() <= self.passed.budget else count
            chosen[row, :, reference(votes, visible, int(held), self.passed.sinks, self.passed.recents)] = True
        return chosen


@pytest.mark.full
@pytest.mark.parametrize("budget", [10, 48])
def test_layers_share_the_budget_by_the_entropies_of_the_step_before(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text, calls = f"actqkv{{budget={budget} sinks=1 recents=2}}", talk(40, 6)
    expected, form = masked_steps(text, calls, monkeypatch, DensityForm)
    each = np.array(form.counts).reshape(6, LAYERS, 2)
    assert (each.sum(1) <= LAYERS * budget).all() and (each.sum(1) >= LAYERS * budget - LAYERS).all() and (each[1:] != budget).any()
    found = steps(compiled(tiny_llama()), dyncc.KVCache(text), calls)[1:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if budget > 46:
        dense = steps(tiny_llama(), DynamicCache(), calls)[1:]
        torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}])
def test_generation(how: dict[str, Any]) -> None:
    model, given = tiny_llama(), prompt(2, 30, pads=3)
    options = {**given, "max_new_tokens": 20, "do_sample": False, **how}
    expected = model.generate(**options)
    before = len(dyncc.reports())
    model.compile(backend="dyncc", options={"engine": "reference"})
    for budget in (64, 12):
        found = model.generate(**options, past_key_values=dyncc.KVCache(f"tokenselect{{budget={budget} sinks=1 recents=2 similar=0.8}}"))
        assert found.shape == expected.shape and (budget == 12 or torch.equal(found, expected))
        reports, before = dyncc.reports()[before:], len(dyncc.reports())
        assert len(reports) <= 3 and not any(r.fallback for r in reports)
        torch._dynamo.reset()


@pytest.mark.full
@pytest.mark.parametrize("text", [CASES["louiskv"], "snapkv{budget=24 window=4 recents=4} " + TOKENSELECT])
def test_the_inductor_engine_agrees(text: str) -> None:
    """Also behind a prompt that is evicted from, whose keys' places are others."""
    calls = talk()
    found = steps(compiled(tiny_llama(), "inductor"), dyncc.KVCache(text), calls)
    torch._dynamo.reset()
    torch.testing.assert_close(found, steps(compiled(tiny_llama()), dyncc.KVCache(text), calls), rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 99), st.sampled_from([-1.0, 0.0, 0.3, 0.9, 1.01]), st.sampled_from(["whole", "heads"]))
def test_alike_is_the_cosine_of_each_row_and_zeros_are_like_nothing(seed: int, least: float, cosine: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, former = torch.randn(5, 3, 1, 4, generator=generator), torch.randn(5, 3, 4, generator=generator)
    former[0], former[1] = 0.0, q[1, :, 0] * 3
    found = alike(q, former, cosine, least)
    a, b = (q[:, :, 0], former) if cosine == "heads" else (q.flatten(1)[:, None], former.flatten(1)[:, None])
    expected = F.cosine_similarity(a, b, dim=2).mean(1) >= least
    assert not found[0] and found[1] == (least <= 1.0) and torch.equal(found[2:], expected[2:])


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 99))
def test_a_choice_has_one_size_and_taken_again_is_itself(keys: int, count: int, seed: int) -> None:
    score = torch.randn(2, 3, keys, generator=torch.Generator().manual_seed(seed))
    choice = choose_spans(score, count, None, 0, 0)
    assert choice.shape == (2, 3, count) and (choice.diff() > 0).all()
    for row, head in np.ndindex(2, 3):
        real = [j for j in choice[row, head].tolist() if j < keys]
        assert real == reference(score[row, head].numpy(), np.ones(keys, bool), count, 0, 0)
    assert torch.equal(choose_spans(former_scores(choice, keys), count, None, 0, 0), choice)


def test_what_it_needs_is_told() -> None:
    made = optimized(step(24), "tokenselect{budget=8 sinks=1 recents=2 similar=0.9}")
    reason = made.report.rewrites[0].reason
    assert not made.report.rewrites[0].applied
    assert reason.startswith("attention 0: similar=0.9 looks back to the former step, which only dyncc.KVCache('select-kv{budget=8")
    model = decoder()
    model.set_attn_implementation("eager")
    eager = dyncc.optimize(Decode(model), step(24), passes=TOKENSELECT, engine="reference").report.rewrites[0].reason
    assert "it is spelled out, and similar=0.8 needs its plain queries" in eager


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("share=head similar=0.9", "similar= remembers the choice of a layer or of its groups"),
        ("score=mean beam=32 similar=0.9", "similar= takes whole pages or single keys again"),
        ("recents=0 similar=0.9", "with similar= it is 1 at least"),
        ("density=true similar=0.9", "it does not go with similar="),
        ("density=true share=group", "it needs votes of whole layers"),
        ("density=true reuse=1", "none can reuse the choice of another"),
    ],
)
def test_options_that_do_not_fit_are_told(text: str, words: str) -> None:
    with pytest.raises(BadOptionValue, match=words):
        build(f"select-kv{{{text}}}")
