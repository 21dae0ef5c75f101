"""Four ops for one query row a head, whose meaning is their truth: `attend_row`, `score_keys`, `score_pages` and `select_best`.

On a CPU with a C++ compiler they run as the kernel of one_row.cpp, everywhere else as their truths. Engines that do not know them get the
truths written out (`TRUTHS`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dyncc.kernels.one_row import cpu
from dyncc.kernels.select_keys import truth
from dyncc.kernels.select_keys.pages import page_keys, page_scores

_library = torch.library.Library("dyncc", "FRAGMENT")
_library.define(
    "attend_row(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? index, int page, float? scale, bool ragged=False) -> Tensor"
)
_library.define("score_keys(Tensor q, Tensor k, Tensor? visible, str score, str share, float? scale, Tensor? skip=None) -> Tensor")
_library.define(
    "score_pages(Tensor q, Tensor low, Tensor high, str share, Tensor? skip=None, Tensor? shown=None, float? scale=None) -> Tensor"
)
_library.define("select_best(Tensor score, int budget, Tensor? visible, int sinks, int recents, bool enough=False) -> Tensor")


def attend_row(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, index: Tensor | None, page: int, scale: float | None, ragged: bool = False
) -> Tensor:
    """Attention [B, H, 1, Dv] of q [B, H, 1, D] over k [B, G, N, D] and v [B, G, N, Dv], H a multiple of G.

    Args:
        mask: [B, 1, 1, N] (without `index`, any number of heads), bool (True is visible) or added.
        index: [B, C, S], the only keys to read, for C in 1, G, H; with `page` above 1 they are pages of so many keys. None reads all.
        ragged: some indices of keys may lie behind the last key, and are none; those of pages always may.
    """
    if index is None:
        options = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
        out: Tensor = torch.ops.aten.scaled_dot_product_attention.default(q, k, v, mask, 0.0, False, scale=scale, **options)
        return out
    at = page_keys(index, page) if page > 1 else index
    return truth.attend_selected(q, k, v, mask, at, scale, ragged=ragged or page > 1)


def score_keys(
    q: Tensor, k: Tensor, visible: Tensor | None, score: str, share: str, scale: float | None, skip: Tensor | None = None
) -> Tensor:
    """Scores [B, C, N] of keys, as `truth.key_scores` has them, with visible [B, 1, N] bool in place of a mask.

    Args:
        skip: [B] bool, rows of the batch that need no scores: theirs are 0, and a kernel does not read their keys.
    """
    return _skipped(truth.key_scores(q, k, None if visible is None else visible.unsqueeze(2), score, share, scale), skip)


def score_pages(
    q: Tensor, low: Tensor, high: Tensor, share: str, skip: Tensor | None = None, shown: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Upper bounds [B, C, pages] of q.k, as `page_scores` has them; `skip` as in `score_keys`."""
    return _skipped(page_scores(q, low, high, share, shown, scale), skip)


def _skipped(score: Tensor, skip: Tensor | None) -> Tensor:
    return score if skip is None else score.masked_fill(skip.view(-1, 1, 1), 0.0)


def select_best(score: Tensor, budget: int, visible: Tensor | None, sinks: int, recents: int, enough: bool = False) -> Tensor:
    """Sorted indices of the best scores, as `truth.select_keys` has them."""
    return truth.select_keys(score, budget, visible, sinks, recents, enough).contiguous()


def choices(share: str, heads: int, groups: int) -> int:
    """How many choices the heads make."""
    return {"head": heads, "group": groups, "any": groups, "layer": 1}[share]


def _attend_on_cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, index: Tensor | None, page: int, scale: float | None, ragged: bool = False
) -> Tensor:
    if not cpu.takes(q, k, v):
        return attend_row(q, k, v, mask, index, page, scale, ragged)
    return cpu.attend(q, k, v, mask, index, page, scale)  # it leaves out what lies behind the last key anyway


def _score_on_cpu(
    q: Tensor, k: Tensor, visible: Tensor | None, score: str, share: str, scale: float | None, skip: Tensor | None = None
) -> Tensor:
    if score == "recents" or not cpu.takes(q, k):
        return score_keys(q, k, visible, score, share, scale, skip)
    return cpu.score_keys(q, k, visible, score == "vote", choices(share, q.shape[1], k.shape[1]), scale, skip)


def _pages_on_cpu(
    q: Tensor, low: Tensor, high: Tensor, share: str, skip: Tensor | None = None, shown: Tensor | None = None, scale: float | None = None
) -> Tensor:
    if not cpu.takes(q, low, high):
        return score_pages(q, low, high, share, skip, shown, scale)
    return cpu.score_pages(q, low, high, choices(share, q.shape[1], low.shape[1]), skip, share == "any", shown, scale)


def _select_on_cpu(score: Tensor, budget: int, visible: Tensor | None, sinks: int, recents: int, enough: bool = False) -> Tensor:
    if score.dtype != torch.float32 or not cpu.takes(score):
        return select_best(score, budget, visible, sinks, recents, enough)
    return cpu.select_best(score, min(budget, score.shape[2]), visible, sinks, recents)


TRUTHS: dict[Any, Callable[..., Tensor]] = {}
"""Each op's truth in ATen, by op."""

for _name, _truth, _kernel in (
    ("attend_row", attend_row, _attend_on_cpu),
    ("score_keys", score_keys, _score_on_cpu),
    ("score_pages", score_pages, _pages_on_cpu),
    ("select_best", select_best, _select_on_cpu),
):
    _library.impl(_name, _truth, "CompositeExplicitAutograd")
    _library.impl(_name, _kernel, "CPU")
    TRUTHS[getattr(torch.ops.dyncc, _name).default] = _truth


@torch.library.register_fake("dyncc::attend_row")
def _fake_attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


@torch.library.register_fake("dyncc::score_keys")
def _fake_scores(q: Tensor, k: Tensor, visible: Tensor | None, score: str, share: str, *rest: Any) -> Tensor:
    together = 1 if score == "recents" else choices(share, q.shape[1], k.shape[1])
    return q.new_empty((q.shape[0], together, k.shape[2]), dtype=torch.float32)


@torch.library.register_fake("dyncc::score_pages")
def _fake_pages(q: Tensor, low: Tensor, high: Tensor, share: str, *rest: Any) -> Tensor:
    return q.new_empty((q.shape[0], choices(share, q.shape[1], low.shape[1]), low.shape[2]), dtype=torch.float32)


@torch.library.register_fake("dyncc::select_best")
def _fake_best(score: Tensor, budget: int, visible: Tensor | None, sinks: int, recents: int, enough: bool = False) -> Tensor:
    keys: Any = score.shape[2]
    count = budget if enough else torch.sym_min(budget, keys) if isinstance(keys, torch.SymInt) else min(budget, keys)
    return score.new_empty((*score.shape[:2], count), dtype=torch.int64)


ATTEND_ROW = torch.ops.dyncc.attend_row.default
SCORE_KEYS = torch.ops.dyncc.score_keys.default
SCORE_PAGES = torch.ops.dyncc.score_pages.default
SELECT_BEST = torch.ops.dyncc.select_best.default
