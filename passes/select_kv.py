"""select-kv: a decoding step attends to the keys that matter to it, and the cache stays whole.

o = softmax(q k[S]' * scale) v[S] with S the `budget` best keys by a score of this step's query row; the first `sinks` and the last
`recents` keys are always in S. Positions stay those of the cache, masks follow. Side conditions: one query row an attention (a decoding
step), one mask row for all heads. Spelled-out attention keeps its logits and reads fewer values. Lossy; all keys as budget is the dense
model. TokenSelect (Wu et al. 2024) for the vote; Quest (Tang et al. 2024) for `bound`, which chooses whole pages by what q.k cannot
exceed in them, and reads only two rows of each page where a `dyncc.KVCache` keeps their bounds (share=any and slack= are ours); HISA (Xu
et al. 2026) and HiP (Lee et al. 2024) for pages that are refined to keys (page_choice.py); FASA (Wang et al. 2026) for `pairs`, q.k over
a few rotary pairs alone (pair_choice.py); TidalDecode (Yang et al. 2024) for choices that later layers reuse; TokenSelect and LouisKV (Wu
et al. 2026) for choices that later steps reuse (former_choice.py); ActQKV (Xiao et al. 2025) for budgets that follow each layer's votes
(layer_budgets.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from dyncc.analysis.facts import Facts
from dyncc.errors import BadOptionValue
from dyncc.ir import is_symbolic, shape
from dyncc.options import Layers, at_least, settle
from dyncc.pair_order import PairOrder
from dyncc.passes.decode_sites import Choice, problem, state_mark
from dyncc.passes.former_choice import FormerChoice, look_back_problem
from dyncc.passes.key_choice import KeyChooser
from dyncc.passes.layer_budgets import LayerBudgets
from dyncc.passes.page_choice import PAGE_SCORES, PageChoice
from dyncc.passes.pair_choice import read_pairs
from dyncc.pipeline import render
from dyncc.restrict import Refusal
from dyncc.rewrite import Context, Pass, PassResult


@dataclass(frozen=True)
class SelectKV(Pass):
    """Attend to the `budget` best keys; the first `dense` attentions see all, and a choice serves the next `reuse` ones too.

    Scores of pages choose whole ones, or `beam` of them whose keys are then chosen by q.k; `branch` splits them by levels.

    Heads choose together by the mean of their scores, those of a `group` or of the `layer`; or a group takes the pages that matter most to
    `any` of its heads, whose bounds are turned into probabilities first. `slack` is how much of a page's bound counts above its mean.

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
    share: Literal["layer", "group", "head", "any"] = "layer"
    sinks: int = 4
    recents: int = 32
    dense: int = 0
    reuse: int = 0
    page: int = 16
    beam: int | None = None
    branch: int | None = None
    slack: float = 1.0
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
        at_least(self, budget=1, sinks=0, recents=0, dense=0, reuse=0, page=1, pairs=1)
        if wrong := self._problem():
            raise BadOptionValue(option=wrong[0], value=str(getattr(self, wrong[0])), problem=wrong[1])

    def _problem(self) -> tuple[str, str] | None:
        """The option that does not fit and why, or None."""
        if wrong := self.pages.problem():
            return wrong
        if self.sinks + self.recents > self.budget:
            return "budget", f"it must hold the {self.sinks} sinks and {self.recents} recents that always stay"
        return look_back_problem(self) if self.looks_back else None

    def run(self, program: Any, facts: Facts, context: Context) -> PassResult:
        """Rewrite every attention of a decoding step; refuse when there is none."""
        if self.score == "pairs" and self.file is None:
            raise BadOptionValue(option="file", value="none", problem="score=pairs needs the file that dyncc.calibrate_pairs wrote")
        sites = facts.attention[self.dense :]
        if not sites:
            raise Refusal(f"dense={self.dense} leaves none of the {len(facts.attention)} attentions")
        growing = any(is_symbolic(shape(r.v)[-2]) for r in sites)
        chosen_by = set(self.layers.resolve(len(facts.attention))) if self.layers is not None else None
        text = render([self])
        problems = {r.index: problem(r, self.score, self.looks_back, text) for r in sites}
        misses = [f"attention {index}: {why}" for index, why in problems.items() if why]
        fit = [r for r in sites if not problems[r.index]]
        marks = {r.index: mark for r in fit if (mark := state_mark(r, text)) is not None} if self.looks_back else {}
        order = read_pairs(str(self.file), self.pairs, facts.attention, program, context.values) if fit and self.score == "pairs" else None
        chooser = KeyChooser(self, order, marks)
        done, whole, served = 0, 0, 0
        choice: Choice | None = None
        for region in fit:
            due = served == self.reuse if chosen_by is None else region.index in chosen_by
            chooses = choice is None or due or not choice.fits(region)
            if choice is None or chooses:
                choice, served = chooser.choose(region), 0
            else:
                served += 1
            if chooses and self.full:
                whole += 1
                continue
            chooser.attend(region, choice.index)
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
        return PageChoice(self.score, self.share, self.budget, self.sinks, self.recents, self.page, self.beam, self.branch, self.slack)

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
    def looks_back(self) -> str:
        """The option by which steps look back to the one before; ''."""
        return "density=true" if self.density else f"similar={self.similar}" if self.similar is not None else ""

    def _pays_from(self, order: PairOrder | None) -> str:
        """From how many keys on fewer operations are needed: scoring costs half of an attention, once in `reuse` + 1 attentions."""
        scored = 0.0 if self.score == "recents" else 0.5 / (self.reuse + 1)
        per_key, more = self.pages.cost() if self.score in PAGE_SCORES else (2 * self.pairs / order.sizes[2] if order else 1.0, 0)
        pays = (self.budget + scored * more) / (1 - min(scored * per_key, 0.99))  # pages of one key have two bounds: they save nothing
        return f"fewer operations from {round(pays):,} keys on, by the cost model; the graph serves any number"
