"""Which rotary pairs of each head say most about its attention: a safetensors file that `calibrate_pairs` writes and `select-kv` reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyncc.errors import BadPairFile
from dyncc.stamped_file import Stamped, read_stamped, write_stamped

FORMAT = "dyncc pairs 2"


@dataclass(frozen=True, eq=False)
class PairOrder:
    """`pairs` [layers, heads, D / 2]: the pairs of each head, the most telling first. `channels` [D / 2, 2]: what a pair consists of.
    `parameters`: digests of the model's parameters."""

    pairs: Tensor
    channels: Tensor
    parameters: frozenset[str]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Attentions, heads, width of a head."""
        layers, heads, count = self.pairs.shape
        return layers, heads, 2 * count

    def best(self, layer: int, count: int) -> list[list[int]]:
        """The channels of the `count` most telling pairs of each head of an attention, rising."""
        chosen = self.channels[self.pairs[layer, :, :count]].flatten(1)
        rows: list[list[int]] = chosen.sort(dim=1).values.tolist()
        return rows

    def strangers(self, tensors: Iterable[Tensor]) -> int:
        """How many of some parameters are none of the model's."""
        return Stamped({}, {}, self.parameters).strangers(tensors)

    def save(self, path: Path, told: dict[str, Any]) -> None:
        """Write the file; `told` goes into it too.

        Raises:
            OSError: the file cannot be written.
        """
        tensors = {"pairs": self.pairs.to(torch.int32), "channels": self.channels.to(torch.int32)}
        write_stamped(path, FORMAT, Stamped(tensors, told, self.parameters))


def load_pairs(path: Path) -> PairOrder:
    """The order in a file.

    Raises:
        BadPairFile: there is no such file, or it is damaged, or is something else.
    """
    try:
        found = read_stamped(path, FORMAT, "rotary pairs")
    except ValueError as error:
        raise BadPairFile(path=path, problem=error) from error
    if set(found.tensors) != {"pairs", "channels"}:
        raise BadPairFile(path=path, problem="it is no file of rotary pairs of this version")
    return PairOrder(found.tensors["pairs"].long(), found.tensors["channels"].long(), found.parameters)
