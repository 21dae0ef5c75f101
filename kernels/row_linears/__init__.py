"""Few rows times several weight matrices at once: an op, its truth in ATen, and a C++ kernel for a CPU."""

from dyncc.kernels.row_linears.op import ROW_LINEARS, row_linears

__all__ = ["ROW_LINEARS", "row_linears"]
