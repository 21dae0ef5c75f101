"""Thresholds with a promise: the tail is the binomial's, and the promise holds over calibration sets that are drawn again."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dyncc.errors import BadCalibration
from dyncc.risk import NEVER, binomial_tail, exit_threshold, leaves


def population(count: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """Logits behind two sites and at the end: rows that are less sure differ more often, the second site is right more often."""
    draw = torch.Generator().manual_seed(seed)
    full = torch.randn(count, 5, generator=draw) * 3
    return [full * scale + noise * torch.randn(count, 5, generator=draw) for scale, noise in ((0.9, 2.0), (1.0, 0.9))], full


def test_the_tail_is_what_drawing_gives() -> None:
    draws = torch.distributions.Binomial(50, torch.tensor(0.1)).sample((200_000,))
    for errors in (0, 2, 5, 9):
        assert abs(float((draws <= errors).double().mean()) - binomial_tail(errors, 50, 0.1)) < 0.01


def test_the_promise_holds_over_calibration_sets() -> None:
    behind, full = population(200_000, 0)
    differs = torch.stack([x.argmax(-1) != full.argmax(-1) for x in behind] + [torch.zeros(len(full), dtype=torch.bool)])
    scores = torch.stack([x.softmax(-1).amax(-1) for x in behind])
    broken = 0
    for seed in range(1, 21):
        sample = population(1500, seed)
        chosen = exit_threshold(*sample, risk=0.02, confidence=0.9)
        assert chosen.threshold <= 1.0
        broken += float(differs.gather(0, leaves(scores, chosen.threshold)[None]).double().mean()) > 0.02
    assert broken <= 4  # of 20 at 10 %: the binomial's 95 % bound


def test_more_rows_promise_as_much_with_a_lower_threshold() -> None:
    found = [exit_threshold(*population(rows, 3), risk=0.05).threshold for rows in (300, 3000, 30_000)]
    assert all(a >= b for a, b in pairwise(found)) and found[0] > found[-1]


def test_where_nothing_can_be_promised_no_row_leaves() -> None:
    behind, full = population(20, 1)
    assert exit_threshold(behind, full, risk=0.001).threshold == NEVER


def test_bad_calibration_is_named() -> None:
    behind, full = population(20, 1)
    with pytest.raises(BadCalibration, match="at least one site"):
        exit_threshold([], full)
    with pytest.raises(BadCalibration, match="at least one site"):
        exit_threshold([behind[0][:0]], full[:0])
    with pytest.raises(BadCalibration, match="behind sites"):
        exit_threshold([behind[0][:3]], full)
    with pytest.raises(BadCalibration, match="NaN"):
        exit_threshold([behind[0] * float("nan")], full)
    with pytest.raises(BadCalibration, match="between 0 and 1"):
        exit_threshold(behind, full, risk=2.0)
    with pytest.raises(BadCalibration, match="choose one of max-prob"):
        exit_threshold(behind, full, score="probe")
