"""How tensors lie in memory: engines outside of PyTorch see rows one behind the other, PyTorch's callers see strides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dyncc.ir import same_size

Order = tuple[int, ...]
"""Dimensions from the slowest to the fastest in memory."""


def memory_order(tensor: torch.Tensor) -> Order:
    """The order of a tensor's dimensions in memory where it fills its memory without gaps; else the plain order.

    >>> memory_order(torch.empty(2, 3, 5).transpose(0, 2))
    (2, 1, 0)
    """
    plain = tuple(range(tensor.dim()))
    strides = [_known(s) for s in tensor.stride()]
    if _dense(tensor, plain) or None in strides:
        return plain
    order = tuple(sorted(plain, key=lambda d: (-strides[d], d)))  # type: ignore[operator]  # None was excluded
    return order if _dense(tensor, order) else plain


def inverse(order: Order) -> Order:
    """The order that undoes this one.

    >>> inverse((2, 0, 1))
    (1, 2, 0)
    """
    return tuple(order.index(d) for d in range(len(order)))


def moved(order: Order) -> bool:
    return order != tuple(range(len(order)))


def laid_out(tensor: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    """The tensor itself where its strides are these (those of dimensions of one do not count), else a copy that has them."""
    if all(a == b or n == 1 for n, a, b in zip(tensor.shape, tensor.stride(), stride, strict=True)) or not tensor.numel():
        return tensor
    once = tensor
    for dim, step in enumerate(stride):
        once = once.narrow(dim, 0, 1) if step == 0 else once
    return torch.empty_strided(once.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(once).expand(tensor.shape)


def _known(size: Any) -> int | None:
    return size if isinstance(size, int) else None if size.node.hint is None else int(size.node.hint)


def _dense(tensor: torch.Tensor, order: Order) -> bool:
    expected: Any = 1
    for dim in reversed(order):
        size = tensor.shape[dim]
        if not (isinstance(size, int) and size == 1):
            if not same_size(tensor.stride()[dim], expected):
                return False
            expected = expected * size
    return True
