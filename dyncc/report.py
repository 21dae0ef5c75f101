"""The report: what was found, what each pass did or refused and why, what it cost and saved. One per graph."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Region:
    """A region of the graph: `kind` is "attention", "mlp" or "layer"; `place` is the user's source line, where known."""

    kind: str
    name: str
    layer: int | None = None
    detail: str = ""
    place: str = ""


@dataclass(frozen=True)
class Rewrite:
    """One pass: `found` of `expected` sites were rewritten; `reason` says why not, or what to know; `evidence` holds what was measured."""

    name: str
    text: str
    applied: bool
    reason: str
    exact: bool
    found: int = 0
    expected: int = 0
    misses: tuple[str, ...] = ()
    evidence: dict[str, Any] = field(default_factory=dict)
    nodes: tuple[int, int] = (0, 0)
    flops: tuple[int, int] = (0, 0)
    seconds: float = 0.0


@dataclass
class Report:
    """All about one graph. `fallback` names why the plain engine runs instead; None when dyncc lowered the graph itself.
    `engine` is what runs; `engine_refused` says which engine did not take the graph and why, `engine_notes` what the one that runs tells.
    `difference` holds each applied pass's graph difference as text, `ops` as a count of ops that came (+) and went (-)."""

    frame: str = ""
    number: int = 0
    engine: str = "inductor"
    engine_refused: str | None = None
    engine_notes: list[str] = field(default_factory=list)
    recompiled: str | None = None
    regions: list[Region] = field(default_factory=list)
    rewrites: list[Rewrite] = field(default_factory=list)
    expected_attention: int = 0
    found_attention: int = 0
    not_understood: list[str] = field(default_factory=list)
    fallback: str | None = None
    graph_break: str | None = None
    evidence: str = "numeric"
    lengths: str = ""
    cached: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    difference: dict[str, str] = field(default_factory=dict)
    ops: dict[str, dict[str, int]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def _engine_lines(self) -> list[str]:
        refused = [f"  engine not taken: {self.engine_refused}"] if self.engine_refused else []
        return refused + [f"  {self.engine}: {note}" for note in self.engine_notes]

    def __str__(self) -> str:
        title = f"dyncc: graph {self.number}" + (f" of {self.frame}" if self.frame else "") + f", engine {self.engine}"
        lines = [title, *self._engine_lines(), f"  attention: {self.found_attention} of {self.expected_attention} found"]
        lines += [f"  not understood: {m}" for m in self.not_understood]
        if self.fallback:
            lines.append(f"  fallback to the plain engine: {self.fallback}")
        if self.graph_break:
            lines.append(f"  graph break: {self.graph_break}")
        if self.recompiled:
            lines.append(f"  compiled again: {self.recompiled}")
        kinds: dict[str, int] = {}
        for region in self.regions:
            kinds[region.kind] = kinds.get(region.kind, 0) + 1
        lines.append("  regions: " + (", ".join(f"{n} {k}" for k, n in kinds.items()) or "none"))
        for r in self.rewrites:
            state = "applied" if r.applied else "refused"
            lines.append(f"  {r.text}: {state} {r.found}/{r.expected}" + (f" - {r.reason}" if r.reason else ""))
            lines += [f"      missed: {m}" for m in r.misses]
            if r.evidence:
                lines.append("      " + ", ".join(f"{k} {_show(v)}" for k, v in r.evidence.items()))
            if r.applied and self.ops.get(r.text):
                lines.append("      graph: " + ", ".join(f"{n:+d} {name}" for name, n in self.ops[r.text].items()))
            if r.applied and r.flops[0] and r.flops[0] != r.flops[1]:
                lines.append(f"      FLOPs {r.flops[0]:,} -> {r.flops[1]:,} ({r.flops[1] / r.flops[0]:.1%})")
        if self.flops:
            lines.append(f"  FLOPs: dense {self.flops['dense']:,}, now {self.flops['now']:,}")
        if self.lengths:
            lines.append(f"  holds for: {self.lengths}")
        if self.seconds:
            lines.append("  seconds: " + ", ".join(f"{k} {v:.2f}" for k, v in self.seconds.items()))
        return "\n".join(lines)


def _show(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


_reports: list[Report] = []
_lock = threading.Lock()


def add_report(report: Report) -> None:
    with _lock:
        report.number = _reports[-1].number + 1 if _reports else 0
        _reports.append(report)


def take_back(report: Report) -> None:
    """Forget a report: its graph is captured anew."""
    with _lock:
        _reports.remove(report)


def reports() -> list[Report]:
    """The reports of this process, one a graph, oldest first."""
    with _lock:
        return list(_reports)
