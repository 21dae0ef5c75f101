"""Attention of a few query rows: their probabilities over all keys, without the rows that nobody asked for."""

from dyncc.kernels.attention_rows.truth import attention_row_logits, attention_rows, take_rows

__all__ = ["attention_row_logits", "attention_rows", "take_rows"]
