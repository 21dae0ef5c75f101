"""The op `dyncc::gated_linear_attention`: on a CPU one chunk after the other, on a GPU a generated Triton kernel, where it is written out
all chunks at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dyncc.kernels.gated_linear_attention.chunks import chunk, chunk_by_chunk
from dyncc.kernels.gated_linear_attention.gpu import spec_of
from dyncc.kernels.gated_linear_attention.truth import step
from dyncc.kernels.generator.tune import preferred
from dyncc.kernels.gradients import by_truth

SHORT = 4
"""Tokens up to which one after the other is faster than a chunk."""

_library = torch.library.Library("dyncc", "FRAGMENT")
_library.define(
    "gated_linear_attention(Tensor q, Tensor k, Tensor v, Tensor? log_decay=None, Tensor? state=None, float scale=1.0) -> (Tensor, Tensor)"
)


def on_cpu(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The form that is fastest for so many tokens."""
    return in_order((step if q.shape[2] <= SHORT else chunk_by_chunk)(q, k, v, log_decay, state, scale))


def on_gpu(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """By a generated kernel, where there is one for such tensors."""
    spec = spec_of(q, k, v, log_decay, state, "add")
    if spec is None:
        return on_cpu(q, k, v, log_decay, state, scale)
    return in_order(preferred(spec, q.device).run(q, k, v, log_decay=log_decay, state=state, scale=scale))


def in_order(results: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Results that own their memory and lie in order, as the fake says."""
    out, last = results
    return out.contiguous(), last.contiguous() if out.shape[2] else last.clone()


def with_gradients(*given: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """The form that autograd goes back through."""
    return in_order(chunk(*given, **named))


_library.impl("gated_linear_attention", on_cpu, "CPU")
_library.impl("gated_linear_attention", on_gpu, "CUDA")
_library.impl("gated_linear_attention", on_cpu, "CompositeExplicitAutograd")


@torch.library.register_fake("dyncc::gated_linear_attention")
def fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(v.dtype, torch.float32)
    return v.new_empty(v.shape), v.new_empty((*q.shape[:2], q.shape[3], v.shape[3]), dtype=wide)


GATED_LINEAR_ATTENTION = torch.ops.dyncc.gated_linear_attention.default
by_truth(_library, GATED_LINEAR_ATTENTION, with_gradients)
TRUTHS: dict[Any, Callable[..., Any]] = {GATED_LINEAR_ATTENTION: chunk}
"""The op in ATen, for engines that do not know it: the form that loops over no tokens."""
