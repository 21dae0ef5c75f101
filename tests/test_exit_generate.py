"""exit-early in generate(): a cache that is written in place holds a key for every token at every layer, whoever left early."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_exit_early import mostly_full
from test_kv_cache import prompt, tiny_llama
from transformers import DynamicCache

import dyncc
from dyncc.passes.exit_scores import max_prob

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "no_grad")

STEPS = 9


def generated(text: str, cache: Any = None, batch: int = 2, pads: int = 0, **more: Any) -> torch.Tensor:
    """Greedy tokens of a tiny decoder that is compiled with exits."""
    model = tiny_llama()
    options = {"engine": "reference", "evidence": "off", "strict": True, "passes": f"exit-early{{{text}}}", **more}
    model.compile(backend="dyncc", options=options)
    return model.generate(**prompt(batch, pads=pads), max_new_tokens=STEPS, do_sample=False, past_key_values=cache)


def dense(batch: int = 2, pads: int = 0, layers: int | None = None) -> torch.Tensor:
    model = tiny_llama()
    model.model.layers = model.model.layers[:layers]
    return model.generate(**prompt(batch, pads=pads), max_new_tokens=STEPS, do_sample=False)


def lengths(cache: Any) -> list[int]:
    return [layer.store.length for layer in cache.layers]


@pytest.mark.full
@pytest.mark.parametrize(("batch", "pads"), [(2, 3), (1, 0)])
def test_where_no_row_leaves_the_tokens_are_dense_ones(batch: int, pads: int) -> None:
    before, cache = len(dyncc.reports()), dyncc.KVCache()
    assert torch.equal(generated("layers=0 threshold=1.5", cache, batch, pads), dense(batch, pads))
    reports = dyncc.reports()[before:]
    assert 2 <= len(reports) <= 3 and all(r.fallback is None and r.rewrites[0].applied for r in reports)
    assert lengths(cache) == [7 + STEPS - 1] * len(cache.layers)


@pytest.mark.parametrize("realise", mostly_full(["auto", "static", "select"], ("auto",)))
def test_where_every_row_leaves_they_are_those_of_the_model_cut_there(realise: str) -> None:
    cache = dyncc.KVCache()
    assert torch.equal(generated(f"layers=0 threshold=0.0 realise={realise}", cache), dense(layers=1))
    assert len(cache.layers) > 1 and lengths(cache) == [7 + STEPS - 1] * len(cache.layers)


@pytest.mark.full
@pytest.mark.parametrize("batch", [1, 3])
def test_rows_that_leave_now_and_then_leave_the_same_keys_in_both_caches(batch: int) -> None:
    """Against the cache that the graph returns, whose rows are those by hand (test_exit_steps.py)."""
    model, ids = tiny_llama(), prompt(batch)["input_ids"]
    model.model.layers = model.model.layers[:1]
    scores = max_prob(model(ids).logits.flatten(0, 1)).sort().values
    text = f"layers=0 threshold={float(scores[len(scores) // 2])}"
    held, grown = dyncc.KVCache(), DynamicCache()
    tokens = generated(text, held, batch)
    torch._dynamo.reset()
    assert torch.equal(tokens, generated(text, grown, batch))
    for mine, other in zip(held.layers, grown.layers, strict=True):
        torch.testing.assert_close(mine.keys, other.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.values, other.values, rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_inductor_gives_the_same_tokens() -> None:
    assert torch.equal(generated("layers=0 threshold=0.0", dyncc.KVCache(), engine="inductor"), dense(layers=1))


@pytest.mark.full
def test_a_cache_of_fixed_size_is_refused_with_the_way_out() -> None:
    model, before = tiny_llama(), len(dyncc.reports())
    model.compile(backend="dyncc", options={"engine": "reference", "passes": "exit-early{layers=0}"})
    tokens = model.generate(**prompt(2), max_new_tokens=3, do_sample=False, cache_implementation="static")
    reasons = [r.reason for report in dyncc.reports()[before:] for r in report.rewrites]
    assert reasons and all("past_key_values=dyncc.KVCache()" in reason for reason in reasons), reasons
    assert torch.equal(tokens, dense()[:, : tokens.shape[1]])
