"""A loop whose results are its states becomes one decayed sum, `dyncc::decayed_sum`, over all numbers of a state."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, fx

from dyncc.analysis.running_sums import RunningSum
from dyncc.analysis.series import NotUnrolled, series
from dyncc.ir import argument, emit, hint, op_name, same_size, shape
from dyncc.kernels.decayed_sum import DECAYED_SUM
from dyncc.kernels.decayed_sum.op import WIDE
from dyncc.kernels.gated_linear_attention.op import SHORT
from dyncc.passes.unrolled_recurrence import LONGEST, check_order, put


def fuse_sum(found: RunningSum) -> None:
    """Put one node in place of all steps.

    Raises:
        NotUnrolled: it has too few or too many tokens, states too wide to gain anything, or decays of several kinds.
    """
    joined, tokens = found.joined, len(found.added)
    if not SHORT < tokens <= LONGEST:
        raise NotUnrolled(f"a loop over {tokens} tokens whose results are its states is read from {SHORT + 1} to {LONGEST} tokens on")
    pieces = joined.args[0]
    last, dim = pieces[-1], argument(joined, "dim", 0) % len(shape(joined))  # type: ignore[index, operator]
    numbers = math.prod(hint(size) for size in shape(last))
    if numbers >= WIDE:
        raise NotUnrolled(f"a state of {numbers} numbers is as fast token after token; fewer than {WIDE} become one node")
    stacked = op_name(joined) == "stack"
    if not stacked and not same_size(shape(last)[dim], 1):
        raise NotUnrolled("its states are joined along another dimension than that of tokens")
    start = min((n for n in (found.before, *found.added) if n is not None), key=list(joined.graph.nodes).index)
    outside = check_order(joined, last, start, found.inside)
    added = series(found.added)
    decay, kept = _decay(found.decays)
    share = [found.share] if isinstance(found.share, fx.Node) else []
    before = [] if found.before is None else [found.before]

    def summed(*values: Tensor) -> tuple[Tensor, Tensor]:
        stream = iter(values)
        state = next(stream) if before else None
        x = added.together(*[next(stream) for _ in added.nodes])
        factor = decay if kept is None else kept.together(*[next(stream) for _ in kept.nodes])
        x = x * next(stream) if share else x if found.share is None else x * found.share
        sums = _over_tokens(x, factor, state)
        out = sums.movedim(0, dim)
        return out if stacked else out.squeeze(dim + 1), sums[-1]

    put(joined, last, outside, emit(joined, summed, *before, *added.nodes, *([] if kept is None else kept.nodes), *share))


def _decay(decays: tuple[Any, ...]) -> tuple[float, Any]:
    """(the number that all states are multiplied by, None), or (1, the series of what they are multiplied by)."""
    if all(isinstance(d, fx.Node) for d in decays):
        return 1.0, series(decays[:1] if len(set(decays)) == 1 else decays)
    if len(set(decays)) > 1 or isinstance(decays[0], fx.Node):
        raise NotUnrolled(f"its decays are {', '.join(str(d) for d in dict.fromkeys(decays))}")
    return (1.0 if decays[0] is None else float(decays[0])), None


def _over_tokens(x: Tensor, factor: Tensor | float, state: Tensor | None) -> Tensor:
    """Sums [T, ...] of x [T, ...], with factors [T or 1, ...] that may lack dimensions in the middle."""
    if not isinstance(factor, Tensor):
        factor = x.new_full((1,) * x.dim(), factor)
    factor = factor.reshape(factor.shape[0], *(1,) * (x.dim() - factor.dim()), *factor.shape[1:])
    rows = [_rows(v) for v in (x, factor if all(n == 1 for n in factor.shape[1:-1]) else factor.expand(-1, *x.shape[1:-1], -1))]
    held = None if state is None else state.reshape(-1, x.shape[-1])
    made: Tensor = DECAYED_SUM(*rows, held)
    return made.movedim(1, 0).reshape(x.shape)


def _rows(x: Tensor) -> Tensor:
    """[B, T, N] of [T, ..., N]."""
    x = x if x.dim() > 2 else x.unsqueeze(1)
    return x.flatten(1, -2).movedim(0, 1)
