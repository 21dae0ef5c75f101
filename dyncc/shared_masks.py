"""A boolean mask that several attentions read, made additive once: a run op by op converts it in every call, which for long prompts is a
tenth of the time."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dyncc.ir import argument, aten, op_name, operands


def share_masks(graph: fx.Graph) -> None:
    """Convert each mask once, where more than one attention of the same dtype reads it; the values stay what SDPA makes of them."""
    made: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
    for node in list(graph.nodes):
        mask = argument(node, "attn_mask") if op_name(node) == "scaled_dot_product_attention" else None
        if not isinstance(mask, fx.Node) or mask.meta["val"].dtype != torch.bool or len(mask.users) < 2:
            continue
        key = (mask, operands(node)[0].meta["val"].dtype)
        if key not in made:
            with graph.inserting_before(node):
                made[key] = graph.call_function(additive, key)
        node.update_arg(3, made[key]) if len(node.args) > 3 else node.update_kwarg("attn_mask", made[key])


def additive(mask: Any, dtype: torch.dtype) -> Any:
    """0 where a bool mask is True, minus infinity elsewhere.

    >>> additive(torch.tensor([True, False]), torch.float32).tolist()
    [0.0, -inf]
    """
    return torch.where(mask, aten.scalar_tensor(0.0, dtype=dtype, device=mask.device), -torch.inf)
