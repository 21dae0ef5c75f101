"""What the generated kernels are timed against on a GPU: for each kind, the same result from libraries and from plain PyTorch.

A rival takes a spec with the tensors of `samples.sample` and gives what the kernel gives, in the spec's type.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dyncc.kernels.gated_linear_attention import chunk
from dyncc.kernels.generator.spec import KernelSpec
from dyncc.kernels.select_keys import attend_selected, page_keys

Rival = Callable[..., Any]


def ended(spec: KernelSpec, result: Tensor, more: dict[str, Any]) -> Tensor:
    """Epilogues in the model's own type, as models write them."""
    for name in spec.epilogues:
        if name == "norm":
            result = F.rms_norm(result, result.shape[-1:], None, more["eps"]) * more["weight"]
        elif name == "residual":
            result = result + more["residual"]
        else:
            result = result * (more["gate"].sigmoid() if name == "gate-sigmoid" else F.silu(more["gate"]))
    return result


def sdpa(spec: Any, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
    """PyTorch's fused attention; only where there is no cap and no window."""
    return ended(spec, F.scaled_dot_product_attention(q, k, v, is_causal=spec.causal, enable_gqa=True), more)


def flex(spec: Any, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
    """FlexAttention (Dong et al. 2024), with its block mask made once for each length."""
    from torch.nn.attention.flex_attention import flex_attention

    def capped(score: Tensor, *place: Tensor) -> Tensor:
        return spec.cap * torch.tanh(score / spec.cap)

    mask = block_mask(spec.causal, spec.window, q.shape[2], k.shape[2], q.device.type)
    return ended(spec, flex_attention(q, k, v, capped if spec.cap else None, mask, enable_gqa=True), more)


@functools.cache
def block_mask(causal: bool, window: int, rows: int, keys: int, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (row >= key) & (row - key < window) if window else row >= key

    return create_block_mask(seen, None, None, rows, keys, device=device) if causal else None


def attention_written_out(spec: Any, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = (q @ k.transpose(2, 3)).float() * q.shape[3] ** -0.5
    logits = spec.cap * torch.tanh(logits / spec.cap) if spec.cap else logits
    if spec.causal:
        back = torch.arange(q.shape[2], device=q.device).unsqueeze(1) - torch.arange(k.shape[2], device=q.device)
        logits = logits.masked_fill((back < 0) | (back >= (spec.window or k.shape[2])), float("-inf"))
    return ended(spec, torch.softmax(logits, -1).to(v.dtype) @ v, more)


def rows_written_out(spec: Any, x: Tensor, **more: Any) -> Tensor:
    return ended(spec, x, more)


def chunks_written_out(spec: Any, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    out, last = chunk(q, k, v, more.get("log_decay"), more.get("state"), more["scale"])
    return ended(spec, out, more), last


def flash_linear_attention(spec: Any, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    """The library of that name: its kernels take [B, T, H, D]."""
    from fla.ops.gla import chunk_gla

    q, k, v, decay = (x.transpose(1, 2).contiguous() for x in (q, k, v, more["log_decay"].expand(q.shape)))
    out, last = chunk_gla(q, k, v, decay, scale=more["scale"], initial_state=more.get("state"), output_final_state=True)
    return ended(spec, out.transpose(1, 2), more), last


def gathered_sdpa(spec: Any, q: Tensor, k: Tensor, v: Tensor, index: Tensor, **more: Any) -> Tensor:
    """Chosen keys gathered, then PyTorch's fused attention; the kernel's own time is that of its parts and of joining them."""
    return attend_selected(q, k, v, None, page_keys(index, spec.page), ragged=True)


def softmax_written_out(spec: Any, x: Tensor, head: Tensor, **more: Any) -> tuple[Tensor, ...]:
    words = torch.log_softmax((x @ head.T).float(), 1)
    best = words.topk(2)
    chances = best.values.exp()
    return chances[:, 0], chances[:, 0] - chances[:, 1], -(words.exp() * words).sum(1), best.indices[:, 0]


COMPILED: dict[str, Rival] = {
    "attend": attention_written_out,
    "rows": rows_written_out,
    "linear_chunk": chunks_written_out,
    "attend_chosen": gathered_sdpa,
    "exit_confidence": softmax_written_out,
}
"""Plain PyTorch for torch.compile, by the kernel's kind."""


def rivals(spec: Any) -> dict[str, tuple[Rival, bool]]:
    """Each rival of a spec by name, and whether it is compiled first."""
    found: dict[str, tuple[Rival, bool]] = {"compiled eager": (COMPILED[spec.entry], True)}
    if spec.entry == "attend":
        found |= {"FlexAttention": (flex, True), **({} if spec.cap or spec.window else {"SDPA": (sdpa, False)})}
    if spec.entry == "linear_chunk" and spec.decay == "channel" and importlib.util.find_spec("fla"):
        found["flash-linear-attention"] = (flash_linear_attention, False)
    return found
