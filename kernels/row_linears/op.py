"""The op `dyncc::row_linears`: linear layers that read the same few rows, whose meaning is its truth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dyncc.kernels.row_linears import cpu

_library = torch.library.Library("dyncc", "FRAGMENT")
_library.define("row_linears(Tensor x, Tensor[] weights, Tensor?[] biases, int threads) -> Tensor[]")


def row_linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], threads: int = 0) -> list[Tensor]:
    """x [..., K] times each weight [N_i, K], plus its bias [N_i] where it has one: a list of [..., N_i].

    Args:
        threads: the most that the kernel wakes; 0 for all of torch's.
    """
    return [torch.ops.aten.linear.default(x, w, b) for w, b in zip(weights, biases, strict=True)]


def _on_cpu(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], threads: int) -> list[Tensor]:
    return (cpu.row_linears if cpu.takes(x, weights, biases) else row_linears)(x, weights, biases, threads)


_library.impl("row_linears", row_linears, "CompositeExplicitAutograd")
_library.impl("row_linears", _on_cpu, "CPU")


@torch.library.register_fake("dyncc::row_linears")
def _fake(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], threads: int) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], w.shape[0])) for w in weights]


ROW_LINEARS = torch.ops.dyncc.row_linears.default
