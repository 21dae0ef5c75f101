"""The engine that was asked for, or Inductor with the reason in the report: engines may refuse graphs, models run all the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dyncc.backends import Lowered, lower
from dyncc.backends.parity import parity, real
from dyncc.errors import DynccUsageError, NotTaken, RefusedError
from dyncc.ir import Program
from dyncc.report import Report
from dyncc.settings import Settings

ALWAYS = ("inductor", "reference")
"""Engines that take every graph and run it as it is written: they are not checked."""


def lowered(program: Program, settings: Settings, report: Report, inputs: Sequence[Any], *, dynamic: bool = False) -> Lowered:
    """A callable over the program's flat inputs; `report` says which engine it is.

    Args:
        inputs: flat example inputs; in door 1 as the compiler handed them over.
    Raises:
        RefusedError: under strict, where the engine does not take the program.
        PackageMissing: the engine is not installed.
    """
    if settings.engine in ALWAYS:
        run = lower(settings.engine, program, list(inputs), dynamic=dynamic)
        report.engine_notes = getattr(run, "notes", [])
        return run
    try:
        run = _checked(program, settings, inputs, dynamic)
    except DynccUsageError:
        raise
    except Exception as problem:
        reason = str(problem) if isinstance(problem, NotTaken) else f"internal: {type(problem).__name__}: {' '.join(str(problem).split())}"
        if settings.strict:
            raise RefusedError(f"engine {settings.engine} does not take graph {report.number}: {reason}") from problem
        report.engine, report.engine_refused = "inductor", f"{settings.engine}: {reason}"
        return lower("inductor", program, list(inputs), dynamic=dynamic)
    report.engine = getattr(run, "engine", settings.engine)
    report.engine_notes = getattr(run, "notes", [])
    return run


def _checked(program: Program, settings: Settings, inputs: Sequence[Any], dynamic: bool) -> Lowered:
    run = lower(settings.engine, program, list(inputs), dynamic=dynamic)
    if settings.evidence == "off" or settings.engine == "auto":
        return run  # auto has compared and timed its candidates, or knows what came of it
    _, words = parity(program, run, real(inputs))
    if words:
        raise NotTaken(f"its results are not the graph's: {words}")
    return run
