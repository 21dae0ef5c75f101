"""C++ kernels that are generated and built for the CPU at hand."""

from dyncc.kernels.native.library import TYPES, load, problem

__all__ = ["TYPES", "load", "problem"]
