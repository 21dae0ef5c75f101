"""`attend` on a GPU: a Triton kernel generated for what the call asks; what no kernel is generated for goes to the truth."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from dyncc.kernels.fused_attention.truth import attend, check, distances, gated, seen
from dyncc.kernels.generator import Attend
from dyncc.kernels.generator.spec import DTYPES, WIDEST, dtype_of
from dyncc.kernels.generator.tune import preferred

TRITON = importlib.util.find_spec("triton") is not None
EPILOGUES = {"sigmoid": "gate-sigmoid", "silu": "gate-silu"}


def attend_by_kernel(
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
    """What truth.attend computes."""
    check(query, key, dropout_p, is_causal, window, activation, prefix, slopes)
    if prefix or slopes is not None:  # kernels know neither: they are written out as a mask
        attn_mask, is_causal = as_mask(query, key, attn_mask, is_causal, window, prefix, slopes), False
        window = 0
    told = {"sinks": sinks, "cap": cap, "window": window, "gate": gate, "activation": activation}
    spec = spec_of(query, key, value, attn_mask, is_causal, **told)  # type: ignore[arg-type]
    if spec is None:
        return attend(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa, **told)  # type: ignore[arg-type]
    out = query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3])).transpose(1, 2)
    each = None if sinks is None else sinks.reshape(-1).expand(query.shape[1]).contiguous()
    more = {"gate": gate} if spec.epilogues else {}
    preferred(spec, query.device).run(query, key, value, mask=attn_mask, sinks=each, scale=scale, out=out, **more)
    return out if spec.epilogues else gated(out, gate, activation)


def spec_of(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, sinks: Tensor | None, cap: float, window: int,
    gate: Tensor | None, activation: str,
) -> Attend | None:  # fmt: skip
    """The kernel that is generated for such tensors, of which only sizes and types count; None where the truth serves them."""
    if not takes(query, key, value, mask, sinks, gate):
        return None
    kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "added"
    fused = (EPILOGUES[activation],) if gate is not None and activation in EPILOGUES else ()
    told = (is_causal, window, cap, kind, sinks is not None)
    return Attend(query.shape[3], value.shape[3], *told, dtype=dtype_of(query), epilogues=fused)


def as_mask(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, window: int, prefix: int, slopes: Tensor | None
) -> Tensor:  # fmt: skip
    """One mask of the queries' type or bool that says what all of these say."""
    rows, keys, device = query.shape[2], key.shape[2], query.device
    shown = seen(rows, keys, window, device, prefix) if is_causal else torch.ones(rows, keys, dtype=torch.bool, device=device)
    if mask is not None and mask.dtype == torch.bool:
        shown, mask = shown & mask, None
    if slopes is not None:
        sloped = (slopes.float() * distances(rows, keys, device)).to(query.dtype)
        mask = sloped if mask is None else mask + sloped
    return shown if mask is None else torch.where(shown, mask, float("-inf"))


def takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None, gate: Tensor | None) -> bool:
    """Whether a kernel is generated for such tensors: types and widths that it takes, a sink for each head, and Triton at hand."""
    if not TRITON or dtype_of(query) not in DTYPES:
        return False
    given = [x for x in (key, value, sinks, gate, mask) if x is not None and x.dtype != torch.bool]
    heads = sinks is None or sinks.numel() == 1 or (sinks.dim() > 2 and sinks.shape[-3] == sinks.numel() == query.shape[1])
    filled = query.numel() > 0 and key.numel() > 0 and value.numel() > 0
    return heads and filled and max(query.shape[3], value.shape[3]) <= WIDEST and all(x.dtype == query.dtype for x in given)
