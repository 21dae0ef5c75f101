"""The whole line in one place: capture -> analysis -> passes -> evidence -> lowering. Read this first.

`rewrite` takes a captured program through the passes and gathers evidence; the two doors (dynamo.py, runtime.py) call it and lower what it
returns. A usage error raises; a refusal is reported; an internal failure is the caller's to turn into a fallback.
"""

from __future__ import annotations

import difflib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dyncc import verdicts
from dyncc.analysis.facts import Facts, analyse
from dyncc.errors import RefusedError
from dyncc.evidence import beyond_tolerance, quality, run_isolated, sample
from dyncc.flops import count_flops
from dyncc.ir import Program, op_name, source_line
from dyncc.pipeline import render
from dyncc.report import Region, Report, Rewrite
from dyncc.rewrite import Applied, Context, apply_pass, graph_text, promised_outputs
from dyncc.settings import Settings

AUTOCAST = ("_enter_autocast", "_exit_autocast", "wrap_with_autocast")


@dataclass(frozen=True)
class Outcome:
    """The rewritten program, the dense one, and the cuts that lossy passes made (for the masked form)."""

    program: Program
    dense: Program
    cuts: tuple[Any, ...]


def rewrite(program: Program, settings: Settings, examples: Sequence[list[Any]], report: Report) -> Outcome:
    """Run the pipeline of `settings` on a program and fill the report.

    Args:
        examples: flat example inputs, each as long as `program.inputs`; evidence is measured on all of them, the worst is reported.
    Raises:
        RefusedError: under `strict`, when a pass of the pipeline was refused.
        DynccUsageError: an option does not fit the model (a layer that it does not have).
    """
    start = time.perf_counter()
    facts = analyse(program)
    report.seconds["analysis"] = time.perf_counter() - start
    describe(program, facts, report)
    dump = Dump(settings.dump_dir, report)
    dump.write("captured", program, facts.dump())
    evidence = Evidence(program, settings, examples, report)
    current, cuts = program, list[Any]()
    open_exact = Segment(program, [])
    for position, passed in enumerate(settings.passes):
        if not passed.exact:
            current = _close(open_exact, current, settings, evidence, report)
        start = time.perf_counter() - evidence.seconds
        applied = _step(current, passed, evidence, position)
        seconds = time.perf_counter() - evidence.seconds - start
        step = _record(passed, current, applied, evidence.measured.pop(position, {}), seconds)
        report.rewrites.append(step)
        if applied.modified:
            dump.write(passed.name, applied.program, "")
            report.difference[step.text] = _difference(current, applied.program)
            report.ops[step.text] = _op_difference(current, applied.program)
            cuts += applied.result.cuts
        current = applied.program
        if not passed.exact:
            open_exact = Segment(current, [])
        elif applied.modified:
            open_exact.positions.append(position)
    current = _close(open_exact, current, settings, evidence, report)
    evidence.remember(report)
    report.seconds["passes"] = sum(r.seconds for r in report.rewrites)
    report.seconds["evidence"] = evidence.seconds
    report.flops = {"dense": count_flops(program.graph), "now": count_flops(current.graph)}
    report.lengths = _lengths(program)
    dump.write("final", current, str(report))
    refused = [r for r in report.rewrites if not r.applied]
    if settings.strict and refused:
        raise RefusedError(f"{refused[0].text} was refused: {refused[0].reason}")
    return Outcome(current, program, tuple(cuts))


def _step(current: Program, passed: Any, evidence: Evidence, position: int) -> Applied:
    """One pass with its evidence: an earlier verdict, the contract, the cost model, then the numbers."""
    stored = evidence.stored(position)
    if stored is not None and not stored["applied"]:
        return Applied(current, False, False, stored["reason"])
    if any(op_name(n) in AUTOCAST for n in current.graph.nodes):
        reason = "the graph switches autocast on or off inside; compile under one autocast setting, or cast the model"
        return Applied(current, False, False, reason)
    applied = apply_pass(current, passed, Context(trace=evidence.settings.trace))
    if not applied.modified or passed.exact:
        return applied
    before, after = count_flops(current.graph), count_flops(applied.program.graph)
    if after >= before:
        return Applied(current, False, False, f"it would cost more than it saves by the cost model ({before:,} FLOPs now, {after:,} then)")
    evidence.judge_lossy(position, applied.program)
    return applied


