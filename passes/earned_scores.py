"""What keys earn in one attention for `evict-kv`: the attention that they receive in this call, beside what they had earned before.

Fused attention is asked again by its queries and keys, and never makes the whole matrix of rows x keys; of attention that is spelled out
the probabilities stand in the graph. Rows ahead of the prompt (rows_ahead.py) and trained gates (given_scores.py) score otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from dyncc.analysis.attention import AttentionRegion
from dyncc.ir import argument, emit, shape, val
from dyncc.kernels.evict_keys import SUMS, ahead_sums, hide_pads, last_rows, probability_sums, row_weights, window_sums
from dyncc.passes.drop_repeat_kv import repeated
from dyncc.passes.given_scores import behind_old, gated
from dyncc.passes.rows_ahead import Look
from dyncc.restrict import Refusal

if TYPE_CHECKING:
    from dyncc.passes.evict_kv import EvictKV


@dataclass(frozen=True)
class EarnedScores:
    """The options of an `evict-kv` at work; `looks` is what rows behind the prompt ask, by the attention's node."""

    options: EvictKV
    looks: Mapping[fx.Node, Look]

    def scores(self, region: AttentionRegion, groups: Any, old: fx.Node | None, rows: Any, start: Any) -> fx.Node:
        """What each key [B, G, N] has earned after this call, whose query `rows` begin at `start`; `old` is what it had earned before.

        Raises:
            Refusal: the attention has a form from which it cannot be told.
        """
        if region.extras:
            raise Refusal(region.extras)
        mask = region.mask
        if mask is not None and (len(shape(mask)) != 4 or shape(mask)[1] != 1):
            raise Refusal(f"its mask is {list(shape(mask))}; one mask for all heads, [batch, 1, rows, keys], can be followed")
        if region.out in self.looks:
            return self._asked(region, self.looks[region.out])
        return self._fused(region, old, rows, start) if region.fused else self._spelled(region, groups, old)

    def _fused(self, region: AttentionRegion, old: fx.Node | None, rows: Any, start: Any) -> fx.Node:
        options, q, k = self.options, region.q, repeated(region.k) or region.k
        if len(shape(q)) != 4 or len(shape(k)) != 4:
            raise Refusal(f"its queries are {list(shape(q))}, not [batch, heads, rows, width]")
        causal, scale = argument(region.out, "is_causal", False), argument(region.out, "scale")

        def compute(q: Any, k: Any, mask: Any, old: Any, start: Any) -> Any:
            if isinstance(rows, int) and rows == 1:  # transformers packs the heads of a single row as rows
                q = q.reshape(q.shape[0], -1, 1, q.shape[3])
            weights = row_weights(mask, q.shape[0], q.shape[2], options.decay, q.device)
            if options.score == "received":
                mask4 = None if mask is None else mask.expand(q.shape[0], 1, q.shape[2], k.shape[2])
                sums = SUMS(q, k, mask4, weights, causal, scale, options.temperature, options.seed, start)
            elif options.score == "window":
                sums = window_sums(q, k, mask, weights, options.window, causal, scale)
            else:
                sums = k.new_zeros((k.shape[0], k.shape[1], k.shape[2]), dtype=torch.float32)
            return self._total(sums, old, mask, q.shape[2])

        made: fx.Node = emit(region.out, compute, q, k, region.mask, old, start)
        return made

    def _asked(self, region: AttentionRegion, look: Look) -> fx.Node:
        scale = argument(region.out, "scale")

        def compute(q: Any, k: Any, seen: Any, mask: Any) -> Any:
            return hide_pads(ahead_sums(q, k, seen, scale), mask)

        made: fx.Node = emit(look.out, compute, look.q, look.k, look.mask, region.mask)
        return made

    def _spelled(self, region: AttentionRegion, groups: Any, old: fx.Node | None) -> fx.Node:
        """Its probabilities stand in the graph."""
        options = self.options
        if options.seed >= 0 or options.temperature != 1.0:
            raise Refusal("noise and temperature act before the softmax, which is spelled out; load it with attn_implementation='sdpa'")
        if region.mask is not None and not val(region.mask).is_floating_point():
            raise Refusal("its mask is boolean and may mean either; load the model with attn_implementation='sdpa'")

        def compute(probabilities: Any, mask: Any, old: Any) -> Any:
            batch, _, rows, _ = probabilities.shape
            weights = row_weights(mask, batch, rows, options.decay, probabilities.device)
            count = last_rows(rows, options.window) if options.score == "window" else rows
            last, weights = probabilities.narrow(2, rows - count, count), weights.narrow(1, rows - count, count)
            return self._total(probability_sums(last, weights, groups), old, mask, rows)

        made: fx.Node = emit(region.out, compute, region.softmax, region.mask, old)
        return made

    def _total(self, sums: Any, old: Any, mask: Any, rows: Any) -> Any:
        """What was earned before, aged by these rows, and now; a window is looked at anew by each call."""
        if old is not None and self.options.score == "received":
            decay = self.options.decay
            aged = decay ** torch.arange(rows, rows + 1, device=sums.device) if decay != 1.0 else 1.0
            sums = old.clamp(min=0.0) * aged + sums
        return hide_pads(sums, mask)


def gate_scores(region: AttentionRegion, given: Any, old: fx.Node, keys: fx.Node, gate: list[fx.Node]) -> fx.Node:
    """What trained gates, whose tensors are `gate`, say of each key [B, G, N]: of `keys` that this call adds anew, of others as before."""
    fresh = gated(given, keys, gate, region.mask, region.out)
    made: fx.Node = emit(region.out, lambda fresh, old, mask: hide_pads(behind_old(fresh, old), mask), fresh, old, region.mask)
    return made
