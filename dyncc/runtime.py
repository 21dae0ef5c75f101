"""Door 2: `optimize` a model offline, and what it returns: a callable like the model, with its report."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from dyncc.call_inputs import bindings, check_conditions, check_inputs, expected_inputs, flat_example, ordered, symbols
from dyncc.capture import Signature, from_model
from dyncc.driver import Outcome, rewrite
from dyncc.engines import ALWAYS, lowered
from dyncc.errors import DynccError, InputMismatch, RefusedError
from dyncc.flops import count_flops
from dyncc.ir import Program
from dyncc.masked import Masked, selections
from dyncc.options import check_engine, check_evidence
from dyncc.pass_tensors import brought_by, with_tensors
from dyncc.pipeline import build, render
from dyncc.report import Report, add_report
from dyncc.settings import Settings
from dyncc.surface import check_surface

Example = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call."""


class Optimized:
    """A rewritten model. Call it like the model; `report` says what was done. Weights are the model's own tensors, not copies."""

    def __init__(self, outcome: Outcome, signature: Signature, settings: Settings, report: Report, example: Example | None = None):
        self._outcome, self._signature, self.report, self.example = outcome, signature, report, example
        self._settings = settings
        self._dynamic = bool(symbols(outcome.dense))
        self._expected = expected_inputs(outcome.dense)
        self._lowered: dict[Program, Any] = {}

    @property
    def program(self) -> Program:
        """The rewritten graph."""
        return self._outcome.program

    @property
    def flops(self) -> int:
        """FLOPs of one call at the example sizes; a multiply-add counts two."""
        return self.report.flops["now"]

    @property
    def dense_flops(self) -> int:
        return self.report.flops["dense"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        flat = self._flat(args, kwargs)
        program = self._outcome.dense if self._too_short(flat) else self._outcome.program
        return self._run(self._engine(program, flat), flat)

    def _engine(self, program: Program, flat: list[Any]) -> Any:
        """The program lowered; a call's inputs are as good an example as any."""
        if program not in self._lowered:
            self._lowered[program] = lowered(program, self._settings, self.report, flat, dynamic=self._dynamic)
        return self._lowered[program]

    def _too_short(self, flat: list[Any]) -> bool:
        """Whether a count keeps every row of this call anyway: then the dense graph runs."""
        return self._dynamic and any(isinstance(c.keep, int) and self._length(c, flat) <= c.keep for c in self._outcome.cuts[:1])

    def reference(self, *args: Any, **kwargs: Any) -> Any:
        """The rewritten graph, run eagerly."""
        return self._run(self._outcome.program.module, self._flat(args, kwargs))

    def dense(self, *args: Any, **kwargs: Any) -> Any:
        """The graph as captured, run eagerly."""
        return self._run(self._outcome.dense.module, self._flat(args, kwargs))

    def export_onnx(self, path: str | Path, verify: bool = True, portable: bool = False) -> Any:
        """Write the rewritten model as ONNX (opset 23, sizes that vary stay so); returns what was written, with the parity table.

        Args:
            verify: run the file in ONNX Runtime against this model and the dense one, at the example's sizes and two others.
            portable: standard ONNX ops only; otherwise ONNX Runtime's own fused ops are used where they fit.
        Raises:
            OnnxExportError: an op has no ONNX form, or (ParityError) the file computes something else; nothing is left at `path`.
            OutputNotWritable: the folder cannot be written.
        """
        from dyncc.backends.onnx_file import write

        report = self.report
        told = {
            "dyncc.pipeline": render(self._settings.passes),
            "dyncc.versions": json.dumps({"dyncc": version("dyncc"), "torch": torch.__version__}),
            "dyncc.evidence": json.dumps([{"name": r.text, "applied": r.applied, **r.evidence} for r in report.rewrites]),
            "dyncc.holds_for": report.lengths,
        }
        programs = (self._outcome.program, self._outcome.dense)
        example = self._flat(*self.example)[len(self._signature.state) :] if self.example is not None else []
        return write(Path(path), programs, self._signature, example, metadata=told, verify=verify, portable=portable)

    def masked(self, *args: Any, **kwargs: Any) -> Any:
        """The masked form: everything computed, what the selections left out hidden. Needs `optimize(..., masked=True)`.

        Raises:
            DynccError: the selections were not recorded, or have no masked form.
        """
        program = self._outcome.program
        if self._outcome.cuts and not program.extra_outputs:
            raise DynccError("selections were not recorded; use dyncc.optimize(..., masked=True)")
        flat = self._flat(args, kwargs)
        with torch.no_grad():
            returned = program.module(*flat)
            values = returned[len(returned) - program.extra_outputs :] if program.extra_outputs else ()
            lengths = [self._length(c, flat) for c in self._outcome.cuts]
            chosen = selections(self._outcome.cuts, values, lengths)
            results = Masked(self._outcome.dense.module, chosen).run(*flat)
        return self._shaped(list(results))

    def save(self, folder: str | Path) -> Path:
        """Write the artefact that `dyncc.load(folder)` reads: program, weights, plan, report and example inputs; no pickles."""
        from dyncc.artefact import save

        return save(self, folder)

    def _length(self, cut: Any, flat: list[Any]) -> int:
        """The full number of rows at a cut, for this call's sizes."""
        target = next(n for n in self._outcome.dense.graph.nodes if n.name == cut.at)
        size = target.meta["val"].shape[1]
        if isinstance(size, int):
            return size
        return int(size.node.expr.xreplace(bindings(self._outcome.dense, flat)))

    def _run(self, function: Callable[..., Any], flat: list[Any]) -> Any:
        with torch.no_grad():
            return self._shaped(list(function(*flat)))

    def _flat(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The call's tensors in the program's order, checked against what was captured."""
        signature = self._signature
        kwargs = ordered(kwargs, signature.in_spec)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != signature.in_spec:
            problem = f"the call has {len(leaves)} values in another arrangement than the example"
            raise InputMismatch(problem=problem, hint="pass the same arguments, positional and by keyword, as at optimize()")
        for position, value in signature.constants:
            if not _same_constant(leaves[position], value):
                problem = f"argument {position} was {value!r} when captured and is {leaves[position]!r} now"
                raise InputMismatch(problem=problem, hint="optimize again for another value")
        flat = [*signature.state, *(leaves[i] for i in signature.leaves)]
        check_inputs(self._expected, flat)
        check_conditions(signature, bindings(self._outcome.dense, flat) if signature.conditions else {})
        return flat

    def _shaped(self, results: list[Any]) -> Any:
        signature = self._signature
        copied = {i for _, i in signature.copies}
        kept = [r for i, r in enumerate(results[: signature.results]) if i not in copied]
        return pytree.tree_unflatten(kept, signature.out_spec)


def _same_constant(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b


def optimize(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    passes: str | None = None,
    dynamic_shapes: Any = None,
    examples: Sequence[tuple[Any, ...]] | None = None,
    metric: Callable[[list[Any], list[Any]], float] | None = None,
    engine: str = "inductor",
    evidence: str = "timed",
    strict: bool = False,
    dump_dir: str | None = None,
    masked: bool = False,
) -> Optimized:
    """Capture a model offline, rewrite it and prove what that cost.

    Args:
        args, kwargs: one example call; evidence is measured on it, and on `examples` (more positional argument tuples) if given.
        passes: pipeline text; None runs the exact passes, "" none.
        dynamic_shapes: as for torch.export.export: which sizes may vary.
        metric: `metric(dense_outputs, outputs) -> float`, higher is better, in place of the default quality figures.
        evidence: "off", "numeric", or "timed" (also compiles the dense model and refuses a pipeline that is not faster).
        masked: record the selections of lossy passes, so that `Optimized.masked` can run the masked form.
    Raises:
        DynccUsageError: a pipeline, option, engine or layer that does not exist.
        RefusedError: under strict, when a pass was refused.
        CaptureError: torch.export cannot capture the model.
    """
    check_surface(model)
    settings = Settings(build(passes), check_engine(engine), strict, check_evidence(evidence), dump_dir, masked, metric)
    report = Report(engine=engine, evidence=evidence, frame=type(model).__name__)
    add_report(report)
    start = time.perf_counter()
    program, signature = from_model(model, tuple(args), kwargs, dynamic_shapes)
    tensors = brought_by(settings.passes, program)
    program = with_tensors(program, tensors, len(signature.state))
    signature = replace(signature, state=(*signature.state, *tensors.values()))
    report.seconds["capture"] = time.perf_counter() - start
    calls = [(tuple(args), kwargs or {}), *((tuple(e), {}) for e in examples or ())]
    flat = [flat_example(program, signature, a, k) for a, k in calls]
    outcome = _rewrite(program, settings, flat, report)
    optimized = Optimized(outcome, signature, settings, report, (tuple(args), ordered(kwargs or {}, signature.in_spec)))
    if engine not in ALWAYS:
        optimized._engine(outcome.program, flat[0])
    if evidence == "timed" and settings.engine != "reference" and any(r.applied and r.nodes[0] for r in report.rewrites):
        from dyncc.breakeven import check_break_even

        check_break_even(optimized, flat[0])
    return optimized


def _rewrite(program: Program, settings: Settings, flat: list[list[Any]], report: Report) -> Outcome:
    """The pipeline; an internal failure leaves the dense graph, with one warning that names the report."""
    try:
        return rewrite(program, settings, flat, report)
    except DynccError:
        raise
    except Exception as problem:
        report.fallback = f"{type(problem).__name__}: {problem}"
        if settings.strict:
            raise RefusedError(f"the model stays as it was: {report.fallback}") from problem
        place = f"dyncc.reports()[{report.number}]"
        words = f"dyncc could not rewrite graph {report.number} and leaves it dense ({report.fallback}); see {place}"
        warnings.warn(words, stacklevel=3)
        report.flops = {"dense": count_flops(program.graph), "now": count_flops(program.graph)}
        return Outcome(program, program, ())


def explain(model: torch.nn.Module, *args: Any, passes: str | None = None, **kwargs: Any) -> Report:
    """What dyncc finds in a model and what each pass does to it, measured numerically on the given example call."""
    return optimize(model, args, kwargs, passes=passes, evidence="numeric").report