@dataclass(frozen=True)
class Segment:
    """Exact passes in a row: the program in front of them and their positions in the pipeline."""

    start: Program
    positions: list[int]


def _close(segment: Segment, current: Program, settings: Settings, evidence: Evidence, report: Report) -> Program:
    """Check the exact passes of a segment at once on the caller's inputs; where the sum is out of tolerance, undo the guilty."""
    if not segment.positions or settings.evidence == "off" or evidence.known:
        return current
    error, words = evidence.judge_exact(current, segment.start)
    if not words:
        for i in segment.positions:
            report.rewrites[i] = replace(report.rewrites[i], evidence={"error": error})
        return current
    return _bisect(segment, settings, evidence, report)


def _bisect(segment: Segment, settings: Settings, evidence: Evidence, report: Report) -> Program:
    """Apply the segment again pass by pass, leaving out each that is out of tolerance by itself."""
    current = segment.start
    for i in segment.positions:
        applied = apply_pass(current, settings.passes[i], Context(trace=settings.trace))
        error, words = evidence.judge_exact(applied.program, current)
        if words:
            report.rewrites[i] = replace(report.rewrites[i], applied=False, found=0, reason=f"undone: {words}", flops=(0, 0))
            continue
        report.rewrites[i] = replace(report.rewrites[i], evidence={"error": error})
        current = applied.program
    return current


def _record(passed: Any, before: Program, applied: Applied, measured: dict[str, Any], seconds: float) -> Rewrite:
    result = applied.result
    nodes = (len(before.graph.nodes), len(applied.program.graph.nodes)) if applied.modified else (0, 0)
    flops = (count_flops(before.graph), count_flops(applied.program.graph)) if applied.modified else (0, 0)
    found = result.found if applied.applied else 0
    outcome = (applied.applied, applied.reason, passed.exact, found, result.expected, result.misses)
    return Rewrite(passed.name, render([passed]), *outcome, measured, nodes, flops, seconds)


class Evidence:
    """Runs programs on the example inputs in the reference engine, once each, and keeps what earlier processes found out."""

    def __init__(self, dense: Program, settings: Settings, examples: Sequence[list[Any]], report: Report):
        self.dense, self.settings, self.examples, self.report = dense, settings, list(examples), report
        self.measured: dict[int, dict[str, Any]] = {}
        self.seconds = 0.0
        self.mutates = bool(analyse(dense).mutated)
        self._results: dict[Program, list[list[Any]]] = {}
        self._last = dense
        self.key = ""
        if settings.evidence != "off" and settings.passes:
            surroundings = f"{settings.evidence} {settings.engine} {dense.door} {dense.needs_grad}"
            text = f"{render(settings.passes)} {surroundings} {sample(self.examples)}"
            self.key = verdicts.key(graph_text(dense.graph), verdicts.sources(settings.passes), text)
        self.known = verdicts.get(self.key) if self.key and settings.metric is None else None
        report.cached = self.known is not None

    def stored(self, position: int) -> dict[str, Any] | None:
        if self.known is None or position >= len(self.known["rewrites"]):
            return None
        entry: dict[str, Any] = self.known["rewrites"][position]
        self.measured[position] = entry["evidence"]
        return entry

    def remember(self, report: Report) -> None:
        if self.key and self.known is None:
            rows = [{"applied": r.applied, "reason": r.reason, "evidence": r.evidence} for r in report.rewrites]
            verdicts.put(self.key, {"rewrites": rows})

    def run(self, program: Program) -> list[list[Any]]:
        """The caller's outputs for every example; those of the dense and of the last program are kept."""
        if program not in self._results:
            kept = {p: r for p, r in self._results.items() if p is self.dense or p is self._last}
            self._results = {**kept, program: [self._run_one(program, values) for values in self.examples]}
            self._last = program
        return self._results[program]

    def _run_one(self, program: Program, values: list[Any]) -> list[Any]:
        results, seconds = run_isolated(program.module, values, self.mutates)
        self.seconds += seconds
        promised = promised_outputs(program)
        return [r for i, r in enumerate(results) if not promised <= i < promised + program.extra_outputs]

    def judge_exact(self, program: Program, against: Program) -> tuple[float, str]:
        worst, words = 0.0, ""
        for before, now in zip(self.run(against), self.run(program), strict=True):
            error, problem = beyond_tolerance(before, now)
            worst, words = max(worst, error), words or problem
        return worst, words

    def judge_lossy(self, position: int, program: Program) -> None:
        """Measure what a lossy pass changes, on every example; the worst figures are kept."""
        if self.settings.evidence == "off" or self.known is not None:
            return
        figures: dict[str, Any] = {"examples": len(self.examples)}
        for dense, now in zip(self.run(self.dense), self.run(program), strict=True):
            measured = {"metric": self.settings.metric(dense, now)} if self.settings.metric else quality(dense, now)
            for name, value in measured.items():
                worse = max if name in ("error", "kl") else min
                figures[name] = worse(figures[name], value) if name in figures else value
        self.measured[position] = figures


