"""What a cache layer behind a cut of `prune-tokens` knows of its prompt: which rows of it are held, and where they stood."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyncc.passes.kept_rows import row_count
from dyncc.pipeline import render


@dataclass(frozen=True)
class PromptCuts:
    """Behind which layers `prune-tokens` keeps how many rows, `fixed` of them whatever their scores; `text` names the pass.

    Numbers are written out: a compiler that meets two caches in one process takes numbers that differ for sizes that vary, and text not.
    """

    written: str
    text: str

    @property
    def fixed(self) -> int:
        return int(self.written.split()[0])

    @property
    def cuts(self) -> list[tuple[int, int | float]]:
        """Each cut's layer, and the rows that stay (int) or their share (float)."""
        pairs = [pair.split(":") for pair in self.written.split()[1:]]
        return [(int(layer), int(keep) if keep.isdigit() else float(keep)) for layer, keep in pairs]

    @classmethod
    def of(cls, passed: Any) -> PromptCuts:
        """Of a decoder that is asked for the logits of its last row."""
        schedule = passed.layers.schedule(passed.keep, 1 + max(passed.layers.places))
        fixed = max(passed.sinks, int(passed.score == "cls-attention")) + max(passed.recents, 1)
        return cls(" ".join([str(fixed), *(f"{layer}:{keep!r}" for layer, keep in schedule if keep != 1.0)]), render([passed]))

    def prunes(self, total: Any) -> bool:
        """Whether a prompt of so many tokens loses any."""
        return any(total > (keep if isinstance(keep, int) else self.fixed) for _, keep in self.cuts)

    def rows_held(self, total: Any, layer: int) -> Any:
        """How many rows of a prompt of `total` a layer behind a cut holds; None in front of all cuts."""
        if all(cut >= layer for cut, _ in self.cuts):
            return None
        for cut, keep in self.cuts:
            if cut < layer:
                total = row_count(keep, total, self.fixed)
        return total


class PrunedPrompt:
    """`origin` [B, P]: the places in the text of the P rows that a layer holds of its prompt, -1 for rows that nobody may see; None while
    the layer holds every row. `tokens`: how many the pruned prompt had, for every layer; 0 for one that was not."""

    def __init__(self, cuts: PromptCuts) -> None:
        self.cuts = cuts
        self.origin: Tensor | None = None
        self.tokens = 0

    def thin(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """What layer number `layer` holds of a pruned prompt's keys and values [B, G, T, D]."""
        self.tokens = keys.shape[2]
        held = self.cuts.rows_held(self.tokens, layer)
        if held is not None:
            keys, values, self.origin = torch.ops.dyncc.thin(keys, values, held, self.cuts.text)
        return keys, values

    def stand_for(self, held: tuple[Tensor, Tensor], dense: tuple[Tensor, Tensor] | None, length: int) -> tuple[Tensor, Tensor]:
        """The rows held, marked as what stands for a text of `length` tokens (`dense`: its keys and values, in the pruned prompt itself).

        The length is that of the masks, the first layer's: one of a layer's own would be compared with it, and Inductor of torch 2.13 then
        forgets to define it.
        """
        if dense is None and self.origin is None:
            return held
        keys, values = dense if dense is not None else (None, None)
        return (
            torch.ops.dyncc.spread(held[0], self.origin, keys, length, self.cuts.text),
            torch.ops.dyncc.spread(held[1], self.origin, values, length, self.cuts.text),
        )

    def change(self, edit: Callable[[Tensor], Tensor]) -> None:
        self.origin = edit(self.origin) if self.origin is not None else None

    def forget(self) -> None:
        """Another text comes, or every layer holds equally many rows from now on."""
        self.origin, self.tokens = None, 0

    def copy(self) -> PrunedPrompt:
        other = PrunedPrompt(self.cuts)
        other.origin, other.tokens = self.origin, self.tokens
        return other
