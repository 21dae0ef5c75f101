"""Taking the former step's choice again for `select-kv`, while a row's query is like an earlier one: what is kept between steps, and where.

A choice is taken again as a score: what it names stands above all other keys, below the first and last ones, which go on moving.
TokenSelect (Wu et al. 2024) looks back to the query that chose, LouisKV (Wu et al. 2026) to that of the step before. Queries are as
attention reads them, with their rotary positions. A `dyncc.KVCache` keeps the state; forgotten, it is zeros, which are like no query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from dyncc.kernels.select_keys.former import alike, former_scores
from dyncc.passes.decode_sites import QUERY_HEADS


@dataclass(frozen=True)
class Before:
    """The state before a step: a query [B, QUERY_HEADS, D], a choice [B, C, S], and which rows [B] take it `again`."""

    query: Tensor
    choice: Tensor
    again: Tensor

    def scores(self, score: Tensor) -> Tensor:
        """Of scores [B, C, N], those of rows that take their choice again replaced by what names it."""
        return torch.where(self.again.view(-1, 1, 1), former_scores(self.choice, score.shape[2]), score)


@dataclass(frozen=True)
class FormerChoice:
    """The options of `select-kv` that say when a choice is taken again, and how many spans it has."""

    similar: float
    cosine: str
    compare: str
    share: str
    spans: int

    def state(self, keys: Tensor) -> list[Tensor]:
        """What a cache layer with keys [B, G, N, D] remembers at first: no query, and any choice."""
        batch, groups, _, width = keys.shape
        choices = groups if self.share == "group" else 1
        none = torch.zeros(batch, choices, self.spans, dtype=torch.int64, device=keys.device)
        return [keys.new_zeros(batch, QUERY_HEADS, width), none]

    def before(self, q: Tensor, query: Tensor, choice: Tensor) -> Before:
        """The state in front of a step with queries q [B, H, 1, D]."""
        return Before(query, choice, alike(q, query[:, : q.shape[1]], self.cosine, self.similar))

    def after(self, q: Tensor, before: Before, choice: Tensor) -> list[Tensor]:
        """The state behind it."""
        query = F.pad(q.squeeze(2), (0, 0, 0, QUERY_HEADS - q.shape[1])).to(before.query.dtype)
        if self.compare == "choice":
            query = torch.where(before.again.view(-1, 1, 1), before.query, query)
        return [query, choice]


def keep_state(mark: fx.Node, state: Sequence[fx.Node]) -> None:
    """Put the state behind a step in the place of a mark."""
    for user in list(mark.users):
        user.replace_all_uses_with(state[user.args[1]])  # type: ignore[index]
        user.graph.erase_node(user)


def look_back_problem(passed: Any) -> tuple[str, str] | None:
    """The option of a `select-kv` that does not go with one that looks back and why, or None."""
    if passed.density and passed.similar is not None:
        return "density", "it does not go with similar=: a choice that is taken again has the size that it had"
    if passed.density and (passed.score != "vote" or passed.share != "layer"):
        return "density", "it needs votes of whole layers: score=vote share=layer"
    if passed.density and (passed.reuse or passed.layers is not None):
        return "density", "each layer has a number of keys of its own, so that none can reuse the choice of another"
    if passed.density:
        return None
    if passed.share in ("head", "any"):
        return "share", "similar= remembers the choice of a layer or of its groups: share=layer or share=group"
    if passed.beam is not None:
        return "beam", "similar= takes whole pages or single keys again, not keys found in pages"
    if passed.recents < 1:
        return "recents", "with similar= it is 1 at least: a former choice does not know the newest key"
    return None
