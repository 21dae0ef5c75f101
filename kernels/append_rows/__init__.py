"""Rows behind a past, written in place where nobody can tell: a concatenation that copies only when it must."""

from dyncc.kernels.append_rows.op import APPEND, TRUTHS
from dyncc.kernels.append_rows.truth import ROOM, capacity

__all__ = ["APPEND", "ROOM", "TRUTHS", "capacity"]
