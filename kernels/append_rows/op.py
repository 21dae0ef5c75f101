"""`dyncc::append`: a past with rows behind it, by its truth the concatenation of both.

The op writes rows that no tensor shows yet, and its result shares memory with its past. It counts as pure all the same: no value that
anybody can read changes, in whatever order calls run and however often one is repeated. Nobody may write into its result inside a graph,
and no CUDA graph may record it: a recording would write to one place for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dyncc.kernels.append_rows.buffers import append_in_place
from dyncc.kernels.append_rows.truth import append_rows, strides

_library = torch.library.Library("dyncc", "FRAGMENT")
_library.define("append(Tensor past, Tensor new) -> Tensor", tags=(torch.Tag.cudagraph_unsafe,))
_library.impl("append", append_in_place, "CompositeExplicitAutograd")


@torch.library.register_fake("dyncc::append")
def _fake_append(past: Tensor, new: Tensor) -> Tensor:
    batch, heads, length, width = past.shape
    rows = length + new.shape[2]
    return past.new_empty_strided((batch, heads, rows, width), strides(heads, rows, width))


APPEND = torch.ops.dyncc.append.default
TRUTHS: dict[Any, Callable[..., Any]] = {APPEND: append_rows}
