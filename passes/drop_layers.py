"""drop-layers: leave whole layers out and carry the residual stream over them, h_(l+1) = h_l.

Which ones: given by number; or the `count` whose absence alone moves the output least on calibration data (`dyncc fit`, part `drops`); or
all but `active`: the `warm` first and the others at the top, as SkipDecode does (Del Corro et al., SkipDecode: Autoregressive Skip Decoding
with Batching and Caching for Efficient LLM Inference, 2023). Lossy. One static graph; nothing is decided while it runs.

Keys and values: where the graph returns or writes those of a layer that is left out, they are still computed, from the stream that is
carried over it, so that every layer of a cache holds as many rows as there are tokens, and a later step may run the layer again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dyncc.analysis.facts import Facts
from dyncc.analysis.layers import Stack
from dyncc.errors import BadOptionValue, BadParameterFile
from dyncc.fitted import load_fitted
from dyncc.ir import Program, shape
from dyncc.options import Layers, settle
from dyncc.pass_tensors import check_belongs
from dyncc.passes.one_stack import one_stack
from dyncc.restrict import Refusal
from dyncc.rewrite import Context, Pass, PassResult


@dataclass(frozen=True)
class DropLayers(Pass):
    """Leave out `layers`, or the `count` least missed ones of `file`, or all but `active`."""

    name: ClassVar[str] = "drop-layers"
    summary: ClassVar[str] = "leave chosen layers out and carry the residual stream over them"
    exact: ClassVar[bool] = False

    layers: Layers | None = None
    count: int = 0
    file: str | None = None
    active: int = 0
    warm: int = 1

    def __post_init__(self) -> None:
        settle(self)
        for name in ("count", "active", "warm"):
            if getattr(self, name) < 0:
                raise BadOptionValue(option=name, value=str(getattr(self, name)), problem="0 is the least")
        if sum((self.layers is not None, self.count > 0, self.active > 0)) > 1:
            raise BadOptionValue(option="layers", value=str(self.layers), problem="give one of layers, count (with file) and active")
        if (self.count > 0) is not (self.file is not None):
            raise BadOptionValue(option="file", value=str(self.file), problem="count and file go together: the file ranks layers")
        if self.active and self.active < self.warm:
            problem = f"the warm={self.warm} first layers are among the active ones"
            raise BadOptionValue(option="active", value=str(self.active), problem=problem)

    def run(self, program: Program, facts: Facts, context: Context) -> PassResult:
        """Put the state in front of a layer in the place of that behind it."""
        stack = one_stack(program, facts)
        chosen = self._chosen(program, stack, context)
        if not chosen:
            return PassResult(0, 0, reason="no layer is named: nothing to leave out")
        for layer in reversed([stack.layers[i] for i in chosen]):
            layer.end.replace_all_uses_with(layer.start)
        return PassResult(len(chosen), len(chosen))

    def _chosen(self, program: Program, stack: Stack, context: Context) -> tuple[int, ...]:
        """The layers to leave out, rising."""
        total = len(stack.layers)
        if self.layers is not None:
            chosen = tuple(dict.fromkeys(self.layers.resolve(total)))
        elif self.count:
            chosen = self._least_missed(program, stack, context)
        else:
            chosen = skipped_layers(total, self.active, self.warm) if self.active else ()
        if len(chosen) == total:
            raise Refusal(f"all {total} layers would be left out; keep one")
        return chosen

    def _least_missed(self, program: Program, stack: Stack, context: Context) -> tuple[int, ...]:
        assert self.file is not None
        found = load_fitted(Path(self.file))
        check_belongs(found, program, context.values, int(shape(stack.layers[0].start)[-1]))
        missed = found.take("drop.divergence")
        if len(missed) != len(stack.layers):
            problem = f"it ranks {len(missed)} layers, the model has {len(stack.layers)}"
            raise BadParameterFile(path=found.path, problem=problem)
        if self.count >= len(missed):
            problem = f"the model has {len(missed)} layers, and one must stay"
            raise BadOptionValue(option="count", value=str(self.count), problem=problem)
        return tuple(sorted(missed.argsort(stable=True)[: self.count].tolist()))


def skipped_layers(total: int, active: int, warm: int = 1) -> tuple[int, ...]:
    """The layers that SkipDecode leaves out: lower-middle ones, behind the `warm` first.

    >>> skipped_layers(8, 5, 1), skipped_layers(8, 8)
    ((1, 2, 3), ())
    """
    return tuple(range(warm, warm + max(0, total - active)))
