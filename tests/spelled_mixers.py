"""Mixing layers of the literature as users write them: those of dyncc.layers, and the same sums in other words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dyncc.layers.decay_mixer import DecayMixer
from dyncc.layers.differential_linear_attention import DifferentialLinearAttention
from dyncc.layers.feedback_attention import FeedbackAttention
from dyncc.layers.gated_delta_rule import GatedDeltaRule
from dyncc.layers.gated_image_attention import GatedImageAttention
from dyncc.layers.gated_linear_attention import GatedLinearAttention
from dyncc.layers.hybrid_memory import HybridMemory
from dyncc.layers.memory_read import MemoryRead
from dyncc.layers.pattention import Pattention
from dyncc.layers.two_way_linear_attention import TwoWayLinearAttention
from dyncc.layers.value_bank import ValueBankAttention

WIDTH = 16


class Written(nn.Module):
    """A function of q, k, v [1, 2, T, D] and log decays [1, 2, T, D] as a module."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *values: Tensor) -> Tensor:
        return self.function(*values)


def causal_pairs(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v


def head_decays(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """One decay a head: exp of a difference of one running sum."""
    fell = log_decay[..., 0].cumsum(-1)
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    kept = (fell.unsqueeze(-1) - fell.unsqueeze(-2)).masked_fill(hidden, float("-inf")).exp()
    return (q @ k.mT * kept) @ v


def channel_decays(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """One decay a channel, taken off the keys: what fp32 cannot hold for long."""
    fell = log_decay.cumsum(2)
    return ((q * fell.exp()) @ (k * (-fell).exp()).mT).tril() @ v


def earlier_pairs(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    """A token does not see itself."""
    return (q @ k.mT).tril(-1) @ v


def power_pairs(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """RetNet's: one decay a head for all tokens, to the power of the distance."""
    at = torch.arange(v.shape[2], device=v.device)
    kept = log_decay[0, :, :1, :1].exp() ** (at.unsqueeze(1) - at).clamp(min=0)
    return (q @ k.mT * kept.tril()) @ v


def normalised_pairs(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    """Weights divided by their sums over the keys."""
    weights = (q.exp() @ k.exp().mT).tril()
    return weights / weights.sum(-1, keepdim=True) @ v


def ema_pairs(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """A moving average as a matrix of powers: no product of queries and keys makes its weights."""
    at = torch.arange(v.shape[2], device=v.device)
    apart = (at.unsqueeze(1) - at).clamp(min=0)
    return (0.9**apart).tril() @ v


class ImagePairs(GatedImageAttention):
    """LINA with all pairs of tokens, its gates where they were: on keys in front of the normaliser, and on values."""

    def mixed(self, x: Tensor) -> Tensor:
        q, k, v = (p.unflatten(2, (self.heads, -1)).transpose(1, 2).float() for p in self.qkv(x).chunk(3, -1))
        q, k, v = torch.relu(q) + 1e-6, (torch.relu(k) + 1e-6) * self.key_gate, v * self.value_gate
        weights = q @ k.transpose(2, 3)
        mass = weights.sum(-1, keepdim=True) + 1e-6 * x.shape[1]
        return (weights / mass @ v).transpose(1, 2).flatten(2).to(x.dtype)


class WrittenBank(ValueBankAttention):
    """MoVE with its attention as products and a softmax."""

    def forward(self, x: Tensor, bank: Tensor) -> Tensor:
        q, k, v = (p.unflatten(2, (self.heads, -1)) for p in self.qkv(x).chunk(3, -1))
        q, k, v = (p.transpose(1, 2) for p in (q, k, v + self.recalled(x, bank)))
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        weights = torch.softmax((q @ k.mT * q.shape[3] ** -0.5).masked_fill(later, float("-inf")), -1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class FeedbackLoop(FeedbackAttention):
    """Sessa one token after the other: s_t = f_t + g_t sum_j A_tj s_j."""

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        weights, outs = self.gains(x) * self.weights(x), [f[:, 0]]
        for t in range(1, x.shape[1]):
            outs.append(f[:, t] + (weights[:, t, :t].unsqueeze(-1) * torch.stack(outs, 1)).sum(1))
        return torch.stack(outs, 1)


def tokens(count: int, *more: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(1, count, width) for width in (WIDTH, *more))


def of_pairs(function: Callable[..., Tensor], count: int = 24) -> tuple[nn.Module, tuple[Any, ...]]:
    q, k, v, log_decay = (torch.randn(1, 2, count, 4) for _ in range(4))
    return Written(function), (q, k, v, -log_decay.abs() / 8)


MIXERS: dict[tuple[str, str], Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    ("linear attention", "pairs"): lambda: of_pairs(causal_pairs),
    ("linear attention", "pairs, earlier tokens alone"): lambda: of_pairs(earlier_pairs),
    ("linear attention", "pairs, normalised"): lambda: of_pairs(normalised_pairs),
    ("RetNet", "pairs and powers"): lambda: of_pairs(power_pairs),
    ("GLA", "loop"): lambda: (GatedLinearAttention(WIDTH, 2), tokens(7)),
    ("GLA", "pairs, a decay a head"): lambda: of_pairs(head_decays),
    ("GLA", "pairs, a decay a channel"): lambda: of_pairs(channel_decays),
    ("ViG", "two loops"): lambda: (TwoWayLinearAttention(WIDTH, 2), tokens(7)),
    ("LINA", "values meet keys first"): lambda: (GatedImageAttention(WIDTH, 24, 2), tokens(24)),
    ("LINA", "pairs"): lambda: (ImagePairs(WIDTH, 24, 2), tokens(24)),
    ("gated delta rule", "loop"): lambda: (GatedDeltaRule(WIDTH, 2), tokens(7)),
    ("NAtS-L", "chunks and a loop"): lambda: (HybridMemory(WIDTH, 2, 4), tokens(12)),
    ("SymbolicLight", "loop"): lambda: (DecayMixer(WIDTH, 2), tokens(7)),
    ("SymbolicLight", "powers"): lambda: of_pairs(ema_pairs, 300),
    ("DyDiLA", "pairs"): lambda: (DifferentialLinearAttention(WIDTH, 2), tokens(24)),
    ("Sessa", "triangular solve"): lambda: (FeedbackAttention(WIDTH), tokens(7, WIDTH)),
    ("Sessa", "loop"): lambda: (FeedbackLoop(WIDTH), tokens(7, WIDTH)),
    ("Pattention", "as published"): lambda: (Pattention(WIDTH, WIDTH, 8), tokens(7)),
    ("MoVE", "as published"): lambda: (ValueBankAttention(WIDTH, 3, 2), (*tokens(7), torch.randn(3, WIDTH))),
    ("MoVE", "softmax written out"): lambda: (WrittenBank(WIDTH, 3, 2), (*tokens(7), torch.randn(3, WIDTH))),
    ("GAM", "as published"): lambda: (MemoryRead(WIDTH, 8), tokens(7)),
}
"""Each layer in each form, with example inputs."""
