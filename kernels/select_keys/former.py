"""Taking the former step's choice again, for each row of a batch whose query is like an earlier one.

TokenSelect's selection cache (Wu et al. 2024) and LouisKV's semantic boundaries (Wu et al. 2026). Spans are keys or pages; a choice
[B, C, S] has the same S at any length, so that it can be kept: where there are fewer spans, it names some behind the last one, which are
none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dyncc.kernels.select_keys.refine import best_spans, span_states


def alike(q: Tensor, former: Tensor, cosine: str, least: float) -> Tensor:
    """Which rows [B] of queries q [B, H, 1, D] have a cosine of `least` at least with former ones [B, H, D]; zeros are no query.

    Args:
        cosine: "whole", of all heads' channels in a row; "heads", the mean of the heads' cosines.
    """
    now, then = q.squeeze(2).float(), former.float()
    if cosine == "whole":
        now, then = now.flatten(1).unsqueeze(1), then.flatten(1).unsqueeze(1)
    norms = (now.square().sum(2) * then.square().sum(2)).sqrt()
    found = ((now * then).sum(2) / norms.clamp(min=1e-30)).mean(1)
    return (found >= least) & then.ne(0).flatten(1).any(1)


def former_scores(choice: Tensor, spans: Any) -> Tensor:
    """Scores [B, C, spans] by which the spans of a choice [B, C, S] come first: 1 for them, 0 for the others."""
    batch, choices, count = choice.shape
    named = torch.zeros(batch, choices, spans + count, device=choice.device).scatter(2, choice, 1.0)
    return named[:, :, :spans]


def choose_spans(score: Tensor, count: int, shown: Tensor | None, sinks: int, recents: int) -> Tensor:
    """As `select_keys` of score [B, C, N] chooses, but `count` spans at any length: [B, C, count]."""
    if shown is None:
        shown = torch.ones(score.shape[0], 1, score.shape[2], dtype=torch.bool, device=score.device)
    return best_spans(F.pad(score, (0, count)), F.pad(span_states(shown, sinks, recents), (0, count)), count)
