"""Break-even by measurement: a pipeline that is not faster than the dense graph, in the same engine and run, is taken back."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dyncc import verdicts
from dyncc.driver import Outcome
from dyncc.pipeline import render
from dyncc.rewrite import graph_text
from dyncc.timing import seconds_of

PAIRS = 9
SLOWER = 0.97
"""A rewrite stays unless dense is faster by more than this: timings of equal code differ by a few per cent."""


def check_break_even(optimized: Any, values: list[Any]) -> None:
    """Compile both graphs, time them in turns, note the ratio, and undo lossy passes (all, when only exact ones ran) that lose.

    The ratio dense/now is stored with the verdicts, so that the next process measures nothing.
    """
    outcome, settings, report = optimized._outcome, optimized._settings, optimized.report
    options = f"{render(settings.passes)} timed {report.engine}"
    name = verdicts.key(graph_text(outcome.dense.graph), verdicts.sources(settings.passes), options)
    known = verdicts.get(name)
    start = time.perf_counter()
    if known is None:
        now, dense = optimized._engine(outcome.program, values), optimized._engine(outcome.dense, values)
        known = {"ratio": paired_ratio(dense, now, values)}
        verdicts.put(name, known)
    ratio = known["ratio"]
    report.seconds["timing"] = time.perf_counter() - start
    for i, r in enumerate(report.rewrites):
        if r.applied and r.nodes[0]:
            report.rewrites[i] = replace(r, evidence={**r.evidence, "speed": ratio})
    if ratio < SLOWER:
        _take_back(optimized, ratio)


def _take_back(optimized: Any, ratio: float) -> None:
    report, outcome = optimized.report, optimized._outcome
    measured = f"the pipeline runs at {ratio:.2f} times the dense graph's speed"
    reason = f"it costs more than it saves: {measured}, measured at the example's sizes ({report.lengths})"
    for i, r in enumerate(report.rewrites):
        if r.applied and r.nodes[0]:
            report.rewrites[i] = replace(r, applied=False, found=0, reason=reason, flops=(0, 0))
    report.flops["now"] = report.flops["dense"]
    optimized._outcome = Outcome(outcome.dense, outcome.dense, ())


def paired_ratio(dense: Any, now: Any, values: list[Any]) -> float:
    """Median of dense/now over interleaved pairs of calls, after one warm-up of each."""
    with torch.no_grad():
        dense(*values), now(*values)
        ratios = []
        for _ in range(PAIRS):
            a, b = seconds_of(partial(dense, *values)), seconds_of(partial(now, *values))
            ratios.append(a / b)
    return statistics.median(ratios)
