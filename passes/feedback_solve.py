"""A loop in which a token reads the results of all earlier ones becomes one triangular solve (Sessa, 2026)."""

from __future__ import annotations

import torch
from torch import Tensor

from dyncc.analysis.feedback import Feedback
from dyncc.analysis.series import NotUnrolled, series
from dyncc.ir import argument, emit, is_mutating, op_name, shape, take_place, val
from dyncc.passes.unrolled_recurrence import LONGEST


def fuse_feedback(found: Feedback) -> None:
    """Put one solve in place of all steps.

    Raises:
        NotUnrolled: it has too many tokens, or results that are joined along another dimension than that of tokens.
    """
    joined, tokens = found.joined, len(found.own)
    if tokens > LONGEST:
        raise NotUnrolled(f"a loop over {tokens} tokens is written out, which is read up to {LONGEST}: capture fewer, in several calls")
    stacked, rank = op_name(joined) == "stack", len(shape(joined))
    if argument(joined, "dim", 0) % rank != rank - 2 or len(shape(found.weights)) > rank:
        raise NotUnrolled("its results are joined along another dimension than that of tokens")
    order = {n: i for i, n in enumerate(joined.graph.nodes)}
    if any(is_mutating(n) and order[found.own[0]] < i < order[joined] for n, i in order.items()):
        raise NotUnrolled("something is written in place between its steps")
    own, dtype = series(found.own), val(joined).dtype
    wide = torch.promote_types(dtype, torch.float32)

    def solved(weights: Tensor, *values: Tensor) -> Tensor:
        f = own.together(*values[: len(own.nodes)])
        f = (f if stacked else f.squeeze(-2)).movedim(0, -2)
        gains = [g if stacked else g.squeeze(-2) for g in values[len(own.nodes) :]]
        if gains:
            weights = weights * torch.stack([torch.zeros_like(gains[0]), *gains], -2)
        lower = -weights.to(wide).tril(-1)
        made: Tensor = torch.linalg.solve_triangular(lower, f.to(wide), upper=False, unitriangular=True)
        return made.to(dtype)

    new = emit(joined, solved, found.weights, *own.nodes, *found.gains)
    take_place(joined, new)
