"""Launch a generated kernel on tensors, as `dyncc::attend` with the epilogues behind it. What it means is `truth`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dyncc.kernels.fused_attention.truth import attend
from dyncc.kernels.generator.epilogues import EPILOGUES
from dyncc.kernels.generator.module import kernel
from dyncc.kernels.generator.spec import KernelSpec


def run(
    spec: KernelSpec, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None, scale: float | None = None,
    out: Tensor | None = None, **extras: Any,
) -> Tensor:  # fmt: skip
    """Attention [B, H, Tq, wide] of a spec.

    Args:
        mask: broadcastable to [B, H, Tq, Tk], of the spec's kind; sinks: [H].
        extras: tensors (broadcastable to the result) and numbers of the epilogues, by name.
    """
    import triton

    batch, heads, rows, width = q.shape
    keys, wide = k.shape[2], spec.value_width
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = q.new_empty((batch, heads, rows, wide)) if out is None else out
    given: list[Any] = [q, k, v, out]
    strides: list[int] = [s for x in given for s in x.stride()[:3]]
    if spec.mask != "none":
        assert mask is not None
        wide_mask = mask.expand(batch, heads, rows, keys)
        given.append(wide_mask.view(torch.uint8) if mask.dtype == torch.bool else wide_mask)
        strides += wide_mask.stride()
    if spec.sinks:
        given.append(sinks)
    numbers: list[float] = []
    for name in spec.epilogues:
        for tensor in EPILOGUES[name].tensors:
            given.append(extras[tensor].expand(batch, heads, rows, wide))
            strides += given[-1].stride()
        numbers += [extras[number] for number in EPILOGUES[name].numbers]
    grid = (triton.cdiv(rows, spec.tile[0]), batch * heads)
    scale = width**-0.5 if scale is None else scale
    options = {"HEADS": heads, "GROUPS": k.shape[1], "num_warps": spec.team, "num_stages": spec.stages}
    kernel(spec)[grid](*given, *strides, rows, keys, scale, *numbers, **options)
    return out


def truth(
    spec: KernelSpec, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None, scale: float | None = None,
    **extras: Any,
) -> Tensor:  # fmt: skip
    """What `run` means, in plain ATen and fp32 until the end."""
    sink = None if sinks is None else sinks.view(1, -1, 1, 1).float()
    mask = mask if mask is None or mask.dtype == torch.bool else mask.float()
    given = (q.float(), k.float(), v.float(), mask, 0.0, spec.causal)
    result = attend(*given, scale=scale, sinks=sink, cap=spec.cap, window=spec.window)
    for name in spec.epilogues:
        result = TRUTHS[name](result, **{x: extras[x] for e in (EPILOGUES[name],) for x in (*e.tensors, *e.numbers)})
    return result.to(q.dtype)


TRUTHS: dict[str, Callable[..., Tensor]] = {
    "gate-sigmoid": lambda result, gate: result * torch.sigmoid(gate.float()),
    "gate-silu": lambda result, gate: result * torch.nn.functional.silu(gate.float()),
    "residual": lambda result, residual: result + residual.float(),
    "norm": lambda result, weight, eps: torch.nn.functional.rms_norm(result, result.shape[-1:], None, eps) * weight.float(),
}
"""Each epilogue's meaning."""
