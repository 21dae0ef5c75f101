"""result + residual."""

from __future__ import annotations

from torch import Tensor


def _residual(result: Tensor, residual: Tensor) -> Tensor:
    return result + residual.float()


TENSORS: tuple[str, ...] = ("residual",)
NUMBERS: tuple[str, ...] = ()
WHOLE = False
EPILOGUES: dict[str, tuple[str, ...]] = {"residual": ("result = result + residual_tile",)}
TRUTHS = {"residual": _residual}
