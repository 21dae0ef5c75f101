"""`attend` on a CPU without a matrix of logits: a few query rows at a time, over no more keys than they see."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from dyncc.kernels.fused_attention.truth import check, gated

aten = torch.ops.aten
LOGITS = 1 << 19
"""Logits that are held at once: they stay in the cores' caches."""
LEAST_ROWS = 32


@dataclass(frozen=True)
class Edges:
    """Which of `keys` keys the rows see, by position alone."""

    keys: int
    is_causal: bool
    window: int
    prefix: int

    def span(self, rows: slice) -> slice:
        """The keys that some of the rows see."""
        end = min(self.keys, max(rows.stop, self.prefix)) if self.is_causal else self.keys
        return slice(min(end, max(0, rows.start - self.window + 1)) if self.window else 0, end)

    def hide(self, logits: Tensor, rows: slice, some: slice) -> None:
        """-inf for later keys and for those behind the window; without a window only keys among the rows themselves can be later ones."""
        start = some.start if self.window else min(max(rows.start, self.prefix), some.stop)
        row, key = torch.arange(rows.start, rows.stop).unsqueeze(1), torch.arange(start, some.stop)
        hidden = (key > row) | (key <= row - self.window) if self.window else key > row
        logits[..., start - some.start :].masked_fill_(hidden, float("-inf"))

    def distances(self, rows: slice, some: slice) -> Tensor:
        """[rows, keys]: how far each key stands behind its row."""
        return torch.arange(some.start, some.stop) - torch.arange(rows.start, rows.stop).unsqueeze(1)


def attend_by_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    sinks: Tensor | None = None,
    cap: float = 0.0,
    window: int = 0,
    prefix: int = 0,
    slopes: Tensor | None = None,
    gate: Tensor | None = None,
    activation: str = "sigmoid",
) -> Tensor:
    """What truth.attend computes, in memory that grows with rows and keys alone."""
    check(query, key, dropout_p, is_causal, window, activation, prefix, slopes)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    out = query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3])).transpose(1, 2)
    prefix = min(prefix, key.shape[2])
    if not cap and not window and slopes is None and _flash_takes(query, key, value, attn_mask):
        if prefix:
            _behind_prefix(out, query, key, value, attn_mask, scale, sinks, prefix)
        else:
            out.copy_(_flash(query, key, value, attn_mask, is_causal, scale, sinks))
    else:
        edges = Edges(key.shape[2], is_causal, window, prefix)
        _by_rows(out, query, key, value, attn_mask, edges, scale, sinks, cap, slopes)
    return gated(out, gate, activation)


def _flash_takes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """ATen's flash kernel has one width for keys and values, at least one key, and an added mask of the queries' type."""
    return q.shape[3] == v.shape[3] and k.shape[2] > 0 and q.shape[2] > 0 and (mask is None or mask.dtype in (torch.bool, q.dtype))


def _flash(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, sinks: Tensor | None
) -> Tensor:  # fmt: skip
    """A sink takes exp(sink) / (exp(sink) + sum exp(logits)) of the weight, and the kernel tells log sum exp(logits)."""
    times = q.shape[1] // k.shape[1]
    if times > 1:
        k, v = k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)
    if mask is not None:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else mask
        mask = mask.expand(*[1] * (4 - mask.dim()), *mask.shape) if mask.dim() < 4 else mask
        mask = mask.expand(-1, -1, q.shape[2], k.shape[2])
    out, mass = aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)
    kept: Tensor = out if sinks is None else out * torch.sigmoid(mass.unsqueeze(3) - sinks).to(out.dtype)
    return kept


