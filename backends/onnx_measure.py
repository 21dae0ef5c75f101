"""Whether ONNX Runtime's fused ops help a model here: the fused file and the one of standard ops timed in turns on the example."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from dyncc.backends.onnx_names import Names
from dyncc.backends.ort_session import open_session, run_session

SHORT = 2e-3
"""Seconds; a shorter call is not measured: fused ops never cost so little a call that it could be told."""
ROUNDS = 5
SECONDS = 2.0
"""A look ends after so many rounds, or after so long."""
SLOWER = 1.03
LOOKS = 3
"""Fused ops are undone where they are slower by more than this, so many times in a row."""


def call_seconds(path: Path, names: Names, example: Sequence[torch.Tensor]) -> float:
    """The least of three calls, after one more."""
    session = open_session(path)
    return min([_seconds(session, names, example) for _ in range(4)][1:])


def slowdown(fused: Path, plain: Path, names: Names, example: Sequence[torch.Tensor]) -> str:
    """Words about how much slower the fused file is, or '' where it is not, clearly."""
    sessions = [open_session(path) for path in (fused, plain)]
    times = [0.0, 0.0]
    for _ in range(LOOKS):
        rounds: list[list[float]] = []
        while len(rounds) < ROUNDS and sum(map(sum, rounds)) < SECONDS:
            rounds.append([_seconds(session, names, example) for session in sessions])
        times = [statistics.median(column) for column in zip(*rounds, strict=True)]
        if times[0] <= times[1] * SLOWER:
            return ""
    return f"they are slower here: {1000 * times[0]:.3g} ms a call, standard ops {1000 * times[1]:.3g} ms"


def _seconds(session: object, names: Names, example: Sequence[torch.Tensor]) -> float:
    start = time.perf_counter()
    run_session(session, names, example)
    return time.perf_counter() - start
