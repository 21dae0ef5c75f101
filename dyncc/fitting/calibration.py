"""Calibration data: DATA on the command line, or any iterable in Python, as a stream of calls of one size."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dyncc.errors import BadCalibration

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Batch:
    """One call of the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def note(self, found: Any) -> None:
        """Add what is in it to a running hash."""
        for leaf in pytree.tree_leaves((self.args, self.kwargs)):
            if isinstance(leaf, Tensor):
                plain = leaf.detach().cpu().contiguous()
                found.update(f"{tuple(plain.shape)}{plain.dtype}".encode() + plain.view(torch.uint8).numpy().tobytes())
            else:
                found.update(repr(leaf).encode())


def batches(data: Iterable[Any]) -> Iterator[Batch]:
    """The calls that an iterable gives: a tensor, a tuple of arguments, or a mapping of keywords each.

    Raises:
        BadCalibration: an item is something else, or holds a tensor without entries.
    """
    for number, item in enumerate(data):
        if isinstance(item, Tensor):
            batch = Batch((item,), {})
        elif isinstance(item, Mapping):
            batch = Batch((), dict(item))
        elif isinstance(item, (tuple, list)):
            batch = Batch(tuple(item), {})
        else:
            problem = f"batch {number} is a {type(item).__name__}; give a tensor, a tuple of arguments or a dict of keywords"
            raise BadCalibration(problem=problem)
        if any(isinstance(leaf, Tensor) and not leaf.numel() for leaf in pytree.tree_leaves((batch.args, batch.kwargs))):
            raise BadCalibration(problem=f"batch {number} holds a tensor without entries")
        yield batch


def running_hash() -> Any:
    """What `Batch.note` adds to."""
    return hashlib.sha256()


def open_data(text: str, model: str, example: Batch, length: int) -> Iterable[Any]:
    """The data that DATA names: `module:function` (returns an iterable of calls), a `.safetensors` file with tensors named as the model's
    inputs, cut into batches as large as the example, or a text file, which the tokenizer of a model folder reads.

    Args:
        model: the MODEL text; its folder holds the tokenizer.
        length: tokens a row of a text file.
    Raises:
        BadCalibration: there is no such data, or it does not fit.
    """
    path = Path(text).expanduser()
    if FUNCTION.fullmatch(text) and not path.exists():
        return _from_function(text)
    if not path.is_file():
        raise BadCalibration(problem=f"data {text!r}: no such file (DATA is module:function, a .safetensors file or a text file)")
    return _from_tensors(path, example) if path.suffix == ".safetensors" else _from_text(path, Path(model).expanduser(), length)


def _from_function(text: str) -> Iterable[Any]:
    from dyncc.loading import call_factory

    found = call_factory(text)
    if isinstance(found, (Tensor, Mapping, str)) or not isinstance(found, Iterable):
        calls = "tensors, tuples of arguments, or dicts of keywords"
        problem = f"{text} returned a {type(found).__name__}; return an iterable of calls: {calls}"
        raise BadCalibration(problem=problem)
    return found


def _from_tensors(path: Path, example: Batch) -> list[dict[str, Tensor]] | list[Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadCalibration(problem=f"data {path} cannot be read: {error}") from error
    sizes = {name: len(tensor) if tensor.dim() else 0 for name, tensor in tensors.items()}
    if not tensors or len(set(sizes.values())) > 1 or not min(sizes.values()):
        problem = f"data {path} holds {sizes or 'no tensors'}; every tensor needs as many rows as the others, and at least one"
        raise BadCalibration(problem=problem)
    leaves = [leaf for leaf in pytree.tree_leaves((example.args, example.kwargs)) if isinstance(leaf, Tensor)]
    size = leaves[0].shape[0] if leaves and leaves[0].dim() else 1
    starts = range(0, next(iter(sizes.values())) - size + 1, size)
    if not starts:
        raise BadCalibration(problem=f"data {path} holds fewer rows than a batch of the model's example, which has {size}")
    if len(example.args) == len(tensors) == 1:
        return [tensor[i : i + size] for tensor in tensors.values() for i in starts]
    return [{name: tensor[i : i + size] for name, tensor in tensors.items()} for i in starts]


def _from_text(path: Path, folder: Path, length: int) -> list[dict[str, Tensor]]:
    if not folder.is_dir():
        raise BadCalibration(problem=f"data {path} is text, which the tokenizer of a model folder reads; give module:function instead")
    try:
        from transformers import AutoTokenizer

        gguf = sorted(folder.glob("*.gguf"))
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **({"gguf_file": gguf[0].name} if gguf else {}))
        text = path.read_text(encoding="utf-8")
    except Exception as error:
        raise BadCalibration(problem=f"data {path} cannot be read as tokens: {' '.join(str(error).split())[:200]}") from error
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    rows = [ids[i : i + length][None] for i in range(0, len(ids) - length + 1, length)]
    if not rows:
        raise BadCalibration(problem=f"data {path} holds {len(ids)} tokens, fewer than a row of {length}; give more text, or --length")
    return [{"input_ids": row} for row in rows]
