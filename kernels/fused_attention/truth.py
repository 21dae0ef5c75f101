"""The truth of `attend`: softmax attention written out, with everything that SDPA cannot be told."""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATIONS = ("sigmoid", "silu", "none")
"""What a gate goes through before it multiplies."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    sinks: Tensor | None = None,
    cap: float = 0.0,
    window: int = 0,
    prefix: int = 0,
    slopes: Tensor | None = None,
    gate: Tensor | None = None,
    activation: str = "sigmoid",
) -> Tensor:
    """act(gate) * softmax(cap tanh(scale q k' / cap) + slopes (key - row) + mask) v, [B, H, Tq, Dv]; the first arguments are SDPA's.

    Args:
        query: [B, H, Tq, D]; key [B, G, Tk, D]; value [B, G, Tk, Dv]; H is a multiple of G.
        attn_mask: broadcastable to [B, H, Tq, Tk]; bool (True is seen) or added to the logits. A row that sees no key gives zeros.
        dropout_p: 0; there only because SDPA has it.
        sinks: broadcastable to [B, H, Tq, 1], logits of a key that is no key: it takes weight and has no value (Agarwal et al. 2025).
        cap: soft cap of the logits (Gemma Team 2024); 0 is none.
        window: with `is_causal`, row i sees the keys above i - window; 0 is all.
        prefix: with `is_causal`, every row sees that many first keys too (Dong et al. 2019, UniLM).
        slopes: broadcastable to [B, H, 1, 1] (ALiBi, Press et al. 2022).
        gate: broadcastable to [B, H, Tq, Dv] (Qiu et al. 2025); `activation` is one of ACTIVATIONS.
    Raises:
        ValueError: dropout, a window or a prefix without the causal flag, both, slopes that are not one a head,
            heads that are no multiple of groups, or an unknown activation.
    """
    check(query, key, dropout_p, is_causal, window, activation, prefix, slopes)
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x if x.dtype == wide else x.to(wide) for x in (query, key, value))
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    logits = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    if cap:
        logits = torch.tanh(logits / cap) * cap
    if slopes is not None:
        logits = logits + slopes.to(wide) * distances(q.shape[2], k.shape[2], q.device)
    if is_causal:
        logits = torch.where(seen(q.shape[2], k.shape[2], window, q.device, prefix), logits, float("-inf"))
    if attn_mask is not None:
        logits = torch.where(attn_mask, logits, float("-inf")) if attn_mask.dtype == torch.bool else logits + attn_mask
    if sinks is None:
        blind = (logits == float("-inf")).all(-1, keepdim=True)  # the softmax of such a row, and its gradient, would be NaN
        out = torch.where(blind, 0.0, torch.softmax(torch.where(blind, 0.0, logits), -1) @ v)
    else:
        column = sinks.to(wide).expand(*logits.shape[:3], 1)
        out = torch.softmax(torch.cat([logits, column], -1), -1)[..., :-1] @ v
    return rows_apart(gated(out.to(query.dtype), gate, activation))


def check(
    query: Tensor, key: Tensor, dropout_p: float, is_causal: bool, window: int, activation: str, prefix: int, slopes: Tensor | None
) -> None:
    """ValueError for what `attend` does not mean."""
    if dropout_p:
        raise ValueError(f"attend has no dropout, got dropout_p={dropout_p}")
    if window < 0 or (window and not is_causal):
        raise ValueError(f"a window counts back from the causal edge: window={window} needs is_causal=True and at least 1 key")
    if prefix < 0 or (prefix and (window or not is_causal)):
        raise ValueError(f"a prefix is what later rows see beside the causal edge: prefix={prefix} needs is_causal=True and no window")
    if slopes is not None and (slopes.dim() not in (3, 4) or tuple(slopes.shape[-2:]) != (1, 1)):
        raise ValueError(f"slopes are one number a head, [B or 1, H or 1, 1, 1], got {list(slopes.shape)}")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads cannot share {key.shape[1]} key heads evenly")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")


def seen(rows: int, keys: int, window: int, device: torch.device, prefix: int = 0) -> Tensor:
    """[rows, keys] bool: row i sees keys up to i, the last `window` of them, and those of the prefix.

    >>> seen(3, 3, 2, torch.device("cpu")).int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    row, key = torch.arange(rows, device=device).unsqueeze(1), torch.arange(keys, device=device)
    causal = key <= row
    if prefix:
        return causal | (key < prefix)
    return causal & (key > row - window) if window else causal


def distances(rows: int, keys: int, device: torch.device) -> Tensor:
    """[rows, keys] int64: how far a key stands behind its row, negative in front of it."""
    return torch.arange(keys, device=device) - torch.arange(rows, device=device).unsqueeze(1)


def gated(out: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """`out` times its gate."""
    if gate is None:
        return out
    opened = gate if activation == "none" else torch.sigmoid(gate) if activation == "sigmoid" else torch.nn.functional.silu(gate)
    return out * opened


def rows_apart(out: Tensor) -> Tensor:
    """[B, H, T, D] laid out as [B, T, H, D]: heads are merged next, and that is then no copy."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)
