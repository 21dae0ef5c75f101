"""Buffers that a past may lie in, and how far each is written: the high-water mark by which an append is in place or a copy.

A past may be appended to in place when it starts where its buffer starts, ends where the buffer was last written, and the rows fit. Rows
behind the mark belong to no tensor that was handed out, so nothing that anybody holds ever changes; the mark is moved before they are
written. A second continuation of one past finds the mark behind its end and moves to a buffer of its own, as does a past that was cropped,
reordered or made elsewhere. Marks live as long as the memory that they belong to.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dyncc.kernels.append_rows.truth import capacity, strides


@dataclass
class Mark:
    """A buffer `shape` [B, G, room, D] of a dtype, whose first `rows` rows are written."""

    storage: StorageWeakRef
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: int


_marks: dict[int, Mark] = {}
_lock = Lock()


def append_in_place(past: Tensor, new: Tensor) -> Tensor:
    """Rows past [B, G, N, D] and new [B, G, T, D] as the first N + T of a buffer [B, G, capacity(N + T), D]."""
    batch, heads, length, width = past.shape
    end = length + new.shape[2]
    shape = (batch, heads, capacity(end), width)
    if _goes_on(past, shape, end):
        buffer = past.as_strided(shape, strides(heads, end, width))
    else:
        buffer = past.new_zeros(shape)  # zeros: whoever compares two runs compares the room too
        buffer[:, :, :length] = past
        _mark(buffer, end)
    buffer[:, :, length:end] = new
    return buffer[:, :, :end]


def _goes_on(past: Tensor, shape: tuple[int, ...], end: int) -> bool:
    """Whether the rows behind a past are free; if so they are taken."""
    if past.is_inference() and not torch.is_inference_mode_enabled():
        return False  # such memory may be written in that mode only
    with _lock:
        mark = _marks.get(past.untyped_storage()._cdata)
        if mark is None or mark.storage.expired() or (mark.shape, mark.dtype, mark.rows) != (shape, past.dtype, past.shape[2]):
            return False
        if past.storage_offset() or past.stride() != strides(shape[1], end, shape[3]):
            return False
        mark.rows = end
        return True


def _mark(buffer: Tensor, rows: int) -> None:
    storage = buffer.untyped_storage()
    with _lock:
        for key in [k for k, m in _marks.items() if m.storage.expired()]:
            del _marks[key]
        _marks[storage._cdata] = Mark(StorageWeakRef(storage), tuple(buffer.shape), buffer.dtype, rows)
