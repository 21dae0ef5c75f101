"""The op `dyncc::decayed_sum`: the form that is fastest for so many numbers a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dyncc.kernels.decayed_sum.truth import at_once, in_chunks, step
from dyncc.kernels.gradients import by_truth

WIDE = 2048
"""Numbers a token from which on one step a token was measured to be fastest; narrower ones are dominated by the calls."""
SHORT = 16

_library = torch.library.Library("dyncc", "FRAGMENT")
_library.define("decayed_sum(Tensor x, Tensor factor, Tensor? state=None) -> Tensor")


def forward(x: Tensor, factor: Tensor, state: Tensor | None = None) -> Tensor:
    """All sums [B, T, N], contiguous."""
    wide = x.shape[0] * x.shape[2] >= WIDE or x.shape[1] <= SHORT
    return (step if wide else in_chunks)(x, factor, state).contiguous()


def with_gradients(*given: Any, **named: Any) -> Tensor:
    """The form that autograd goes back through."""
    return at_once(*given, **named).contiguous()


_library.impl("decayed_sum", forward, "CompositeExplicitAutograd")


@torch.library.register_fake("dyncc::decayed_sum")
def fake(x: Tensor, factor: Tensor, state: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape)


DECAYED_SUM = torch.ops.dyncc.decayed_sum.default
by_truth(_library, DECAYED_SUM, with_gradients)
TRUTHS: dict[Any, Callable[..., Any]] = {DECAYED_SUM: at_once}
"""The op in ATen, for engines that do not know it: the form that loops over no tokens."""
