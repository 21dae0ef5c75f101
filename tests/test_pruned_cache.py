"""prune-tokens with a cache: after a pruned prompt layers behind the cut hold its kept tokens alone, and steps compute what masking the
others in a dense model computes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from test_evict_kv import compiled, conversation, read
from test_kv_cache import VOCABULARY, prompt
from test_onnx import GROUPS, HEADS, decoder
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

import dyncc
from dyncc.errors import BadCachePasses, CacheNotServed

DEPTH, LENGTH, STEPS = 4, 30, 8
HALF = "promptdistill{keep=12 layers=1}"


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def deep(**changes: Any) -> Any:
    return decoder(num_hidden_layers=DEPTH, eos_token_id=None, max_position_embeddings=4096, **changes)


class MaskedPrompt:
    """SDPA over a cache that keeps everything; from the layers behind each cut on, keys of the prompt's tokens that were dropped are hidden.

    `cuts` maps a layer to how many of `n` tokens stay; what a token has earned there is the last token's q.k or, with `softmax`, its
    attention. Every sequence counts its own real tokens.
    """

    def __init__(self, cuts: dict[int, Any], softmax: bool = False) -> None:
        self.cuts, self.softmax, self.plain, self.calls = cuts, softmax, F.scaled_dot_product_attention, 0
        self.shown: list[Any] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, is_causal: bool = False, **more: Any) -> Tensor:
        packed = q.shape
        rows = 1 if packed[1] != HEADS else packed[2]
        q = q.reshape(q.shape[0], HEADS, rows, q.shape[3])
        k, v = (t.repeat_interleave(HEADS // t.shape[1], 1) for t in (k, v))
        keys = k.shape[2]
        causal = torch.ones(1, 1, rows, keys, dtype=torch.bool).tril(keys - rows)
        seen = (causal if attn_mask is None else attn_mask.bool()).expand(q.shape[0], 1, -1, -1)
        layer, self.calls = self.calls % DEPTH, self.calls + 1
        if self.calls == 1:
            self.shown = [seen[:, 0, -1].clone()]
        shown = self.shown[-1 if self.calls <= DEPTH else sum(cut < layer for cut in self.cuts)]
        shown = torch.cat([shown, torch.ones(q.shape[0], keys - shown.shape[1], dtype=torch.bool)], 1)
        seen = seen & (shown[:, None, None] | torch.eye(keys, dtype=torch.bool)[-rows:])
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


def ratio(keep: float) -> Any:
    return lambda n: 1 + int(np.ceil((n - 1) * keep - 1e-9))


RECIPES = {
    "promptdistill": (HALF, {1: lambda n: min(12, n)}, False),
    "more-than-real": ("promptdistill{keep=28 layers=0}", {0: lambda n: min(28, n)}, False),
    "lazyllm": ("lazyllm{layers=0,1,2}", {0: ratio(0.7), 1: ratio(0.5), 2: ratio(0.3)}, True),
    "counts": ("prune-tokens{layers=0,2 keep=20,9}", {0: lambda n: min(20, n), 2: lambda n: min(9, n)}, True),
}


def masked(name: str, model: Any, calls: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    _, cuts, softmax = RECIPES[name]
    cache = DynamicCache()
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", MaskedPrompt(cuts, softmax))
        return [last(model, cache, ids, mask) for ids, mask in calls]


def last(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits [B, V] of the last token, which are all that is asked for."""
    out: Tensor = model(input_ids=ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    return out


@pytest.mark.parametrize("pads", [0, 5])
@pytest.mark.parametrize("name", RECIPES)
def test_steps_after_a_pruned_prompt_equal_their_masked_form(name: str, pads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = deep(), conversation((LENGTH, *[1] * STEPS), pads)
    expected = masked(name, model, calls, monkeypatch)
    run, cache, dense, apart = compiled(model), dyncc.KVCache(RECIPES[name][0]), DynamicCache(), 0.0
    for (ids, mask), then in zip(calls, expected, strict=True):
        torch.testing.assert_close(last(run, cache, ids, mask), then, rtol=1e-4, atol=1e-5)
        apart = max(apart, (last(model, dense, ids, mask) - then).abs().max().item())
    assert apart > 1e-3 or name == "more-than-real"  # tokens were missed
    assert cache.get_seq_length() == LENGTH + STEPS
