"""The op `dyncc::group_query_attention`, whose meaning is its truth."""

from __future__ import annotations

from typing import Any

import torch

from dyncc.kernels.group_query_attention.truth import group_query_attention

_library = torch.library.Library("dyncc", "FRAGMENT")
_library.define(
    "group_query_attention(Tensor q, Tensor k, Tensor v, Tensor? past_k, Tensor? past_v, Tensor lengths, Tensor total, Tensor? cos, "
    "Tensor? sin, Tensor? positions, Tensor? bias, int heads, int groups, float scale) -> (Tensor, Tensor, Tensor)"
)
_library.impl("group_query_attention", group_query_attention, "CompositeExplicitAutograd")


@torch.library.register_fake("dyncc::group_query_attention")
def _fake(q: Any, k: Any, v: Any, past_k: Any, past_v: Any, *rest: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    groups = rest[-2]
    keys = k.shape[1] + (past_k.shape[2] if past_k is not None else 0)
    cache = (k.shape[0], groups, keys, k.shape[2] // groups)
    return torch.empty_like(q), k.new_empty(cache), v.new_empty(cache)


OP = torch.ops.dyncc.group_query_attention.default
