"""evict-kv: a cache that keeps the keys which attention has used, and forgets the others.

Two sites. In a step over a `dyncc.KVCache(passes="evict-kv{...}")` the cache marks its keys (kernels/evict_keys, `watched`); the pass
computes what each key has earned beside the attention, and the cache itself drops keys by it, at its next step: outputs of this call do
not change. In a prompt whose keys and values are outputs (`Prefill(keys=True)`, an exported prefill) the outputs are the kept rows.
Scores: H2O (Zhang et al. 2023), A2SF (Jo & Shin 2024), Keyformer (Adnan et al. 2024), SnapKV (Li et al. 2024), StreamingLLM;
DapQ (Tian et al. 2026) for `ahead`, the attention of rows that stand behind the prompt (rows_ahead.py). With trained weights from a file
(given_scores.py): LookaheadKV (Ahn et al. 2026) for such rows, TRIM-KV (Bui et al. 2025) for `fade`, by which keys lose worth as they age,
and Attention-Gate (Zeng et al. 2024) for `gate`, by which each key of a prompt stays or goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from dyncc.analysis.attention import AttentionRegion, kv_sources
from dyncc.analysis.facts import Facts
from dyncc.errors import BadOptionValue
from dyncc.given_weights import AttentionGates, FadingGates, Gates, Lookahead
from dyncc.ir import GETITEM, Program, argument, emit, output_node, outputs, shape
from dyncc.kernels.evict_keys import (
    HIDDEN,
    WATCHED,
    keep_keys,
)
from dyncc.kernels.select_keys import select_keys, take_keys
from dyncc.options import at_least, settle
from dyncc.passes.earned_scores import EarnedScores, gate_scores
from dyncc.passes.given_scores import check_gates, check_model, load_given, rows_given
from dyncc.passes.rows_ahead import Look, RowsAhead, Site
from dyncc.passes.trained_rows import Given
from dyncc.pipeline import render
from dyncc.restrict import Refusal
from dyncc.rewrite import Context, Pass, PassResult


@dataclass(frozen=True)
class EvictKV(Pass):
    """Keep `budget` keys a head: once, at the first step after a prompt, or whenever `every` more are held."""

    name: ClassVar[str] = "evict-kv"
    summary: ClassVar[str] = "a cache keeps its most used keys and drops the others (with dyncc.KVCache, or on a prompt's returned keys)"
    exact: ClassVar[bool] = False

    budget: int = 1024
    score: Literal["received", "window", "ahead", "fade", "gate", "recents"] = "received"
    window: int = 32
    pool: int = 1
    decay: float = 1.0
    temperature: float = 1.0
    seed: int = -1
    sinks: int = 0
    recents: int = 32
    every: int = 0
    file: str | None = None

    def __post_init__(self) -> None:
        settle(self)
        at_least(self, budget=1, window=1, pool=1, sinks=0, recents=0, every=0, seed=-1)
        if wrong := self._problem():
            raise BadOptionValue(option=wrong[0], value=str(getattr(self, wrong[0])), problem=wrong[1])

    def _problem(self) -> tuple[str, str] | None:
        """The option that does not fit and why, or None."""
        if self.sinks + self.recents > self.budget:
            return "budget", f"it must hold the {self.sinks} sinks and {self.recents} recents that always stay"
        if self.pool % 2 == 0:
            return "pool", "a key stands in the middle of its pool: take an odd number"
        if not 0.0 < self.decay <= 1.0:
            return "decay", "it lies above 0 and is 1 at most"
        if self.score in ("ahead", "gate") and self.every:
            return "every", f"score={self.score} looks once, when the prompt ends: every=0"
        if self.score == "fade" and not self.every:
            return "every", "score=fade looks at keys as they age: every=1 or more"
        if self.file is not None and not self.wants_new:
            return "file", f"score={self.score} needs no trained weights"
        return ("temperature", "it lies above 0") if self.temperature <= 0 else None

    @property
    def wants_new(self) -> bool:
        """Whether scores are made from what this call's keys come from."""
        return self.score in ("ahead", "fade", "gate")

    def given(self) -> Lookahead | FadingGates | AttentionGates | None:
        """The trained weights in `file`.

        Raises:
            BadOptionValue: the score needs a file and has none.
            BadWeightFile: there is no such file, or it is damaged, or is something else.
        """
        writer = {"fade": "dyncc.save_gates", "gate": "dyncc.save_attention_gates"}.get(self.score)
        if self.file is None and writer is not None:
            raise BadOptionValue(option="file", value="none", problem=f"score={self.score} needs the file that {writer} wrote")
        return load_given(self.score, self.file) if self.file is not None else None

    def choose(self, scores: torch.Tensor, enough: bool = False, ages: torch.Tensor | None = None) -> torch.Tensor:
        """Sorted indices [B, G, min(budget, N)] of the keys that stay, by scores [B, G, N]; `enough`: N is `budget` at least; `ages`: how
        many tokens ago keys were read."""
        if self.score == "fade":
            assert ages is not None, "a key fades with its age"
            return select_keys(-(ages * scores), self.budget, scores[:, :1] >= 0, self.sinks, self.recents, enough)
        if self.score == "recents":
            at = torch.arange(scores.shape[2], device=scores.device, dtype=torch.float32)
            scores = torch.where(scores < 0, HIDDEN, at)
        return keep_keys(scores, self.budget, self.sinks, self.recents, self.pool, enough)

    def run(self, program: Any, facts: Facts, context: Context) -> PassResult:
        """Serve every marked cache, or shorten the keys and values that a prompt returns."""
        marks = [n for n in program.graph.nodes if n.target is WATCHED and argument(n, "policy") == render([self])]
        if marks:
            return self._serve(marks, program, facts, context)
        if self.file is not None or self.score in ("fade", "gate"):
            raise Refusal("trained weights come with dyncc.KVCache: compile the model and give it a cache made with this pass")
        return self._shorten_all(program, facts)

    def _shorten_all(self, program: Any, facts: Facts) -> PassResult:
        done, misses, shortened, held = 0, [], set(), {}
        for region in facts.attention:
            try:
                held[region] = self._held(program, region, facts)
            except Refusal as refusal:
                misses.append(f"attention {region.index}: {refusal}")
        returned = outputs(program.graph)
        looks = self._look(facts, None, [Site(r, returned[k], returned[v]) for r, (k, v) in held.items()])
        earned = EarnedScores(self, looks)
        for region, at in held.items():
            try:
                self._shorten(program, region, at, earned)
                shortened |= set(at)
                done += 1
            except Refusal as refusal:
                misses.append(f"attention {region.index}: {refusal}")
        if not done:
            raise Refusal(misses[0] if misses else "the graph has no attention")
        gain = f"the steps that follow hold {self.budget:,} of the prompt's keys a head"
        return PassResult(done, facts.expected, misses=tuple(misses), shortened_outputs=frozenset(shortened), pays_from=gain)

    def _serve(self, marks: list[fx.Node], program: Program, facts: Facts, context: Context) -> PassResult:
        """Put the keys themselves and their new scores in place of each mark."""
        readers = {mark: region for region in facts.attention for mark in _behind(region)}
        given = self.given()
        parameters = check_model(given, program, context.values) if given is not None else []
        if isinstance(given, Gates):
            check_gates(given, facts)
        rows = rows_given(given, marks[0].args[3], parameters) if isinstance(given, Lookahead) else None
        looks = self._look(facts, rows, [Site(readers[m], *m.args[2]) for m in marks if m in readers and m.args[2]])
        earned = EarnedScores(self, looks)
        for number, mark in enumerate(marks):
            region = readers.get(mark)
            if region is None:
                raise Refusal(f"no attention that dyncc understands reads the keys of cache layer {number}")
            keys, old, new, gate, _, rows, start = mark.args
            if isinstance(given, Gates):
                scores = gate_scores(region, given, old, new[0], gate)
            else:
                scores = earned.scores(region, shape(keys)[1], old, rows, start)
            for user in list(mark.users):
                user.replace_all_uses_with(keys if user.args[1] == 0 else scores)
                user.graph.erase_node(user)
            mark.graph.erase_node(mark)
        return PassResult(len(marks), len(marks))

    def _look(self, facts: Facts, given: Given | None, sites: list[Site]) -> dict[fx.Node, Look]:
        """What rows behind the prompt ask in its attentions."""
        if self.score != "ahead" or not sites:
            return {}
        if any(not site.region.fused for site in sites):
            raise Refusal("rows behind the prompt need plain queries and keys; load the model with attn_implementation='sdpa'")
        return RowsAhead(facts.axes, sites, self.window, given).run()

    def _held(self, program: Any, region: AttentionRegion, facts: Facts) -> tuple[int, int]:
        """The numbers of the outputs that are one attention's keys and values."""
        returned = outputs(program.graph)
        held = [i for i, n in enumerate(returned) if i in facts.kv_outputs and n in kv_sources(region)]
        if len(held) != 2:
            raise Refusal(f"its keys and values are no outputs of the graph ({len(held)} of 2 are); evict-kv acts on a cache")
        rows = shape(region.q)[-2]
        if isinstance(rows, int) and rows == 1:
            raise Refusal("it has one query row; evict-kv acts on prompts, and in decoding steps with dyncc.KVCache(passes=...)")
        return held[0], held[1]

    def _shorten(self, program: Any, region: AttentionRegion, held: tuple[int, int], earned: EarnedScores) -> None:
        """Return the kept rows of one attention's keys and values."""
        returned, out = outputs(program.graph), output_node(program.graph)
        kept = emit(out, self.choose, earned.scores(region, shape(returned[held[0]])[1], None, None, 0))
        for i in held:
            returned[i] = emit(out, take_keys, returned[i], kept)
        out.args = (tuple(returned),)


def _behind(region: AttentionRegion) -> set[fx.Node]:
    """The marks that an attention's keys come through."""
    return {n.args[0] for n in kv_sources(region) if n.target is GETITEM and n.args[0].target is WATCHED}
