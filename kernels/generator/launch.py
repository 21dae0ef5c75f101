"""Put tensors in the order that a generated kernel takes them, and launch it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyncc.kernels.generator.epilogues import EPILOGUES
from dyncc.kernels.generator.frame import tensors
from dyncc.kernels.generator.module import kernel
from dyncc.kernels.generator.spec import KernelSpec


def launch(
    spec: KernelSpec, grid: Sequence[int], given: Mapping[str, Tensor | None], numbers: Mapping[str, int | float],
    constants: Mapping[str, int], extras: Mapping[str, Any],
) -> None:  # fmt: skip
    """Run a spec's kernel on `grid` programs.

    Args:
        given: its operands by name; numbers: its sizes and scalars; constants: what it is compiled for.
        extras: tensors (broadcastable to the result) and numbers of the epilogues, by name.
    """
    order = _order(spec)
    pointers: list[Tensor] = []
    strides: list[int] = []
    for name, count in order.tensors:
        x = given[name] if name in given else extras[name]
        assert x is not None, name
        pointers.append(x.view(torch.uint8) if x.dtype == torch.bool else x)
        strides += [0, *x.stride()[1:count]] if name == "out" and spec.moves else x.stride()[:count]
    told = [numbers[name] if name in numbers else extras[name] for name in order.numbers]
    order.kernel[tuple(grid)](*pointers, *strides, *told, **constants, **order.options)


@dataclass(frozen=True)
class _Order:
    """What a spec's kernel takes: tensors with how many strides each, numbers, what Triton is told, and the kernel."""

    tensors: list[tuple[str, int]]
    numbers: list[str]
    options: dict[str, int]
    kernel: Any


@functools.cache
def _order(spec: KernelSpec) -> _Order:
    told = [(x.name, len(x.strides)) for x in tensors(spec.operands(), spec.epilogues)]
    ends = [EPILOGUES[name] for name in spec.epilogues]
    numbers = [*spec.sizes(), *(n for e in ends for n in e.sizes), *spec.numbers(), *(n for e in ends for n in e.numbers)]
    return _Order(told, numbers, spec.options(torch.version.hip is None), kernel(spec))


def broadcast(spec: KernelSpec, extras: Mapping[str, Any], shape: Sequence[int]) -> dict[str, Any]:
    """The epilogues' tensors as [B, H, T, D], and their numbers as they are."""
    tensors = {x for name in spec.epilogues for x in EPILOGUES[name].tensors}
    return {name: value.expand(*shape) if name in tensors else value for name, value in extras.items()}


def ended(spec: KernelSpec, result: Tensor, extras: Mapping[str, Any]) -> Tensor:
    """What the epilogues make of a result in fp32: their truths, in order."""
    for name in spec.epilogues:
        epilogue = EPILOGUES[name]
        result = epilogue.truth(result, *(extras[x] for x in (*epilogue.tensors, *epilogue.numbers)))
    return result


def results(spec: KernelSpec, like: Tensor, shape: Sequence[int], out: Tensor | None) -> Tensor:
    """What a kernel stores into: `out`, or new memory of `shape` where it is None.

    Raises:
        ValueError: rows go to pages and no cache is given.
    """
    if out is None and spec.moves:
        raise ValueError(f"{spec.name} writes rows into pages: give the cache as out=[1, H, slots, {shape[3]}]")
    return like.new_empty(shape, dtype=getattr(torch, spec.stored)) if out is None else out


def stored(spec: KernelSpec, result: Tensor, extras: Mapping[str, Any], out: Tensor | None = None) -> Tensor:
    """What a kernel leaves in `out` for a result [B, H, T, D] in fp32: the truth of its epilogues, its type and its places."""
    made = ended(spec, result, extras).to(getattr(torch, spec.stored))
    if not spec.moves:
        return made
    at, page = torch.arange(made.shape[2], device=made.device), extras["page"]
    slots = extras["pages"][:, at // page] * page + at % page
    assert out is not None
    kept = out.clone()
    kept[0, :, slots.flatten()] = made.transpose(0, 1).flatten(1, 2)
    return kept


def side_by_side(x: Tensor) -> Tensor:
    """The same values with channels that lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def blocks(count: int, size: int) -> int:
    """
    >>> blocks(17, 16)
    2
    """
    return (count + size - 1) // size
