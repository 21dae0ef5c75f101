"""The gated delta rule: a recurrence that replaces what a key held, in two equal forms (step, chunk)."""

from dyncc.kernels.gated_delta_rule.chunks import chunk
from dyncc.kernels.gated_delta_rule.op import GATED_DELTA_RULE, TRUTHS
from dyncc.kernels.gated_delta_rule.truth import step

__all__ = ["GATED_DELTA_RULE", "TRUTHS", "chunk", "step"]
