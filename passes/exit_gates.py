"""Conditional exit probabilities: gates that know of the gates in front of them.

    g_l = sigmoid(w [p_max, H, p1 - p2, H'] + b)      P_l = max(0, min(g_l, 1 - sum_(j<l) g_j))
    p_l = clip(P_l / prod_(j<l) (1 - p_j), 0, 1)      a row leaves at the first p_l that reaches the threshold (the paper's is 0.5)

over p = softmax(logits) of the head behind layer l; H is its entropy and H' that of p^2 / sum p^2. What no gate takes leaves at the end.
Regol et al., Jointly-Learned Exit and Inference for a Dynamic Neural Network (JEI-DNN), ICLR 2024. Its text says sharpened by a power:
that the power is 2 is a choice made here, so gates have to be trained with it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dyncc.passes.exit_scores import margin, max_prob


def gate_features(logits: Tensor) -> Tensor:
    """[B, 4] of logits [B, V]: largest probability, entropy, margin, entropy of the sharpened distribution."""
    once, twice = torch.log_softmax(logits.float(), -1), torch.log_softmax(2 * logits.float(), -1)
    entropies = [-(log_p.exp() * log_p).sum(-1) for log_p in (once, twice)]
    return torch.stack([max_prob(logits), entropies[0], margin(logits), entropies[1]], -1)


def gate(logits: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """g_l [B]; weight [1, 4], bias [1]."""
    return torch.sigmoid(F.linear(gate_features(logits), weight.float(), bias.float()))[:, 0]


def conditional(g: Tensor, used: Tensor, left: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p_l, then `used` and `left` for the next exit: the sum of the gates so far, and the chance that a row is still there.

    >>> one = torch.ones(1)
    >>> p, used, left = conditional(0.25 * one, 0 * one, one)
    >>> conditional(0.375 * one, used, left)[0].item()
    0.5
    """
    share = torch.minimum(g, 1 - used).clamp(min=0.0)
    p = (share / left.clamp(min=1e-12)).clamp(0.0, 1.0)
    return p, used + g, left * (1 - p)
