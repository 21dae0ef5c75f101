"""Choosing keys for one query row: scores, the best as sorted indices, and attention over them alone."""

from dyncc.kernels.select_keys.truth import attend_selected, key_scores, select_keys, visible_keys

__all__ = ["attend_selected", "key_scores", "select_keys", "visible_keys"]
