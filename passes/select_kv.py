"""select-kv: a decoding step attends to the keys that matter to it, and the cache stays whole.

o = softmax(q k[S]' * scale) v[S] with S the `budget` best keys by a score of this step's query row; the first `sinks` and the last
`recents` keys are always in S. Positions stay those of the cache, masks follow. Side conditions: one query row an attention (a decoding
step), one mask row for all heads. Spelled-out attention keeps its logits and reads fewer values. Lossy; all keys as budget is the dense
model. TokenSelect (Wu et al. 2024) for the vote; Quest (Tang et al. 2024) for `bound`, which chooses whole pages by what q.k cannot
exceed in them, and reads only two rows of each page where a `dyncc.KVCache` keeps their bounds; HISA (Xu et al. 2026) and HiP (Lee et
al. 2024) for pages that are refined to keys (page_choice.py); FASA (Wang et al. 2026) for `pairs`, q.k over a few rotary pairs alone
(pair_choice.py); TidalDecode (Yang et al. 2024) for choices that later layers reuse; TokenSelect and LouisKV (Wu et al. 2026)
for choices that later steps reuse (former_choice.py); ActQKV (Xiao et al. 2025) for budgets that follow
each layer's votes (layer_budgets.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from dyncc.analysis.attention import AttentionRegion
from dyncc.analysis.facts import Facts
from dyncc.errors import BadOptionValue
from dyncc.ir import argument, emit, is_symbolic, shape
from dyncc.kernels.one_row import ATTEND_ROW, SCORE_KEYS, SELECT_BEST
from dyncc.kernels.select_keys import (
    NUMBERS,
    attend_selected_logits,
    newest,
    pair_scores,
    shared_scores,
    visible_keys,
    visible_logits,
)
from dyncc.kernels.select_keys.former import choose_spans
from dyncc.options import Layers, settle
from dyncc.pair_order import PairOrder
from dyncc.passes.decode_sites import Choice, logits, parts, problem, state_mark
from dyncc.passes.former_choice import Before, FormerChoice, keep_state, look_back_problem
from dyncc.passes.layer_budgets import LayerBudgets
from dyncc.passes.page_choice import PAGE_SCORES, PageChoice
from dyncc.passes.pair_choice import read_pairs
from dyncc.restrict import Refusal
from dyncc.rewrite import Context, Pass, PassResult


@dataclass(frozen=True)
class SelectKV(Pass):
    """Attend to the `budget` best keys; the first `dense` attentions see all, and a choice serves the next `reuse` ones too.

    Scores of pages choose whole ones, or `beam` of them whose keys are then chosen by q.k; `branch` splits them by levels.

    With `layers`, those choose and all between them reuse; with `full`, an attention that chooses sees all keys itself.

    With `similar`, a row of the batch takes its choice of the step before again while the `cosine` of its query (of the heads together,
    or the mean over heads) with the query that chose, or with that of the step before (`compare`), is so much at least.
    With `density`, layers whose votes were spread wider at the step before read more than `budget` keys and others fewer.
    """

    name: ClassVar[str] = "select-kv"
    summary: ClassVar[str] = "a decoding step attends to its best-scored keys; the cache stays whole"
    exact: ClassVar[bool] = False

    budget: int = 512
    score: Literal["vote", "logits", "recents", "bound", "mean", "middle", "pairs"] = "vote"
    share: Literal["layer", "group", "head"] = "layer"
    sinks: int = 4
    recents: int = 32
    dense: int = 0
    reuse: int = 0
    page: int = 16
    beam: int | None = None
    branch: int | None = None
    pairs: int = 16
    file: str | None = None
    layers: Layers | None = None
    full: bool = False
    similar: float | None = None
    cosine: Literal["whole", "heads"] = "whole"
    compare: Literal["choice", "step"] = "choice"
    density: bool = False

    def __post_init__(self) -> None:
        settle(self)
        for name, least in (("budget", 1), ("sinks", 0), ("recents", 0), ("dense", 0), ("reuse", 0), ("page", 1), ("pairs", 1)):
            if getattr(self, name) < least:
                raise BadOptionValue(option=name, value=str(getattr(self, name)), problem=f"{least} is the least")
        if wrong := self.pages.problem():
            raise BadOptionValue(option=wrong[0], value=str(getattr(self, wrong[0])), problem=wrong[1])
        if self.sinks + self.recents > self.budget:
            problem = f"it must hold the {self.sinks} sinks and {self.recents} recents that always stay"
            raise BadOptionValue(option="budget", value=str(self.budget), problem=problem)
        if self._looks_back and (wrong := look_back_problem(self)):
            raise BadOptionValue(option=wrong[0], value=str(getattr(self, wrong[0])), problem=wrong[1])

    def run(self, program: Any, facts: Facts, context: Context) -> PassResult:
        """Rewrite every attention of a decoding step; refuse when there is none."""
        if self.score == "pairs" and self.file is None:
            raise BadOptionValue(option="file", value="none", problem="score=pairs needs the file that dyncc.calibrate_pairs wrote")
        sites = facts.attention[self.dense :]
        if not sites:
            raise Refusal(f"dense={self.dense} leaves none of the {len(facts.attention)} attentions")
        growing = any(is_symbolic(shape(r.v)[-2]) for r in sites)
        chosen_by = set(self.layers.resolve(len(facts.attention))) if self.layers is not None else None
        problems = {r.index: problem(r, self.score, self._looks_back, self._text) for r in sites}
        misses = [f"attention {index}: {why}" for index, why in problems.items() if why]
        fit = [r for r in sites if not problems[r.index]]
        marks = {r.index: mark for r in fit if (mark := state_mark(r, self._text)) is not None} if self._looks_back else {}
        done, whole = 0, 0
        choice: Choice | None = None
        order: PairOrder | None = None
        served = 0
        for region in fit:
            if self.file is not None and self.score == "pairs" and order is None:
                order = read_pairs(self.file, self.pairs, facts.attention, program, context.values)
            due = served == self.reuse if chosen_by is None else region.index in chosen_by
            chooses = choice is None or due or not choice.fits(region)
            if choice is None or chooses:
                choice, served = self._choose(region, order, marks), 0
            else:
                served += 1
            if chooses and self.full:
                whole += 1
                continue
            self._attend(region, choice.index)
            done += 1
        if not done:
            raise Refusal(misses[0] if misses else "every attention chooses and sees all keys; give reuse= or layers=")
        return PassResult(done, len(sites) - whole, misses=tuple(misses), pays_from=self._pays_from(order) if growing else "")

    @property
    def counts_layers(self) -> bool:
        """The first `dense` ones are counted from the start of the model."""
        return self.dense > 0 or self.layers is not None

    @property
    def pages(self) -> PageChoice:
        """How pages are chosen, by scores of pages."""
        return PageChoice(self.score, self.share, self.budget, self.sinks, self.recents, self.page, self.beam, self.branch)

    @property
    def former(self) -> FormerChoice | LayerBudgets | None:
        """What looks back to the step before, and whose state a cache keeps; None where each step stands alone."""
        if self.density:
            return LayerBudgets(self.budget, self.sinks, self.recents)
        if self.similar is None:
            return None
        spans = self.budget // self.page if self.score in PAGE_SCORES else self.budget
        return FormerChoice(self.similar, self.cosine, self.compare, self.share, spans)

    @property
    def _looks_back(self) -> str:
        """The option that does; ''."""
        return "density=true" if self.density else f"similar={self.similar}" if self.similar is not None else ""

    @property
    def _text(self) -> str:
        from dyncc.pipeline import render

        return render([self])

    def _choose(self, region: AttentionRegion, order: PairOrder | None, marks: Mapping[int, fx.Node]) -> Choice:
        """The choice of one attention, computed in front of it; `marks` stand for what the caches of attentions remember."""
        q, k, v = parts(region)
        if not region.fused:
            return Choice(self._choose_by_logits(region, v), shape(region.softmax)[1], tuple(shape(v)[1:3]))
        kept = self.pages.kept(region) if self.score in PAGE_SCORES else []
        mark, former = marks.get(region.index), self.former
        state: list[Any] = list(mark.args[1]) if mark is not None else []  # type: ignore[arg-type]
        if isinstance(former, LayerBudgets):
            state = [entropy for other in marks.values() for entropy in other.args[1]]  # type: ignore[union-attr]
            state = [*state, state[list(marks).index(region.index)]] if all(e.op == "placeholder" for e in state) else []  # else new
        masks = [region.mask] if region.mask is not None else []
        scale = argument(region.out, "scale")
        rows = order.best(region.index, self.pairs) if order is not None else []

        def choose(q: Any, k: Any, *more: Any) -> Any:
            visible = visible_keys(more[-1]) if masks else None
            old = more[len(kept) :][: len(state)]
            if isinstance(former, LayerBudgets):
                return former.keys(SCORE_KEYS(q, k, visible, self.score, self.share, scale), visible, former.counts(old))
            before = former.before(q, *old) if former is not None else None
            if self.score in PAGE_SCORES:
                index = self.pages.keys(q, k, visible, more[: len(kept)], before)
            else:
                index = self._keys(q, k, visible, scale, rows, before)
            return index if before is None or former is None else (index, *former.after(q, before, index))

        made: Any = emit(region.out, choose, q, k, *kept, *state, *masks)
        if mark is not None:
            made, *after = made
            keep_state(mark, after)
        return Choice(made, shape(q)[1], tuple(shape(k)[1:3]))

    def _keys(self, q: Any, k: Any, visible: Any, scale: Any, rows: list[list[int]], before: Before | None) -> Any:
        """The best keys [B, C, S], by the channels of `rows` for each head where pairs score them."""
        if self.score == "pairs":
            channels = NUMBERS([c for row in rows for c in row], [len(rows), len(rows[0])], k.device)
            score = pair_scores(q, k, channels, self.share)
        else:
            score = SCORE_KEYS(q, k, visible, self.score, self.share, scale, *([before.again] if before is not None else []))
        if before is None:
            return SELECT_BEST(score, self.budget, visible, self.sinks, self.recents)
        return choose_spans(before.scores(score), self.budget, visible, self.sinks, self.recents)

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

    def _attend(self, region: AttentionRegion, index: fx.Node) -> None:
        out = region.out
        q, k, v = parts(region)
        masks = [region.mask] if region.mask is not None else []
        scale, page = argument(out, "scale") if region.fused else None, self.pages.read if self.score in PAGE_SCORES else 1
        ragged = self.score in PAGE_SCORES or bool(self._looks_back)

        def attend(q: Any, k: Any, v: Any, at: Any, *mask: Any) -> Any:
            return ATTEND_ROW(q, k, v, mask[0] if mask else None, at, page, scale, ragged)

        new = emit(out, attend, q, k, v, index, *masks) if region.fused else emit(out, attend_selected_logits, logits(region), v, index)
        new.meta = {**out.meta, "val": new.meta["val"]}
        out.replace_all_uses_with(new)
        out.graph.erase_node(out)

    def _pays_from(self, order: PairOrder | None) -> str:
        """From how many keys on fewer operations are needed: scoring costs half of an attention, once in `reuse` + 1 attentions."""
        scored = 0.0 if self.score == "recents" else 0.5 / (self.reuse + 1)
        per_key, more = self.pages.cost() if self.score in PAGE_SCORES else (2 * self.pairs / order.sizes[2] if order else 1.0, 0)
        pays = (self.budget + scored * more) / (1 - min(scored * per_key, 0.99))  # pages of one key have two bounds: they save nothing
        return f"fewer operations from {round(pays):,} keys on, by the cost model; the graph serves any number"
