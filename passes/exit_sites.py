"""Sites of early exits: the head behind a layer, and which rows are sure of what it gives.

A rule is one small function of the logits there or of the row that the head reads: exit_scores.py, exit_gates.py, exit_stop.py,
exit_masked.py. What a rule wants to know of former sites travels with the rows (`carried`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx

from dyncc.analysis.axes import Axes
from dyncc.analysis.layers import Layer, Stack
from dyncc.ir import emit, shape, val
from dyncc.passes.exit_gates import conditional, gate
from dyncc.passes.exit_heads import Head, Map, put_head, row_of
from dyncc.passes.exit_masked import surest_masked, token_ids
from dyncc.passes.exit_scores import OF_LOGITS, decayed, probe, saturation
from dyncc.passes.exit_stop import controlled, ended
from dyncc.restrict import Refusal

Score = Literal["max-prob", "margin", "entropy", "saturation", "probe", "gate", "controller"]
WANTED = {
    "probe": ("exit.{}.probe.weight", "exit.{}.probe.bias"), "gate": ("exit.{}.gate.weight", "exit.{}.gate.bias"),
    "controller": ("exit.controller.weight",),
}  # fmt: skip
"""The parameters that a score needs, by name; `{}` is the layer."""


@dataclass(frozen=True)
class Rule:
    """How rows become sure: `score` and `threshold`, which decays over `steps` tokens; `stop` and `end` of the controller; the mask token
    `masked`, or -1; and where the parameters of a layer are found in the graph."""

    score: Score
    threshold: float
    decay: float
    steps: int
    stop: float
    end: int
    masked: int
    given: Callable[[str], fx.Node]


@dataclass(frozen=True)
class Site:
    """A place to leave: the state h_l [B, T, D], what the head gives there, which rows are sure, [B] bool, and what goes on with rows."""

    layer: int
    state: fx.Node
    answers: tuple[fx.Node, ...]
    sure: fx.Node
    carried: tuple[fx.Node, ...] = ()

    @property
    def leaving(self) -> tuple[fx.Node, ...]:
        """All that rows need on their way to the next site."""
        return (self.state, *self.answers, self.sure, *self.carried)


def put_site(axes: Axes, stack: Stack, head: Head, layer: Layer, affine: Map | None, rule: Rule, former: Site | None) -> Site:
    """The head behind a layer, and which rows are sure there."""
    state = layer.end
    before = state.next
    site = Site(layer.index, state, put_head(head, state, affine, before), state)
    if rule.score == "controller":
        return _controlled(site, head, rule, _limit(stack, rule), before)
    if rule.score == "gate":
        return _gated(site, rule, former, _limit(stack, rule), before)
    if rule.masked >= 0:
        score = _masked(axes, stack, site, rule, before)
    elif rule.score in ("saturation", "probe"):
        score = _of_row(head, layer, rule, before)
    else:
        _check_logits(site.answers[0], rule.score)
        score = emit(before, lambda x: OF_LOGITS[rule.score](x.flatten(0, -2)), site.answers[0])
    return replace(site, sure=_reaches(score, _limit(stack, rule), before))


def _limit(stack: Stack, rule: Rule) -> Any:
    """The threshold: a number, or a function of the tokens read, with the tensor and dimension that know how many they are."""
    if not rule.decay:
        return rule.threshold
    first = stack.layers[0]
    source, dim = (first.end, stack.dim) if stack.axis else (first.attention.k, -2)
    return partial(decayed, rule.threshold, rule.decay, rule.steps), source, dim


def _reaches(score: fx.Node, limit: Any, before: fx.Node) -> fx.Node:
    sure: fx.Node
    if isinstance(limit, float):
        sure = emit(before, lambda s: s >= limit, score)
    else:
        function, source, dim = limit
        sure = emit(before, lambda s, x: s >= function(x.shape[dim]), score, source)
    return sure


def _of_row(head: Head, layer: Layer, rule: Rule, before: fx.Node) -> fx.Node:
    found: fx.Node
    if rule.score == "saturation":
        found = emit(before, saturation, *[row_of(head, n, before) for n in (layer.end, layer.start)])
    else:
        found = emit(before, probe, row_of(head, layer.end, before), *_given(rule, layer.index))
    return found


def _given(rule: Rule, layer: int) -> list[fx.Node]:
    return [rule.given(name.format(layer)) for name in WANTED[rule.score]]


def _gated(site: Site, rule: Rule, former: Site | None, limit: Any, before: fx.Node) -> Site:
    _check_logits(site.answers[0], rule.score)
    g = emit(before, lambda x, w, b: gate(x.flatten(0, -2), w, b), site.answers[0], *_given(rule, site.layer))
    carried = former.carried if former else (emit(before, torch.zeros_like, g), emit(before, torch.ones_like, g))
    p, *carried = emit(before, conditional, g, *carried)
    return replace(site, sure=_reaches(p, limit, before), carried=tuple(carried))


def _controlled(site: Site, head: Head, rule: Rule, limit: Any, before: fx.Node) -> Site:
    _check_logits(site.answers[0], rule.score)
    row = row_of(head, site.state, before)
    score, stopped = emit(before, lambda x, w: controlled(x, w, rule.stop), row, *_given(rule, site.layer))
    first = site.answers[0]
    if rule.end >= shape(first)[-1]:
        raise Refusal(f"end={rule.end} is no token: the first output has {shape(first)[-1]} of them")
    if rule.end >= 0:
        first = emit(before, lambda x, s: ended(x, s, rule.end), first, stopped)
    sure = emit(before, torch.logical_or, _reaches(score, limit, before), stopped)
    return replace(site, answers=(first, *site.answers[1:]), sure=sure)


def _masked(axes: Axes, stack: Stack, site: Site, rule: Rule, before: fx.Node) -> fx.Node:
    """The score of the surest position that is still masked."""
    answer, ids = site.answers[0], token_ids(axes, stack)
    if shape(answer)[:-1] != shape(ids) or not val(answer).is_floating_point():
        raise Refusal(f"masked= needs logits at all positions {list(shape(ids))}, and the first output is {list(shape(answer))}")

    def surest(logits: Tensor, ids: Tensor) -> Tensor:
        return surest_masked(OF_LOGITS[rule.score](logits), ids, rule.masked)

    score: fx.Node = emit(before, surest, answer, ids)
    return score


def _check_logits(answer: fx.Node, score: str) -> None:
    sizes = shape(answer)
    if len(sizes) < 2 or any(s != 1 for s in sizes[1:-1]) or not val(answer).is_floating_point():
        raise Refusal(
            f"score={score} needs logits of one position a row, and the first output is {list(sizes)}; "
            "ask for the last position only (such as logits_to_keep=1), or use score=saturation"
        )
