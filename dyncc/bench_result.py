"""What `bench` found, as data and as text."""

from __future__ import annotations

import io
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from dyncc.timing import Ratio, Timings
from dyncc.verdicts import gpu_model

OWN = ("capture", "analysis", "passes", "evidence")
"""Stages whose seconds are dyncc's own; the others are the engine's code generation, dense or rewritten."""


@dataclass(frozen=True)
class BenchResult:
    """Timings of all variants, and what dyncc did for its own. `runs` are the compiled variants, to go on measuring with."""

    title: str
    passes: str | None
    door: int
    engine: str
    pairs: int
    timings: Timings
    quality: dict[str, dict[str, float]]
    rewrites: list[dict[str, Any]]
    fallbacks: list[str]
    flops: dict[str, int]
    own: dict[str, float]
    cached: bool
    environment: dict[str, Any]
    runs: dict[str, Callable[..., Any]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def ratios(self) -> dict[str, Ratio]:
        """How many times faster dyncc is than each peer, or nothing where dyncc failed."""
        if "dyncc" not in self.timings.seconds:
            return {}
        return {name: self.timings.ratio(name, "dyncc") for name in self.timings.seconds if name != "dyncc"}

    @property
    def own_seconds(self) -> float:
        """Seconds of capture, analyses, passes and numeric evidence."""
        return sum(seconds for stage, seconds in self.own.items() if stage in OWN)

    @property
    def own_share(self) -> float | None:
        """`own_seconds` as a share of plain Inductor's first call."""
        first = self.timings.first.get("inductor")
        return self.own_seconds / first if first and self.own else None

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "title": self.title,
            "passes": self.passes,
            "door": self.door,
            "engine": self.engine,
            "pairs": self.pairs,
            "ratios": {name: ratio.to_dict() for name, ratio in self.ratios.items()},
            "medians": {name: self.timings.median(name) for name in self.timings.seconds},
            **self.timings.to_dict(),
            "quality": self.quality,
            "rewrites": self.rewrites,
            "fallbacks": self.fallbacks,
            "flops": self.flops,
            "own_seconds": self.own_seconds,
            "own_stages": self.own,
            "evidence_was_stored": self.cached,
            "own_share_of_inductor_first_call": self.own_share,
            "environment": self.environment,
        }

    def renderable(self) -> Group:
        """Tables and lines for a rich console."""
        return Group(self._variants(), *(Text(line) for line in self._lines()))

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=140, color_system=None)
        with console.capture() as captured:
            console.print(self.renderable())
        return captured.get().rstrip()

    def _variants(self) -> Table:
        table = Table(title=f"{self.title}: {self.pairs} interleaved pairs, median times", title_justify="left")
        for heading in ("variant", "ms", "dyncc is faster by (95 %)", "first call s", "difference to eager"):
            table.add_column(heading)
        ratios = self.ratios
        for name in self.timings.seconds:
            ratio = str(ratios[name]) if name in ratios else ""
            milliseconds = f"{1000 * self.timings.median(name):.2f}"
            table.add_row(name, milliseconds, ratio, f"{self.timings.first[name]:.1f}", _numbers(self.quality.get(name, {})))
        for name, why in self.timings.failures.items():
            table.add_row(name, "failed", "", "", why)
        return table

    def _lines(self) -> list[str]:
        lines = [f"passes: {self.passes if self.passes is not None else 'exact passes'}; door {self.door}; engine {self.engine}"]
        lines += [_rewrite_line(row) for row in self.rewrites]
        lines += [f"fallback: {why}" for why in self.fallbacks]
        if self.flops:
            lines.append("FLOPs a call: " + ", ".join(f"{name} {value / 1e9:.2f} G" for name, value in self.flops.items()))
        if self.own:
            share = f" = {self.own_share:.0%} of plain Inductor's first call" if self.own_share is not None else ""
            stored = " (numeric evidence was stored by an earlier run)" if self.cached else ""
            lines.append(f"dyncc's own time: {self.own_seconds:.1f} s{share}{stored}")
        return lines


def rewrite_rows(reports: Sequence[Any]) -> list[dict[str, Any]]:
    """One row a pass and graph: applied or not, how often it was found and expected, and the reason of a refusal."""
    names = ("name", "applied", "found", "expected", "reason", "exact")
    return [{name: getattr(rewrite, name) for name in names} for report in reports for rewrite in report.rewrites]


def environment() -> dict[str, Any]:
    """What the numbers depend on besides the model."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        **({"gpu": gpu_model()} if gpu_model() else {}),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def _rewrite_line(row: dict[str, Any]) -> str:
    if row["applied"]:
        return f"{row['name']}: applied {row['found']} of {row['expected']}"
    return f"{row['name']}: refused: {row['reason']}"


def _numbers(values: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in values.items())
