"""Page selection by generated Triton kernels: bounds of pages, and attention over chosen pages split among programs (flash decoding).

Set `TRITON_INTERPRET=1` before Triton is imported to run them without a GPU. Meaning: pages.page_scores and truth.attend_selected. No pass
emits them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dyncc.kernels.generator.kinds import AttendChosen, JoinParts, ScorePages
from dyncc.kernels.generator.spec import dtype_of
from dyncc.kernels.generator.tune import preferred


def score(q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Bounds [B, H, pages] for q [B, H, 1, D], low and high [B, G, pages, D]."""
    bounds: Tensor = ScorePages(q.shape[3], dtype=dtype_of(q)).run(q, low, high)
    return bounds


def attend(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, page: int, visible: Tensor | None = None, scale: float | None = None,
    epilogues: tuple[str, ...] = (), **extras: Any,
) -> Tensor:  # fmt: skip
    """Attention [B, H, 1, Dv] of q [B, H, 1, D] over the pages `index` [B, C, S] of k [B, G, N, D] and v [B, G, N, Dv].

    Args:
        page: keys of a page; 1 makes `index` chosen keys. visible: [B, N] bool.
        epilogues: what the kernel that joins the parts ends with; extras: what those read, broadcastable to the result.
    """
    spec = AttendChosen(q.shape[3], v.shape[3], page, masked=visible is not None, dtype=dtype_of(q))
    parts = preferred(spec, q.device).run(q, k, v, index, visible=visible, scale=scale)
    batch, heads, width = q.shape[0], q.shape[1], v.shape[3]
    apart, together = parts[2].shape[1], parts[2].shape[3]
    told = {name: _folded(x, (batch, heads, 1, width), (batch, apart, together, width)) for name, x in extras.items()}
    joined: Tensor = JoinParts(width, dtype=dtype_of(q), epilogues=epilogues).run(*parts, **told)
    return joined.view(batch, heads, 1, width)


def _folded(x: Any, shape: tuple[int, ...], apart: tuple[int, ...]) -> Any:
    """Heads that chose together as rows, as the parts have them."""
    return x.expand(shape).reshape(apart) if isinstance(x, Tensor) else x
