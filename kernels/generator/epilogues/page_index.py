"""Rows go to pages of one cache: row t of a sequence to row t % page of the page that `pages` [B, count] names (Kwon et al. 2023)."""

from __future__ import annotations

from torch import Tensor


def _in_place(result: Tensor) -> Tensor:
    """Numbers stay as they are; `launch.stored` puts them where they go."""
    return result


TENSORS: tuple[str, ...] = ()
NUMBERS: tuple[str, ...] = ()
INDICES = ("pages",)
SIZES = ("page",)
WHOLE = False
MOVES = True
EPILOGUES: dict[str, tuple[str, ...]] = {
    "page-index": ("slot = tl.load(pages + batch * pages_batch + at // page, mask=at < rows, other=0) * page + at % page",),
}
TRUTHS = {"page-index": _in_place}
