"""act(gate) * result (Qiu et al. 2025)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def _sigmoid(result: Tensor, gate: Tensor) -> Tensor:
    return result * gate.float().sigmoid()


def _silu(result: Tensor, gate: Tensor) -> Tensor:
    return result * F.silu(gate.float())


TENSORS: tuple[str, ...] = ("gate",)
NUMBERS: tuple[str, ...] = ()
WHOLE = False
EPILOGUES: dict[str, tuple[str, ...]] = {
    "gate-sigmoid": ("result = result * tl.sigmoid(gate_tile)",),
    "gate-silu": ("result = result * gate_tile * tl.sigmoid(gate_tile)",),
}
TRUTHS = {"gate-sigmoid": _sigmoid, "gate-silu": _silu}
