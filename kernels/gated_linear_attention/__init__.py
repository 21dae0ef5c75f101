"""Gated linear attention: a recurrence with a decay for each channel of the keys, in three equal forms (step, chunk, dense)."""

from dyncc.kernels.gated_linear_attention.chunks import chunk
from dyncc.kernels.gated_linear_attention.op import GATED_LINEAR_ATTENTION, TRUTHS
from dyncc.kernels.gated_linear_attention.truth import dense, step

__all__ = ["GATED_LINEAR_ATTENTION", "TRUTHS", "chunk", "dense", "step"]
