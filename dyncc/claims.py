"""Claims: values of two programs that must be the same, as nodes of the joint graph that compare them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dyncc.evidence import relative_error
from dyncc.ir import aten, is_tensor, op_name, same_size, shape, val

SOME = 128
"""Query rows on which a rewritten attention is compared: each is computed by itself, and all of a long prompt would cost what the captured
attention costs."""


@dataclass(frozen=True)
class Claim:
    """The program at `position` of the chain says that `what` is the same as in the one before it."""

    position: int
    what: str
    dtype: torch.dtype


def comparable(a: fx.Node, b: fx.Node) -> bool:
    """Tensors of one size and dtype whose contents mean something (fresh memory holds anything)."""
    if not is_tensor(a) or not is_tensor(b) or "empty" in op_name(a) or "empty" in op_name(b):
        return False
    alike = val(a).dtype == val(b).dtype and val(a).device == val(b).device and len(shape(a)) == len(shape(b))
    return alike and all(same_size(x, y) for x, y in zip(shape(a), shape(b), strict=True))


def compare(graph: fx.Graph, a: fx.Node, b: fx.Node) -> fx.Node:
    """A node that holds the relative error of `b`; an attention that nobody else reads is computed only as far as it is compared."""
    if b.target is aten.scaled_dot_product_attention.default and not b.users:
        error = graph.call_function(attention_error, (a, *b.args), dict(b.kwargs))
        graph.erase_node(b)
        return error
    return graph.call_function(relative_error, (a, b))


def attention_error(
    a: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **more: Any,
) -> float:
    """The relative error of an attention [..., Tq, D] to `a` on at most SOME query rows, the first and the last among them.

    >>> q, k = torch.randn(1, 2, 300, 4), torch.randn(1, 2, 300, 4)
    >>> attention_error(torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True), q, k, k, is_causal=True) < 1e-5
    True
    """
    count = q.shape[-2]
    if count <= SOME:
        return relative_error(a, aten.scaled_dot_product_attention.default(q, k, v, attn_mask, dropout_p, is_causal, **more))
    rows = torch.linspace(0, count - 1, SOME, device=q.device).round().long()
    if is_causal:
        attn_mask = torch.arange(k.shape[-2], device=q.device) <= rows.unsqueeze(1)
    elif attn_mask is not None and attn_mask.shape[-2] != 1:
        attn_mask = attn_mask.index_select(-2, rows)
    now = aten.scaled_dot_product_attention.default(q.index_select(-2, rows), k, v, attn_mask, dropout_p, False, **more)
    return relative_error(a.index_select(-2, rows), now)
