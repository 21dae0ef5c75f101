"""Linear attention on a GPU: a Triton kernel generated for what a call asks, in chunks, or token by token where they are few."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from dyncc.errors import BadKernelSpec
from dyncc.kernels.fused_attention.gpu import TRITON
from dyncc.kernels.generator.kinds import LinearChunk, LinearStep
from dyncc.kernels.generator.spec import DTYPES, dtype_of

FEW = 16
"""Tokens below which they do not fill a chunk."""


def spec_of(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, rule: str) -> LinearChunk | LinearStep | None:
    """The kernel for such tensors, of which only sizes and types count; None where none is generated."""
    if not takes(q, k, v, log_decay, state):
        return None
    decay = "none" if log_decay is None else "head" if log_decay.shape[3] == 1 < q.shape[3] else "channel"
    for kind in (LinearStep,) if q.shape[2] < FEW else (LinearChunk, LinearStep):
        with contextlib.suppress(BadKernelSpec):  # heads too wide for chunks may still go token by token
            return kind(q.shape[3], v.shape[3], decay=decay, rule=rule, started=state is not None, dtype=dtype_of(q))
    return None


def takes(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None) -> bool:
    """Whether they have types that kernels take, and fit each other; what does not, the truth tells."""
    given = [x for x in (log_decay, state) if x is not None]
    alike = q.dtype == k.dtype == v.dtype and all(x.dtype in (v.dtype, torch.float32) for x in given)
    if not TRITON or dtype_of(q) not in DTYPES or not alike or any(x.dim() != 4 for x in (q, k, v, *given)):
        return False
    held, sizes = (*q.shape[:2], q.shape[3], v.shape[3]), q.shape
    fits = q.shape == k.shape and q.shape[:3] == v.shape[:3] and (state is None or state.shape == held)
    spread = log_decay is None or all(n in (1, size) for n, size in zip(log_decay.shape, sizes, strict=True))
    return fits and spread and v.numel() > 0 and q.shape[3] > 0
