"""The op `dyncc::gated_delta_rule`: chunk after chunk, and token after token where there are few; on a GPU a generated Triton kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dyncc.kernels.gated_delta_rule.chunks import chunk
from dyncc.kernels.gated_delta_rule.truth import step
from dyncc.kernels.gated_linear_attention.gpu import spec_of
from dyncc.kernels.gated_linear_attention.op import SHORT, fake, in_order
from dyncc.kernels.generator.tune import preferred
from dyncc.kernels.gradients import by_truth

_library = torch.library.Library("dyncc", "FRAGMENT")
_library.define(
    "gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? log_decay=None, Tensor? state=None) -> (Tensor, Tensor)"
)


def forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The form that is fastest for so many tokens."""
    return in_order((step if q.shape[2] <= SHORT else chunk)(q, k, v, beta, log_decay, state))


def on_gpu(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """By a generated kernel, where there is one for such tensors."""
    decay = None if log_decay is None else log_decay.unsqueeze(-1)
    spec = spec_of(q, k, v, decay, state, "delta")
    if spec is None or any(x is not None and x.shape != q.shape[:3] for x in (beta, log_decay)):
        return forward(q, k, v, beta, log_decay, state)
    return in_order(preferred(spec, q.device).run(q, k, v, beta=beta.unsqueeze(3), log_decay=decay, state=state))


def with_gradients(*given: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """The form that autograd goes back through."""
    return in_order(chunk(*given, **named))


_library.impl("gated_delta_rule", on_gpu, "CUDA")
_library.impl("gated_delta_rule", forward, "CompositeExplicitAutograd")
torch.library.register_fake("dyncc::gated_delta_rule", fake)

GATED_DELTA_RULE = torch.ops.dyncc.gated_delta_rule.default
by_truth(_library, GATED_DELTA_RULE, with_gradients)
TRUTHS: dict[Any, Callable[..., Any]] = {GATED_DELTA_RULE: chunk}
"""The op in ATen, for engines that do not know it."""
