"""SmolLM2: what reading fewer keys costs in perplexity, at one budget or several, on documents read to the end of a prompt and on.

    python benchmarks/kv_quality.py --prompt 1536 --ahead 512 --documents 8 --write

Policies that evict drop keys once, when the prompt ends; one that prunes leaves tokens out of the layers behind its cut, as a
`dyncc.KVCache` made with it does. Policies that select are run as their masked form: each of the tokens ahead sees
the keys that its own step would choose (tests/test_select_kv.py shows that the pass computes the same). Perplexity is that of the tokens
ahead, teacher-forced; intervals are bootstrap 95 % over documents.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from record import progress, write
from torch import Tensor
from torch.nn import functional as F

import dyncc
from dyncc.bench_result import environment
from dyncc.decoding import Prefill, continuation_nll, flatten_cache
from dyncc.kernels.evict_keys import column_sums, row_weights, window_sums
from dyncc.kernels.select_keys import page_bounds, page_scores, shared_scores, take_keys
from dyncc.models import english_tokens, load_smollm2
from dyncc.passes.evict_kv import EvictKV
from dyncc.passes.prune_tokens import PruneTokens
from dyncc.passes.select_kv import SelectKV
from dyncc.pipeline import build

EVICT = ["streamingllm{budget=%d every=0}", "snapkv{budget=%d}", "a2sf{budget=%d}", "h2o{budget=%d recents=%d every=0}"]
PRUNE = ["promptdistill{layers=14 keep=%d}"]
SELECT = [
    "select-kv{budget=256 score=logits share=head sinks=0 recents=0}",
    "tokenselect{budget=256 sinks=16 recents=64}",
    "quest{budget=512}",
    "tidaldecode{budget=256}",
    "sink-window{budget=512}",
]
Attention = Callable[..., Tensor]


class Recording:
    """Causal SDPA that also notes which keys each evicting policy would keep, layer by layer."""

    def __init__(self, policies: dict[str, EvictKV], plain: Attention) -> None:
        self.policies, self.plain = policies, plain
        self.kept: dict[str, list[Tensor]] = {name: [] for name in policies}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        assert attn_mask is None and q.shape[2] > 1
        for name, policy in self.policies.items():
            weights = row_weights(None, q.shape[0], q.shape[2], policy.decay, q.device)
            if policy.score == "received":
                scores = column_sums(q, k, None, weights, is_causal=True)
            elif policy.score == "window":
                scores = window_sums(q, k, None, weights, policy.window, is_causal=True)
            else:
                scores = torch.zeros(k.shape[:3])
            self.kept[name].append(policy.choose(scores))
        return self.plain(q, k, v, **more)


class Selecting:
    """SDPA of several rows each of which sees only the keys that `select-kv` would choose for it in a step of its own."""

    def __init__(self, passed: SelectKV, groups: int, plain: Attention) -> None:
        self.passed, self.groups, self.plain = passed, groups, plain
        self.calls = self.served = 0
        self.chosen: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, **more: Any) -> Tensor:
        layer, self.calls = self.calls, self.calls + 1
        if layer >= self.passed.dense:
            due = self.served == self.passed.reuse if self.passed.layers is None else layer in self.passed.layers.places
            if chooses := self.chosen is None or due:
                self.chosen, self.served = self._choose(q, k, attn_mask), 0
            else:
                self.served += 1
            if not (chooses and self.passed.full):
                attn_mask = attn_mask & self.chosen
        return self.plain(q, k, v, attn_mask=attn_mask, **more)

    def _choose(self, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        """The keys [1, C, T, N] chosen for each row, C = 1 or the heads."""
        passed, page = self.passed, self.passed.page if self.passed.score == "bound" else 1
        k = k[:, :: k.shape[1] // self.groups]  # the copies that transformers makes for each head
        keys, last = seen.shape[3], seen.sum(3, keepdim=True)
        if passed.score == "bound":
            low, high = page_bounds(k, page)
            rows = [page_scores(q[:, :, i : i + 1], low, high, passed.share) for i in range(q.shape[2])]
            score, last = torch.stack(rows, 2), (last + page - 1) // page
        else:
            score = self._scores(q, k, seen)
        place = torch.arange(score.shape[3])
        sinks, recents = passed._forced_pages() if page > 1 else (passed.sinks, passed.recents)
        score = score.masked_fill((place < sinks) | (place >= last - recents), torch.inf).masked_fill(place >= last, -torch.inf)
        best = torch.topk(score, min(passed.budget // page, score.shape[3]), dim=3).indices
        chosen = torch.zeros(score.shape, dtype=torch.bool).scatter_(3, best, True)
        return chosen.repeat_interleave(page, 3)[..., :keys] if page > 1 else chosen

    def _scores(self, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        batch, heads, rows, width = q.shape
        logits = (q.reshape(batch, self.groups, -1, width) @ k.transpose(2, 3) * width**-0.5).view(batch, heads, rows, -1)
        if self.passed.score == "recents":
            return torch.arange(k.shape[2]).float().expand(batch, 1, rows, -1).clone()
        if self.passed.score == "vote":
            logits = torch.softmax(logits.masked_fill(~seen, -torch.inf), -1)
        return shared_scores(logits.flatten(2), self.groups, self.passed.share).unflatten(2, (rows, -1))


@contextmanager
def attention(replaced: Any) -> Iterator[Any]:
    """Transformers' SDPA attention computed by `replaced`."""
    plain = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = replaced
    try:
        yield replaced
    finally:
        F.scaled_dot_product_attention = plain


