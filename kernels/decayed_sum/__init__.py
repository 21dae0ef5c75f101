"""Sums of tokens that decay, number by number: averages that move, in equal forms (step, chunks, without a loop)."""

from dyncc.kernels.decayed_sum.op import DECAYED_SUM, TRUTHS
from dyncc.kernels.decayed_sum.truth import at_once, in_chunks, step

__all__ = ["DECAYED_SUM", "TRUTHS", "at_once", "in_chunks", "step"]
