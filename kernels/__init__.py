"""Fused ops, one folder an op: `truth.py` is the op's meaning in plain ATen, which is also its CPU path and its exported form."""
