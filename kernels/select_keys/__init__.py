"""Choosing keys for one query row: scores of keys or of pages, the best as sorted indices, and attention over them alone."""

from dyncc.kernels.select_keys.op import PARTLY_READ, REMEMBERED
from dyncc.kernels.select_keys.pages import (
    drawn_in,
    near_bounds,
    page_bounds,
    page_keys,
    page_means,
    page_middles,
    page_scores,
    visible_pages,
)
from dyncc.kernels.select_keys.pairs import NUMBERS, pair_channels, pair_scores
from dyncc.kernels.select_keys.truth import (
    attend_selected,
    attend_selected_logits,
    key_scores,
    newest,
    select_keys,
    shared_scores,
    take_keys,
    visible_keys,
    visible_logits,
)

__all__ = [
    "NUMBERS", "PARTLY_READ", "REMEMBERED", "attend_selected", "attend_selected_logits", "drawn_in", "key_scores", "near_bounds", "newest",
    "page_bounds", "page_keys", "page_means", "page_middles", "page_scores", "pair_channels", "pair_scores", "select_keys", "shared_scores",
    "take_keys", "visible_keys", "visible_logits", "visible_pages",
]
