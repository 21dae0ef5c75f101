"""ATen ops that torch's ONNX exporter does not know, or translates wrongly: op -> its ONNX spelling (onnxscript, traced)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset23 as op

aten = torch.ops.aten


def sort(self: Any, dim: int = -1, descending: bool = False) -> Any:
    """TopK of everything: it keeps the lower index of equal values first, so it is a stable sort."""
    size = op.Shape(self, start=dim, end=dim + 1) if dim != -1 else op.Shape(self, start=-1)
    return op.TopK(self, size, axis=dim, largest=1 if descending else 0, sorted=1)


def stable_sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    return sort(self, dim, descending)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {aten.sort.default: sort, aten.sort.stable: stable_sort}
