"""exit-early: rows that are sure of their result after a chosen layer leave with it, and the rest of the model runs for the others.

At each site the model's own head (the graph behind its last layer) is computed on the state h_l there, behind a fitted affine map where a
file gives one. A row leaves at the first site whose score reaches the threshold; what lies between two sites is a branch (dyncc/branch.py)
on the rows that stayed. Decisions are each row's own. Lossy; with a threshold above 1 no row leaves, at 0 all leave at the first site.
Keys and values that the graph returns are made of the state that a row left with, where it skips their layer (exit_keys.py).
A cache that is written in place there, as dyncc.KVCache is, gets them last (exit_caches.py).
Side conditions: nothing else that the caller gets is made behind the first site, and nothing else is written in place there.
Schuster et al., Confident Adaptive Language Modeling, NeurIPS 2022; the map in front of the head: Din et al., Jump to Conclusions, 2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from dyncc.analysis.axes import Axes
from dyncc.analysis.facts import Facts
from dyncc.analysis.layers import Stack
from dyncc.branch import Branch, branch
from dyncc.errors import BadOptionValue
from dyncc.fitted import Parameters, load_fitted
from dyncc.ir import Program, descendants, emit, hint, output_node, shape
from dyncc.options import Keep, Layers, settle
from dyncc.pass_tensors import brought, check_belongs
from dyncc.passes.exit_caches import written_keys
from dyncc.passes.exit_heads import Head, Map, find_head, put_head
from dyncc.passes.exit_keys import keys_behind, projected, stored_keys
from dyncc.passes.exit_scores import OF_LOGITS
from dyncc.passes.exit_sites import WANTED, Rule, Score, Site, put_site
from dyncc.passes.one_stack import one_stack
from dyncc.passes.reads import output_reads
from dyncc.region import Rows, find_region
from dyncc.restrict import Refusal, where
from dyncc.rewrite import Context, Pass, PassResult


@dataclass(frozen=True)
class ExitEarly(Pass):
    """Let rows leave after the given layers where `score` is at least `threshold`. With `score=controller` rows also stop, with the token
    `end`, where that class reaches `stop`; `masked` is the mask token of a diffusion language model, whose steps are scored there alone."""

    name: ClassVar[str] = "exit-early"
    summary: ClassVar[str] = "rows that are sure of their result after a chosen layer skip the layers behind it"
    exact: ClassVar[bool] = False

    layers: Layers = Layers("25%,50%,75%")
    score: Score = "max-prob"
    threshold: float = 0.9
    decay: float = 0.0
    steps: int = 512
    stop: float = 2.0
    end: int = -1
    masked: int = -1
    realise: Literal["auto", "select", "cond", "compact", "static"] = "auto"
    buckets: Keep = (0.125, 0.25, 0.5)
    file: str | None = None

    def __post_init__(self) -> None:
        settle(self)
        if self.score in WANTED and self.file is None:
            problem = f"it needs file=, parameters that hold {' and '.join(WANTED[self.score]).format('<layer>', '<layer>')}"
            raise BadOptionValue(option="score", value=self.score, problem=problem)
        if self.masked >= 0 and self.score not in OF_LOGITS:
            raise BadOptionValue(option="masked", value=str(self.masked), problem=f"give score={', '.join(OF_LOGITS)} with it")
        if 0.0 <= self.stop <= 1.0 and (self.score != "controller" or self.end < 0):
            problem = "stopping needs score=controller and end=, the end-of-text token that a stopped row gets"
            raise BadOptionValue(option="stop", value=str(self.stop), problem=problem)
        for option, value, right, problem in (
            ("threshold", self.threshold, self.threshold >= 0, "scores lie between 0 and 1; above 1 no row leaves"),
            ("decay", self.decay, self.decay >= 0, "it must not be negative"),
            ("steps", self.steps, self.steps > 0, "it must be positive"),
            ("stop", self.stop, self.stop >= 0, "a probability; above 1 no row stops"),
            ("end", self.end, self.end >= -1, "a token, or -1"),
            ("masked", self.masked, self.masked >= -1, "a token, or -1"),
        ):
            if not right:
                raise BadOptionValue(option=option, value=str(value), problem=problem)

    def tensors(self) -> Mapping[str, Tensor]:
        """The maps and probes of the file."""
        given = self._fitted()
        return {} if given is None else given.of(sorted(n for n in given.held.tensors if n.startswith("exit.")))

    def _fitted(self) -> Parameters | None:
        return None if self.file is None else load_fitted(self.file)

    def _map(self, program: Program, layer: int) -> Map | None:
        """The fitted map in front of the head of a layer; a file of probes may hold none."""
        given, name = self._fitted(), f"exit.{layer}.map"
        if given is None or (self.score in WANTED and f"{name}.weight" not in given):
            return None
        weight, bias = given.of([f"{name}.weight", f"{name}.bias"])
        return brought(program, weight), brought(program, bias)

    def run(self, program: Program, facts: Facts, context: Context) -> PassResult:
        """Put exits on the one stack of layers that the outputs come from."""
        stack = one_stack(program, facts)
        if stack.dim != 1:
            raise Refusal("the token axis is not dimension 1 of the residual stream")
        layers = tuple(dict.fromkeys(self.layers.resolve(len(stack.layers))))
        if layers[-1] == len(stack.layers) - 1:
            raise Refusal(f"no layer is left to skip after layer {layers[-1]}, the last one; choose an earlier layer")
        appended = written_keys(program.graph, stack.layers[layers[0]].end, stack.layers[0].start)
        behind = descendants(stack.layers[layers[0]].end)
        if written := [n for n in facts.mutated if n in behind and n not in appended.values()]:
            problem = "writes in place behind the first exit, and a branch must not; give generate() past_key_values=dyncc.KVCache()"
            raise Refusal(f"{where(written[0])} {problem}, or take the past as inputs and return it, as dyncc.decoding.Decode does")
        given = self._fitted()
        if given is not None:
            width = hint(shape(stack.layers[0].end)[-1])
            check_belongs(given, program, context.values, width)
        head = find_head(program.graph, facts.axes, stack, output_reads(program, facts, stack))
        stored = {**stored_keys(program, facts, stack), **appended}
        if self.realise == "static":
            return self._cut(program, stack, head, layers, stored)
        sites = self._sites(program, facts.axes, stack, head, layers)
        rows = Rows(axes := Axes(program.graph), axes.dims(sites[0].state)[0])
        for i in reversed(range(len(sites))):
            self._skip(program, stack, sites[i], sites[i + 1] if i + 1 < len(sites) else None, head, rows, stored)
        return PassResult(len(sites), len(sites), pays_from=_pays(layers, len(stack.layers)))

    def _cut(self, program: Program, stack: Stack, head: Head, layers: tuple[int, ...], stored: Mapping[fx.Node, fx.Node]) -> PassResult:
        """Every row leaves after the one layer: the static graph of one level."""
        if len(layers) > 1:
            raise Refusal("realise=static leaves after one layer; give one in layers")
        state = stack.layers[layers[0]].end
        before = state.next
        answers = put_head(head, state, self._map(program, layers[0]), before)
        for old, new in zip(head.suffix.exits, answers, strict=True):
            output_node(program.graph).replace_input_with(old, new)
        for keys in keys_behind(stored, state, None):
            stored[keys].replace_input_with(keys, projected(stack, keys, state, before))
        return PassResult(1, 1)

    def _sites(self, program: Program, axes: Axes, stack: Stack, head: Head, layers: tuple[int, ...]) -> list[Site]:
        """The head behind every chosen layer, and which rows are sure there."""
        found = self._fitted()

        def given(name: str) -> fx.Node:
            assert found is not None
            found.take(name)
            return brought(program, found.mark(name))

        rule = Rule(self.score, self.threshold, self.decay, self.steps, self.stop, self.end, self.masked, given)
        sites: list[Site] = []
        for layer in layers:
            former = sites[-1] if sites else None
            sites.append(put_site(axes, stack, head, stack.layers[layer], self._map(program, layer), rule, former))
        return sites

    def _skip(
        self, program: Program, stack: Stack, site: Site, following: Site | None, head: Head, rows: Rows, stored: Mapping[fx.Node, fx.Node]
    ) -> None:
        """What lies between two sites, or behind the last one, runs for the rows that stayed."""
        exits = following.leaving if following else head.suffix.exits
        otherwise = site.leaving if following else site.answers
        before = site.sure.next
        keys = keys_behind(stored, site.state, following.state if following else None)
        rest = [projected(stack, n, site.state, before) for n in keys]
        region = find_region([site.state, *site.carried], (*exits, *keys))
        active = emit(before, torch.logical_not, site.sure)
        made = Branch(region, active, (*otherwise, *rest), rows)
        size = hint(shape(site.state)[0])
        realise = ("compact" if size > 1 else "cond") if self.realise == "auto" else self.realise
        branch(program, made, realise, self._buckets(size))  # type: ignore[arg-type]

    def _buckets(self, size: int) -> list[int]:
        """Numbers of rows that the rest of the model is compiled for, besides the whole batch."""
        given = self.buckets if isinstance(self.buckets, tuple) else (self.buckets,)
        counts = {b if isinstance(b, int) else max(1, round(b * size)) for b in given}
        return sorted(c for c in counts if c < size)


def _pays(layers: tuple[int, ...], count: int) -> str:
    skipped = count - 1 - layers[0]
    return f"rows that leave after layer {layers[0]} skip {skipped} of {count} layers; where none leaves it costs {len(layers)} heads more"
