"""generate() of a real language model through door 1: eager's greedy tokens, few graphs, all lowered by dyncc."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_kv_cache import prompt, tiny_llama

import dyncc
from dyncc.models import load_smollm2

LAYERS, STEPS = 30, 64
PROMPT = "The compiler reads a graph and"


@pytest.fixture
def smollm2() -> Iterator[tuple[Any, torch.Tensor]]:
    """A fresh SmolLM2-135M and a prompt; nothing compiled before, nothing kept after."""
    torch._dynamo.reset()
    model, tokenizer = load_smollm2()
    with torch.no_grad():
        yield model, tokenizer(PROMPT, return_tensors="pt").input_ids
    torch._dynamo.reset()


def _generate(model: Any, ids: torch.Tensor, cache: str | None) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=STEPS, do_sample=False, cache_implementation=cache)


def _check(model: Any, ids: torch.Tensor, cache: str | None, engine: str) -> None:
    expected = _generate(model, ids, cache)
    before, breaks = len(dyncc.reports()), sum(torch._dynamo.utils.counters["graph_break"].values())
    model.compile(backend="dyncc", options={"engine": engine})
    assert torch.equal(_generate(model, ids, cache), expected)
    reports = dyncc.reports()[before:]
    assert 2 <= len(reports) <= 3
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == breaks
    for report in reports:
        assert report.fallback is None
        assert report.found_attention == report.expected_attention == LAYERS


@pytest.mark.full
@pytest.mark.parametrize("cache", [None, "static"])
def test_greedy_tokens_with_the_reference_engine(smollm2: tuple[Any, torch.Tensor], cache: str | None) -> None:
    _check(*smollm2, cache, "reference")


@pytest.mark.full
@pytest.mark.parametrize("cache", [None, "static"])
def test_greedy_tokens_with_inductor(smollm2: tuple[Any, torch.Tensor], cache: str | None) -> None:
    _check(*smollm2, cache, "inductor")


@pytest.mark.parametrize(
    ("cache", "words"),
    [
        (None, "the keys and values that the graph returns would get shorter; use past_key_values=dyncc.KVCache('prune-tokens{keep=0.5"),
        ("static", "if that fills a cache, use past_key_values=dyncc.KVCache('prune-tokens{keep=0.5 layers=0}') instead"),
        ("plain", "if that fills a cache, use past_key_values=dyncc.KVCache('prune-tokens{keep=0.5 layers=0}') instead"),
    ],
)
def test_a_pruned_prefill_into_a_cache_that_does_not_know_of_it_is_refused(cache: str | None, words: str) -> None:
    torch._dynamo.reset()
    model, before = tiny_llama(), len(dyncc.reports())
    model.compile(backend="dyncc", options={"engine": "reference", "passes": "prune-tokens{layers=0 keep=0.5}"})
    given = {"past_key_values": dyncc.KVCache()} if cache == "plain" else {"cache_implementation": cache}
    model.generate(**prompt(1, 12), max_new_tokens=1, do_sample=False, **given)
    reasons = [r.reason for report in dyncc.reports()[before:] for r in report.rewrites]
    assert len(reasons) == 1 and words in reasons[0], reasons
    torch._dynamo.reset()


@pytest.mark.full
@pytest.mark.parametrize("engine", ["reference", "inductor"])
def test_a_pruned_prompt_goes_on_for_200_tokens_from_three_graphs(smollm2: tuple[Any, torch.Tensor], engine: str) -> None:
    """A left-padded batch of two."""
    model, words = smollm2
    ids = words.repeat(1, 16)[:, :96].repeat(2, 1)
    mask = torch.ones_like(ids)
    ids[0, :30] = mask[0, :30] = 0
    before, breaks = len(dyncc.reports()), sum(torch._dynamo.utils.counters["graph_break"].values())
    model.compile(backend="dyncc", options={"engine": engine})
    cache = dyncc.KVCache("promptdistill{layers=14 keep=48}")
    out = model.generate(ids, attention_mask=mask, max_new_tokens=200, min_new_tokens=200, do_sample=False, past_key_values=cache)
    assert out.shape[1] == 296 and cache.get_seq_length() == 295
    assert [layer.store.length for layer in cache.layers] == [295] * 15 + [48 + 199] * (LAYERS - 15)
    reports = dyncc.reports()[before:]
    assert 2 <= len(reports) <= 3 and sum(torch._dynamo.utils.counters["graph_break"].values()) == breaks
    for report in reports:
        assert report.fallback is None and report.found_attention == report.expected_attention == LAYERS
        assert report.rewrites[0].name == "prune-tokens" and report.rewrites[0].applied
