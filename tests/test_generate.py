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


def test_a_pruned_prefill_is_refused_while_the_cache_is_an_output() -> None:
    torch._dynamo.reset()
    model, before = tiny_llama(), len(dyncc.reports())
    model.compile(backend="dyncc", options={"engine": "reference", "passes": "prune-tokens{layers=0 keep=0.5}"})
    model.generate(**prompt(1, 12), max_new_tokens=2, do_sample=False)
    reasons = [r.reason for report in dyncc.reports()[before:] for r in report.rewrites]
    assert "the keys and values that the graph returns would get shorter; use dyncc.optimize, which returns them so" in reasons
    torch._dynamo.reset()
