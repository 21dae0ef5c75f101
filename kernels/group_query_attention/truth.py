"""The truth of group_query_attention: rotate, append to the cache, attend causally, heads merged in and out."""

from __future__ import annotations

import torch

aten = torch.ops.aten


def group_query_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past_k: torch.Tensor | None,
    past_v: torch.Tensor | None,
    lengths: torch.Tensor,
    total: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    positions: torch.Tensor | None,
    bias: torch.Tensor | None,
    heads: int,
    groups: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Causal attention of S new rows over P past keys and themselves; row i sees keys up to P + i.

    Args:
        q: [B, S, H * D]; k, v: [B, S, G * D], heads side by side.
        past_k, past_v: [B, G, P, D], or None for P = 0.
        lengths: [B] int32, the last key's position (P + S - 1); total: scalar int32, P + S. Both only tell a runtime what the sizes say.
        cos, sin: [N, D / 2] rows of the rotary tables, or None; positions: [B, S] int64, the row that each token takes.
        bias: [B or 1, H or 1, S, P + S], added to the logits.
    Returns:
        [B, S, H * D], and keys and values [B, G, P + S, D].
    """
    q, k, v = _split(q, heads), _split(k, groups), _split(v, groups)
    if cos is not None and sin is not None and positions is not None:
        q, k = _rotated(q, cos, sin, positions), _rotated(k, cos, sin, positions)
    if past_k is not None and past_v is not None:
        k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
    rows, keys = q.shape[2], k.shape[2]
    seen = torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril(keys - rows)
    hidden = torch.zeros(rows, keys, dtype=q.dtype, device=q.device).masked_fill(~seen, float("-inf"))
    mask = hidden if bias is None else hidden + bias
    out = aten.scaled_dot_product_attention.default(q, k, v, mask, 0.0, False, scale=scale, enable_gqa=heads != groups)
    return out.transpose(1, 2).flatten(2), k.contiguous(), v.contiguous()


def _split(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [B, H, S, D], first half against second half (Su et al. 2021)."""
    c, s = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * c - high * s, high * c + low * s], dim=-1)
