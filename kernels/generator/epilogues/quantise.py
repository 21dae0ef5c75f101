"""round(result / steps) as int8 within 127, with one step for each row, channel or head, as given (Jacob et al. 2018, symmetric)."""

from __future__ import annotations

from torch import Tensor


def _quantise(result: Tensor, steps: Tensor) -> Tensor:
    return (result / steps.float() + 0.5).floor().clamp(-127, 127)


TENSORS: tuple[str, ...] = ("steps",)
NUMBERS: tuple[str, ...] = ()
WHOLE = False
STORES = "int8"
EPILOGUES: dict[str, tuple[str, ...]] = {
    "quantise": (
        "result = tl.floor(result / tl.where(kept, steps_tile, 1.0) + 0.5)",
        "result = tl.minimum(tl.maximum(result, -127.0), 127.0)",
    ),
}
TRUTHS = {"quantise": _quantise}
