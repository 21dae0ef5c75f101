"""Attention to learned slots becomes `dyncc::attend_slots`, which holds the scores of a few rows at a time."""

from __future__ import annotations

import math

from torch import Tensor

from dyncc.analysis.slots import NotSlots, Slots
from dyncc.ir import emit, hint, is_symbolic, op_name, operands, shape, take_place
from dyncc.kernels.slot_attention import ATTEND_SLOTS

MANY = 1 << 21
"""Scores from which on a few rows at a time are computed: fewer fit in a core's caches at once."""


def fuse_slots(found: Slots) -> str:
    """Put one node in place of both products; returns from how many rows on that pays, where their number varies.

    Raises:
        NotSlots: rows and slots are too few.
    """
    *lead, count = shape(found.scores)
    rows, many = math.prod(hint(n) for n in lead), hint(count)
    if rows * many < MANY:
        told = f"{rows} rows x {many} slots are {rows * many} scores, which may stand at once"
        raise NotSlots(f"{told}; from {MANY} on they are computed a few rows at a time")
    out = found.out
    turned = [op_name(n) != "linear" for n in (found.scores, out)]

    def attend(x: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        slots = keys.T if turned[0] else keys, values if turned[1] else values.T
        made: Tensor = ATTEND_SLOTS(x, *slots, found.scale, found.eps, found.approximate)
        return made if bias is None else made + bias

    values, bias = (*operands(out)[1:], None)[:2]
    new = emit(out, attend, *operands(found.scores), values, bias)
    take_place(out, new)
    varies = any(is_symbolic(n) for n in lead)
    return f"holds fewer scores at once from {-(-MANY // many)} rows on; the graph serves any number" if varies else ""
