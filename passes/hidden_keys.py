"""Keys that do not count, masked out of an attention whatever its form."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dyncc.ir import emit, operands, refresh, replace_operands
from dyncc.restrict import Refusal


def hide_keys(region: Any, valid: fx.Node) -> None:
    """Mask keys that are not valid out of an attention, for rows that are (a row with nothing to see would give NaN)."""
    if region.extras:
        raise Refusal(f"attention {region.index}: {region.extras}")
    if region.fused:
        sdpa = region.out
        mask = operands(sdpa)[3]
        replace_operands(sdpa, {3: emit(sdpa, _hidden, mask, valid)})
        refresh(sdpa)
        return
    softmax = region.softmax
    replace_operands(softmax, {0: emit(softmax, _hidden_logits, softmax.args[0], valid)})
    refresh(softmax)


def _hidden(mask: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    seen = _seen(valid, mask)
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def _seen(valid: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Which keys a row may see; rows that are not valid themselves see all (nobody looks at them, and they must not turn NaN)."""
    own = ~valid[:, None, :, None]
    return valid[:, None, None, :] | own if isinstance(rows.shape[-2], torch.SymInt) or rows.shape[-2] != 1 else valid[:, None, None, :]


def _hidden_logits(logits: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    seen = _seen(valid, logits)
    return logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
