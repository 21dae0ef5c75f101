"""The whole line in one place: capture -> analysis -> passes -> evidence -> lowering. Read this first.

`rewrite` takes a captured program through the passes and has them judged (judge.py); a pass found wrong is left out and the pipeline runs
again without it. The two doors (dynamo.py, runtime.py) call it and lower what it returns. A usage error raises; a refusal is reported; an
internal failure is the caller's to turn into a fallback.
"""

from __future__ import annotations

import difflib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dyncc.analysis.facts import Facts
from dyncc.errors import RefusedError
from dyncc.flops import count_flops
from dyncc.ir import Program, op_name, source_line
from dyncc.judge import Judge, Link
from dyncc.pipeline import render
from dyncc.report import Region, Report, Rewrite
from dyncc.rewrite import Applied, Context, Draft, apply_pass, graph_text
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
    draft = Draft.of(program)
    report.seconds["analysis"] = time.perf_counter() - start
    describe(draft.facts, report)
    dump = Dump(settings.dump_dir, report)
    dump.write("captured", program, draft.facts.dump())
    start = time.perf_counter()
    judge = Judge(program, settings, examples)
    report.cached = judge.known is not None
    costs = Costs()
    steps = _steps(program, draft, settings, judge, costs)
    while not judge.accepts([Link(x.after, (x.position,), x.passed.exact) for x in steps if x.applied.modified]):
        steps = _steps(program, None, settings, judge, costs)
    report.rewrites += [_record(step, judge.measured.get(step.position, {}), costs) for step in steps]
    judge.remember(report.rewrites[len(report.rewrites) - len(steps) :])
    current = steps[-1].after if steps else program
    for step in steps:
        if step.applied.modified:
            dump.write(step.passed.name, step.after, "")
            text = render([step.passed])
            report.difference[text] = _difference(step.before, step.after)
            report.ops[text] = _op_difference(step.before, step.after)
    report.flops = {"dense": costs[program], "now": costs[current]}
    report.lengths = _lengths(program)
    report.seconds["passes"] = time.perf_counter() - start - judge.seconds
    report.seconds["evidence"] = judge.seconds
    dump.write("final", current, str(report))
    refused = [r for r in report.rewrites if not r.applied]
    if settings.strict and refused:
        raise RefusedError(f"{refused[0].text} was refused: {refused[0].reason}")
    return Outcome(current, program, tuple(cut for x in steps if x.applied.modified for cut in x.applied.result.cuts))


class Costs(dict[Program, int]):
    """FLOPs by program, counted when first asked for."""

    def __missing__(self, program: Program) -> int:
        self[program] = count_flops(program.graph)
        return self[program]


@dataclass(frozen=True)
class Step:
    """One pass of the pipeline and what it made of the program before it."""

    position: int
    passed: Any
    before: Program
    applied: Applied
    seconds: float

    @property
    def after(self) -> Program:
        return self.applied.program


def _steps(program: Program, draft: Draft | None, settings: Settings, judge: Judge, costs: Costs) -> list[Step]:
    """The pipeline, less what was undone."""
    steps: list[Step] = []
    current = program
    for position, passed in enumerate(settings.passes):
        start = time.perf_counter()
        applied = _apply(current, draft, passed, position, settings, judge, costs)
        draft = applied.left
        steps.append(Step(position, passed, current, applied, time.perf_counter() - start))
        current = applied.program
    return steps


def _apply(
    current: Program, draft: Draft | None, passed: Any, position: int, settings: Settings, judge: Judge, costs: Costs
) -> Applied:
    """One pass: an earlier verdict, the contract, then the cost model."""
    problem = judge.refused(position)
    if problem is not None:
        return Applied(current, False, False, problem, left=draft)
    if any(op_name(n) in AUTOCAST for n in current.graph.nodes):
        reason = "the graph switches autocast on or off inside; compile under one autocast setting, or cast the model"
        return Applied(current, False, False, reason)
    applied = apply_pass(current, passed, Context(settings.trace, judge.examples[0] if judge.examples else None), draft)
    if not applied.modified or passed.exact:
        return applied
    before, after = costs[current], costs[applied.program]
    if after >= before and not applied.result.pays_from:
        return Applied(current, False, False, f"it would cost more than it saves by the cost model ({before:,} FLOPs now, {after:,} then)")
    return applied


def _record(step: Step, measured: dict[str, Any], costs: Costs) -> Rewrite:
    applied, result = step.applied, step.applied.result
    nodes = (len(step.before.graph.nodes), len(step.after.graph.nodes)) if applied.modified else (0, 0)
    flops = (costs[step.before], costs[step.after]) if applied.modified else (0, 0)
    found = result.found if applied.applied else 0
    outcome = (applied.applied, applied.reason, step.passed.exact, found, result.expected, result.misses)
    return Rewrite(step.passed.name, render([step.passed]), *outcome, measured, nodes, flops, step.seconds)


def describe(facts: Facts, report: Report) -> None:
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
                if isinstance(size, torch.SymInt) and size.node.expr.free_symbols and str(size) not in seen:
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


