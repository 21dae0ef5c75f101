"""Sharing out the budget of `select-kv` among layers by how widely each spread its attention at the step before (ActQKV, Xiao et al. 2025).

A layer reads budget * e / mean(e) keys, with e the entropy of its scores at the step before and the mean over the layers that choose; twice
the budget at most, and what always stays at least. So all layers together read what they would read without. Where nothing is remembered
each layer has the budget; where it holds all keys, all are read. A `dyncc.KVCache` keeps the entropies. The authors' formulas are known to
us from summaries only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dyncc.kernels.one_row import SELECT_BEST
from dyncc.kernels.select_keys.refine import FORCED, HIDDEN, span_states


@dataclass(frozen=True)
class LayerBudgets:
    """The options of `select-kv` that say how many keys a layer reads."""

    budget: int
    sinks: int
    recents: int

    @property
    def most(self) -> int:
        return 2 * self.budget

    def state(self, keys: Tensor) -> list[Tensor]:
        """What a cache layer with keys [B, G, N, D] remembers at first: no entropy."""
        return [keys.new_zeros(keys.shape[0], 1, dtype=torch.float32)]

    def counts(self, entropies: Sequence[Tensor]) -> Tensor | int:
        """How many keys one layer reads, [B, 1, 1], by the entropies [B, 1] of all layers that choose and, last, its own; none at the
        first step of a text."""
        if not entropies:
            return self.budget
        *each, own = entropies
        mean = torch.cat(each, 1).mean(1, keepdim=True)
        shared = (self.budget * own / mean.clamp(min=1e-30)).floor().clamp(max(1, self.sinks + self.recents), self.most)
        return torch.where(mean > 0, shared, float(self.budget)).unsqueeze(2)

    def keys(self, score: Tensor, visible: Tensor | None, counts: Tensor | int) -> tuple[Tensor, Tensor]:
        """Indices [B, 1, most] of the best `counts` keys by scores [B, 1, N], the others behind the last key; and the entropy [B, 1]."""
        if visible is None:
            visible = torch.ones(score.shape[0], 1, score.shape[2], dtype=torch.bool, device=score.device)
        states = F.pad(span_states(visible, self.sinks, self.recents), (0, self.most))
        ranked = F.pad(score, (0, self.most)).masked_fill(states == FORCED, torch.inf).masked_fill(states == HIDDEN, -torch.inf)
        best = SELECT_BEST(ranked, self.most, None, 0, 0, True)
        rank = ranked.gather(2, best).argsort(dim=2, descending=True, stable=True).argsort(dim=2)
        everything = visible.sum(2) <= self.budget
        stays = (rank < counts) | everything.unsqueeze(2)
        return torch.where(stays, best, score.shape[2] + self.most), torch.special.entr(score.clamp(min=0.0)).sum(2)
