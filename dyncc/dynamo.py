"""Door 1: the backend that torch.compile finds under the name "dyncc" (entry point `torch_dynamo_backends`)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import RestartAnalysis, ShortenTraceback
from torch._dynamo.resume_execution import TORCH_DYNAMO_RESUME_IN_PREFIX

from dyncc.backends.inductor import compile_graph as plain_inductor
from dyncc.cache_marks import serve_caches
from dyncc.capture import CaptureError, count, from_dynamo
from dyncc.driver import rewrite
from dyncc.engines import lowered
from dyncc.errors import DynccError, DynccUsageError, RefusedError
from dyncc.ir import hint
from dyncc.pass_tensors import brought_by, with_tensors
from dyncc.report import Report, add_report, take_back
from dyncc.settings import Settings, settings_from

ATTENTION_LIKE = ("scaled_dot_product_attention", "softmax", "_softmax")


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """torch.compile(model, backend="dyncc", options={"passes": TEXT, "engine": ..., "strict": ..., "evidence": ..., "dump_dir": ...}).

    Raises:
        DynccUsageError: an option or the pipeline text is wrong.
        RefusedError: under strict, when a pass was refused or the graph could not be captured.
    """
    try:
        return _compile_or_fall_back(gm, example_inputs, settings_from(options))
    except (DynccUsageError, RefusedError) as problem:
        raise _unwrapped(problem) from None


def _unwrapped(problem: DynccError) -> DynccError:
    """The same error as one of the kind that Dynamo hands on as it is, and does not wrap into BackendCompilerFailed."""
    kind = type(type(problem).__name__, (type(problem), ShortenTraceback), {"__module__": type(problem).__module__})
    error: DynccError = kind.__new__(kind, *problem.args)
    error.__dict__.update(problem.__dict__, first_useful_frame=None)
    if isinstance(error, ImportError):
        error.msg = str(problem)  # Dynamo reads it
    return error


def _compile_or_fall_back(gm: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings) -> Callable[..., Any]:
    report = Report(engine=settings.engine, evidence=settings.evidence)
    report.frame, report.recompiled = _frame()
    report.graph_break = _graph_break(gm)
    add_report(report)
    try:
        return _compile(gm, list(example_inputs), settings, report)
    except CaptureError as problem:
        return _fall_back(gm, example_inputs, settings, report, str(problem), quiet=True)
    except (DynccUsageError, RefusedError):
        raise
    except RestartAnalysis:  # no failure: Dynamo traces again with what was learned, and calls again
        take_back(report)
        raise
    except Exception as problem:
        return _fall_back(gm, example_inputs, settings, report, f"{type(problem).__name__}: {problem}", quiet=False)


def _compile(gm: fx.GraphModule, example_inputs: list[Any], settings: Settings, report: Report) -> Callable[..., Any]:
    start = time.perf_counter()
    program = from_dynamo(gm, example_inputs)
    example = [hint(v) if isinstance(v, torch.SymInt) else v for v in example_inputs]
    program, settings = serve_caches(program, settings, report, example)
    tensors = brought_by(settings.passes, program)
    program = with_tensors(program, tensors, len(program.inputs))
    example, example_inputs = [*example, *tensors.values()], [*example_inputs, *tensors.values()]
    report.seconds["capture"] = time.perf_counter() - start
    if report.graph_break and count(program.graph, *ATTENTION_LIKE):
        settings = _without_layer_passes(settings, report)
    outcome = rewrite(program, settings, [example], report)
    start = time.perf_counter()
    run = lowered(outcome.program, settings, report, example_inputs)
    report.seconds["lowering"] = time.perf_counter() - start
    return (lambda *inputs: run(*inputs, *tensors.values())) if tensors else run


def _without_layer_passes(settings: Settings, report: Report) -> Settings:
    """Layer numbers count the whole model, so passes that name layers cannot run on a part of it."""
    from dataclasses import replace

    from dyncc.pipeline import render
    from dyncc.report import Rewrite

    kept = []
    for passed in settings.passes:
        if not passed.counts_layers:
            kept.append(passed)
            continue
        reason = f"a graph break splits the model, so its layers cannot be numbered: {report.graph_break}"
        report.rewrites.append(Rewrite(passed.name, render([passed]), False, reason, passed.exact))
        if settings.strict:
            raise RefusedError(f"{passed.name} was refused: {reason}")
    return replace(settings, passes=tuple(kept))


def _fall_back(
    gm: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings, report: Report, reason: str, *, quiet: bool
) -> Callable[..., Any]:
    report.fallback = reason
    report.engine = "reference" if settings.engine == "reference" else "inductor"
    if settings.strict:
        raise RefusedError(f"graph {report.number} goes to the plain engine: {reason}")
    if not quiet:
        words = f"dyncc could not compile graph {report.number} and runs it plainly ({reason}); see dyncc.reports()[{report.number}]"
        warnings.warn(words, stacklevel=2)
    return gm.forward if settings.engine == "reference" else plain_inductor(gm, list(example_inputs))


def _frame() -> tuple[str, str | None]:
    """The frame being compiled and, from its second compilation on, why."""
    context = torch._guards.CompileContext.try_get()
    if context is None or context.compile_id is None:
        return "", None
    identity = context.compile_id
    again = getattr(identity, "frame_compile_id", 0) or 0
    why = str(getattr(torch._dynamo.utils.get_metrics_context(), "_metrics", {}).get("recompile_reason") or "").strip()
    return f"frame {identity}", (why.splitlines()[0] if why else f"compilation {again} of this frame") if again else None


def _graph_break(gm: fx.GraphModule) -> str | None:
    """The source line at which Dynamo cut the model, when this graph is one of its parts."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    stack = getattr(reason, "user_stack", None) or []
    if reason is not None and getattr(reason, "graph_break", False):
        place = f"{stack[-1].filename.rsplit('/', 1)[-1]}:{stack[-1].lineno}" if stack else "unknown line"
        return f"{place}: {str(reason.reason).strip().splitlines()[0]}"
    resumed = next((f for f in stack if f.name.startswith(TORCH_DYNAMO_RESUME_IN_PREFIX)), None)
    if resumed is not None:
        return f"{resumed.filename.rsplit('/', 1)[-1]}:{resumed.name.rsplit('_', 1)[-1]}: this graph continues behind an earlier break"
    return None
