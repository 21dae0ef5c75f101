"""Scores for tokens: [B, T] floats, higher stays. Attention scores look at a few query rows only, never at N x N.

Each score is a function of the layer's attention region and the residual stream at the cut, inserted into the graph in front of a node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dyncc.analysis.attention import AttentionRegion
from dyncc.analysis.axes import Axes, Dim
from dyncc.ir import argument, emit, operands, shape
from dyncc.kernels.attention_rows import attention_row_logits, attention_rows, take_rows
from dyncc.restrict import Refusal

PROBES = 64


@dataclass(frozen=True)
class Tap:
    """What a score may read: the cut's hidden rows [B, T, C], which of them are real, and the attention of the layer that ends there."""

    before: fx.Node
    hidden: fx.Node
    region: AttentionRegion
    axes: Axes
    axis: Dim
    window: int
    seed: int
    valid: fx.Node | None = None


def cls_attention(tap: Tap) -> fx.Node:
    """Mean over heads of the first row's attention (EViT)."""
    return _probabilities(tap, lambda total, count: torch.arange(1) * count)


def last_attention(tap: Tap) -> fx.Node:
    """Mean over heads of the last row's attention (LazyLLM)."""
    return _probabilities(tap, lambda total, count: torch.arange(1) + (count - 1))


def last_window_attention(tap: Tap) -> fx.Node:
    """Mean over heads and the last `window` rows (SnapKV's observation window)."""


    def rows(total: Any, count: Any) -> torch.Tensor:
        width = torch.sym_min(tap.window, total)
        return torch.arange(width) + (count - width)

    return _probabilities(tap, rows)


def received_attention(tap: Tap) -> fx.Node:
    """Attention received from up to 64 evenly spaced query rows, all of them when there are no more (SpAtten, ZipVL's probes)."""

    def rows(total: Any, count: Any) -> torch.Tensor:
        many = count.clamp(min=1, max=PROBES) if isinstance(count, torch.Tensor) else torch.sym_min(PROBES, count)
        return torch.arange(torch.sym_min(PROBES, total)) * count // many

    return _probabilities(tap, rows)


def last_logits(tap: Tap) -> fx.Node:
    """Mean over heads of the last row's scaled q.k, no softmax (PromptDistill)."""
    q, k = _queries_keys(tap)
    flip = not tap.region.fused

    def score(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        k = k.transpose(-1, -2) if flip else k
        rows = torch.arange(1, device=q.device) + (q.shape[2] - 1)
        return attention_row_logits(q, k, rows).mean((1, 2))

    return emit(tap.before, score, q, k)


def hidden_norm(tap: Tap) -> fx.Node:
    """L2 norm of the hidden row."""
    return emit(tap.before, lambda x: x.float().norm(dim=-1), tap.hidden)


def key_norm(tap: Tap) -> fx.Node:
    """Minus the L2 norm of the key, mean over heads: small keys draw attention (Devoto et al. 2024)."""
    _, k = _queries_keys(tap)
    dim = 3 if tap.region.fused else 2
    return emit(tap.before, lambda k: -k.float().norm(dim=dim).mean(1), k)


def random(tap: Tap) -> fx.Node:
    """A control: a fixed pseudo-random number per position, the same in every run."""
    seed = tap.seed

    def score(x: torch.Tensor) -> torch.Tensor:
        wave = torch.sin((torch.arange(x.shape[1], device=x.device, dtype=torch.float32) + 1) * 12.9898 + seed * 78.233) * 43758.5453
        return (wave - torch.floor(wave)).expand(x.shape[0], x.shape[1])

    return emit(tap.before, score, tap.hidden)


SCORES: dict[str, Callable[[Tap], fx.Node]] = {
    "cls-attention": cls_attention,
    "last-attention": last_attention,
    "last-logits": last_logits,
    "last-window-attention": last_window_attention,
    "received-attention": received_attention,
    "hidden-norm": hidden_norm,
    "key-norm": key_norm,
    "random": random,
}


def _probabilities(tap: Tap, rows: Callable[[Any, Any], torch.Tensor]) -> fx.Node:
    """Mean probabilities of some rows, from q and k when fused, read off the softmax when it is spelled out.

    Args:
        rows: `rows(total, count)` counts real rows only: it gives ranks among them, [R] of `count` rows or [B, R] of `count` [B, 1]; those
            outside of 0..count-1 have no say. So padding, wherever it stands, changes no score.
    """
    region, valid = tap.region, [] if tap.valid is None else [tap.valid]
    if region.softmax is not None:
        _four_dims(region.softmax)
        return emit(tap.before, lambda p, *valid: _mean_rows(p.shape[2], rows, valid, lambda at: take_rows(p, at)), region.softmax, *valid)
    sdpa = region.out
    q, k = _queries_keys(tap)
    masks = operands(sdpa)[3:4]
    causal, scale = bool(argument(sdpa, "is_causal", False)), argument(sdpa, "scale")

    def score(q: torch.Tensor, k: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        mask = rest[0] if masks else None
        return _mean_rows(q.shape[2], rows, rest[len(masks) :], lambda at: attention_rows(q, k, at, mask, is_causal=causal, scale=scale))

    return emit(tap.before, score, q, k, *masks, *valid)


def _mean_rows(
    total: Any, rows: Callable[[Any, Any], torch.Tensor], valid: Sequence[torch.Tensor], picked: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Mean over heads and chosen rows; `picked` gives [B, H, R, T] for row positions."""
    if not valid:
        return picked(rows(total, total)).float().mean((1, 2))
    count = valid[0].sum(1, keepdim=True)
    ranks = rows(total, count)
    inside = (ranks >= 0) & (ranks < count)
    real_first = torch.sort((~valid[0]).to(torch.int8), dim=1, stable=True).indices
    probabilities = picked(real_first.gather(1, ranks.clamp(min=0).minimum(count - 1).clamp(min=0))).float().mean(1)
    seen = torch.where(inside.unsqueeze(-1), probabilities, 0.0).sum(1)
    return seen / inside.sum(1, keepdim=True).clamp(min=1)


def _queries_keys(tap: Tap) -> tuple[fx.Node, fx.Node]:
    if tap.region.extras:
        raise Refusal(f"attention {tap.region.index}: {tap.region.extras}")
    q, k = operands(tap.region.out)[:2] if tap.region.fused else (tap.region.q, tap.region.k)
    _four_dims(q)
    places = tap.axes.places(k, tap.axis)
    if places != [2 if tap.region.fused else 3]:
        raise Refusal(f"the keys of attention {tap.region.index} do not run over the same tokens as its queries")
    return q, k


def _four_dims(node: fx.Node) -> None:
    if len(shape(node)) != 4:
        raise Refusal(f"attention scores need [batch, head, row, ...], but {node.name} is {list(shape(node))}; use score=hidden-norm")
