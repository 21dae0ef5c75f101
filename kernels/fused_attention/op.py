"""The op `dyncc::attend`: SDPA's arguments and more. Its meaning is its truth; on a CPU it runs a few rows at a time, on a GPU as a
generated Triton kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dyncc.kernels.fused_attention.cpu import attend_by_rows
from dyncc.kernels.fused_attention.gpu import attend_by_kernel
from dyncc.kernels.fused_attention.truth import attend
from dyncc.kernels.gradients import by_truth

_library = torch.library.Library("dyncc", "FRAGMENT")
_library.define(
    "attend(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, bool is_causal=False, *, "
    "float? scale=None, bool enable_gqa=False, Tensor? sinks=None, float cap=0.0, int window=0, int prefix=0, "
    "Tensor? slopes=None, Tensor? gate=None, str activation='sigmoid') -> Tensor"
)
_library.impl("attend", attend, "CompositeExplicitAutograd")
_library.impl("attend", attend_by_rows, "CPU")
_library.impl("attend", attend_by_kernel, "CUDA")


@torch.library.register_fake("dyncc::attend")
def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Tensor:
    batch, heads, rows = query.shape[:3]
    return query.new_empty((batch, rows, heads, value.shape[3])).transpose(1, 2)


ATTEND = torch.ops.dyncc.attend.default
by_truth(_library, ATTEND, attend)
TRUTHS: dict[Any, Callable[..., Tensor]] = {ATTEND: attend}
"""The op's truth in ATen, for engines that do not know it."""
