"""Safetensors files that belong to one model: they hold a format, a checksum of their numbers, and digests of the model's parameters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Stamped:
    """What such a file holds: tensors by name, what else was told, and `parameters`, the digests of the model's."""

    tensors: Mapping[str, Tensor]
    told: Mapping[str, Any]
    parameters: frozenset[str]

    def strangers(self, tensors: Iterable[Tensor]) -> int:
        """How many of some parameters are none of the model's."""
        return sum(digest(t) not in self.parameters for t in tensors)


def write_stamped(path: Path, form: str, stamped: Stamped) -> None:
    """Write a file of the format `form`.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in stamped.tensors.items()}
    told = {**stamped.told, "format": form, "parameters": sorted(stamped.parameters), "checksum": _checksum(tensors)}
    try:
        save_file(tensors, path, metadata={"dyncc": json.dumps(told)})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def read_stamped(path: Path, form: str, what: str) -> Stamped:
    """What a file of the format `form` holds; `what` names such files to a user.

    Raises:
        ValueError: there is no such file, or it is damaged, or is something else; the message says which.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError("there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {}).get("dyncc", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"it cannot be read ({error})") from error
    if not isinstance(told, dict) or told.get("format") != form:
        raise ValueError(f"it is no file of {what} of this version")
    if told.get("checksum") != _checksum(tensors):
        raise ValueError("it is damaged: its numbers do not give its checksum")
    return Stamped(tensors, told, frozenset(told["parameters"]))


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].cpu().contiguous()
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode() + tensor.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digest(tensor: Tensor, values: int = 64) -> str:
    """A parameter's name for itself: its sizes, type, and some of its values, spread over it."""
    flat = tensor.detach().reshape(-1)
    places = torch.linspace(0, max(flat.numel() - 1, 0), min(values, flat.numel()), dtype=torch.float64).long()  # the same on every device
    some: Sequence[float] = flat[places.to(flat.device)].double().tolist()
    return hashlib.sha256(f"{tuple(tensor.shape)}{tensor.dtype}{some}".encode()).hexdigest()[:16]
