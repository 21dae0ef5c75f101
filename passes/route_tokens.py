"""route-tokens: chosen tokens run a layer, the others take a stand-in; keys and values are computed for all.

    h'[t] = layer(h)[t]  where t runs,   h[t] + (h[t] down up + bias)  (fill=affine)  or  h[t]  (fill=carry)  elsewhere

Which run: with `rule=count` the `rate` best-scored tokens of each sequence (capacity-k; which ones depends on later tokens, so it is
refused where an autoregressive model answers at all positions); with `rule=threshold` those whose score lies above the quantile that let
`rate` of the calibration tokens through, the first `capacity` of a sequence at most: later tokens change nothing. Scores come from a
router, fitted (the log of how wrong the surrogate will be) or given, or are norms of the state. Queries, output projection and MLP of a
layer run for the chosen tokens alone; its keys and values for all, so that caches hold every token. Lossy.

With `site=mlp` attention runs for all and the MLP is routed; `fill=small` gives the others a small MLP of that form (small_mlp.py). With
`rule=level` a given router of three logits says of each token: skip, small or big; the first `rate` of a sequence that say big are.

Informed Routing (2025): execute-or-approximate. Duo-LLM (2024): `site=mlp fill=small rule=level`.
Raposo et al., Mixture-of-Depths: Dynamically allocating compute in transformer-based language models, 2024: `fill=carry weigh=true` with
given routers (`dyncc.save_parameters`), x + r(x) (layer(x) - x) for chosen tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from dyncc.analysis.axes import Axes
from dyncc.analysis.facts import Facts
from dyncc.analysis.layers import Layer, Stack
from dyncc.errors import BadOptionValue
from dyncc.fitted import Parameters, load_fitted
from dyncc.ir import Program, emit, shape
from dyncc.kernels.route_rows import router_scores
from dyncc.options import Layers, settle
from dyncc.pass_tensors import brought, check_belongs
from dyncc.passes.autoregressive import refuse_looking_ahead
from dyncc.passes.kept_rows import row_count
from dyncc.passes.one_stack import one_stack
from dyncc.passes.padding import padding_input, real_rows
from dyncc.passes.small_mlp import mlp_start, small_mlp
from dyncc.passes.some_rows import run_some_rows, select_rows_of
from dyncc.restrict import Refusal
from dyncc.rewrite import Context, Pass, PassResult

SKIP, BIG = 0, 2
"""Levels of a token, a small MLP's between them."""


