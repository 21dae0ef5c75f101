"""Tensors in a safetensors file: each storage once, so that what was tied is tied again after loading.

A tensor that covers its storage is stored under its name with its shape. Others (tied names, views, strided tensors) are kept in the
file's metadata as views of a stored one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dyncc.errors import UnsupportedModel

Entry = dict[str, Any]


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors to a file.

    Raises:
        UnsupportedModel: safetensors has no form for one of them.
        OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    stored, table = _packed(tensors)
    try:
        save_file(stored, path, metadata={"tensors": json.dumps(table)})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UnsupportedModel(what=f"A tensor that safetensors cannot hold ({error})", hint="convert it before saving") from error


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that `save_tensors` wrote, on their devices; parameters come back as parameters without gradients."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        table: dict[str, Entry] = json.loads(file.metadata()["tensors"])
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  the handle is no mapping
    moved = {name: stored[name].to(entry["device"]) for name, entry in table.items() if name in stored}
    found: dict[str, torch.Tensor] = {}
    made: dict[str, torch.Tensor] = {}
    for name, entry in table.items():
        key = json.dumps({k: v for k, v in entry.items() if k != "device"})
        if key not in made:
            view = moved[entry["of"]].as_strided(entry["size"], entry["stride"], entry["offset"])
            made[key] = torch.nn.Parameter(view, requires_grad=False) if entry["parameter"] else view
        found[name] = made[key]
    return found


def _packed(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Entry]]:
    """What to store, and each tensor as a view of something stored."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), tensor.dtype, tensor.device) if storage.nbytes() else name
        groups.setdefault(key, []).append(name)
    stored: dict[str, torch.Tensor] = {}
    table: dict[str, Entry] = {}
    for names in groups.values():
        low = min(tensors[n].storage_offset() for n in names)
        high = max(tensors[n].storage_offset() + _span(tensors[n]) for n in names)
        base = next((n for n in names if tensors[n].is_contiguous() and tensors[n].numel() == high - low), names[0])
        whole = tensors[base].detach()
        if not whole.is_contiguous() or whole.numel() != high - low:
            whole = whole.as_strided((high - low,), (1,), low)
        stored[base] = whole
        table.update({n: _entry(tensors[n], base, low) for n in names})
    return stored, {name: table[name] for name in tensors}


def _entry(tensor: torch.Tensor, base: str, low: int) -> Entry:
    place = {"of": base, "size": list(tensor.shape), "stride": list(tensor.stride()), "offset": tensor.storage_offset() - low}
    return {**place, "parameter": isinstance(tensor, torch.nn.Parameter), "device": str(tensor.device)}


def _span(tensor: torch.Tensor) -> int:
    """How many elements of the storage a tensor reaches over."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
