"""evict-kv: bounded caches hold what their policy, in words of its own, keeps, and compute what masking all other keys computes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_kv_cache import VOCABULARY, prompt, tiny_llama
from test_onnx import GROUPS, HEADS, LAYERS, decoder
from test_select_kv import reference
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

import dyncc
from dyncc.decoding import EvictedDecode, Prefill
from dyncc.errors import BadCachePasses, BadOptionValue, CacheNotServed
from dyncc.kernels.evict_keys import column_sums, hide_pads, keep_keys, row_weights, window_sums
from dyncc.kernels.select_keys import near_bounds
from dyncc.passes.evict_kv import EvictKV
from dyncc.pipeline import build

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "no_grad")

RECIPES = {
    "snapkv": "snapkv{budget=12 window=4 recents=4 pool=3}",
    "h2o": "h2o{budget=12 recents=6}",
    "h2o-rarely": "h2o{budget=12 recents=6 every=5}",
    "a2sf": "a2sf{budget=12 recents=4}",
    "streamingllm": "streamingllm{budget=12 sinks=2}",
    "tova": "tova{budget=12}",
}


def each(*quick: str) -> list[Any]:
    """All recipes; those that are not quick run in the full matrix."""
    return [pytest.param(text, id=name, marks=[] if name in quick else [pytest.mark.full]) for name, text in RECIPES.items()]


def compiled(model: Any, engine: str = "reference") -> Any:
    return torch.compile(model, backend="dyncc", options={"engine": engine})


def read(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    out: Tensor = model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
    return out


class MaskedForm:
    """SDPA over a cache that keeps everything; what the policy has dropped, by bookkeeping of its own, is hidden."""

    def __init__(self, policy: EvictKV) -> None:
        self.policy, self.plain, self.calls = policy, F.scaled_dot_product_attention, 0
        self.held = [np.zeros((0,), dtype=bool)] * LAYERS
        self.scores = [np.zeros((0,))] * LAYERS
        self.prompted = [False] * LAYERS

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, is_causal: bool = False, **more: Any) -> Tensor:
        packed = q.shape
        groups = k.shape[1] if k.shape[1] != HEADS else GROUPS
        per, rows = HEADS // groups, 1 if packed[1] != HEADS else packed[2]
        q = q.reshape(q.shape[0], HEADS, rows, q.shape[3])
        k, v = (t.repeat_interleave(HEADS // t.shape[1], 1) for t in (k, v))
        batch, keys = k.shape[0], k.shape[2]
        causal = torch.ones(1, 1, rows, keys, dtype=torch.bool).tril(keys - rows)
        seen = (causal if attn_mask is None else attn_mask).expand(batch, 1, -1, -1)
        layer, self.calls = self.calls % LAYERS, self.calls + 1
        held, scores = self.grown(layer, batch, groups, keys - rows)
        if rows == 1 and self.due(held, layer):
            held = self.drop(held, scores, seen[:, 0, -1, : keys - rows].numpy())
        self.prompted[layer] = rows > 1
        held, scores = (np.concatenate([x, np.full((batch, groups, rows), fill)], 2) for x, fill in ((held, True), (scores, 0.0)))
        shown = seen & torch.from_numpy(held).repeat_interleave(per, 1)[:, :, None]
        logits = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).masked_fill(~shown, -torch.inf)
        probabilities = torch.softmax(logits, -1).nan_to_num().view(batch, groups, per, rows, keys).sum(2).numpy()
        self.held[layer], self.scores[layer] = held, self.earned(scores, probabilities, seen[:, 0].numpy())
        return self.plain(q, k, v, attn_mask=shown).reshape(*packed[:3], v.shape[3])

    def grown(self, layer: int, batch: int, groups: int, past: int) -> tuple[Any, Any]:
        if past == 0:
            return np.zeros((batch, groups, 0), dtype=bool), np.zeros((batch, groups, 0))
        return self.held[layer], self.scores[layer]

    def due(self, held: Any, layer: int) -> bool:
        count = int(held[0, 0].sum())
        if self.policy.every:
            return count >= self.policy.budget + self.policy.every
        return self.prompted[layer] and count > self.policy.budget

    def drop(self, held: Any, scores: Any, visible: Any) -> Any:
        kept = np.zeros_like(held)
        for row, group in np.ndindex(*held.shape[:2]):
            places = np.flatnonzero(held[row, group])
            here = places.astype(float) if self.policy.score == "recents" else scores[row, group, places]
            here = np.where(visible[row, places], here, -1.0)
            half = self.policy.pool // 2
            pooled = np.array([here[max(0, j - half) : j + half + 1].max() for j in range(len(here))])
            chosen = reference(pooled, visible[row, places], self.policy.budget, self.policy.sinks, self.policy.recents)
            kept[row, group, places[chosen]] = True
        return kept

    def earned(self, scores: Any, probabilities: Any, seen: Any) -> Any:
        rows, keys = probabilities.shape[2:]
        real = np.stack([seen[:, i, keys - rows + i] for i in range(rows)], 1)
        if self.policy.score == "window":
            scores, first = np.zeros_like(scores), max(0, rows - self.policy.window)
        else:
            first = 0
        for i in range(first, rows):
            scores = scores * self.policy.decay + probabilities[:, :, i] * real[:, None, i, None]
        return scores


def masked_logits(policy: str, model: Any, calls: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    cache, form = DynamicCache(), MaskedForm(build(policy)[0])
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", form)
        return [read(model, cache, ids, mask) for ids, mask in calls]


def conversation(chunks: tuple[int, ...], pads: int = 3, batch: int = 2) -> list[tuple[Tensor, Tensor]]:
    """A text read in chunks, with the mask of all that was read so far; the first row begins with pads."""
    given = prompt(batch, sum(chunks), pads)
    ends = np.cumsum(chunks)
    return [(given["input_ids"][:, e - c : e], given["attention_mask"][:, :e]) for c, e in zip(chunks, ends, strict=True)]


@pytest.mark.parametrize("recipe", each("h2o"))
def test_a_bounded_cache_equals_its_masked_form(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = conversation((30, *[1] * 12))
    model, cache = tiny_llama(), dyncc.KVCache(recipe)
    expected = masked_logits(recipe, model, calls, monkeypatch)
    run, dense = compiled(model), DynamicCache()
    apart = 0.0
    for (ids, mask), then in zip(calls, expected, strict=True):
        found = read(run, cache, ids, mask)
        torch.testing.assert_close(found[:, -1], then[:, -1], rtol=1e-4, atol=1e-5)
        apart = max(apart, (read(model, dense, ids, mask)[:, -1] - then[:, -1]).abs().max().item())
    assert apart > 1e-3  # keys were missed


@pytest.mark.parametrize("recipe", each("snapkv"))
def test_generation_holds_the_budget(recipe: str) -> None:
    """Left pads, no fallback, what is dropped is freed; 3 graphs, and one more where only some steps drop keys."""
    model, given = tiny_llama(), prompt(2, 30, pads=3)
    before = len(dyncc.reports())
    model.compile(backend="dyncc", options={"engine": "reference"})
    cache = dyncc.KVCache(recipe)
    model.generate(**given, max_new_tokens=40, do_sample=False, past_key_values=cache)
    reports = dyncc.reports()[before:]
    assert cache.get_seq_length() == 69
    policy = build(recipe)[0]
    assert len(reports) <= (4 if policy.every > 1 else 3) and not any(r.fallback for r in reports)
    held = policy.budget + policy.every if policy.every else policy.budget + 39
    for layer in cache.layers:
        assert (held - policy.every if policy.every else held) <= layer.store.length <= held
    assert cache.bytes == sum(2 * 4 * layer.keys.numel() for layer in cache.layers)


QUEST = "quest{budget=16 page=4 dense=0}"
NEAR = "quest{budget=16 page=4 dense=0 share=any slack=0.4}"


@pytest.mark.full
@pytest.mark.parametrize("passes", [QUEST, "snapkv{budget=24 window=4 recents=4} " + QUEST, NEAR])
def test_steps_that_select_read_the_bounds_that_the_cache_keeps(passes: str) -> None:
    model, given = tiny_llama(), prompt(2, 60, pads=3)
    before = len(dyncc.reports())
    model.compile(backend="dyncc", options={"engine": "reference"})
    cache = dyncc.KVCache(passes)
    model.generate(**given, max_new_tokens=40, do_sample=False, past_key_values=cache)
    reports = dyncc.reports()[before:]
    assert len(reports) <= 3 and not any(r.fallback for r in reports)
    for report in reports[1:]:
        chosen = next(r for r in report.rewrites if r.name == "select-kv")
        assert chosen.applied and (chosen.found, chosen.expected) == (LAYERS, LAYERS)
    held = 63 if "snapkv" in passes else 99
    for layer in cache.layers:
        assert layer.store.length == held and layer.get_seq_length() == 99
        bounds_are_kept(layer, 0.4 if passes == NEAR else 1.0)


@pytest.mark.full
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}])
def test_pages_for_any_head_with_room_for_all_give_the_dense_tokens(how: dict[str, int]) -> None:
    model, given = tiny_llama(), {**prompt(2, 30, pads=3), "max_new_tokens": 24, "do_sample": False, **how}
    expected = model.generate(**given)
    model.compile(backend="dyncc", options={"engine": "reference"})
    assert torch.equal(model.generate(**given, past_key_values=dyncc.KVCache(NEAR.replace("16", "64"))), expected)


def bounds_are_kept(layer: Any, slack: float) -> None:
    for side, kept in zip(near_bounds(layer.keys, 4, slack), (layer.pages.low, layer.pages.high), strict=True):
        exact = {"rtol": 0.0, "atol": 0.0} if slack == 1.0 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(kept[:, :, : side.shape[2]], side, **exact)


@pytest.mark.full
@pytest.mark.parametrize("slack", [1.0, 0.4])
def test_bounds_follow_a_second_prompt_and_branches_do_not_loosen_each_others(slack: float) -> None:
    run, ids = compiled(tiny_llama()), prompt(1, 21)["input_ids"]
    cache = dyncc.KVCache(f"quest{{budget=8 page=4 dense=0 slack={slack}}}")
    for step in (ids, ids[:, :1], ids[:, 3:9], ids[:, 1:2]):  # a second prompt in between
        read(run, cache, step)
    bounds_are_kept(cache.layers[0], slack)
    other = copy.copy(cache)
    then = other.layers[0].pages.high.clone()
    read(run, cache, ids[:, 5:6])
    assert torch.equal(other.layers[0].pages.high, then)


def drawn(rows: int = 11, keys: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, and a mask with three pads in the first of two rows."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, count, 8, generator=generator) for heads, count in ((4, rows), (2, keys)))
    mask = torch.ones(2, 1, rows, keys, dtype=torch.bool).tril(keys - rows)
    mask[0, ..., :3] = False
    return q, k, mask


def probabilities(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    logits = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5
    return torch.softmax(logits.masked_fill(~mask, -torch.inf), -1).nan_to_num()


@pytest.mark.parametrize("kind", ["bool", "float", "causal"])
def test_column_sums_are_the_sums_of_all_columns_tiled_or_not(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, mask = drawn()
    if kind == "causal":
        mask = torch.ones(11, 11, dtype=torch.bool).tril()[None, None].expand(2, 1, -1, -1)
    given = {"bool": mask, "float": torch.zeros(mask.shape).masked_fill(~mask, -torch.inf), "causal": None}[kind]
    weights = row_weights(given, 2, 11, 0.9, q.device)
    expected = (probabilities(q, k, mask) * weights[:, None, :, None]).view(2, 2, 2, 11, 11).sum((2, 3))
    whole = column_sums(q, k, given, weights, kind == "causal")
    torch.testing.assert_close(whole, expected)
    monkeypatch.setattr("dyncc.kernels.evict_keys.truth.TILE", 4)
    torch.testing.assert_close(column_sums(q, k, given, weights, kind == "causal"), whole)
    last = window_sums(q, k, given, weights, 3, kind == "causal")
    torch.testing.assert_close(last, (probabilities(q, k, mask) * weights[:, None, :, None])[:, :, -3:].view(2, 2, 2, 3, 11).sum((2, 3)))
    torch.testing.assert_close(window_sums(q, k, given, weights, 99, kind == "causal"), whole)


def test_rows_sum_to_one_and_pads_have_no_say() -> None:
    q, k, mask = drawn()
    sums = column_sums(q, k, mask, row_weights(mask, 2, 11, 1.0, q.device))
    torch.testing.assert_close(sums.sum((1, 2)), torch.tensor([8.0 * 4, 11.0 * 4]))  # one a real row and head
    assert (hide_pads(sums, mask)[0, :, :3] == -1).all() and (hide_pads(sums, mask)[:, :, 3:] >= 0).all()


def test_forgetting_is_a_recursion() -> None:
    q, k, mask = drawn()
    torch.testing.assert_close(row_weights(None, 1, 3, 0.5, q.device), torch.tensor([[0.25, 0.5, 1.0]]))
    closed = column_sums(q, k, mask, row_weights(mask, 2, 11, 0.9, q.device))
    old = torch.zeros(2, 2, 11)
    for row in range(11):
        one = mask[:, :, row : row + 1]
        real = one[:, 0, :, row].float()
        old = 0.9 * old + column_sums(q[:, :, row : row + 1], k, one, real)
    torch.testing.assert_close(closed, old)


def test_noise_is_seeded_and_does_not_depend_on_chunks() -> None:
    q, k, mask = drawn()
    weights = row_weights(mask, 2, 11, 1.0, q.device)
    plain, noisy = column_sums(q, k, mask, weights), column_sums(q, k, mask, weights, seed=3)
    assert torch.equal(noisy, column_sums(q, k, mask, weights, seed=3))
    assert (noisy - column_sums(q, k, mask, weights, seed=4)).abs().max() > 0.1 < (noisy - plain).abs().max()
    parts = [column_sums(q[:, :, a:b], k, mask[:, :, a:b], weights[:, a:b], seed=3, start=a) for a, b in ((0, 5), (5, 11))]
    torch.testing.assert_close(parts[0] + parts[1], noisy)
    many = torch.stack([column_sums(q[:, :, -1:], k, mask[:, :, -1:], weights[:, -1:], seed=s) for s in range(4000)])
    more = torch.stack([column_sums(q[:, :, -1:], k, mask[:, :, -1:], weights[:, -1:], seed=s) for s in range(4000, 8000)])
    torch.testing.assert_close(many.mean(0), more.mean(0), rtol=0.1, atol=0.02)


def test_pooling_keeps_neighbours_and_pads_go_first() -> None:
    scores = torch.tensor([[[-1.0, 0.0, 0.1, 5.0, 0.2, 0.3, 0.0]]])
    assert keep_keys(scores, 2, 0, 0).tolist() == [[[3, 5]]]
    assert keep_keys(scores, 3, 0, 0, pool=3).tolist() == [[[2, 3, 4]]]
    assert keep_keys(scores, 3, 1, 1).tolist() == [[[1, 3, 6]]]
    assert keep_keys(scores, 7, 0, 0, pool=5).tolist() == [[list(range(7))]]


@pytest.mark.full
def test_a_budget_of_all_keys_is_the_dense_model() -> None:
    model, calls = tiny_llama(), conversation((14, 1, 1, 1))
    run, cache, dense = compiled(model), dyncc.KVCache("h2o{budget=17 recents=4}"), DynamicCache()
    for ids, mask in calls:
        torch.testing.assert_close(read(run, cache, ids, mask)[:, -1], read(model, dense, ids, mask)[:, -1], rtol=1e-4, atol=1e-5)
    assert cache.layers[0].store.length == 17


@pytest.mark.full
def test_a_prompt_in_chunks_keeps_what_one_prompt_keeps() -> None:
    recipe = "a2sf{budget=12 recents=4 decay=0.9}"
    kept = []
    for chunks in ((30, 1), (16, 14, 1)):
        run, cache = compiled(tiny_llama()), dyncc.KVCache(recipe)
        for ids, mask in conversation(chunks):
            read(run, cache, ids, mask)
        kept.append(cache.layers[0].keys)
    torch.testing.assert_close(*kept, rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_two_sequences_do_not_leak_copies_go_on_apart_and_a_reset_forgets() -> None:
    run, calls = compiled(tiny_llama()), conversation((20, *[1] * 6), pads=0, batch=1)
    alone, a = [], dyncc.KVCache("h2o{budget=12 recents=4}")
    for ids, _ in calls:
        alone.append(read(run, a, ids)[:, -1])
    a.reset()
    assert a.get_seq_length() == 0 == a.bytes
    b = dyncc.KVCache("h2o{budget=12 recents=4}")
    for number, ((ids, _), then) in enumerate(zip(calls, alone, strict=True)):
        if number == 3:
            c = copy.copy(a)
        torch.testing.assert_close(read(run, a, ids)[:, -1], then)
        read(run, b, (ids + 7) % VOCABULARY)
    for (ids, _), then in zip(calls[3:], alone[3:], strict=True):
        torch.testing.assert_close(read(run, c, ids)[:, -1], then)


def test_another_order_of_the_batch_takes_scores_along() -> None:
    run, cache = compiled(tiny_llama()), dyncc.KVCache("h2o{budget=12 recents=4}")
    read(run, cache, prompt(2, 20)["input_ids"])
    layer = cache.layers[0]
    keys, scores = layer.keys.clone(), layer.scores.clone()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.keys, keys[[1, 0]]) and torch.equal(layer.scores, scores[[1, 0]])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3]))
    assert torch.equal(layer.keys, keys[:1]) and torch.equal(layer.scores, scores[:1])
    cache.crop(-2)
    assert layer.get_seq_length() == 18 == layer.scores.shape[2]


def test_mistakes_are_told() -> None:
    ids = prompt(1, 20)["input_ids"]
    with pytest.raises(CacheNotServed, match=r'compiled only; call model.compile\(backend="dyncc"\)'):
        read(tiny_llama(), dyncc.KVCache("snapkv"), ids)
    with pytest.raises(CacheNotServed, match=r'compiled only; call model.compile\(backend="dyncc"\)'):
        read(tiny_llama(), dyncc.KVCache("quest"), ids)
    for passes in ("simplify-mask", "snapkv h2o", ""):
        with pytest.raises(BadCachePasses, match="takes one pass that prunes prompts, one that evicts, one that selects"):
            dyncc.KVCache(passes)
    with pytest.raises(BadCachePasses, match="take a policy that evicts once"):
        dyncc.KVCache("h2o quest")
    with torch.enable_grad(), pytest.raises(CacheNotServed, match="gradients are on"):
        read(compiled(tiny_llama()), dyncc.KVCache("snapkv"), ids)
    run, cache = compiled(tiny_llama()), dyncc.KVCache("snapkv{budget=8 recents=2 window=2}")
    read(run, cache, ids)
    read(run, cache, ids[:, :1])
    with pytest.raises(ValueError, match="has dropped keys, so it cannot go back"):
        cache.crop(-1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("budget=0", "1 is the least"),
        ("pool=4", "take an odd number"),
        ("decay=0", "lies above 0 and is 1 at most"),
        ("temperature=0", "lies above 0"),
        ("budget=10 recents=9 sinks=4", "must hold the 4 sinks and 9 recents"),
    ],
)
def test_options_that_do_not_fit_are_told(text: str, words: str) -> None:
    with pytest.raises(BadOptionValue, match=words):
        build(f"evict-kv{{{text}}}")


def prefilled(attention: str = "sdpa", passes: str = "snapkv{budget=12 window=4 recents=4 pool=3}") -> tuple[Any, Any, Any]:
    """A prompt whose keys are returned: optimized, plain, and its call."""
    model = decoder()
    model.set_attn_implementation(attention)
    given = prompt(2, 30, pads=3)
    call = (given["input_ids"], given["attention_mask"])
    module = Prefill(model, keys=True)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=2)
    sizes = {"input_ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: length}}
    return dyncc.optimize(module, call, passes=passes, engine="reference", dynamic_shapes=sizes), module, call


@pytest.mark.full
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_prompts_returned_keys_are_those_kept(attention: str) -> None:
    made, plain, call = prefilled(attention)
    rewrite = made.report.rewrites[0]
    assert rewrite.applied and (rewrite.found, rewrite.expected) == (LAYERS, LAYERS), rewrite.reason
    dense, found = plain(*call), made(*call)
    torch.testing.assert_close(found[0], dense[0], rtol=1e-4, atol=1e-5)
    cache = dyncc.KVCache("snapkv{budget=12 window=4 recents=4 pool=3}")
    run = compiled(decoder())
    read(run, cache, *call)
    read(run, cache, call[0][:, :1], torch.cat([call[1], call[1][:, -1:]], 1))
    for layer, (k, v) in zip(cache.layers, zip(found[1::2], found[2::2], strict=True), strict=True):
        torch.testing.assert_close(layer.keys[:, :, :12], k, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.values[:, :, :12], v, rtol=1e-4, atol=1e-5)
    short = tuple(x[:, -9:] for x in call)
    for a, b in zip(made(*short), plain(*short), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("recipe", ["snapkv{budget=12 window=4 recents=4 pool=3}", "a2sf{budget=12 recents=4}"])
def test_a_prompt_that_evicts_exports_to_onnx(recipe: str, tmp_path: Path) -> None:
    made, _, _ = prefilled(passes=f"{recipe} drop-repeat-kv")
    written = made.export_onnx(tmp_path / "prompt.onnx")
    assert len({row.sizes for row in written.parity}) == 3 and all(row.holds for row in written.parity)


@pytest.mark.full
def test_a_prompt_that_evicts_and_a_step_that_selects_go_on_in_onnx(tmp_path: Path) -> None:
    """SnapKV's keys from one file, Quest's step in another, against the same two in one `dyncc.KVCache`."""
    import onnxruntime as ort
    from torch.export import Dim

    made, _, (ids, mask) = prefilled(passes="snapkv{budget=12 window=4 recents=4 pool=3} drop-repeat-kv")
    first = made(ids, mask)
    ids, mask, past = ids[1:], torch.ones(1, 13, dtype=torch.long), [t[1:] for t in first[1:]]
    quest = "quest{budget=8 page=4 dense=0}"
    call = (ids[:, :1], mask, torch.tensor([[30]]), *past)
    held = Dim("held", min=2)
    sizes = ({}, {1: held + 1}, {}, tuple({2: held} for _ in past))
    step = dyncc.optimize(EvictedDecode(decoder()), call, passes=quest, engine="reference", dynamic_shapes=sizes)
    assert step.report.rewrites[0].applied, step.report.rewrites[0].reason
    written = step.export_onnx(tmp_path / "step.onnx")
    assert len({row.sizes for row in written.parity}) == 3 and all(row.holds for row in written.parity)
    run, cache = compiled(decoder()), dyncc.KVCache(f"snapkv{{budget=12 window=4 recents=4 pool=3}} {quest}")
    read(run, cache, prompt(2, 30, pads=3)["input_ids"][1:])
    session = ort.InferenceSession(str(tmp_path / "step.onnx"), providers=["CPUExecutionProvider"])
    arrays = [t.numpy() for t in past]
    for position in range(30, 34):
        names = [v.name for v in session.get_inputs()]
        mask = np.ones((1, position - 30 + 13), dtype=np.int64)
        feed = dict(zip(names, (ids[:, :1].numpy(), mask, np.array([[position]]), *arrays), strict=True))
        logits, *arrays = session.run(None, feed)
        torch.testing.assert_close(torch.from_numpy(logits), read(run, cache, ids[:, :1]), rtol=1e-4, atol=1e-5)


def test_refusals_say_why() -> None:
    given = prompt(1, 30)
    made = dyncc.optimize(Prefill(decoder()), (given["input_ids"],), passes="snapkv", engine="reference")
    assert "its keys and values are no outputs of the graph" in made.report.rewrites[0].reason
    made, _, _ = prefilled("eager", "keyformer{budget=12 recents=4}")
    assert "load it with attn_implementation='sdpa'" in made.report.rewrites[0].reason
