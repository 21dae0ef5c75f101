"""Thresholds with a promise: early exits whose risk stays below a bound, with a stated confidence, whatever the data is.

Learn-then-Test (Angelopoulos et al., 2021), as CALM uses it (Schuster et al., NeurIPS 2022): from the safest threshold down, the hypothesis
"rows differ from the full model more often than `risk`" is tested on calibration data by the exact binomial tail; the last threshold before
the first that cannot be rejected is taken. Tests in a fixed order need no correction for their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyncc.errors import BadCalibration
from dyncc.passes.exit_scores import OF_LOGITS

GRID = 200
NEVER = 2.0
"""A threshold that no score reaches."""


@dataclass(frozen=True)
class Chosen:
    """A threshold, and what it promises: with probability `confidence` over the calibration data, at most `risk` of rows differ. `seen` is
    the share of the `rows` that differed; a threshold above 1 lets no row leave: then nothing less could be promised."""

    threshold: float
    risk: float
    confidence: float
    seen: float
    rows: int

    def __str__(self) -> str:
        promise = f"at most {self.risk:.1%} of rows differ from the full model, with {self.confidence:.0%} confidence"
        return f"threshold {self.threshold:.4f}: {promise} (seen {self.seen:.2%} of {self.rows})"


def exit_threshold(
    behind: Sequence[Tensor], full: Tensor, *, score: str = "max-prob", risk: float = 0.02, confidence: float = 0.9
) -> Chosen:
    """The lowest threshold of `exit-early` that keeps the promise.

    Args:
        behind: logits [N, V] behind each site, in order, such as of `exit-early{realise=static}`.
        full: logits [N, V] of the full model on the same rows.
        score: max-prob, margin or entropy.
    Raises:
        BadCalibration: there are no rows, they are of other sizes, or they hold NaN.
    """
    _check(behind, full, score, risk, confidence)
    scores = torch.stack([OF_LOGITS[score](x) for x in behind])
    differs = torch.stack([x.argmax(-1) != full.argmax(-1) for x in behind] + [torch.zeros_like(full[:, 0], dtype=torch.bool)])
    best = Chosen(NEVER, risk, confidence, 0.0, len(full))
    for threshold in torch.linspace(1.0, 0.0, GRID + 1).tolist():
        errors = int(differs.gather(0, leaves(scores, threshold)[None]).sum())
        if binomial_tail(errors, len(full), risk) > 1 - confidence:
            break
        best = Chosen(threshold, risk, confidence, errors / len(full), len(full))
    return best


def leaves(scores: Tensor, threshold: float) -> Tensor:
    """The site [N] at which each row leaves, of scores [S, N]; S where it stays to the end.

    >>> leaves(torch.tensor([[0.9, 0.1, 0.1], [0.9, 0.8, 0.2]]), 0.5).tolist()
    [0, 1, 2]
    """
    sure = torch.cat([scores >= threshold, torch.ones_like(scores[:1], dtype=torch.bool)])
    return sure.to(torch.uint8).argmax(0)


def binomial_tail(errors: int, rows: int, risk: float) -> float:
    """P(X <= errors) of rows that each err with probability `risk`: the p-value of "the risk is at least that".

    >>> round(binomial_tail(0, 10, 0.1), 4)
    0.3487
    """
    terms = (
        math.lgamma(rows + 1) - math.lgamma(k + 1) - math.lgamma(rows - k + 1) + k * math.log(risk) + (rows - k) * math.log1p(-risk)
        for k in range(errors + 1)
    )
    return min(1.0, math.fsum(math.exp(t) for t in terms))


def _check(behind: Sequence[Tensor], full: Tensor, score: str, risk: float, confidence: float) -> None:
    if not behind or full.dim() != 2 or not len(full):
        raise BadCalibration(problem="logits [N, V] of the full model and behind at least one site are needed")
    if any(x.shape != full.shape for x in behind):
        raise BadCalibration(problem=f"the full model's logits are {list(full.shape)}, behind sites {[list(x.shape) for x in behind]}")
    if any(bool(x.isnan().any()) for x in (*behind, full)):
        raise BadCalibration(problem="logits hold NaN")
    if score not in OF_LOGITS:
        raise BadCalibration(problem=f"score={score} is not one of logits; choose one of {', '.join(OF_LOGITS)}")
    if not (0 < risk < 1 and 0 < confidence < 1):
        raise BadCalibration(problem=f"risk={risk} and confidence={confidence} must lie between 0 and 1")
