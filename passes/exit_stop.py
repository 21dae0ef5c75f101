"""Stop, exit or go on: a controller of three classes on the row that the head reads.

    c = softmax(W h_l),  W [3, D] shared by all layers: stop, exit, continue
    stop where argmax c = stop and c_stop >= `stop`;  exit where argmax c = exit and c_exit >= threshold;  else continue

Sun et al., When Neural Code Completion Models Size up the Situation: Attaining Cheaper and Faster Completion through Dynamic Model
Inference, ICSE 2024. There a stopped completion is cancelled by a flag. Here its row leaves with the end-of-text token as its only choice,
which every generating loop understands: what was written before stays as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def controlled(row: Tensor, weight: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Of rows [B, D]: the score of exiting [B], 0 where that is not the first class, and which stop, [B] bool; never both.

    >>> score, stopped = controlled(torch.eye(3), 9 * torch.eye(3), 0.5)
    >>> score.ne(0).tolist(), stopped.tolist()
    ([False, True, False], [True, False, False])
    """
    c = torch.softmax(F.linear(row.float(), weight.float()), -1)
    first = c.argmax(-1)
    score = torch.where(first == 1, c[:, 1], torch.zeros_like(c[:, 1]))
    return torch.where(c.isnan().any(-1), torch.nan, score), (first == 0) & (c[:, 0] >= least)


def ended(logits: Tensor, stopped: Tensor, end: int) -> Tensor:
    """Logits [B, ..., V] whose stopped rows allow the token `end` alone."""
    others = torch.arange(logits.shape[-1], device=logits.device) != end
    hidden = stopped.view([-1] + [1] * (logits.dim() - 1)) & others
    return logits.masked_fill(hidden, float("-inf"))
