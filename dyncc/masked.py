"""The masked form of pruning: compute everything and mask, the meaning that the restricted graph must reproduce.

The dense graph is interpreted on real tensors; the selections are those that the restricted graph returned. From a cut on, keys that went
are hidden in every attention, and at the exit their rows take the fill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dyncc.errors import DynccError
from dyncc.ir import is_attention


@dataclass(frozen=True)
class Selection:
    """One cut's outcome: node names in the dense graph and which rows stay, [B, T] bool."""

    at: str
    stop: str | None
    fill: str
    hidden_from: tuple[str, ...]
    kept: torch.Tensor


class Masked(fx.Interpreter):
    """Interpret a dense graph under selections (earlier cuts first)."""

    def __init__(self, module: fx.GraphModule, selections: Sequence[Selection]):
        super().__init__(module)
        self.selections = selections
        self.bases: dict[str, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        hidden = [s.kept for s in self.selections if n.name in s.hidden_from]
        if hidden and is_attention(n):
            return self._attention(n, hidden)
        if hidden:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return n.target(_hide(args[0], hidden), *args[1:], **kwargs)  # type: ignore[operator]
        value = super().run_node(n)
        for s in self.selections:
            if n.name == s.at:
                self.bases[s.at] = value
        for s in reversed(self.selections):
            if n.name == s.stop:
                base = self.bases[s.at] if s.fill == "carry" else torch.zeros_like(value)
                value = torch.where(s.kept.unsqueeze(-1), value, base)
        return value

    def _attention(self, n: fx.Node, hidden: list[torch.Tensor]) -> torch.Tensor:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        names = [a.name for a in n.target._schema.arguments]  # type: ignore[union-attr]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        q, k = given["query"], given["key"]
        bias = q.new_zeros(q.shape[0], 1, q.shape[2], k.shape[2])
        if given.pop("is_causal", False):
            bias = bias.masked_fill(~torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(), float("-inf"))
        mask = given.pop("attn_mask", None)
        if mask is not None:
            bias = bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask
        given["attn_mask"] = _hide(bias, hidden)
        return n.target(**given)  # type: ignore[operator]


def _hide(logits: torch.Tensor, hidden: list[torch.Tensor]) -> torch.Tensor:
    """Hide the keys that went from the rows that stayed (rows that went are never looked at)."""
    for kept in hidden:
        rows = ~kept[:, None, :, None] if logits.shape[-2] == kept.shape[1] else False
        seen = kept[:, None, None, :] | rows
        logits = logits.masked_fill(~seen, float("-inf"))
    return logits


def selections(cuts: Sequence[Any], values: Sequence[torch.Tensor], lengths: Sequence[int]) -> list[Selection]:
    """Read the selections that a traced graph returned: per cut its original positions and, with padding, their validity."""
    stream = iter(values)
    found = []
    for cut, length in zip(cuts, lengths, strict=True):
        if cut.fused:
            raise DynccError("a fused row has no masked form")
        origin = next(stream)
        stays = next(stream) if cut.after.valid else torch.ones_like(origin, dtype=torch.bool)
        kept = torch.zeros(origin.shape[0], length, dtype=torch.bool, device=origin.device).scatter(1, origin, stays)
        found.append(Selection(cut.at, cut.stop, cut.fill, cut.hidden_from, kept))
    return found
