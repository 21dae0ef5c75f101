"""Choosing the keys of one attention for `select-kv`, and attending to them: what the pass puts into the graph of a decoding step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from dyncc.analysis.attention import AttentionRegion
from dyncc.ir import argument, emit, shape, take_place
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
from dyncc.pair_order import PairOrder
from dyncc.passes.decode_sites import Choice, logits, parts
from dyncc.passes.former_choice import Before, keep_state
from dyncc.passes.layer_budgets import LayerBudgets
from dyncc.passes.page_choice import PAGE_SCORES

if TYPE_CHECKING:
    from dyncc.passes.select_kv import SelectKV


@dataclass(frozen=True)
class KeyChooser:
    """The options of a `select-kv` at work: `order` ranks rotary pairs (score=pairs), `marks` stand for what the caches of attentions
    remember, by their numbers."""

    options: SelectKV
    order: PairOrder | None
    marks: Mapping[int, fx.Node]

    def choose(self, region: AttentionRegion) -> Choice:
        """The choice of one attention, computed in front of it."""
        options, (q, k, v) = self.options, parts(region)
        if not region.fused:
            return Choice(self._by_logits(region, v), shape(region.softmax)[1], tuple(shape(v)[1:3]))
        kept = options.pages.kept(region) if options.score in PAGE_SCORES else []
        mark, former = self.marks.get(region.index), options.former
        state: list[Any] = list(mark.args[1]) if mark is not None else []  # type: ignore[arg-type]
        if isinstance(former, LayerBudgets):
            state = [entropy for other in self.marks.values() for entropy in other.args[1]]  # type: ignore[union-attr]
            state = [*state, state[list(self.marks).index(region.index)]] if all(e.op == "placeholder" for e in state) else []  # else new
        masks = [region.mask] if region.mask is not None else []
        scale = argument(region.out, "scale")
        rows = self.order.best(region.index, options.pairs) if self.order is not None else []

        def choose(q: Any, k: Any, *more: Any) -> Any:
            visible = visible_keys(more[-1]) if masks else None
            old = more[len(kept) :][: len(state)]
            if isinstance(former, LayerBudgets):
                return former.keys(SCORE_KEYS(q, k, visible, options.score, options.share, scale), visible, former.counts(old))
            before = former.before(q, *old) if former is not None else None
            if options.score in PAGE_SCORES:
                index = options.pages.keys(q, k, visible, more[: len(kept)], before, scale)
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
        options = self.options
        if options.score == "pairs":
            channels = NUMBERS([c for row in rows for c in row], [len(rows), len(rows[0])], k.device)
            score = pair_scores(q, k, channels, options.share)
        else:
            score = SCORE_KEYS(q, k, visible, options.score, options.share, scale, *([before.again] if before is not None else []))
        if before is None:
            return SELECT_BEST(score, options.budget, visible, options.sinks, options.recents)
        return choose_spans(before.scores(score), options.budget, visible, options.sinks, options.recents)

    def _by_logits(self, region: AttentionRegion, v: fx.Node) -> fx.Node:
        """Of an attention that is spelled out, whose scaled and masked logits stand in the graph."""
        options, groups = self.options, shape(v)[1]

        def choose(x: Any) -> Any:
            score, visible = x.squeeze(2).float(), visible_logits(x)
            if options.score == "recents":
                score = newest(x.shape[0], x.shape[3], x.device)
            else:
                score = shared_scores(torch.softmax(score, -1) if options.score == "vote" else score, groups, options.share)
            return SELECT_BEST(score, options.budget, visible, options.sinks, options.recents)

        made: fx.Node = emit(region.out, choose, logits(region))
        return made

    def attend(self, region: AttentionRegion, index: fx.Node) -> None:
        """Put attention to the chosen keys [B, C, S] in the place of one that sees all."""
        options, out, (q, k, v) = self.options, region.out, parts(region)
        masks = [region.mask] if region.mask is not None else []
        scale, page = argument(out, "scale") if region.fused else None, options.pages.read if options.score in PAGE_SCORES else 1
        ragged = options.score in PAGE_SCORES or bool(options.looks_back)

        def attend(q: Any, k: Any, v: Any, at: Any, *mask: Any) -> Any:
            return ATTEND_ROW(q, k, v, mask[0] if mask else None, at, page, scale, ragged)

        new = emit(out, attend, q, k, v, index, *masks) if region.fused else emit(out, attend_selected_logits, logits(region), v, index)
        take_place(out, new)
