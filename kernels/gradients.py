"""Gradients of fused ops: where one is asked for, an op is its truth, through which autograd and compilers know the way back.

Kernels have no way back of their own. Without this, their gradients would be lost, silently in compiled code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def by_truth(library: torch.library.Library, op: Any, truth: Callable[..., Any]) -> None:
    """Make `op` of `library` its `truth` wherever a gradient is asked for: grad mode is on and a tensor among its arguments requires
    grad, or has a tangent. The truth takes the op's arguments and is of ATen ops that have gradients."""

    def called(*given: Any, **named: Any) -> Any:
        if _asked((*given, *named.values())):
            return truth(*given, **named)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*given, **named)

    library.impl(op._schema.name.removeprefix("dyncc::"), called, "Autograd")


def _asked(given: tuple[Any, ...]) -> bool:
    dual = forward_ad._current_level >= 0  # tangents exist inside a level alone
    if not dual and not torch.is_grad_enabled():
        return False
    return any(x.requires_grad or (dual and forward_ad.unpack_dual(x).tangent is not None) for x in given if isinstance(x, Tensor))
