"""Paired timing: every round calls every variant once, so that a slow minute of the machine slows all of them alike.

What is reported is the median over the rounds of a ratio within one round, with a bootstrap interval, never a ratio of two medians.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dyncc.errors import DynccUsageError

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many steps of it are done, and how many there are."""

RESAMPLES = 2000
SEED = 0


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios baseline / variant, above 1 where the variant is faster, with its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def to_dict(self) -> dict[str, float]:
        return {"median": self.median, "low": self.low, "high": self.high}


@dataclass
class Timings:
    """Seconds of every round by variant, the first call's seconds, and the variants that failed with their reasons."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """The variant's median seconds."""
        return float(np.median(self.seconds[name]))

    def ratio(self, baseline: str, variant: str) -> Ratio:
        """How many times faster `variant` is than `baseline`."""
        return paired_ratio(self.seconds[baseline], self.seconds[variant])

    def to_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "first_call_seconds": self.first, "failures": self.failures}


def paired_ratio(baseline: list[float], variant: list[float], seed: int = SEED) -> Ratio:
    """Median and bootstrap 95 % interval of baseline[i] / variant[i].

    >>> print(paired_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]))
    2.00 [2.00, 2.00]
    """
    if len(baseline) != len(variant) or not baseline:
        raise ValueError(f"pairs are needed, got {len(baseline)} and {len(variant)} timings")
    ratios = np.asarray(baseline) / np.asarray(variant)
    drawn = np.random.default_rng(seed).integers(0, len(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def paired(variants: Mapping[str, Callable[[], Any]], pairs: int = 20, warmup: int = 2, progress: Progress | None = None) -> Timings:
    """Call each variant once (timed as its first call), `warmup` times unmeasured, then time `pairs` interleaved rounds.

    A variant that raises in its first calls is left out, and the reason is kept in `failures`; only a usage error of dyncc is raised,
    because it is the caller's to mend. A variant with a method `prepare` has
    it called before every call, outside the measured time.
    """
    if pairs < 1:
        raise ValueError(f"pairs={pairs}: at least one round is needed")
    timings = Timings()
    alive = [name for name, call in variants.items() if _first_calls(name, call, warmup, timings, progress)]
    for name in alive:
        timings.seconds[name] = []
    for number in range(pairs):
        _tell(progress, "pairs", number, pairs)
        for name in _rotated(alive, number):
            timings.seconds[name].append(_timed(variants[name]))
    _tell(progress, "pairs", pairs, pairs)
    return timings


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds of a call, until an accelerator has done what the call gave it to do; what it still did before does not count."""
    finish()
    start = time.perf_counter()
    call()
    finish()
    return time.perf_counter() - start


def finish() -> None:
    """Wait for the accelerator, if there is one: calls return when their work is queued there."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


ROUNDS = 7
ENOUGH = 0.2
"""Seconds a call after which no round is added to two: what is slow is measured well in few rounds."""


def least_seconds(calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """The least seconds of each call: a busy machine only adds, and rounds are interleaved, so that a busy moment falls on all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for i in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(seconds_of(call))
        if i >= 1 and time.perf_counter() - began > ENOUGH * len(calls):
            break
    return {name: min(found) for name, found in times.items()}


def _first_calls(name: str, call: Callable[[], Any], warmup: int, timings: Timings, progress: Progress | None) -> bool:
    _tell(progress, f"first call: {name}", 0, 1)
    try:
        timings.first[name] = _timed(call)
        for _ in range(warmup):
            _timed(call)
    except Exception as error:
        cause = getattr(error, "inner_exception", error)  # torch.compile wraps what a backend raises
        if isinstance(cause, DynccUsageError):
            raise cause from error
        timings.failures[name] = reason(cause)
        timings.first.pop(name, None)
        return False
    _tell(progress, f"first call: {name}", 1, 1)
    return True


def _timed(call: Callable[[], Any]) -> float:
    prepare = getattr(call, "prepare", None)
    if prepare is not None:
        prepare()
    return seconds_of(call)


def _rotated(names: list[str], number: int) -> list[str]:
    """Another variant starts each round, so that none always runs in the wake of the same one."""
    shift = number % len(names) if names else 0
    return names[shift:] + names[:shift]


def reason(error: BaseException) -> str:
    """One line: the kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _tell(progress: Progress | None, what: str, done: int, total: int) -> None:
    if progress is not None:
        progress(what, done, total)
