"""The demo's findings as a table for the terminal and as a Markdown report with its data beside it."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dyncc.bench_result import BenchResult

HEADINGS = ("what", "setting", "Inductor", "dyncc", "faster by (95 %)", "FLOPs", "quality against dense")


@dataclass(frozen=True)
class Finding:
    """One comparison: its timings, and its quality over documents that were not timed."""

    name: str
    setting: str
    result: BenchResult
    documents: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "setting": self.setting, "documents": self.documents, "bench": self.result.to_dict()}

    def row(self) -> tuple[str, ...]:
        """What the summary says of it, in the order of HEADINGS."""
        timings = self.result.timings
        times = [f"{1000 * timings.median(name):.1f} ms" if name in timings.seconds else "failed" for name in ("inductor", "dyncc")]
        ratio = self.result.ratios.get("inductor")
        return (self.name, self.setting, *times, str(ratio) if ratio else "-", _flops(self.result.flops), self.quality())

    def quality(self) -> str:
        """The measure that fits the model, in words."""
        found = self.documents
        if "mean_cosine" in found:
            return f"cosine {found['mean_cosine']:.3f} (worst {found['smallest_cosine']:.3f}) over {found['passages']} passages"
        if "perplexity_change" in found:
            agreement = f"first token agrees on {found['first_token_agreement']:.0%} of {found['documents']} documents"
            return f"{agreement}, perplexity {found['perplexity_change']:+.1%} over the next {found['tokens_ahead']} tokens"
        return ", ".join(f"{name.replace('_', ' ')} {value:.2g}" for name, value in self.result.quality.get("dyncc", {}).items())


def summary(findings: Sequence[Finding]) -> str:
    """A table for the terminal."""
    table = Table(title="dense (plain Inductor) against dyncc, same run, interleaved", title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading)
    for finding in findings:
        table.add_row(*finding.row())
    console = Console(file=io.StringIO(), width=150, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip()


def write_report(folder: Path, findings: Sequence[Finding], environment: dict[str, Any], seconds: float) -> tuple[Path, Path]:
    """Write `report.md` and `report.json`; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    report, data = folder / "report.md", folder / "report.json"
    report.write_text(markdown(findings, environment, seconds))
    content = {"environment": environment, "seconds": seconds, "findings": [finding.to_dict() for finding in findings]}
    data.write_text(json.dumps(content, indent=1) + "\n")
    return report, data


def markdown(findings: Sequence[Finding], environment: dict[str, Any], seconds: float) -> str:
    """The report: one summary table, then all that was measured for each row of it."""
    rows = [HEADINGS, tuple("---" for _ in HEADINGS), *(finding.row() for finding in findings)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    machine = ", ".join(f"{name} {value}" for name, value in environment.items())
    details = "\n\n".join(_details(finding) for finding in findings)
    return f"""# dyncc demo

Dense models under plain Inductor against the same models under dyncc: times are medians, ratios are medians over interleaved pairs
with a bootstrap 95 % interval, above 1 where dyncc is faster. Exact passes change nothing but rounding. Pruning is lossy, so its
quality is measured on text that was not timed.

{table}

Measured in {seconds:.0f} s on: {machine}.

{details}
"""


def _details(finding: Finding) -> str:
    measured = "".join(f"- {name.replace('_', ' ')}: {value:.4g}\n" for name, value in finding.documents.items())
    return f"## {finding.name}\n\n{finding.setting}\n\n```\n{finding.result}\n```\n\n{measured}".rstrip()


def _flops(counted: dict[str, int]) -> str:
    """Dense FLOPs and what is left of them.

    >>> _flops({"dense": 4_000_000_000, "now": 1_000_000_000})
    '4.0 G -> 1.0 G'
    """
    if not counted:
        return "-"
    return " -> ".join(f"{value / 1e9:.1f} G" for value in counted.values())
