"""Boolean masks that several attentions read, looked at once: a run op by op converts a mask in every call, and computes what it hides.

Of a mask that hides later keys and nothing else, the flag that says so takes its place: half of a long prompt's attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dyncc.ir import argument, aten, op_name, operands


@dataclass(frozen=True)
class Mask:
    """What SDPA is given in place of a boolean mask: an additive one, or None and the causal flag."""

    additive: Tensor | None
    causal: bool


def share_masks(graph: fx.Graph) -> None:
    """Look at each mask once, where more than one attention of the same dtype reads it; the values stay what SDPA makes of them."""
    made: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
    for node in list(graph.nodes):
        mask = argument(node, "attn_mask") if op_name(node) == "scaled_dot_product_attention" else None
        if not isinstance(mask, fx.Node) or mask.meta["val"].dtype != torch.bool or len(mask.users) < 2:
            continue
        key = (mask, operands(node)[0].meta["val"].dtype)
        q, k, v = operands(node)[:3]
        options = {name: argument(node, name) for name in ("dropout_p", "scale", "enable_gqa")}
        with graph.inserting_before(node):
            if key not in made:
                made[key] = graph.call_function(look_at, key)
            attended = graph.call_function(attend, (made[key], q, k, v), options)
        attended.meta = dict(node.meta)
        node.replace_all_uses_with(attended)
        graph.erase_node(node)


def look_at(mask: Tensor, dtype: torch.dtype) -> Mask:
    """The mask as SDPA may take it.

    >>> look_at(torch.ones(3, 3, dtype=torch.bool).tril(), torch.float32)
    Mask(additive=None, causal=True)
    >>> look_at(torch.tensor([[True, False]]), torch.float32).additive.tolist()
    [[0.0, -inf]]
    """
    rows, keys = mask.shape[-2:]
    if rows == keys and bool((mask == torch.ones(rows, keys, dtype=torch.bool, device=mask.device).tril()).all()):
        return Mask(None, True)
    return Mask(torch.where(mask, aten.scalar_tensor(0.0, dtype=dtype, device=mask.device), -torch.inf), False)


def attend(mask: Mask, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """SDPA with a mask that was looked at."""
    found: Tensor = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask.additive, is_causal=mask.causal, **options)
    return found
