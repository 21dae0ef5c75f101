"""Choosing keys by pages for `select-kv`: what stands for a page is scored; the best pages stay whole, or are split down to keys.

`bound` reads two rows a page, and with `slack` below 1 is drawn towards the mean of q.k; `mean` and `middle` read one; a `dyncc.KVCache`
keeps bounds and means up to date, and middles stand in the keys.
With `beam` pages kept, their keys are chosen by q.k (HISA, Xu et al. 2026); with `branch` spans are split by levels, each scored by the
key in its middle (HiP, Lee et al. 2024, whose first spans grow with the length; here their size is fixed, and so are the levels).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from dyncc.analysis.attention import AttentionRegion, kv_sources
from dyncc.kernels.one_row import SCORE_PAGES, SELECT_BEST
from dyncc.kernels.select_keys import (
    PARTLY_READ,
    near_bounds,
    page_means,
    page_middles,
    visible_pages,
)
from dyncc.kernels.select_keys.former import choose_spans
from dyncc.kernels.select_keys.refine import key_states, refine_pages, span_scores

if TYPE_CHECKING:
    from dyncc.passes.former_choice import Before

PAGE_SCORES = ("bound", "mean", "middle")


@dataclass(frozen=True)
class PageChoice:
    """The options of `select-kv` that say how pages are chosen."""

    score: str
    share: str
    budget: int
    sinks: int
    recents: int
    page: int
    beam: int | None
    branch: int | None
    slack: float = 1.0

    def problem(self) -> tuple[str, str] | None:
        """The option that does not fit and why, or None."""
        if not 0.0 < self.slack <= 1.0:
            return "slack", "a part of what bounds stand above the mean, above 0 and at most 1; without any it is score=mean"
        if self.slack < 1.0 and self.score != "bound":
            return "slack", "it draws the bounds of pages towards their mean: score=bound"
        if self.share == "any" and (self.score != "bound" or self.beam is not None):
            return "share", "any compares what whole pages are to each head: score=bound, without beam="
        if self.score not in PAGE_SCORES:
            problem = "single keys are scored; pages that can be split need score=bound, mean or middle"
            return next(((name, problem) for name in ("beam", "branch") if getattr(self, name) is not None), None)
        if self.beam is None and self.branch is not None:
            return "branch", "give beam= too, how many spans stay at each level"
        if self.beam is None:
            return self._whole_problem()
        if self.beam < 1:
            return "beam", "1 is the least"
        if self.branch is not None and self.score != "middle":
            return "branch", f"pages by their {self.score} are split into keys at once; score=middle has levels"
        if self.branch is not None and (self.branch < 2 or self._levels() is None):
            return "branch", f"page={self.page} must be a power of it, and 2 is the least"
        if self.beam * self._split < self.budget:
            return "beam", f"so many spans of {self._split} keys must hold the budget of {self.budget}"
        if sum(self.forced_spans(self._split)) > self.beam:
            return "beam", f"it must hold the spans of {self._split} keys with the {self.sinks} sinks and {self.recents} recents"
        return None

    def _whole_problem(self) -> tuple[str, str] | None:
        sinks, recents = self.forced_pages()
        if sinks + recents <= self.budget // self.page and self.budget >= self.page:
            return None
        problem = f"it must hold the {sinks} first and {recents} last pages of {self.page} keys that always stay, and one page at least"
        return "budget", problem

    @property
    def read(self) -> int:
        """How many keys a chosen span has: whole pages, the last spans of a search where all of their keys fit, or single keys."""
        return self.page if self.beam is None else self._split if self.beam * self._split == self.budget and self.page > 1 else 1

    @property
    def _split(self) -> int:
        return self.branch or self.page

    def _levels(self) -> int | None:
        """How often a page is split until its parts are keys; None where it does not come out even."""
        size, levels = self.page, 0
        while size > 1 and size % self._split == 0:
            size, levels = size // self._split, levels + 1
        return levels if size == 1 else None

    def forced_pages(self) -> tuple[int, int]:
        """Pages that hold the first `sinks` and the last `recents` keys, wherever the last page ends."""
        first, last = self.forced_spans(self.page)
        return -(-self.sinks // self.page) if self.score == "bound" else first, last

    def forced_spans(self, size: int) -> tuple[int, int]:
        """Spans that hold so many first and last visible keys, wherever they begin and end."""
        return tuple((count + size - 2) // size + 1 if count else 0 for count in (self.sinks, self.recents))  # type: ignore[return-value]

    def cost(self) -> tuple[float, int]:
        """Rows that are scored: of each key held, and whatever the length."""
        per_key = (2 if self.score == "bound" else 1) / self.page
        if self.beam is None:
            return per_key, 0
        return per_key, self.beam * self._split * ((self._levels() or 0) - (self.read > 1))

    def kept(self, region: AttentionRegion) -> list[fx.Node]:
        """What a cache keeps of the pages of an attention's keys; nothing where there is no such cache."""
        mark = next((n for n in kv_sources(region) if n.target is PARTLY_READ and n.args[1]), None)
        return list(mark.args[1]) if mark is not None else []  # type: ignore[arg-type]

    def keys(
        self, q: Tensor, k: Tensor, visible: Tensor | None, kept: Sequence[Tensor] = (), before: Before | None = None,
        scale: float | None = None,
    ) -> Tensor:  # fmt: skip
        """The spans [B, C, S] of `read` keys for q [B, H, 1, D] and k [B, G, N, D], visible [B, 1, N] or all, with what a cache keeps of
        pages and the choice of the step before. Some may lie behind the last key."""
        if self.score == "bound":
            low, high = kept or near_bounds(k, self.page, self.slack, visible)
            paged = visible_pages(visible, self.page) if visible is not None and self.beam is None else None
            of_pages = paged if self.share == "any" else None
            score, told = SCORE_PAGES(q, low, high, self.share, before.again if before is not None else None, of_pages, scale), None
        elif self.score == "mean":
            score = span_scores(q.float(), kept[0] if kept else page_means(k, self.page, visible), self.share)
            told = None if visible is None or not kept else ~visible_pages(~visible, self.page)  # a cache's means count pads
        else:
            score = span_scores(q, page_middles(k, self.page), self.share)
            told = None if visible is None else page_middles(visible, self.page)
        if before is not None:
            score = before.scores(score)
        if self.score == "bound" and self.beam is None:
            return self._whole(score, paged, same_size=before is not None)
        beam = self.beam or self.budget // self.page
        shown = torch.ones(k.shape[0], 1, k.shape[2], dtype=torch.bool, device=k.device) if visible is None else visible
        states = key_states(shown, self.sinks, self.recents, (score.shape[2] + beam) * self.page)
        budget = self.budget if self.beam else beam * self.page
        return refine_pages(q, k, score, told, states, self.page, self._split, beam, budget, self.share)

    def _whole(self, score: Tensor, shown: Tensor | None, same_size: bool) -> Tensor:
        """Quest's: pages count as first and last ones, not keys, and none is chosen behind the last, except for the `same_size` always."""
        sinks, recents = self.forced_pages()
        return (choose_spans if same_size else SELECT_BEST)(score, self.budget // self.page, shown, sinks, recents)