def _behind_prefix(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, sinks: Tensor | None, prefix: int
) -> None:  # fmt: skip
    """Rows inside the prefix see all of it and no more; to those behind it, the prefix is earlier: their attention is plainly causal."""
    split, rows = min(prefix, q.shape[2]), q.shape[2]
    part = None if mask is None else _part(mask, slice(0, split), slice(0, prefix))
    out[:, :, :split] = _flash(q[:, :, :split], k[:, :, :prefix], v[:, :, :prefix], part, False, scale, sinks)
    if split == rows:
        return
    if mask is None and 2 * split <= rows:
        out[:, :, split:] = _flash(q, k, v, None, True, scale, sinks)[:, :, split:]
        return
    shown = torch.arange(k.shape[2]) <= torch.arange(split, rows).unsqueeze(1)
    if mask is not None:
        rest = _part(mask, slice(split, rows), slice(0, k.shape[2]))
        shown = shown & rest if rest.dtype == torch.bool else torch.where(shown, rest, float("-inf"))
    out[:, :, split:] = _flash(q[:, :, split:], k, v, shown, False, scale, sinks)


def _by_rows(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, edges: Edges, scale: float, sinks: Tensor | None, cap: float,
    slopes: Tensor | None,
) -> None:  # fmt: skip
    """One key head after the other: all query heads of its group, a few rows at a time."""
    times, keys = q.shape[1] // k.shape[1], k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v, q = k.to(wide).transpose(2, 3), v.to(wide), q.to(wide) * (scale / cap if cap else scale)
    blind = edges.window > 0 and q.shape[2] - edges.window >= keys  # the last rows' windows lie behind all keys
    step = max(LEAST_ROWS // times, LOGITS // max(1, times * keys), 1)
    for batch, group in itertools.product(range(q.shape[0]), range(k.shape[1])):
        heads = slice(group * times, (group + 1) * times)
        told, sink, slope = (None if x is None else _of_heads(x, batch, heads) for x in (mask, sinks, slopes))
        for first in range(0, q.shape[2], step):
            rows = slice(first, min(q.shape[2], first + step))
            some = edges.span(rows)
            block = q[batch, heads, rows].reshape(-1, q.shape[3])
            logits = (block @ k[batch, group, :, some]).view(times, rows.stop - first, some.stop - some.start)
            if cap:
                logits.tanh_().mul_(cap)
            if slope is not None:
                logits.addcmul_(slope.to(wide), edges.distances(rows, some).to(wide))
            if edges.is_causal:
                edges.hide(logits, rows, some)
            if told is not None:
                part = _part(told, rows, some)
                logits = logits.masked_fill_(~part, float("-inf")) if part.dtype == torch.bool else logits.add_(part)
            mass, logits = _weights(logits, None if sink is None else _part(sink, rows, slice(0, 1)), told is not None or blind)
            weighted = (logits.view(block.shape[0], -1) @ v[batch, group, some]).view(times, -1, v.shape[3])
            out[batch, heads, rows] = weighted if mass is None else weighted.div_(mass)


def _of_heads(x: Tensor, batch: int, heads: slice) -> Tensor:
    """[heads or 1, rows or 1, keys or 1] of a mask or of sinks."""
    x = x[(None,) * (4 - x.dim())]
    x = x[batch if x.shape[0] > 1 else 0]
    return x[heads] if x.shape[0] > 1 else x


def _weights(logits: Tensor, sink: Tensor | None, may_hide_all: bool) -> tuple[Tensor | None, Tensor]:
    """Softmax weights; with a sink unnormalised, and what to divide by."""
    if sink is not None:
        return _exponentials(logits, sink), logits
    return None, aten._safe_softmax(logits, -1) if may_hide_all else torch.softmax(logits, -1)


def _part(mask: Tensor, rows: slice, some: slice) -> Tensor:
    mask = mask[..., rows, :] if mask.shape[-2] > 1 else mask
    return mask[..., some] if mask.shape[-1] > 1 else mask


def _exponentials(logits: Tensor, sink: Tensor) -> Tensor:
    """exp(logits) in place, up to a factor for each row that is also in the sums returned, [..., rows, 1]: the sink's share is in them."""
    top = torch.maximum(logits.amax(-1, keepdim=True), sink) if logits.shape[-1] else sink
    top = torch.where(top == float("-inf"), 0.0, top)
    mass = logits.sub_(top).exp_().sum(-1, keepdim=True) + torch.exp(sink - top)
    return torch.where(mass == 0.0, 1.0, mass)
