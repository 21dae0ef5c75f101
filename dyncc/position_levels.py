"""One static graph per level of depth, chosen by the position of a token: SkipDecode.

E(t) = most + (least - most) t / horizon, rounded and clamped, layers run for the token at position t: the `warm` first and the E(t) - warm
at the top. It never rises, so the layers of a later token are among those of every earlier one, and whatever it attends to was computed by
the layer itself. The caches of the others grow too (see passes/drop_layers.py).
Del Corro et al., SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient LLM Inference, 2023.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dyncc.analysis.facts import analyse
from dyncc.errors import BadOptionValue, InputMismatch, RefusedError
from dyncc.ir import Program
from dyncc.passes.one_stack import one_stack
from dyncc.restrict import Refusal
from dyncc.runtime import Optimized, optimize


@dataclass(frozen=True)
class Level:
    """From position `first` on, `active` layers run."""

    first: int
    active: int


class PositionLevels:
    """A model with a graph a level; call it with the position of the token in front of the model's own arguments."""

    def __init__(self, levels: tuple[Level, ...], graphs: tuple[Optimized, ...]) -> None:
        self.levels, self.graphs = levels, graphs

    def level(self, position: int) -> int:
        """The number of the level that a position belongs to.

        Raises:
            InputMismatch: the position is negative.
        """
        if position < 0:
            raise InputMismatch(problem=f"position {position} is negative", hint="give the number of tokens in front of this one")
        return bisect_right([level.first for level in self.levels], position) - 1

    def at(self, position: int) -> Optimized:
        """The graph that runs a token at a position."""
        return self.graphs[self.level(position)]

    def __call__(self, position: int, *args: Any, **kwargs: Any) -> Any:
        return self.at(position)(*args, **kwargs)

    def export_onnx(self, folder: str | Path, **options: Any) -> list[Any]:
        """A file a level in a folder, `active_<layers>.onnx`; what `Optimized.export_onnx` returns of each."""
        pairs = zip(self.levels, self.graphs, strict=True)
        return [graph.export_onnx(Path(folder) / f"active_{level.active}.onnx", **options) for level, graph in pairs]


def active_layers(position: int, most: int, least: int, horizon: int) -> int:
    """E(t).

    >>> [active_layers(t, 8, 4, 16) for t in (0, 1, 2, 8, 16, 99)]
    [8, 8, 8, 6, 4, 4]
    """
    return max(least, min(most, math.floor(most + (least - most) * position / horizon + 0.5)))


def plan_levels(most: int, least: int, horizon: int, levels: int) -> tuple[Level, ...]:
    """At most `levels` levels: E(t) is rounded up to one of so many values, spread from `most` to `least`.

    >>> plan_levels(8, 4, 16, 3)
    (Level(first=0, active=8), Level(first=7, active=6), Level(first=15, active=4))
    """
    spread = [most + (least - most) * i / max(levels - 1, 1) for i in range(levels)] if levels > 1 else [most]
    values = sorted({math.floor(v + 0.5) for v in spread})
    found: list[Level] = []
    for position in range(horizon + 1):
        wanted = active_layers(position, most, least, horizon)
        active = next(v for v in values if v >= wanted)
        if not found or active < found[-1].active:
            found.append(Level(position, active))
    return tuple(found)


def optimize_by_position(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    least: int,
    horizon: int,
    most: int | None = None,
    warm: int = 1,
    levels: int = 4,
    passes: str = "",
    **options: Any,
) -> PositionLevels:
    """Optimize a decoding step (a module that takes and returns its cache, such as `dyncc.decoding.Decode`) once a level.

    Args:
        least, most: how many layers run from position `horizon` on, and at position 0 (None: all of them).
        warm: how many of the first layers always run.
        levels: how many graphs at most.
        passes: other passes of every level, behind `drop-layers`.
        options: as for `dyncc.optimize`.
    Raises:
        BadOptionValue: a number that does not fit the model.
        RefusedError: the layers of the model cannot be left out; the message says why.
    """
    if horizon < 1 or levels < 1 or warm < 0:
        raise BadOptionValue(option="horizon, levels, warm", value=f"{horizon}, {levels}, {warm}", problem="1, 1 and 0 are the least")
    dense = optimize(model, args, kwargs, passes=passes, **options)
    total = _layers(dense._outcome.dense)
    top = total if most is None else most
    if not max(warm, 1) <= least <= top <= total:
        problem = f"warm={warm} <= least <= most <= {total}, the model's layers, is wanted"
        raise BadOptionValue(option="least, most", value=f"{least}, {top}", problem=problem)
    planned = plan_levels(top, least, horizon, levels)
    graphs = []
    for level in planned:
        text = f"drop-layers{{active={level.active} warm={warm}}} {passes}"
        full = level.active == total
        graphs.append(dense if full else optimize(model, args, kwargs, passes=text, **{**options, "strict": True}))
    return PositionLevels(planned, tuple(graphs))


def _layers(program: Program) -> int:
    try:
        return len(one_stack(program, analyse(program)).layers)
    except Refusal as refusal:
        raise RefusedError(f"its layers cannot be left out: {refusal}") from refusal
