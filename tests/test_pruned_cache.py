"""prune-tokens with a cache: after a pruned prompt layers behind the cut hold its kept tokens alone, and steps compute what masking the
others in a dense model computes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from test_evict_kv import compiled, conversation, read
from test_kv_cache import VOCABULARY, prompt
from test_onnx import HEADS, decoder
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

import dyncc
from dyncc.errors import BadCachePasses, CacheNotServed, LayerOutOfRange

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "no_grad")

DEPTH, LENGTH, STEPS = 4, 30, 8
HALF = "promptdistill{keep=12 layers=1}"


def deep(**changes: Any) -> Any:
    return decoder(num_hidden_layers=DEPTH, eos_token_id=None, max_position_embeddings=4096, **changes)


class MaskedPrompt:
    """SDPA over a cache that keeps everything; from each cut on, keys of the prompt's tokens that were dropped are hidden.

    `cuts` maps a layer to how many of `n` tokens stay; what a token has earned there is the last token's q.k or, with `softmax`, its
    attention. Every sequence counts its own real tokens. `narrow` says which of a step's older visible keys are read.
    """

    def __init__(self, cuts: dict[int, Any], softmax: bool = False, narrow: Callable[[Any], Any] | None = None) -> None:
        self.cuts, self.softmax, self.narrow = cuts, softmax, narrow
        self.plain, self.calls, self.shown = F.scaled_dot_product_attention, 0, [torch.empty(0)]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, is_causal: bool = False, **more: Any) -> Tensor:
        packed = q.shape
        rows = 1 if packed[1] != HEADS else packed[2]
        q = q.reshape(q.shape[0], HEADS, rows, q.shape[3])
        k, v = (t.repeat_interleave(HEADS // t.shape[1], 1) for t in (k, v))
        batch, keys = k.shape[0], k.shape[2]
        causal = torch.ones(1, 1, rows, keys, dtype=torch.bool).tril(keys - rows)
        seen = (causal if attn_mask is None else attn_mask.bool()).expand(batch, 1, -1, -1)
        layer, self.calls = self.calls % DEPTH, self.calls + 1
        if self.calls == 1:
            self.shown = [seen[:, 0, -1].clone()]
        shown = self.shown[-1 if self.calls <= DEPTH else sum(cut < layer for cut in self.cuts)]
        seen = seen & (F.pad(shown, (0, keys - shown.shape[1]), value=True)[:, None, None] | torch.eye(keys, dtype=torch.bool)[-rows:])
        if self.calls > DEPTH and self.narrow is not None:
            seen = self.narrowed(seen)
        logits = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).masked_fill(~seen, -torch.inf)
        if self.calls <= DEPTH and layer in self.cuts:
            earned = (torch.softmax(logits, -1) if self.softmax else logits)[:, :, -1].mean(1)
            self.shown.append(self.kept(earned, shown, self.cuts[layer]))
        return self.plain(q, k, v, attn_mask=seen).reshape(*packed[:3], v.shape[3])

    def kept(self, earned: Tensor, shown: Tensor, count: Any) -> Tensor:
        stays = torch.zeros_like(shown)
        for row in range(len(earned)):
            places = np.flatnonzero(shown[row].numpy())
            others = places[:-1][np.argsort(-earned[row, places[:-1]].numpy(), kind="stable")]
            stays[row, [*others[: count(len(places)) - 1], places[-1]]] = True
        return stays

    def narrowed(self, seen: Tensor) -> Tensor:
        read = torch.zeros_like(seen)
        for row in range(len(seen)):
            *older, newest = np.flatnonzero(seen[row, 0, 0].numpy())
            read[row, 0, 0, [*self.narrow(older), newest]] = True
        return read


def ratio(keep: float) -> Any:
    return lambda n: 1 + int(np.ceil((n - 1) * keep - 1e-9))


def at_most(count: int) -> Any:
    return lambda n: min(count, n)


def window(sinks: int, recents: int) -> Any:
    return lambda places: places if len(places) <= sinks + recents else [*places[:sinks], *places[-recents:]]


RECIPES: dict[str, tuple[str, MaskedPrompt]] = {
    "lazyllm": ("lazyllm{layers=0,1,2}", MaskedPrompt({0: ratio(0.7), 1: ratio(0.5), 2: ratio(0.3)}, softmax=True)),
    "promptdistill": (HALF, MaskedPrompt({1: at_most(12)})),
    "more-than-real": ("promptdistill{keep=28 layers=0}", MaskedPrompt({0: at_most(28)})),
    "counts": ("prune-tokens{layers=0,2 keep=40,9}", MaskedPrompt({0: at_most(40), 2: at_most(9)}, softmax=True)),
    "selects": (f"{HALF} sink-window{{budget=6 sinks=2}}", MaskedPrompt({1: at_most(12)}, narrow=window(2, 3))),
    "evicts": (f"{HALF} streamingllm{{budget=6 sinks=2}}", MaskedPrompt({1: at_most(12)}, narrow=window(2, 4))),
}


def each(*quick: tuple[str, int]) -> list[Any]:
    """All recipes with and without pads; those that are not quick run in the full matrix."""
    pairs = [(name, pads) for name in RECIPES for pads in (0, 5)]
    return [pytest.param(*pair, id="-".join(map(str, pair)), marks=[] if pair in quick else [pytest.mark.full]) for pair in pairs]


@contextmanager
def masking(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", copy.copy(RECIPES[name][1]))
        yield


def last(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits [B, V] of the last token, which are all that is asked for."""
    out: Tensor = model(input_ids=ids.contiguous(), attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    return out


@pytest.mark.full
@pytest.mark.parametrize(("name", "pads"), each(("promptdistill", 5)))
def test_steps_after_a_pruned_prompt_equal_their_masked_form(name: str, pads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = deep(), conversation((LENGTH, *[1] * STEPS), pads)
    dense, plain, cache, run = DynamicCache(), DynamicCache(), dyncc.KVCache(RECIPES[name][0]), compiled(model)
    with masking(name, monkeypatch):
        expected = [last(model, dense, ids, mask) for ids, mask in calls]
    apart = 0.0
    for (ids, mask), then in zip(calls, expected, strict=True):
        torch.testing.assert_close(last(run, cache, ids, mask), then, rtol=1e-4, atol=1e-5)
        apart = max(apart, (last(model, plain, ids, mask) - then).abs().max().item())
    assert apart > 1e-3 or (name == "more-than-real" and pads)  # tokens were missed
    assert cache.get_seq_length() == LENGTH + STEPS


@pytest.mark.full
def test_a_second_prompt_is_read_whole_and_what_came_behind_the_first_can_be_cropped(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = deep(), conversation((LENGTH, 1, 5, 1), 5)
    dense, cache, run = DynamicCache(), dyncc.KVCache(HALF), compiled(model)
    with masking("promptdistill", monkeypatch):
        expected = [last(model, dense, ids, mask) for ids, mask in calls]
    for (ids, mask), then in zip(calls, expected, strict=True):
        torch.testing.assert_close(last(run, cache, ids, mask), then, rtol=1e-4, atol=1e-5)
    cache.crop(-7)
    assert cache.get_seq_length() == LENGTH and [layer.store.length for layer in cache.layers] == [LENGTH, LENGTH, 12, 12]
    torch.testing.assert_close(last(run, cache, *calls[1]), expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", [{}, pytest.param({"num_beams": 3}, marks=pytest.mark.full)], ids=["greedy", "beams"])
def test_generate_gives_the_tokens_of_the_masked_form_from_three_graphs(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = deep(), {**prompt(2, LENGTH, pads=5), "max_new_tokens": 60, "do_sample": False, **how}
    with masking("promptdistill", monkeypatch):
        expected = model.generate(**options)
    before, breaks = len(dyncc.reports()), dict(torch._dynamo.utils.counters["graph_break"])
    model.compile(backend="dyncc", options={"engine": "reference"})
    cache = dyncc.KVCache(HALF)
    assert torch.equal(model.generate(**options, past_key_values=cache), expected)
    reports = dyncc.reports()[before:]
    assert dict(torch._dynamo.utils.counters["graph_break"]) == breaks and not any(r.fallback for r in reports)
    assert all(r.found_attention == r.expected_attention == DEPTH for r in reports)
    assert len(reports) <= 3 and [layer.store.length for layer in cache.layers] == [89, 89, 71, 71]


@pytest.mark.full
def test_attention_that_is_spelled_out_reads_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, dense = conversation((LENGTH, 1, 1, 5, 1), 5), DynamicCache()
    with masking("lazyllm", monkeypatch):
        expected = [last(deep(), dense, ids, mask) for ids, mask in calls]
    run, cache = compiled(deep(attn_implementation="eager")), dyncc.KVCache(RECIPES["lazyllm"][0])
    for (ids, mask), then in zip(calls, expected, strict=True):
        torch.testing.assert_close(last(run, cache, ids, mask), then, rtol=1e-4, atol=1e-5)


def test_a_second_recipe_in_one_process_keeps_its_own_numbers() -> None:
    """A compiler that meets another number where one stood takes it for one that varies."""
    for keep in (12, 0.7, 0.31):
        run, cache = compiled(deep()), dyncc.KVCache(f"promptdistill{{keep={keep} layers=1}}")
        last(run, cache, *conversation((LENGTH,), 0)[0])
        held = cache.layers[-1].store.length
        assert held == (keep if isinstance(keep, int) else 1 + -(-(LENGTH - 1) * round(keep * 100) // 100))


@pytest.mark.full
def test_a_padded_row_of_a_batch_is_what_it_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 32)  # each batch and recipe has graphs of its own
    for recipe in (HALF, "lazyllm{layers=0,1,2}"):
        run, together, alone = compiled(deep()), dyncc.KVCache(recipe), [dyncc.KVCache(recipe) for _ in range(2)]
        for ids, mask in conversation((LENGTH, 1, 1), 5):
            found = last(run, together, ids, mask)
            for row, (cache, pads) in enumerate(zip(alone, (5, 0), strict=True)):
                mine = ids[row : row + 1, pads if ids.shape[1] > 1 else 0 :]
                torch.testing.assert_close(found[row : row + 1], last(run, cache, mine), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", ["promptdistill{keep=1.0 layers=1}", f"promptdistill{{keep={LENGTH} layers=1}}"])
def test_a_prompt_that_keeps_every_token_is_the_dense_one_bit_by_bit(recipe: str) -> None:
    model, cache, dense = deep(), dyncc.KVCache(recipe), DynamicCache()
    for ids, mask in conversation((LENGTH, 1, 1), 5):
        assert torch.equal(last(model, cache, ids, mask), last(model, dense, ids, mask))  # needs no compiler either
    last(model, dyncc.KVCache("prune-tokens{keep=0.5 layers=1}"), prompt(1, 1)["input_ids"])  # a single token stays


@pytest.mark.full
def test_two_sequences_do_not_leak_copies_and_other_orders_go_on_apart_and_a_reset_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 32)  # each of these ways is a graph of its own
    run, calls = compiled(deep()), conversation((LENGTH, *[1] * 5), pads=3)
    alone, a, b = [], dyncc.KVCache(HALF), dyncc.KVCache(HALF)
    for ids, mask in calls:
        alone.append(last(run, a, ids, mask))
    a.reset()
    assert a.get_seq_length() == 0 == a.bytes
    for number, ((ids, mask), then) in enumerate(zip(calls, alone, strict=True)):
        if number == 3:
            c, swapped = copy.copy(a), copy.copy(a)
            swapped.reorder_cache(torch.tensor([1, 0]))
        torch.testing.assert_close(last(run, a, ids, mask), then)
        last(run, b, (ids + 7) % VOCABULARY, mask)
    for (ids, mask), then in zip(calls[3:], alone[3:], strict=True):
        torch.testing.assert_close(last(run, c, ids, mask), then)
        torch.testing.assert_close(last(run, swapped, ids.flip(0), mask.flip(0)), then.flip(0))
    with pytest.raises(ValueError, match="holds a pruned prompt, so it cannot go back into it"):
        a.crop(-6)
    assert {layer.get_seq_length() for layer in a.layers} == {LENGTH + 5}


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        ("lazyllm", "give their numbers, such as layers=7,15,22 and not layers=25%,50%,75%"),
        ("promptdistill lazyllm{layers=1,2,3}", "takes one pass that prunes prompts, one that evicts"),
        ("promptdistill{keep=1024} snapkv{budget=1024}", "must keep a number of tokens, 1,025 or more"),
        ("lazyllm{layers=1,2,3} snapkv", "must keep a number of tokens"),
    ],
)
def test_passes_that_do_not_go_together_are_told(passes: str, words: str) -> None:
    with pytest.raises(BadCachePasses, match=words):
        dyncc.KVCache(passes)


@pytest.mark.full
def test_prompts_that_cannot_be_pruned_are_told() -> None:
    ids = prompt(1, LENGTH)["input_ids"]
    with pytest.raises(CacheNotServed, match=r'compiled only; call model.compile\(backend="dyncc"\)'):
        last(deep(), dyncc.KVCache(HALF), ids)
    with pytest.raises(CacheNotServed, match="ask for the last position only"):
        read(compiled(deep()), dyncc.KVCache(HALF), ids)
    with torch.enable_grad(), pytest.raises(CacheNotServed, match="gradients are on"):
        last(compiled(deep()), dyncc.KVCache(HALF), ids)
    with pytest.raises(CacheNotServed, match="nothing runs on all tokens after layer 3; choose an earlier layer"):
        last(compiled(deep()), dyncc.KVCache("promptdistill{keep=12 layers=3}"), ids)
    with pytest.raises(LayerOutOfRange, match="layer 13 is out of range: the model's 4 layers"):
        last(compiled(deep()), dyncc.KVCache("promptdistill{keep=12}"), ids)
    broken = deep()
    broken.model.norm.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    with pytest.raises(CacheNotServed, match="a graph break splits the model, so its layers cannot be numbered"):
        last(compiled(broken), dyncc.KVCache(HALF), ids)
