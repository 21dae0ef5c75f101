"""The zoo exported to ONNX, each model once a process: what the tests and the table in docs/ look at."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import zoo_runs
from zoo import by_name

from dyncc.errors import DynccError

PRUNE = "prune-tokens{keep=0.5 layers=1 score=hidden-norm}"


@dataclass(frozen=True)
class Export:
    """One export: `state` is "exported", "refused" (the pass did not apply) or "failed"; `error` is the worst of all points."""

    state: str
    reason: str
    error: float
    points: int
    fused: dict[str, int]
    undone: str = ""


@cache
def export(name: str, passes: str) -> Export:
    """A model of the zoo, sizes dynamic, padded where it takes a mask, through `export_onnx` with verification."""
    model = by_name(name)
    optimized, _, _ = zoo_runs.optimize(model, model.attns[0], passes, padding=model.has_mask, dynamic=True)
    refused = [r.reason for r in optimized.report.rewrites if not r.applied]
    if refused:
        return Export("refused", refused[0], 0.0, 0, {})
    with tempfile.TemporaryDirectory() as folder:
        try:
            written = optimized.export_onnx(Path(folder) / "model.onnx")
        except DynccError as error:
            return Export("failed", str(error), 0.0, 0, {})
    sizes = {row.sizes for row in written.parity}
    return Export("exported", "", max(row.error for row in written.parity), len(sizes), written.fused, written.undone)


def row(name: str) -> dict[str, Any]:
    """One line of the table: dense and pruned."""
    found = {"model": name}
    for label, passes in (("dense", ""), ("pruned", PRUNE)):
        made = export(name, passes)
        found[label] = made.state
        found[f"{label}_reason"] = made.reason or (f"exported with standard ops only: {made.undone}" if made.undone else "")
        found[f"{label}_fused"] = {k: v for k, v in sorted(made.fused.items()) if v and k[0].isupper()}
    return found
