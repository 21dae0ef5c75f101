"""Choosing rows: the best-scored ones as sorted indices, ties to the lower index."""

from dyncc.kernels.select_rows.truth import alive_rows, rank_rows, select_rows

__all__ = ["alive_rows", "rank_rows", "select_rows"]
