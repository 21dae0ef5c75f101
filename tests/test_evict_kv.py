"""evict-kv: bounded caches hold what their policy, in words of its own, keeps, and compute what masking all other keys computes."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from test_kv_cache import prompt, tiny_llama
from test_onnx import GROUPS, HEADS, LAYERS, WIDTH, decoder
from torch import Tensor
from torch.nn import functional as F

import dyncc
from dyncc.decoding import Prefill
from dyncc.errors import BadCachePasses, BadOptionValue, CacheNotServed
from dyncc.kernels.evict_keys import column_sums, keep_keys, row_weights, window_sums

RECIPES = {
    "snapkv": "snapkv{budget=12 window=4 recents=4 pool=3}",
    "h2o": "h2o{budget=12 recents=6}",
    "a2sf": "a2sf{budget=12 recents=4}",
    "keyformer": "keyformer{budget=12 recents=4}",
    "streamingllm": "streamingllm{budget=12 sinks=2}",
    "tova": "tova{budget=12}",
}


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def compiled(model: Any, engine: str = "reference") -> Any:
    return torch.compile(model, backend="dyncc", options={"engine": engine})


def read(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    out: Tensor = model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
    return out


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_generation_holds_the_budget(recipe: str) -> None:
    model, given = tiny_llama(), prompt(2, 30, pads=3)
    before = len(dyncc.reports())
    model.compile(backend="dyncc", options={"engine": "reference"})
    cache = dyncc.KVCache(recipe)
    model.generate(**given, max_new_tokens=40, do_sample=False, past_key_values=cache)
    reports = dyncc.reports()[before:]
    assert len(reports) <= 3 and not any(r.fallback for r in reports)
    print([r.recompiled for r in reports], [layer.store.length for layer in cache.layers])
    assert cache.get_seq_length() == 69
