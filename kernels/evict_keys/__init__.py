"""What each key of a cache has earned: scores by the attention it received, and which keys to keep by them."""

from dyncc.kernels.evict_keys.ahead import ahead_mask, ahead_sums
from dyncc.kernels.evict_keys.op import SUMS, WATCHED
from dyncc.kernels.evict_keys.truth import (
    HIDDEN,
    column_sums,
    hide_pads,
    keep_keys,
    last_rows,
    probability_sums,
    row_weights,
    window_sums,
)

__all__ = [
    "HIDDEN", "SUMS", "WATCHED", "ahead_mask", "ahead_sums", "column_sums", "hide_pads", "keep_keys", "last_rows", "probability_sums",
    "row_weights", "window_sums",
]
