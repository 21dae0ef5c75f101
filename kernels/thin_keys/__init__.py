"""Marks of a cache whose prompt is pruned: what a layer behind the cut holds, and what its attention reads."""

from dyncc.kernels.thin_keys.op import SPREAD, THIN

__all__ = ["SPREAD", "THIN"]