def describe(program: Program, facts: Facts, report: Report) -> None:
    """Fill in what was found."""
    report.expected_attention, report.found_attention = facts.expected, facts.found
    report.not_understood = list(facts.misses)
    for region in facts.attention:
        kind = "fused" if region.fused else "spelled out"
        report.regions.append(Region("attention", region.out.name, region.index, kind, source_line(region.out)))
    for stack in facts.stacks:
        for layer in stack.layers:
            starts = {"layer": layer.start} if layer.middle is layer.end else {"layer": layer.start, "mlp": layer.middle}
            for kind, start in starts.items():
                span = f"{start.name} to {layer.end.name}"
                report.regions.append(Region(kind, layer.end.name, layer.index, span, source_line(layer.end)))


def _lengths(program: Program) -> str:
    """The sizes that may vary, with the ranges that capture allows, or that they are fixed."""
    seen: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor):
            for dim, size in enumerate(node.meta["val"].shape):
                if isinstance(size, torch.SymInt) and str(size) not in seen:
                    bounds = size.node.shape_env.bound_sympy(size.node.expr)
                    upper = "any" if not bounds.upper.is_Integer or bounds.upper > 1 << 40 else str(bounds.upper)
                    seen[str(size)] = f"{node.name}[{dim}] from {bounds.lower} to {upper} (measured at {size.node.hint})"
    words = list(seen.values())
    more = [f"{len(words) - 4} more sizes"] if len(words) > 4 else []
    return "; ".join(words[:4] + more) or "the captured sizes only"


def _difference(before: Program, after: Program) -> str:
    old, new = graph_text(before.graph).splitlines(), graph_text(after.graph).splitlines()
    return "\n".join(difflib.unified_diff(old, new, "before", "after", lineterm="", n=0))


def _op_difference(before: Program, after: Program) -> dict[str, int]:
    counts = Counter(op_name(n) for n in after.graph.nodes if n.op == "call_function")
    counts.subtract(op_name(n) for n in before.graph.nodes if n.op == "call_function")
    return {name: n for name, n in sorted(counts.items()) if n}


class Dump:
    """Numbered files of every stage under `dump_dir`, one folder a graph."""

    def __init__(self, folder: str | None, report: Report):
        self.folder = Path(folder) / f"graph{report.number}" if folder else None
        self.count = 0

    def write(self, stage: str, program: Program, notes: str) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        text = graph_text(program.graph) + ("\n" + notes + "\n" if notes else "")
        (self.folder / f"{self.count:02d}-{stage}.txt").write_text(text, encoding="utf-8")
        self.count += 1


