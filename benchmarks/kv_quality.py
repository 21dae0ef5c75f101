"""SmolLM2: what reading fewer keys costs in perplexity, at one budget or several, on documents read to the end of a prompt and on.

    python benchmarks/kv_quality.py --prompt 1536 --ahead 512 --documents 8 --write

Policies that evict drop keys once, when the prompt ends; one that prunes leaves tokens out of the layers behind its cut, as a
`dyncc.KVCache` made with it does. Policies that select are run as their masked form: each of the tokens ahead sees
the keys that its own step would choose (tests/test_select_kv.py shows that the pass computes the same). Policies that look at former
steps or at rows that are not there yet are served: a `dyncc.KVCache` reads the tokens ahead one by one. Perplexity is that of the
tokens ahead, teacher-forced; intervals are bootstrap 95 % over documents. Rotary pairs are calibrated on other text behind the documents.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from record import progress, write
from torch import Tensor
from torch.nn import functional as F

import dyncc
from dyncc.bench_result import environment
from dyncc.calibrate import calibrate_pairs
from dyncc.decoding import Prefill, continuation_nll, flatten_cache
from dyncc.kernels.evict_keys import column_sums, row_weights, window_sums
from dyncc.kernels.select_keys import near_bounds, page_keys, page_means, shared_scores, take_keys
from dyncc.models import english_tokens, load_smollm2
from dyncc.pair_order import load_pairs
from dyncc.passes.evict_kv import EvictKV
from dyncc.passes.page_choice import PAGE_SCORES
from dyncc.passes.prune_tokens import PruneTokens
from dyncc.passes.select_kv import SelectKV
from dyncc.pipeline import build

EVICT = ["streamingllm{budget=%d every=0}", "snapkv{budget=%d}", "a2sf{budget=%d}", "h2o{budget=%d recents=%d every=0}"]
AHEAD = ["dapq{budget=%d}"]
PRUNE = ["promptdistill{layers=14 keep=%d}"]
SELECT = [
    "select-kv{budget=256 score=logits share=head sinks=4 recents=32 dense=2}",
    "select-kv{budget=256 score=logits share=head sinks=0 recents=0}",
    "tokenselect{budget=256 sinks=16 recents=64}",
    "quest{budget=512}",
    "quest{budget=512 share=any page=8 slack=0.35}",
    "hisa{budget=256 page=16 beam=32}",
    "hip{budget=512}",
    "fasa{budget=256 pairs=8}",
    "tidaldecode{budget=256}",
    "sink-window{budget=512}",
    "tokenselect{budget=256 sinks=16 recents=64 similar=0.9}",
    "louiskv{budget=512}",
    "actqkv{budget=256}",
]
CALIBRATION = 1024
"""Tokens of each of the four texts that rotary pairs are chosen by."""
ROWS = 32
"""Steps that are chosen for at once, where each gathers keys of its own."""
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
                chosen = self._choose(q, k, attn_mask)
                self.chosen, self.served = chosen.repeat_interleave(q.shape[1] // chosen.shape[1], 1), 0
            else:
                self.served += 1
            if not (chooses and self.passed.full):
                attn_mask = attn_mask & self.chosen
        return self.plain(q, k, v, attn_mask=attn_mask, **more)

    def _choose(self, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        """The keys [1, C, T, N] chosen for each row, C = 1 or the heads."""
        passed, keys = self.passed, seen.shape[3]
        k = k[:, :: k.shape[1] // self.groups]  # the copies that transformers makes for each head
        if passed.score in PAGE_SCORES:
            kept = self._kept(k)
            rows = [self._page_keys(q[:, :, i : i + ROWS], k, seen[0, 0, i : i + ROWS], kept) for i in range(0, q.shape[2], ROWS)]
            return torch.cat(rows, 2)
        score, last = self._scores(q, k, seen), seen.sum(3, keepdim=True)
        place = torch.arange(keys)
        forced = (place < passed.sinks) | (place >= last - passed.recents)
        score = score.masked_fill(forced, torch.inf).masked_fill(place >= last, -torch.inf)
        best = torch.topk(score, min(passed.budget, keys), dim=3).indices
        return torch.zeros(score.shape, dtype=torch.bool).scatter_(3, best, True)

    def _kept(self, k: Tensor) -> tuple[Tensor, ...]:
        """What a cache keeps of its pages. Of a row's last page it counts later keys too, but that page is always chosen."""
        if self.passed.score == "bound":
            return near_bounds(k, self.passed.page, self.passed.slack)
        return (page_means(k, self.passed.page)[:, :, :-1],) if self.passed.score == "mean" else ()

    def _page_keys(self, q: Tensor, k: Tensor, seen: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        """As the pass chooses by pages, each row a step of its own: [1, C, T, N] of q [1, H, T, D] and seen [T, N]."""
        steps, keys = q.transpose(0, 2), k.shape[2]
        pages = self.passed.pages
        k, *held = (t.expand(q.shape[2], *t.shape[1:]) for t in (k, *kept))
        index = page_keys(pages.keys(steps, k, seen.unsqueeze(1), tuple(held)), pages.read)
        chosen = torch.zeros(*index.shape[:2], keys + 1, dtype=torch.bool).scatter_(2, index.clamp(max=keys), True)
        return chosen[None, :, :, :keys].transpose(1, 2)

    def _scores(self, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        batch, heads, rows, width = q.shape
        if self.passed.file is not None:
            only = torch.tensor(load_pairs(Path(self.passed.file)).best(self.calls - 1, self.passed.pairs))
            q = q * torch.zeros(heads, width).scatter_(1, only, 1.0)[:, None]
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
    with attention(Recording(noted_on_the_way(policies), plain)) as noted:
        prefilled = Prefill(model, keys=True)(ids[:, :prompt])
    found = {"dense": continuation_nll(model, prefilled, following, prompt).mean().item()}
    for name, policy in policies.items():
        if must_be_served(policy):
            found[name] = served(model, ids, prompt, name)
        elif isinstance(policy, EvictKV):
            kept = [take_keys(t, noted.kept[name][i // 2]) for i, t in enumerate(prefilled[1:])]
            found[name] = continuation_nll(model, (prefilled[0], *kept), following, prompt).mean().item()
        elif isinstance(policy, PruneTokens):
            found[name] = continuation_nll(model, pruned(model, ids[:, :prompt], name), following, prompt).mean().item()
        else:
            with attention(Selecting(policy, model.config.num_key_value_heads, plain)):
                found[name] = continuation_nll(model, prefilled, following, prompt).mean().item()
    return found


def must_be_served(policy: Any) -> bool:
    """Whether what a policy reads is known to its own cache only: former steps, or rows behind the prompt."""
    if isinstance(policy, EvictKV):
        return policy.score not in ("recents", "received", "window")
    return isinstance(policy, SelectKV) and (policy.similar is not None or policy.density)


def noted_on_the_way(policies: dict[str, Any]) -> dict[str, EvictKV]:
    """The policies whose choice attention itself shows while the prompt is read."""
    return {n: p for n, p in policies.items() if isinstance(p, EvictKV) and not must_be_served(p)}


def compiled(model: Any) -> Any:
    """One forward for all caches, with a graph for each kind."""
    return torch.compile(model, backend="dyncc", options={"engine": "reference", "evidence": "off"})


def served(model: Any, ids: Tensor, prompt: int, passes: str) -> float:
    """Mean negative log-likelihood of the tokens behind the prompt, read one by one by a cache with passes."""
    run, cache = compiled(model), dyncc.KVCache(passes)
    losses, read = [], ids[:, :prompt]
    for place in range(prompt, ids.shape[1]):
        logits = run(input_ids=read, past_key_values=cache, logits_to_keep=1).logits
        losses.append(F.cross_entropy(logits[:, -1].float(), ids[:, place]).item())
        read = ids[:, place : place + 1]
    return sum(losses) / len(losses)


def pruned(model: Any, ids: Tensor, passes: str) -> tuple[Tensor, ...]:
    """What a prompt leaves behind that is pruned on its way through the layers: its last logits, and what each layer holds."""
    run, cache = compiled(model), dyncc.KVCache(passes)
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
    usual = [text % ((budget, budget // 2) if text.count("%d") == 2 else budget) for text in EVICT + AHEAD + PRUNE] + SELECT
    torch._dynamo.config.recompile_limit = 64  # all caches compile one forward
    policies = {text: build(text)[0] for text in options.passes or usual}
    model, tokenizer = load_smollm2()
    span = options.prompt + options.ahead
    tokens = english_tokens(tokenizer)
    documents = tokens[: options.documents * span].view(options.documents, 1, span)
    losses: dict[str, list[float]] = {name: [] for name in ("dense", *policies)}
    with TemporaryDirectory() as folder:
        if any(isinstance(policy, SelectKV) and policy.score == "pairs" for policy in policies.values()):
            file = calibrate_pairs(model, tokens[-4 * CALIBRATION :].view(4, 1, CALIBRATION), Path(folder) / "pairs")
            policies = {n: replace(p, file=str(file)) if getattr(p, "score", "") == "pairs" else p for n, p in policies.items()}
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