@torch.no_grad()
def read(model: Any, ids: Tensor, prompt: int, policies: dict[str, Any]) -> dict[str, float]:
    """Mean negative log-likelihood of the tokens behind the prompt, dense and by policy."""
    plain, following = F.scaled_dot_product_attention, ids[:, prompt:]
    with attention(Recording({n: p for n, p in policies.items() if isinstance(p, EvictKV)}, plain)) as noted:
        prefilled = Prefill(model, keys=True)(ids[:, :prompt])
    found = {"dense": continuation_nll(model, prefilled, following, prompt).mean().item()}
    for name, policy in policies.items():
        if isinstance(policy, EvictKV):
            kept = [take_keys(t, noted.kept[name][i // 2]) for i, t in enumerate(prefilled[1:])]
            found[name] = continuation_nll(model, (prefilled[0], *kept), following, prompt).mean().item()
        elif isinstance(policy, PruneTokens):
            found[name] = continuation_nll(model, pruned(model, ids[:, :prompt], name), following, prompt).mean().item()
        else:
            with attention(Selecting(policy, model.config.num_key_value_heads, plain)):
                found[name] = continuation_nll(model, prefilled, following, prompt).mean().item()
    return found


def pruned(model: Any, ids: Tensor, passes: str) -> tuple[Tensor, ...]:
    """What a prompt leaves behind that is pruned on its way through the layers: its last logits, and what each layer holds."""
    torch._dynamo.reset()
    run = torch.compile(model, backend="dyncc", options={"engine": "reference", "evidence": "off"})
    cache = dyncc.KVCache(passes)
    return (run(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits, *flatten_cache(cache))


def table(losses: dict[str, list[float]]) -> dict[str, Any]:
    """Perplexities and their change against dense with intervals, printed."""
    dense, rows = np.asarray(losses["dense"]), {}
    drawn = np.random.default_rng(0).integers(0, len(dense), size=(2000, len(dense)))
    for name, values in losses.items():
        change = np.asarray(values) - dense
        low, high = np.percentile(np.exp(change[drawn].mean(1)) - 1, [2.5, 97.5])
        rows[name] = {"perplexity": math.exp(np.mean(values)), "change": math.exp(change.mean()) - 1, "interval": (float(low), float(high))}
        print(f"{name:70} {rows[name]['perplexity']:8.3f} {rows[name]['change']:+8.2%} [{low:+.2%}, {high:+.2%}]")
    return rows


def main(argv: list[str] | None = None) -> None:
    """Read the documents, print the table, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("passes", nargs="*", help="pipelines of one pass each, instead of the usual ones")
    parser.add_argument("--prompt", type=int, default=1536)
    parser.add_argument("--ahead", type=int, default=512)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--budget", type=int, help="what evicting and pruning policies keep; a quarter of the prompt by default")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/kv_quality.json")
    options = parser.parse_args(argv)
    budget = options.budget or options.prompt // 4
    usual = [text % ((budget, budget // 2) if text.count("%d") == 2 else budget) for text in EVICT + PRUNE] + SELECT
    policies = {text: build(text)[0] for text in options.passes or usual}
    model, tokenizer = load_smollm2()
    span = options.prompt + options.ahead
    documents = english_tokens(tokenizer)[: options.documents * span].view(options.documents, 1, span)
    losses: dict[str, list[float]] = {name: [] for name in ("dense", *policies)}
    for number, ids in enumerate(documents):
        for name, loss in read(model, ids, options.prompt, policies).items():
            losses[name].append(loss)
        progress("documents", number + 1, options.documents)
    rows = table(losses)
    if options.write:
        title = f"{options.documents} x {options.prompt} + {options.ahead} tokens"
        write("kv_quality", {title: {"policies": rows, "environment": environment()}})


if __name__ == "__main__":
    main()
