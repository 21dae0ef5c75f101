"""weight * result / sqrt(mean(result^2) + eps), over the channels of a head."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def _norm(result: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(result, result.shape[-1:], None, eps) * weight.float()


TENSORS: tuple[str, ...] = ("weight",)
NUMBERS: tuple[str, ...] = ("eps",)
WHOLE = True
EPILOGUES: dict[str, tuple[str, ...]] = {
    "norm": (
        "square = tl.sum(tl.where(kept, result * result, 0.0), axis=1) / WIDTH",
        "result = result * (1.0 / tl.sqrt(square + eps))[:, None] * weight_tile",
    ),
}
TRUTHS = {"norm": _norm}
