"""All that is said about the logits of one attention, as one mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dyncc.analysis.spelled import Mask, NotRead
from dyncc.ir import aten, shape, val
from dyncc.passes.attention_frame import Frame, padded


def join_masks(masks: list[Mask], frame: Frame, dtype: torch.dtype) -> Callable[..., Tensor | None]:
    """What makes one mask of all: bool where nothing is added and hidden logits are -inf, else added."""
    told: list[tuple[Mask, int]] = [(m, len(shape(m.at))) for m in masks]
    boolean = all(m.kind != "added" and m.value == float("-inf") for m, _ in told)
    if any(m.kind == "added" and val(m.node).dtype == torch.bool for m, _ in told):
        raise NotRead("a boolean is added to the logits")

    def joined(*tensors: Tensor) -> Tensor | None:
        bias: Tensor | None = None
        seen: Tensor | None = None
        hidden = 0.0
        for (mask, rank), tensor in zip(told, tensors, strict=True):
            part = padded(frame, tensor, rank)
            if mask.kind == "added":
                part = (part if mask.factor == 1.0 else part * mask.factor).to(dtype)
                bias = part if bias is None else bias + part
            else:
                part = part if mask.kind == "seen" else torch.logical_not(part)
                seen = part if seen is None else torch.logical_and(seen, part)
                hidden = min(hidden, max(mask.value, torch.finfo(dtype).min) if mask.value > float("-inf") else mask.value)
        if seen is None or boolean:
            return seen if bias is None else bias
        least = torch.finfo(dtype).min if hidden > float("-inf") else hidden
        return torch.where(seen, aten.scalar_tensor(0.0, dtype=dtype, device=seen.device) if bias is None else bias, least)

    return joined
