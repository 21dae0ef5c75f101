"""Attention of new rows over a grown cache as one op, rotary embedding included: what ONNX Runtime calls GroupQueryAttention."""

from dyncc.kernels.group_query_attention.op import OP
from dyncc.kernels.group_query_attention.truth import group_query_attention

__all__ = ["OP", "group_query_attention"]
