"""The kernel of row_linears.cpp on CPU tensors. Meaning: `row_linears` in op.py."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dyncc.kernels.native import TYPES, load, problem

SOURCE = Path(__file__).with_name("row_linears.cpp")
MOST_ROWS = 8
"""More rows are better served by a matrix product that keeps them in registers."""


class Product(ctypes.Structure):
    """One product as the kernel reads it."""

    _fields_ = [("w", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("out", ctypes.c_void_p), ("columns", ctypes.c_int64)]


def takes(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
    """Whether the kernel computes with these: few rows, plain CPU tensors of one dtype that it knows."""
    given = [x, *weights, *(b for b in biases if b is not None)]
    alike = all(t.device.type == "cpu" and t.dtype == x.dtype for t in given)
    return alike and x.dtype in TYPES and 0 < rows_of(x) <= MOST_ROWS and all(w.is_contiguous() for w in weights) and not problem()


def rows_of(x: Tensor) -> int:
    """All dimensions but the last."""
    return x.numel() // max(1, x.shape[-1])


def row_linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], threads: int) -> list[Tensor]:
    """[..., N_i] for each weight [N_i, K] of x [..., K]; `threads` are the most to wake, 0 for all of torch's."""
    x = x.contiguous()
    made = [x.new_empty((*x.shape[:-1], w.shape[0])) for w in weights]
    kept = [b if b is None else b.contiguous() for b in biases]
    products = (Product * len(made))(
        *(Product(w.data_ptr(), b.data_ptr() if b is not None else None, o.data_ptr(), w.shape[0])
          for w, b, o in zip(weights, kept, made, strict=True))
    )  # fmt: skip
    call = load((SOURCE,), "linears", x.dtype, ROWS=rows_of(x))
    awake = min(threads or torch.get_num_threads(), torch.get_num_threads())
    call(ctypes.c_void_p(x.data_ptr()), products, *map(ctypes.c_int64, (len(made), x.shape[-1], awake)))
    return made
