"""Builds a C++ kernel for its constants, with the compiler and the cache that Inductor uses."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

VECTORS = Path(__file__).with_name("vectors.h")
TYPES = {torch.float32: "float", torch.bfloat16: "bf16"}
FLAGS = ("-ffp-contract=fast", "-ftree-loop-vectorize")


def source(paths: Sequence[Path], dtype: torch.dtype, **constants: int) -> str:
    """The C++ text of a kernel: its constants, vectors.h, and its files."""
    named = {"T": TYPES[dtype], **constants}
    head = [f"#define {name} {value}\n" for name, value in named.items()]
    return "".join([*head, *(part.read_text(encoding="utf-8") for part in (VECTORS, *paths))])


@functools.cache
def _load(paths: tuple[Path, ...], dtype: torch.dtype, constants: tuple[tuple[str, int], ...]) -> Any:
    from torch._inductor.codecache import CppCodeCache

    return CppCodeCache.load(source(paths, dtype, **dict(constants)), "cpu", extra_flags=FLAGS)


def load(paths: tuple[Path, ...], function: str, dtype: torch.dtype, **constants: int) -> Any:
    """A function of the library that a kernel's files make; built in about two seconds where Inductor's cache does not have it.

    Raises:
        OSError, RuntimeError: there is no C++ compiler, or it fails.
    """
    found = getattr(_load(paths, dtype, tuple(constants.items())), function)
    found.restype = None
    return found


@functools.cache
def problem() -> str:
    """Why no kernel can be built here; ''."""
    from dyncc.kernels.row_linears import cpu

    try:
        load((cpu.SOURCE,), "linears", torch.float32, ROWS=1)
    except Exception as error:
        return f"no C++ kernel can be built ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return ""
