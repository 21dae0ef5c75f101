"""The kernel of one_row.cpp on CPU tensors. Meaning: the truths in op.py."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyncc.kernels.native import TYPES, load, problem

PARTS = tuple(Path(__file__).with_name(name) for name in ("rows.h", "pages.h"))
SOURCE, BEST_PAGES = (Path(__file__).with_name(name) for name in ("one_row.cpp", "best_pages.cpp"))
MOST_ROWS = 8
"""Heads that one unit takes together: their queries are to stay near."""


class Sizes(ctypes.Structure):
    """Sizes of one call, as the kernel reads them."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "heads", "groups", "keys", "threads")]


class Steps(ctypes.Structure):
    """Elements from one batch, head and row of a tensor to the next."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "head", "row")]


def rows_together(heads: int, groups: int) -> int:
    """How many of a group's heads a unit takes: the largest divisor of heads / groups that is at most MOST_ROWS."""
    alike = heads // groups
    return next(n for n in range(min(alike, MOST_ROWS), 0, -1) if alike % n == 0)


def _kernel(function: str, dtype: torch.dtype, width: int, width_v: int, rows: int) -> Any:
    return load((*PARTS, SOURCE), function, dtype, WIDTH=width, WIDTH_V=width_v, ROWS=rows)


def takes(*tensors: Tensor) -> bool:
    """Whether the kernel computes with these: plain CPU tensors of one dtype that it knows, where it can be built."""
    return all(t.device.type == "cpu" and t.dtype in TYPES and t.dtype == tensors[0].dtype for t in tensors) and not problem()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, index: Tensor | None, page: int, scale: float | None) -> Tensor:
    """Attention [B, H, 1, Dv] of q [B, H, 1, D]; arguments as `attend_row` takes them, mask with one row for all queries of a head."""
    batch, heads, _, width = q.shape
    groups, choices = k.shape[1], 0 if index is None else index.shape[1]
    rows = 1 if choices > groups else rows_together(heads, groups)
    q, k, v = q.contiguous(), _dense(k), _dense(v)
    out = q.new_empty((batch, heads, 1, v.shape[3]))
    seen, bias, step = _mask(mask, batch, heads, k.shape[2])
    at = None if index is None else index.contiguous()
    _kernel("attend", q.dtype, width, v.shape[3], rows)(
        _at(q), _at(k), _at(v), _at(out), _at(seen), _at(bias), _at(at), _sizes(q, k), _steps(k), _steps(v), step, _n(choices),
        _n(0 if at is None else at.shape[2]), _n(page), ctypes.c_float(width**-0.5 if scale is None else scale),
    )  # fmt: skip
    return out


def score_keys(
    q: Tensor, k: Tensor, visible: Tensor | None, vote: bool, choices: int, scale: float | None, skip: Tensor | None = None
) -> Tensor:
    """[B, choices, N] float32: means over heads of q.k, or with `vote` of its softmax over visible keys [B, 1, N]; 0 where `skip` [B]."""
    batch, heads, _, width = q.shape
    q, k = q.contiguous(), _dense(k)
    seen, step = _visible(visible, batch)
    skip = None if skip is None else skip.contiguous()  # named, so that it lives as long as the call
    out = torch.empty((batch, choices, k.shape[2]))
    _kernel("score_keys", q.dtype, width, width, rows_together(heads, k.shape[1]))(
        _at(q), _at(k), _at(out), _at(seen), _sizes(q, k), _steps(k), _n(step), _n(choices), _n(int(vote)),
        ctypes.c_float(width**-0.5 if scale is None else scale), _at(skip),
    )  # fmt: skip
    return out