@dataclass(frozen=True)
class RouteTokens(Pass):
    """Run `layers` for `rate` of the tokens."""

    name: ClassVar[str] = "route-tokens"
    summary: ClassVar[str] = "chosen tokens run a layer, the others take a fitted surrogate or are carried over it"
    exact: ClassVar[bool] = False

    rate: float = 0.5
    layers: Layers | None = None
    fill: Literal["affine", "carry", "small"] = "affine"
    score: Literal["router", "norm"] = "router"
    rule: Literal["count", "threshold", "level"] = "count"
    site: Literal["layer", "mlp"] = "layer"
    capacity: float = 0.0
    weigh: bool = False
    file: str | None = None

    def __post_init__(self) -> None:
        settle(self)
        if not 0.0 < self.rate <= 1.0:
            raise BadOptionValue(option="rate", value=str(self.rate), problem="a share of the tokens above 0.0 up to 1.0")
        if self.capacity and not self.rate <= self.capacity <= 1.0:
            raise BadOptionValue(option="capacity", value=str(self.capacity), problem=f"between rate={self.rate} and 1.0, or 0.0")
        if self.rule == "threshold" and self.score != "router":
            raise BadOptionValue(option="rule", value="threshold", problem="thresholds are known of a fitted router only: score=router")
        if self.weigh and (self.score != "router" or self.fill != "carry"):
            problem = "a router's score weighs what a layer adds: score=router fill=carry"
            raise BadOptionValue(option="weigh", value="true", problem=problem)
        for fits, option, problem in (
            (self.site == "mlp" or self.fill != "small", "fill", "a small MLP stands in for an MLP: site=mlp"),
            (self.site == "layer" or self.fill != "affine", "fill", "surrogates stand in for layers: site=layer, or fill=carry or small"),
            (self.rule != "level" or self.fill == "small", "rule", "levels are skip, small and big: site=mlp fill=small"),
        ):
            if not fits:
                raise BadOptionValue(option=option, value=str(getattr(self, option)), problem=problem)

    @property
    def wanted(self) -> tuple[str, ...]:
        """The parameters that a layer needs."""
        parts = ("down.weight", "up.weight", "bias") if self.fill == "affine" else ()
        if self.rule == "level":
            return (*parts, "levels.weight", "levels.bias")
        return parts + (("router.weight", "router.bias") if self.score == "router" else ())

    def parameters(self) -> Parameters | None:
        """What the file holds.

        Raises:
            BadOptionValue: one is needed and none is given.
            BadParameterFile: it cannot be taken.
        """
        if (self.wanted or self.fill == "small") and self.file is None:
            problem = f"fill={self.fill} score={self.score} need what `dyncc fit` (part `units`) or dyncc.save_parameters wrote"
            raise BadOptionValue(option="file", value="none", problem=problem)
        return load_fitted(Path(self.file)) if self.file is not None else None

    def tensors(self) -> Mapping[str, Tensor]:
        """Every surrogate and router of the file."""
        found = self.parameters()
        units = [n for n in found.held.tensors if n.startswith("unit.")] if found else []
        names = [n for n in units if (part := n.split(".", 2)[2]) in self.wanted or (self.fill == "small" and part.startswith("small."))]
        return found.of(names) if found else {}

    def run(self, program: Program, facts: Facts, context: Context) -> PassResult:
        """Route every chosen layer, the last one first."""
        stack = one_stack(program, facts)
        if not stack.axis:
            raise Refusal("a step of one token has no tokens to choose from; route prompts")
        if stack.dim != 1:
            raise Refusal("the token axis is not dimension 1 of the residual stream")
        total = len(stack.layers)
        chosen = tuple(range(total)) if self.layers is None else tuple(dict.fromkeys(self.layers.resolve(total)))
        found = self.parameters()
        if found is not None:
            check_belongs(found, program, context.values, int(shape(stack.layers[0].start)[-1]))
            for layer in chosen:
                for part in self.wanted:
                    found.take(f"unit.{layer}.{part}")
        if self.rule == "count":
            refuse_looking_ahead(program, facts, stack)
        if self.rate == 1.0 and self.rule == "count" and not self.weigh:
            return PassResult(0, len(chosen), reason="rate=1.0 runs every token: nothing to approximate")
        padding = padding_input([x.attention for x in stack.layers], facts.axes, stack.axis, stack.batch)
        for index in reversed(chosen):
            self._route(program, stack, stack.layers[index], found, padding)
        return PassResult(len(chosen), len(chosen))

    def _route(self, program: Program, stack: Stack, layer: Layer, found: Parameters | None, padding: fx.Node | None) -> None:
        """Make one layer, or its MLP, run for some rows."""
        layer = replace(layer, start=mlp_start(stack, layer)) if self.site == "mlp" else layer
        before = layer.start.next
        given = {part: brought(program, found.mark(f"unit.{layer.index}.{part}")) for part in self.wanted} if found else {}
        real = None if padding is None else real_rows(before, padding, layer.start)
        score = self._score(before, layer, given)
        share = (self.capacity or self.rate) if self.rule == "threshold" else self.rate
        level = {"count": lambda: None, "threshold": lambda: self._level(found, layer), "level": lambda: BIG - 0.5}[self.rule]()
        index, valid = select_rows_of(before, score, real, lambda tokens: row_count(share, tokens), level)
        base = self._stand_in(program, layer, found, given, score)
        weight = emit(before, lambda s, i: s.gather(1, i), score, index) if self.weigh else None
        run_some_rows(Axes(program.graph), stack, layer, index, valid, base, weight)

    def _stand_in(self, program: Program, layer: Layer, found: Parameters | None, given: Mapping[str, fx.Node], score: fx.Node) -> fx.Node:
        """What rows that do not run get [B, T, D]."""
        made: fx.Node = layer.start
        if self.fill == "affine":
            parts = (given[p] for p in ("down.weight", "up.weight", "bias"))
            made = emit(layer.start.next, _approximate, layer.start, *parts)
        elif self.fill == "small":
            assert found is not None
            made = small_mlp(layer, lambda part: _brought(program, found, f"unit.{layer.index}.small.{part}"))
            if self.rule == "level":
                made = emit(layer.end, lambda s, small, x: torch.where((s > SKIP).unsqueeze(-1), small, x), score, made, layer.start)
        return made

    def _score(self, before: fx.Node, layer: Layer, given: Mapping[str, fx.Node]) -> fx.Node:
        """[B, T], higher runs."""
        made: fx.Node
        if self.score == "norm":
            made = emit(before, lambda x: x.float().norm(dim=-1), layer.start)
        elif self.rule == "level":
            made = emit(before, levels, layer.start, given["levels.weight"], given["levels.bias"])
        else:
            scaled = not self.weigh
            made = emit(before, lambda x, w, b: router_scores(x, w, b, scaled), layer.start, given["router.weight"], given["router.bias"])
        return made

    def _level(self, found: Parameters | None, layer: Layer) -> float:
        """The score above which `rate` of the calibration tokens lay."""
        assert found is not None
        quantiles = found.take(f"unit.{layer.index}.router.quantiles")
        at = (1.0 - self.rate) * (len(quantiles) - 1)
        low = min(int(at), len(quantiles) - 2)
        return float(torch.lerp(quantiles[low], quantiles[low + 1], at - low)) if self.rate < 1.0 else float("-inf")


def levels(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The level of each state x [B, T, D], as float32 [B, T]: the greatest of its logits by `weight` [3, D] and `bias` [3].

    >>> levels(torch.eye(3), torch.eye(3), torch.zeros(3)).tolist()
    [0.0, 1.0, 2.0]
    """
    return torch.nn.functional.linear(x.float(), weight.float(), bias.float()).argmax(-1).float()


def _brought(program: Program, found: Parameters, name: str) -> fx.Node:
    found.take(name)
    return brought(program, found.mark(name))


def _approximate(x: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """x + x down up + bias, for all rows: two thin products."""
    linear = torch.nn.functional.linear
    return x + linear(linear(x, down.to(x.dtype)), up.to(x.dtype), bias.to(x.dtype))
