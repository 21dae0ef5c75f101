"""Triton kernels made from small specs: a spec says what is computed, `source` writes readable code, and nothing here needs a GPU."""

from dyncc.kernels.generator.kinds import KINDS, Attend
from dyncc.kernels.generator.source import source
from dyncc.kernels.generator.spec import KernelSpec

__all__ = ["KINDS", "Attend", "KernelSpec", "source"]
