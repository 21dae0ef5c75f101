"""Triton kernels of page selection: bounds of pages, and attention over chosen pages split among programs (flash decoding).

Import after `TRITON_INTERPRET=1` is set to run them without a GPU. Meaning: pages.page_scores and truth.attend_selected. They were not
run on a GPU, and no pass emits them.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64
"""Pages that one program scores."""
SPLIT = 8
"""Pages that one program attends to."""


@triton.jit
def score_pages(q, low, high, out, pages, HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip # noqa: E501
    """out[b, h, p] = sum over channels of max(q low, q high); q [B, H, WIDTH], low and high [B, G, pages, WIDTH], all contiguous."""
    row, block = tl.program_id(0), tl.program_id(1)
    batch, head = row // HEADS, row % HEADS
    group = batch * GROUPS + head // (HEADS // GROUPS)
    at, lane = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, LANES)
    inside = (at < pages)[:, None] & (lane < WIDTH)[None, :]
    place = (group * pages + at)[:, None].to(tl.int64) * WIDTH + lane[None, :]
    query = tl.load(q + row * WIDTH + lane, mask=lane < WIDTH, other=0.0).to(tl.float32)[None, :]
    least = tl.load(low + place, mask=inside, other=0.0).to(tl.float32)
    most = tl.load(high + place, mask=inside, other=0.0).to(tl.float32)
    least = tl.where(least == float("inf"), 0.0, least)
    most = tl.where(most == -float("inf"), 0.0, most)
    bound = tl.sum(tl.maximum(query, 0.0) * most + tl.minimum(query, 0.0) * least, axis=1)
    tl.store(out + row.to(tl.int64) * pages + at, bound, mask=at < pages)


@triton.jit
def attend_split(q, k, v, index, visible, sums, most, mass, keys, chosen, scale, HEADS: tl.constexpr, GROUPS: tl.constexpr, CHOICES: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip # noqa: E501
    """One head over SPLIT of its chosen pages: the largest logit, the sum of exponentials, and the weighted sum of values.

    q [B, H, WIDTH]; k, v [B, G, keys, WIDTH]; index [B, CHOICES, chosen] pages; visible [B, keys] when MASKED.
    """
    row, part = tl.program_id(0), tl.program_id(1)
    batch, head = row // HEADS, row % HEADS
    group = batch * GROUPS + head // (HEADS // GROUPS)
    choice = batch * CHOICES + head // (HEADS // CHOICES)
    lane, step = tl.arange(0, LANES), tl.arange(0, KEYS)
    query = tl.load(q + row * WIDTH + lane, mask=lane < WIDTH, other=0.0).to(tl.float32)
    top, total, acc = -float("inf"), 0.0, tl.zeros([LANES], dtype=tl.float32)
    for i in range(SPLIT):
        number = part * SPLIT + i
        page = tl.load(index + choice * chosen + number, mask=number < chosen, other=0)
        at = page * PAGE + step
        seen = (at < keys) & (step < PAGE) & (number < chosen)
        if MASKED:
            seen = seen & (tl.load(visible + batch * keys + at, mask=at < keys, other=0) != 0)
        place = (group * keys + at)[:, None].to(tl.int64) * WIDTH + lane[None, :]
        inside = seen[:, None] & (lane < WIDTH)[None, :]
        logits = tl.sum(tl.load(k + place, mask=inside, other=0.0).to(tl.float32) * query[None, :], axis=1) * scale
        logits = tl.where(seen, logits, -float("inf"))
        higher = tl.maximum(top, tl.max(logits, axis=0))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp(logits - base)
        shrink = tl.exp(top - base)
        total = total * shrink + tl.sum(weights, axis=0)
        acc = acc * shrink + tl.sum(tl.load(v + place, mask=inside, other=0.0).to(tl.float32) * weights[:, None], axis=0)
        top = higher
    slot = row * tl.num_programs(1) + part
    tl.store(most + slot, top)
    tl.store(mass + slot, total)
    tl.store(sums + slot.to(tl.int64) * WIDTH + lane, acc, mask=lane < WIDTH)


@triton.jit
def join_splits(sums, most, mass, out, parts, PARTS: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """One head's splits together: softmax does not depend on how its sum was cut."""
    row = tl.program_id(0)
    part, lane = tl.arange(0, PARTS), tl.arange(0, LANES)
    top = tl.load(most + row * parts + part, mask=part < parts, other=-float("inf"))
    total = tl.load(mass + row * parts + part, mask=part < parts, other=0.0)
    share = tl.exp(top - tl.max(top, axis=0))
    place = (row * parts + part)[:, None].to(tl.int64) * WIDTH + lane[None, :]
    acc = tl.load(sums + place, mask=(part < parts)[:, None] & (lane < WIDTH)[None, :], other=0.0)
    joined = tl.sum(acc * share[:, None], axis=0) / tl.sum(total * share, axis=0)
    tl.store(out + row * WIDTH + lane, joined.to(out.dtype.element_ty), mask=lane < WIDTH)


def _launch(kernel: Any) -> Any:
    """The kernel as `triton_op` wants it; the interpreter's is launched as it is."""
    return torch.library.wrap_triton(kernel) if isinstance(kernel, triton.runtime.JITFunction) else kernel


def score(q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Bounds [B, H, pages] for q [B, H, 1, D], low and high [B, G, pages, D]."""
    batch, heads, _, width = q.shape
    groups, pages = low.shape[1], low.shape[2]
    out = q.new_empty((batch, heads, pages), dtype=torch.float32)
    grid = (batch * heads, triton.cdiv(pages, BLOCK))
    lanes = triton.next_power_of_2(width)
    _launch(score_pages)[grid](
        q.contiguous(), low.contiguous(), high.contiguous(), out, pages, HEADS=heads, GROUPS=groups, WIDTH=width, LANES=lanes, BLOCK=BLOCK
    )
    return out


def attend(q: Tensor, k: Tensor, v: Tensor, index: Tensor, page: int, visible: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Attention [B, H, 1, D] of q [B, H, 1, D] over the pages `index` [B, C, S] of k and v [B, G, N, D]; visible [B, N] bool or None."""
    batch, heads, _, width = q.shape
    groups, keys, choices, chosen = k.shape[1], k.shape[2], index.shape[1], index.shape[2]
    parts = triton.cdiv(chosen, SPLIT)
    sums = q.new_empty((batch, heads, parts, width), dtype=torch.float32)
    most, mass = (q.new_empty((batch, heads, parts), dtype=torch.float32) for _ in range(2))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lanes = triton.next_power_of_2(width)
    shown = index if visible is None else visible.to(torch.uint8).contiguous()
    _launch(attend_split)[(batch * heads, parts)](
        q.contiguous(), k.contiguous(), v.contiguous(), index.contiguous(), shown, sums, most, mass, keys, chosen,
        width**-0.5 if scale is None else scale, HEADS=heads, GROUPS=groups, CHOICES=choices, WIDTH=width, LANES=lanes, PAGE=page,
        KEYS=triton.next_power_of_2(page), SPLIT=SPLIT, MASKED=visible is not None,
    )  # fmt: skip
    _launch(join_splits)[(batch * heads,)](
        sums, most, mass, out, parts, PARTS=triton.next_power_of_2(parts), WIDTH=width, LANES=lanes
    )
    return out
