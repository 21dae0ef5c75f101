"""evict-kv: a cache that keeps the keys which attention has used, and forgets the others.

Two sites. In a step over a `dyncc.KVCache(passes="evict-kv{...}")` the cache marks its keys (kernels/evict_keys, `watched`); the pass
computes what each key has earned beside the attention, and the cache itself drops keys by it, at its next step: outputs of this call do
not change. In a prompt whose keys and values are outputs (`Prefill(keys=True)`, an exported prefill) the outputs are the kept rows.
Scores: H2O (Zhang et al. 2023), A2SF (Jo & Shin 2024), Keyformer (Adnan et al. 2024), SnapKV (Li et al. 2024), StreamingLLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from dyncc.analysis.attention import AttentionRegion, kv_sources
from dyncc.analysis.facts import Facts
from dyncc.errors import BadOptionValue
from dyncc.ir import GETITEM, argument, emit, output_node, outputs, shape, val
from dyncc.kernels.evict_keys import (
    HIDDEN,
    SUMS,
    WATCHED,
    hide_pads,
    keep_keys,
    last_rows,
    probability_sums,
    row_weights,
    window_sums,
)
from dyncc.kernels.select_keys import take_keys
from dyncc.options import settle
from dyncc.passes.drop_repeat_kv import repeated
from dyncc.restrict import Refusal
from dyncc.rewrite import Context, Pass, PassResult


@dataclass(frozen=True)
class EvictKV(Pass):
    """Keep `budget` keys a head: once, at the first step after a prompt, or whenever `every` more are held."""

    name: ClassVar[str] = "evict-kv"
    summary: ClassVar[str] = "a cache keeps its most used keys and drops the others (with dyncc.KVCache, or on a prompt's returned keys)"
    exact: ClassVar[bool] = False

    budget: int = 1024
    score: Literal["received", "window", "recents"] = "received"
    window: int = 32
    pool: int = 1
    decay: float = 1.0
    temperature: float = 1.0
    seed: int = -1
    sinks: int = 0
    recents: int = 32
    every: int = 0

    def __post_init__(self) -> None:
        settle(self)
        for name, least in (("budget", 1), ("window", 1), ("pool", 1), ("sinks", 0), ("recents", 0), ("every", 0), ("seed", -1)):
            if getattr(self, name) < least:
                raise BadOptionValue(option=name, value=str(getattr(self, name)), problem=f"{least} is the least")
        if self.sinks + self.recents > self.budget:
            problem = f"it must hold the {self.sinks} sinks and {self.recents} recents that always stay"
            raise BadOptionValue(option="budget", value=str(self.budget), problem=problem)
        if self.pool % 2 == 0:
            raise BadOptionValue(option="pool", value=str(self.pool), problem="a key stands in the middle of its pool: take an odd number")
        if not 0.0 < self.decay <= 1.0:
            raise BadOptionValue(option="decay", value=str(self.decay), problem="it lies above 0 and is 1 at most")
        if self.temperature <= 0:
            raise BadOptionValue(option="temperature", value=str(self.temperature), problem="it lies above 0")

    def choose(self, scores: torch.Tensor, enough: bool = False) -> torch.Tensor:
        """Sorted indices [B, G, min(budget, N)] of the keys that stay, by scores [B, G, N]; `enough`: N is `budget` at least."""
        if self.score == "recents":
            at = torch.arange(scores.shape[2], device=scores.device, dtype=torch.float32)
            scores = torch.where(scores < 0, HIDDEN, at)
        return keep_keys(scores, self.budget, self.sinks, self.recents, self.pool, enough)

    def run(self, program: Any, facts: Facts, context: Context) -> PassResult:
        """Serve every marked cache, or shorten the keys and values that a prompt returns."""
        marks = [n for n in program.graph.nodes if n.target is WATCHED and argument(n, "policy") == self._text()]
        if marks:
            return self._serve(marks, facts)
        done, misses, shortened = 0, [], set()
        for region in facts.attention:
            try:
                shortened |= self._shorten(program, region, facts)
                done += 1
            except Refusal as refusal:
                misses.append(f"attention {region.index}: {refusal}")
        if not done:
            raise Refusal(misses[0] if misses else "the graph has no attention")
        gain = f"the steps that follow hold {self.budget:,} of the prompt's keys a head"
        return PassResult(done, facts.expected, misses=tuple(misses), shortened_outputs=frozenset(shortened), pays_from=gain)

    def _text(self) -> str:
        from dyncc.pipeline import render

        return render([self])

    def _serve(self, marks: list[fx.Node], facts: Facts) -> PassResult:
        """Put the keys themselves and their new scores in place of each mark."""
        readers = {mark: region for region in facts.attention for mark in _behind(region)}
        for number, mark in enumerate(marks):
            region = readers.get(mark)
            if region is None:
                raise Refusal(f"no attention that dyncc understands reads the keys of cache layer {number}")
            keys, old, _, rows, start = mark.args
            scores = self._scores(region, shape(keys)[1], old, rows, start)
            for user in list(mark.users):
                user.replace_all_uses_with(keys if user.args[1] == 0 else scores)
                user.graph.erase_node(user)
            mark.graph.erase_node(mark)
        return PassResult(len(marks), len(marks))

    def _shorten(self, program: Any, region: AttentionRegion, facts: Facts) -> set[int]:
        """Return the kept rows of one attention's keys and values; the numbers of the outputs that became shorter."""
        returned = outputs(program.graph)
        held = [i for i, n in enumerate(returned) if i in facts.kv_outputs and n in kv_sources(region)]
        if len(held) != 2:
            raise Refusal(f"its keys and values are no outputs of the graph ({len(held)} of 2 are); evict-kv acts on a cache")
        rows = shape(region.q)[-2]
        if isinstance(rows, int) and rows == 1:
            raise Refusal("it has one query row; evict-kv acts on prompts, and in decoding steps with dyncc.KVCache(passes=...)")
        out = output_node(program.graph)
        kept = emit(out, self.choose, self._scores(region, shape(returned[held[0]])[1], None, None, 0))
        for i in held:
            returned[i] = emit(out, take_keys, returned[i], kept)
        out.args = (tuple(returned),)
        return set(held)

    def _scores(self, region: AttentionRegion, groups: Any, old: fx.Node | None, rows: Any, start: Any) -> fx.Node:
        """What each key [B, G, N] has earned after this call."""
        if region.extras:
            raise Refusal(region.extras)
        mask = region.mask
        if mask is not None and (len(shape(mask)) != 4 or shape(mask)[1] != 1):
            raise Refusal(f"its mask is {list(shape(mask))}; one mask for all heads, [batch, 1, rows, keys], can be followed")
        return self._fused(region, old, rows, start) if region.fused else self._spelled(region, groups, old)

    def _fused(self, region: AttentionRegion, old: fx.Node | None, rows: Any, start: Any) -> fx.Node:
        q, k = region.q, repeated(region.k) or region.k
        if len(shape(q)) != 4 or len(shape(k)) != 4:
            raise Refusal(f"its queries are {list(shape(q))}, not [batch, heads, rows, width]")
        causal, scale = argument(region.out, "is_causal", False), argument(region.out, "scale")

        def compute(q: Any, k: Any, mask: Any, old: Any, start: Any) -> Any:
            if isinstance(rows, int) and rows == 1:  # transformers packs the heads of a single row as rows
                q = q.reshape(q.shape[0], -1, 1, q.shape[3])
            weights = row_weights(mask, q.shape[0], q.shape[2], self.decay, q.device)
            if self.score == "received":
                mask4 = None if mask is None else mask.expand(q.shape[0], 1, q.shape[2], k.shape[2])
                sums = SUMS(q, k, mask4, weights, causal, scale, self.temperature, self.seed, start)
            elif self.score == "window":
                sums = window_sums(q, k, mask, weights, self.window, causal, scale)
            else:
                sums = k.new_zeros((k.shape[0], k.shape[1], k.shape[2]), dtype=torch.float32)
            return self._total(sums, old, mask, q.shape[2])

        made: fx.Node = emit(region.out, compute, q, k, region.mask, old, start)
        return made

    def _spelled(self, region: AttentionRegion, groups: Any, old: fx.Node | None) -> fx.Node:
        """Its probabilities stand in the graph."""
        if self.seed >= 0 or self.temperature != 1.0:
            raise Refusal("noise and temperature act before the softmax, which is spelled out; load it with attn_implementation='sdpa'")
        if region.mask is not None and not val(region.mask).is_floating_point():
            raise Refusal("its mask is boolean and may mean either; load the model with attn_implementation='sdpa'")

        def compute(probabilities: Any, mask: Any, old: Any) -> Any:
            batch, _, rows, _ = probabilities.shape
            weights = row_weights(mask, batch, rows, self.decay, probabilities.device)
            count = last_rows(rows, self.window) if self.score == "window" else rows
            last, weights = probabilities.narrow(2, rows - count, count), weights.narrow(1, rows - count, count)
            return self._total(probability_sums(last, weights, groups), old, mask, rows)

        made: fx.Node = emit(region.out, compute, region.softmax, region.mask, old)
        return made

    def _total(self, sums: Any, old: Any, mask: Any, rows: Any) -> Any:
        """What was earned before, aged by these rows, and now; a window is looked at anew by each call."""
        if old is not None and self.score == "received":
            aged = self.decay ** torch.arange(rows, rows + 1, device=sums.device) if self.decay != 1.0 else 1.0
            sums = old.clamp(min=0.0) * aged + sums
        return hide_pads(sums, mask)


def _behind(region: AttentionRegion) -> set[fx.Node]:
    """The marks that an attention's keys come through."""
    return {n.args[0] for n in kv_sources(region) if n.target is GETITEM and n.args[0].target is WATCHED}
