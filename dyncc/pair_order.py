"""Which rotary pairs of each head say most about its attention: a safetensors file that `calibrate_pairs` writes and `select-kv` reads.

It names the model that it belongs to by a few values of each of its parameters, and holds a checksum of its own numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyncc.errors import BadPairFile

FORMAT = "dyncc pairs 1"


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
        return sum(digest(t) not in self.parameters for t in tensors)

    def save(self, path: Path, told: dict[str, Any]) -> None:
        """Write the file; `told` goes into it too.

        Raises:
            OSError: the file cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {"pairs": self.pairs.to(torch.int32).contiguous(), "channels": self.channels.to(torch.int32).contiguous()}
        told = {**told, "format": FORMAT, "parameters": sorted(self.parameters), "checksum": _checksum(tensors.values())}
        try:
            save_file(tensors, path, metadata={"dyncc": json.dumps(told)})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def load_pairs(path: Path) -> PairOrder:
    """The order in a file.

    Raises:
        BadPairFile: there is no such file, or it is damaged, or is something else.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise BadPairFile(path=path, problem="there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {}).get("dyncc", "{}"))
            tensors = [file.get_tensor(name) for name in ("pairs", "channels")]
    except (SafetensorError, OSError, ValueError) as error:
        raise BadPairFile(path=path, problem=f"it cannot be read ({error})") from error
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise BadPairFile(path=path, problem="it is no file of rotary pairs of this version")
    if told.get("checksum") != _checksum(tensors):
        raise BadPairFile(path=path, problem="it is damaged: its numbers do not give its checksum")
    pairs, channels = (t.long() for t in tensors)
    return PairOrder(pairs, channels, frozenset(told["parameters"]))


def _checksum(tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def digest(tensor: Tensor, values: int = 64) -> str:
    """A parameter's name for itself: its sizes, type, and some of its values, spread over it."""
    flat = tensor.detach().reshape(-1)
    places = torch.linspace(0, max(flat.numel() - 1, 0), min(values, flat.numel()), dtype=torch.float64, device=flat.device).long()
    some: Sequence[float] = flat[places].double().tolist()
    return hashlib.sha256(f"{tuple(tensor.shape)}{tensor.dtype}{some}".encode()).hexdigest()[:16]
