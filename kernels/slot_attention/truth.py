"""The truth of attention to learned slots, written out (Pattention, Wang et al. 2024, "TokenFormer")."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def attend_slots(x: Tensor, keys: Tensor, values: Tensor, scale: float = 1.0, eps: float = 0.0, approximate: str = "none") -> Tensor:
    """gelu(scale s / max(|s|, eps)) V with s = x K', [..., Dv]; |s| is the length of a row's scores.

    Args:
        x: [..., D].
        keys: [S, D]; values [S, Dv], of x's type.
        scale: what scores of unit length are multiplied by; of any sign.
        eps: the least length that scores are divided by; with 0 a row of zeros gives NaN, as it does written out.
        approximate: of gelu, "none" or "tanh".
    Raises:
        ValueError: sizes that do not fit each other.
    """
    check(x, keys, values)
    scores = x @ keys.T
    unit = scores / torch.linalg.vector_norm(scores, dim=-1, keepdim=True).clamp_min(eps)
    return (F.gelu(unit * scale, approximate=approximate) @ values).contiguous()


def check(x: Tensor, keys: Tensor, values: Tensor) -> None:
    """ValueError for sizes that `attend_slots` does not take."""
    if keys.dim() != 2 or values.dim() != 2 or not x.dim() or x.shape[-1] != keys.shape[1] or keys.shape[0] != values.shape[0]:
        got = [list(t.shape) for t in (x, keys, values)]
        raise ValueError(f"slots are read by x [..., D] from keys [S, D] and values [S, Dv], got {got}")
