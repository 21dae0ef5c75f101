"""Put tensors in the order that a generated kernel takes them, and launch it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dyncc.kernels.generator.epilogues import EPILOGUES
from dyncc.kernels.generator.frame import PLACE
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
    pointers: list[Tensor] = []
    strides: list[int] = []
    for operand in spec.operands():
        x = given[operand.name]
        assert x is not None, operand.name
        pointers.append(x.view(torch.uint8) if x.dtype == torch.bool else x)
        strides += x.stride()[: len(operand.strides)]
    for name in spec.epilogues:
        for tensor in EPILOGUES[name].tensors:
            pointers.append(extras[tensor])
            strides += pointers[-1].stride()[: len(PLACE)]
    told = [numbers[name] for name in (*spec.sizes(), *spec.numbers())]
    told += [extras[number] for name in spec.epilogues for number in EPILOGUES[name].numbers]
    kernel(spec)[tuple(grid)](*pointers, *strides, *told, **constants, **spec.options(torch.version.hip is None))


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


def side_by_side(x: Tensor) -> Tensor:
    """The same values with channels that lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def blocks(count: int, size: int) -> int:
    """
    >>> blocks(17, 16)
    2
    """
    return (count + size - 1) // size
