"""Attention to learned slots whose weights are activations of scores of unit length, a few rows at a time."""

from dyncc.kernels.slot_attention.op import ATTEND_SLOTS, TRUTHS
from dyncc.kernels.slot_attention.truth import attend_slots

__all__ = ["ATTEND_SLOTS", "TRUTHS", "attend_slots"]
