"""prune-tokens: after chosen layers, keep the best-scored tokens and run the rest of the model on them alone.

h' = h[S] with S = top-k of a score; later layers see only S, at original positions (position tables, masks on both axes and everything else
of the same axis class follow). At the exit, `carry` puts the surviving rows back into the residual as it was at the cut; `zero` puts them
into zeros; `drop` never puts them back (possible where the output reads kept rows only). Lossy. Refused where the output of an
autoregressive model covers all positions: which tokens stay depends on later ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

from torch import fx

from dyncc.analysis.axes import Axes, Read
from dyncc.analysis.facts import Facts
from dyncc.analysis.layers import Layer, Stack
from dyncc.ir import Program, argument, output_node, outputs
from dyncc.kernels.thin_keys import THIN
from dyncc.options import Keep, Layers, settle
from dyncc.passes.autoregressive import refuse_looking_ahead
from dyncc.passes.cache_rows import hold_short, marks, read_held
from dyncc.passes.cut import Cut, make_cut
from dyncc.passes.kept_rows import Kept
from dyncc.passes.padding import padding_input, real_rows
from dyncc.passes.reads import Reads, output_reads
from dyncc.pipeline import render
from dyncc.restrict import Plan, Refusal, plan_forward
from dyncc.rewrite import Context, Pass, PassResult
from dyncc.undo import undone_if_refused

Score = Literal[
    "auto", "cls-attention", "last-attention", "last-logits", "last-window-attention", "received-attention", "hidden-norm", "key-norm",
    "random",
]


@dataclass(frozen=True)
class PruneTokens(Pass):
    """Keep the `keep` best tokens after the given layers."""

    name: ClassVar[str] = "prune-tokens"
    summary: ClassVar[str] = "after chosen layers, run the rest of the model on the best-scored tokens"
    exact: ClassVar[bool] = False

    keep: Keep = 0.7
    layers: Layers = Layers("3")
    score: Score = "auto"
    site: Literal["layer", "attention"] = "layer"
    fill: Literal["auto", "carry", "zero", "drop"] = "auto"
    fuse: bool = False
    window: int = 32
    sinks: int = 0
    recents: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        settle(self)

    def run(self, program: Program, facts: Facts, context: Context) -> PassResult:
        """Prune every stack of layers that it fits; refuse when it fits none. Where a cache was made with this pass, it gets the rows that
        stayed, and its later steps read them."""
        text = render([self])
        found = marks(program.graph, text)
        if found and all(argument(n, "dense") is None for n in found):
            served = read_held(program.graph, facts, text)
            return PassResult(served, served)
        result, cuts = self._prune_all(program, facts, context)
        if found:
            hold_short(program.graph, cuts, text)
        return result

    def _prune_all(self, program: Program, facts: Facts, context: Context) -> tuple[PassResult, list[Cut]]:
        if not facts.stacks:
            raise Refusal(facts.misses[0] if facts.misses else "no attention layers were found")
        cuts: list[Cut] = []
        misses: list[str] = []
        shortened: set[int] = set()
        done = 0
        for stack in facts.stacks:
            try:
                with undone_if_refused(program.graph):
                    made, short = self._prune(program, facts, stack)
            except Refusal as refusal:
                misses.append(f"{refusal}{self._other_cache(program, facts)}")
                continue
            done += 1
            cuts += made
            shortened |= short
        if not done:
            raise Refusal(misses[0])
        if context.trace:
            _trace(program, cuts)
        reason = "keep=1.0 keeps every token: nothing to remove" if not cuts else ""
        plain = tuple(c.plain() for c in cuts)
        return PassResult(done, len(facts.stacks), reason, tuple(misses), plain, frozenset(shortened)), cuts

    def _prune(self, program: Program, facts: Facts, stack: Stack) -> tuple[list[Cut], set[int]]:
        schedule = self.layers.schedule(self.keep, len(stack.layers) + len(stack.tail))
        last = schedule[-1][0]
        if last >= len(stack.layers) or (self.site == "layer" and last == len(stack.layers) - 1 and not stack.tail):
            raise Refusal(f"nothing runs on all tokens after layer {last}; choose an earlier layer or site=attention")
        steps = [(stack.layers[i], keep) for i, keep in schedule]
        if stack.dim != 1:
            raise Refusal("the token axis is not dimension 1 of the residual stream")
        reads = output_reads(program, facts, stack)
        refuse_looking_ahead(program, facts, stack)
        padding = padding_input([x.attention for x in stack.layers], facts.axes, stack.axis, stack.batch)
        steps = [(layer, keep) for layer, keep in steps if keep != 1.0 or isinstance(keep, int)]
        cuts: list[Cut] = []
        shortened: set[int] = set()
        kept: Kept | None = None
        for layer, keep in steps:
            axes = Axes(program.graph)
            at = layer.middle if self.site == "attention" else layer.end
            if kept is None:
                kept = Kept.start(at, None if padding is None else partial(real_rows, source=padding, hidden=at), reads.computed)
            fill, plan, stop = self._plan(program, axes, stack, layer, at, reads, cuts)
            shortened |= self._short_outputs(program, facts, plan, stop)
            cut = make_cut(self._for(layer, keep, reads), program, axes, stack, layer, at, stop, plan, fill, reads, kept)
            kept = cut.after
            cuts.append(cut)
        return cuts, shortened

    def _for(self, layer: Layer, keep: Any, reads: Reads) -> PruneTokens:
        """These options for one cut, `auto` resolved by what the graph is."""
        score = self.score
        if score == "auto":
            score = "last-attention" if reads.last else "cls-attention" if reads.first else "received-attention"
        return replace(self, keep=keep, score=score)

    def _plan(
        self, program: Program, axes: Axes, stack: Stack, layer: Layer, at: fx.Node, reads: Reads, earlier: list[Cut]
    ) -> tuple[str, Plan, fx.Node | None]:
        """The fill and plan: `drop` if the outputs read kept rows only, else rows are put back behind the last layer."""
        axis = axes.dims(at)[stack.dim]
        regions = (*(x.attention for x in stack.layers if x.index >= layer.index), *stack.tail)

        def harmless(node: fx.Node, read: Read) -> bool:
            return node in reads.nodes or node.target is THIN

        if self.fill in ("auto", "drop") and all(c.stop is None for c in earlier):
            try:
                plan = plan_forward(axes, axis, at, stack.dim, None, regions, harmless)
                _check_outputs(program, plan)
                return "drop", plan, None
            except Refusal:
                if self.fill == "drop":
                    raise
        stop = stack.layers[-1].end
        plan = plan_forward(axes, axis, at, stack.dim, stop, regions, lambda node, read: node.target is THIN)
        _check_inside(plan, stop)
        return ("carry" if self.fill == "auto" else self.fill), plan, stop

    def _short_outputs(self, program: Program, facts: Facts, plan: Plan, stop: fx.Node | None) -> set[int]:
        """Outputs that become shorter: keys and values, offline only."""
        short = {i for i, n in enumerate(outputs(program.graph)) if isinstance(n, fx.Node) and n in plan.short and n is not stop}
        if short - facts.kv_outputs:
            raise Refusal(f"output {min(short - facts.kv_outputs)} holds rows of every token and would get shorter")
        if short and program.door == 1:
            cache = f"use past_key_values=dyncc.KVCache({render([self])!r}), which holds them so, or dyncc.optimize, which returns them so"
            raise Refusal(f"the keys and values that the graph returns would get shorter; {cache}")
        return short

    def _other_cache(self, program: Program, facts: Facts) -> str:
        """What to do where the graph fills a cache that does not know of this pass."""
        if program.door != 1 or not facts.mutated or marks(program.graph, render([self])):
            return ""
        return f"; if that fills a cache, use past_key_values=dyncc.KVCache({render([self])!r}) instead"


def _check_outputs(program: Program, plan: Plan) -> None:
    """With `drop`, only keys and values may leave the graph short (checked again, by position, in `_short_outputs`)."""
    ends = {n for n in outputs(program.graph) if isinstance(n, fx.Node) and n in plan.short}
    if any(len(plan.short[n]) != 1 or len(n.meta["val"].shape) < 4 for n in ends):
        raise Refusal("an output holds rows of every token")


def _check_inside(plan: Plan, stop: fx.Node) -> None:
    if stop not in plan.short:
        raise Refusal("the cut does not reach the end of the last layer")


def _trace(program: Program, cuts: list[Cut]) -> None:
    """Return each cut's selection (original positions and validity) behind the caller's outputs."""
    out = output_node(program.graph)
    extra = [n for c in cuts for n in (c.after.origin, c.after.valid) if n is not None]
    out.args = ((*outputs(program.graph), *extra),)
