"""select-kv: a decoding step attends to the keys that matter to it, and the cache stays whole.

o = softmax(q k[S]' * scale) v[S] with S the `budget` best keys by a score of this step's query row; the first `sinks` and the last
`recents` keys are always in S. Positions stay those of the cache, masks follow. Side conditions: one query row an attention (a decoding
step), one mask row for all heads. Spelled-out attention keeps its logits and reads fewer values. Lossy; all keys as budget is the dense
model. TokenSelect (Wu et al. 2024) for the vote; Quest (Tang et al. 2024) for `bound`, which chooses whole pages by what q.k cannot
exceed in them, and reads only two rows of each page where a `dyncc.KVCache` keeps their bounds; TidalDecode (Yang et al. 2024) for
choices that later layers reuse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from dyncc.analysis.attention import AttentionRegion, kv_sources
from dyncc.analysis.facts import Facts
from dyncc.errors import BadOptionValue
from dyncc.ir import argument, emit, is_symbolic, shape
from dyncc.kernels.one_row import ATTEND_ROW, SCORE_KEYS, SCORE_PAGES, SELECT_BEST
from dyncc.kernels.select_keys import (
    PARTLY_READ,
    attend_selected_logits,
    newest,
    page_bounds,
    shared_scores,
    visible_keys,
    visible_logits,
    visible_pages,
)
from dyncc.options import Layers, settle
from dyncc.passes.decode_sites import Choice, logits, parts, problem
from dyncc.restrict import Refusal
from dyncc.rewrite import Context, Pass, PassResult


@dataclass(frozen=True)
class SelectKV(Pass):
    """Attend to the `budget` best keys; the first `dense` attentions see all, and a choice serves the next `reuse` ones too.

    With `layers`, those choose and all between them reuse; with `full`, an attention that chooses sees all keys itself.
    """

    name: ClassVar[str] = "select-kv"
    summary: ClassVar[str] = "a decoding step attends to its best-scored keys; the cache stays whole"
    exact: ClassVar[bool] = False

    budget: int = 512
    score: Literal["vote", "logits", "recents", "bound"] = "vote"
    share: Literal["layer", "group", "head"] = "layer"
    sinks: int = 4
    recents: int = 32
    dense: int = 0
    reuse: int = 0
    page: int = 16
    layers: Layers | None = None
    full: bool = False

    def __post_init__(self) -> None:
        settle(self)
        for name, least in (("budget", 1), ("sinks", 0), ("recents", 0), ("dense", 0), ("reuse", 0), ("page", 1)):
            if getattr(self, name) < least:
                raise BadOptionValue(option=name, value=str(getattr(self, name)), problem=f"{least} is the least")
        sinks, recents = self._forced_pages()
        if self.score == "bound" and (sinks + recents > self.budget // self.page or self.budget < self.page):
            problem = f"it must hold the {sinks} first and {recents} last pages of {self.page} keys that always stay, and one page at least"
            raise BadOptionValue(option="budget", value=str(self.budget), problem=problem)
        if self.sinks + self.recents > self.budget:
            problem = f"it must hold the {self.sinks} sinks and {self.recents} recents that always stay"
            raise BadOptionValue(option="budget", value=str(self.budget), problem=problem)

    def run(self, program: Any, facts: Facts, context: Context) -> PassResult:
        """Rewrite every attention of a decoding step; refuse when there is none."""
        sites = facts.attention[self.dense :]
        if not sites:
            raise Refusal(f"dense={self.dense} leaves none of the {len(facts.attention)} attentions")
        growing = any(is_symbolic(shape(r.v)[-2]) for r in sites)
        chosen_by = set(self.layers.resolve(len(facts.attention))) if self.layers is not None else None
        done, whole, misses = 0, 0, []
        choice: Choice | None = None
        served = 0
        for region in sites:
            if why := problem(region, self.score):
                misses.append(f"attention {region.index}: {why}")
                continue
            due = served == self.reuse if chosen_by is None else region.index in chosen_by
            chooses = choice is None or due or not choice.fits(region)
            if choice is None or chooses:
                choice, served = self._choose(region), 0
            else:
                served += 1
            if chooses and self.full:
                whole += 1
                continue
            self._attend(region, choice.index)
            done += 1
        if not done:
            raise Refusal(misses[0] if misses else "every attention chooses and sees all keys; give reuse= or layers=")
        return PassResult(done, len(sites) - whole, misses=tuple(misses), pays_from=self._pays_from() if growing else "")

    @property
    def counts_layers(self) -> bool:
        """The first `dense` ones are counted from the start of the model."""
        return self.dense > 0 or self.layers is not None

    def _forced_pages(self) -> tuple[int, int]:
        """Pages that hold the first `sinks` and the last `recents` keys, wherever the last page ends."""
        return -(-self.sinks // self.page), (self.recents + self.page - 2) // self.page + 1 if self.recents else 0

    def _choose(self, region: AttentionRegion) -> Choice:
        """The choice of one attention, computed in front of it."""
        sdpa = region.out
        q, k, v = parts(region)
        if not region.fused:
            return Choice(self._choose_by_logits(region, v), shape(region.softmax)[1], tuple(shape(v)[1:3]))
        if self.score == "bound":
            return Choice(self._choose_pages(region, q, k), shape(q)[1], tuple(shape(k)[1:3]))
        scale = argument(sdpa, "scale")

        def choose(q: Any, k: Any, *masks: Any) -> Any:
            visible = visible_keys(masks[0]) if masks else None
            score = SCORE_KEYS(q, k, visible, self.score, self.share, scale)
            return SELECT_BEST(score, self.budget, visible, self.sinks, self.recents)

        made: fx.Node = emit(sdpa, choose, q, k, *([region.mask] if region.mask is not None else []))
        return Choice(made, shape(q)[1], tuple(shape(k)[1:3]))

    def _choose_by_logits(self, region: AttentionRegion, v: fx.Node) -> fx.Node:
        """Of an attention that is spelled out, whose scaled and masked logits stand in the graph."""
        groups = shape(v)[1]

        def choose(x: Any) -> Any:
            score, visible = x.squeeze(2).float(), visible_logits(x)
            if self.score == "recents":
                score = newest(x.shape[0], x.shape[3], x.device)
            else:
                score = shared_scores(torch.softmax(score, -1) if self.score == "vote" else score, groups, self.share)
            return SELECT_BEST(score, self.budget, visible, self.sinks, self.recents)

        made: fx.Node = emit(region.out, choose, logits(region))
        return made

    def _choose_pages(self, region: AttentionRegion, q: fx.Node, k: fx.Node) -> fx.Node:
        """The best pages, by bounds that the cache keeps, or that are taken from the keys here."""
        mark = next((n for n in kv_sources(region) if n.target is PARTLY_READ and n.args[1] is not None), None)
        kept = list(mark.args[1:3]) if mark is not None else []
        masks = [region.mask] if region.mask is not None else []
        sinks, recents = self._forced_pages()

        def choose(q: Any, k: Any, *more: Any) -> Any:
            visible = visible_keys(more[-1]) if masks else None
            low, high = more[:2] if kept else page_bounds(k, self.page, visible)
            shown = None if visible is None else visible_pages(visible, self.page)
            return SELECT_BEST(SCORE_PAGES(q, low, high, self.share), self.budget // self.page, shown, sinks, recents)

        made: fx.Node = emit(region.out, choose, q, k, *kept, *masks)
        return made

    def _attend(self, region: AttentionRegion, index: fx.Node) -> None:
        out = region.out
        q, k, v = parts(region)
        masks = [region.mask] if region.mask is not None else []
        scale, page = argument(out, "scale") if region.fused else None, self.page if self.score == "bound" else 1

        def attend(q: Any, k: Any, v: Any, at: Any, *mask: Any) -> Any:
            return ATTEND_ROW(q, k, v, mask[0] if mask else None, at, page, scale)

        new = emit(out, attend, q, k, v, index, *masks) if region.fused else emit(out, attend_selected_logits, logits(region), v, index)
        new.meta = {**out.meta, "val": new.meta["val"]}
        out.replace_all_uses_with(new)
        out.graph.erase_node(out)

    def _pays_from(self) -> str:
        """From how many keys on fewer operations are needed: scoring costs half of an attention, once in `reuse` + 1 attentions."""
        scored = 0.0 if self.score == "recents" else 0.5 / (self.reuse + 1)
        if self.score == "bound":
            scored = min(scored * 2 / self.page, 0.99)  # pages of one key have two bounds: they save nothing
        return f"fewer operations from {round(self.budget / (1 - scored)):,} keys on, by the cost model; the graph serves any number"