def score_pages(
    q: Tensor, low: Tensor, high: Tensor, choices: int, skip: Tensor | None = None, any_head: bool = False, shown: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """[B, choices, pages] float32 from bounds [B, G, pages, D]; 0 where `skip` [B]. With `any_head`, choices is G: over pages `shown`."""
    q, low, high = q.contiguous(), _dense(low), _dense(high)
    skip = None if skip is None else skip.contiguous()
    seen, step = _visible(shown, q.shape[0])
    out = torch.empty((q.shape[0], choices, low.shape[2]))
    kernel = _kernel("score_pages", q.dtype, q.shape[3], q.shape[3], rows_together(q.shape[1], low.shape[1]))
    kernel(
        _at(q), _at(low), _at(high), _at(out), _sizes(q, low), _steps(low), _steps(high), _n(choices), _at(skip), _n(int(any_head)),
        _at(seen), _n(step), ctypes.c_float(q.shape[3] ** -0.5 if scale is None else scale),
    )  # fmt: skip
    return out


def select_best(score: Tensor, count: int, visible: Tensor | None, sinks: int, recents: int) -> Tensor:
    """[B, C, count] int64 of score [B, C, N] float32, count at most N."""
    batch, choices, keys = score.shape
    score, (seen, step) = score.contiguous(), _visible(visible, batch)
    out = torch.empty((batch, choices, count), dtype=torch.int64)
    threads = torch.get_num_threads()
    numbers = (batch, choices, keys, step, count, sinks, recents, threads)
    _kernel("select_best", torch.float32, 8, 8, 1)(_at(score), _at(seen), _at(out), *map(_n, numbers))
    return out


def attend_best_pages(
    q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, mask: Tensor | None, shown: Tensor | None, choices: int, any_head: bool,
    count: int, sinks: int, recents: int, page: int, scale: float | None,
) -> Tensor:  # fmt: skip
    """Attention [B, H, 1, Dv] of q [B, H, 1, D]; arguments as `best_pages.attend_best_pages` takes them."""
    batch, heads, _, width = q.shape
    q, k, v, low, high = q.contiguous(), _dense(k), _dense(v), _dense(low), _dense(high)
    out = q.new_empty((batch, heads, 1, v.shape[3]))
    seen, bias, step = _mask(mask, batch, heads, k.shape[2])
    paged, paged_step = _visible(shown, batch)
    constants = {"WIDTH": width, "WIDTH_V": v.shape[3], "ROWS": rows_together(heads, k.shape[1]), "APART": int(choices > k.shape[1])}
    load((*PARTS, BEST_PAGES), "attend_best_pages", q.dtype, **constants)(
        *map(_at, (q, k, v, out, seen, bias, low, high, paged)), _sizes(q, k), _sizes(q, low), _steps(k), _steps(v), step, _steps(low),
        _steps(high), *map(_n, (paged_step, choices, int(any_head), count, sinks, recents, page)),
        ctypes.c_float(width**-0.5 if scale is None else scale),
    )  # fmt: skip
    return out


def _dense(x: Tensor) -> Tensor:
    """Channels side by side, as the kernel reads them; the rest may have any strides."""
    return x if x.stride(3) == 1 else x.contiguous()


def _visible(visible: Tensor | None, batch: int) -> tuple[Tensor | None, int]:
    """[B or 1, 1, N] bool as bytes, and the step from one batch to the next."""
    if visible is None:
        return None, 0
    row = visible if visible.stride(2) == 1 else visible.contiguous()
    row = row.expand(batch, *row.shape[1:])
    return row, row.stride(0)


def _mask(mask: Tensor | None, batch: int, heads: int, keys: int) -> tuple[Tensor | None, Tensor | None, Any]:
    """A mask [B or 1, H or 1, 1, N] as bytes or as float32 that is added, and its steps."""
    if mask is None:
        return None, None, ctypes.byref(Steps(0, 0, 0))
    row = mask.float() if mask.dtype != torch.bool else mask
    row = (row if row.stride(3) == 1 or keys == 1 else row.contiguous()).expand(batch, heads, 1, keys)
    steps = ctypes.byref(Steps(row.stride(0), row.stride(1), 0))
    return (row, None, steps) if mask.dtype == torch.bool else (None, row, steps)


def _sizes(q: Tensor, k: Tensor) -> Any:
    return ctypes.byref(Sizes(q.shape[0], q.shape[1], k.shape[1], k.shape[2], torch.get_num_threads()))


def _steps(x: Tensor) -> Any:
    return ctypes.byref(Steps(*x.stride()[:3]))


def _at(x: Tensor | None) -> Any:
    return None if x is None else ctypes.c_void_p(x.data_ptr())


def _n(number: int) -> Any:
    return ctypes.c_int64(number)
