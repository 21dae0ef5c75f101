"""Attention with more to say than SDPA has words for: soft cap, sinks, sliding window, and a gate on what it gives."""

from dyncc.kernels.fused_attention.op import ATTEND, TRUTHS
from dyncc.kernels.fused_attention.truth import attend

__all__ = ["ATTEND", "TRUTHS", "attend"]
