"""`dyncc::attend_best_pages`: scores of pages, the choice of the best and attention to them as one op, whose meaning is its truth.

Engines put it in place of the three where a kernel computes them together (backends/native_pages.py); no pass emits it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyncc.kernels.one_row import cpu
from dyncc.kernels.one_row.op import attend_row, choices, score_pages, select_best

_library = torch.library.Library("dyncc", "FRAGMENT")
_library.define(
    "attend_best_pages(Tensor q, Tensor k, Tensor v, Tensor low, Tensor high, Tensor? mask, Tensor? shown, str share, int count, int sinks,"
    " int recents, int page, float? scale) -> Tensor"
)


def attend_best_pages(
    q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, mask: Tensor | None, shown: Tensor | None, share: str, count: int,
    sinks: int, recents: int, page: int, scale: float | None,
) -> Tensor:  # fmt: skip
    """Attention [B, H, 1, Dv] of q [B, H, 1, D] to the `count` best pages of k [B, G, N, D] and v [B, G, N, Dv].

    Args:
        low, high: bounds of the pages [B, G, pages, D].
        mask: of keys, as `attend_row` takes it; shown: of pages, [B, 1, pages] bool, those to choose from.
        share: as `score_pages` takes it; sinks, recents: pages that are always chosen.
    """
    score = score_pages(q, low, high, share, None, shown if share == "any" else None, scale)
    return attend_row(q, k, v, mask, select_best(score, count, shown, sinks, recents), page, scale)


def _on_cpu(
    q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, mask: Tensor | None, shown: Tensor | None, share: str, count: int,
    sinks: int, recents: int, page: int, scale: float | None,
) -> Tensor:  # fmt: skip
    if not cpu.takes(q, k, v, low, high):
        return attend_best_pages(q, k, v, low, high, mask, shown, share, count, sinks, recents, page, scale)
    together = choices(share, q.shape[1], k.shape[1])
    some = min(count, low.shape[2])
    return cpu.attend_best_pages(q, k, v, low, high, mask, shown, together, share == "any", some, sinks, recents, page, scale)


_library.impl("attend_best_pages", attend_best_pages, "CompositeExplicitAutograd")
_library.impl("attend_best_pages", _on_cpu, "CPU")


@torch.library.register_fake("dyncc::attend_best_pages")
def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


ATTEND_BEST_PAGES = torch.ops.dyncc.attend_best_pages.default
