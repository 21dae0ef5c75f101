"""Writes docs/mixers.json and docs/mixers.md: what the passes that fuse do with each mixing layer of the literature, in each form.

Run it from the root of the repository: `python tests/make_mixer_table.py`.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from make_coverage import DOCS
from spelled_mixers import MIXERS
from zoo_model import relative_error

import dyncc

Row = dict[str, Any]
PASSES = ("fuse-attention", "fuse-gated-attention", "fuse-linear-attention")


@torch.no_grad()
def row(layer: str, form: str) -> tuple[Row, float]:
    """A line of the table, and by how much the rewritten layer differs from the layer."""
    torch.manual_seed(0)
    module, inputs = MIXERS[layer, form]()
    optimized = dyncc.optimize(module.eval(), inputs, passes=" ".join(PASSES), engine="reference", evidence="numeric")
    applied = [r for r in optimized.report.rewrites if r.applied]
    told: Row = {
        "layer": layer, "form": form, "applied": bool(applied), "passes": [r.name for r in applied], "nodes": sum(r.found for r in applied),
        "reason": "" if applied else optimized.report.rewrites[-1].reason,
    }  # fmt: skip
    return told, relative_error(optimized(*inputs), module(*inputs))


def checked_in() -> list[Row]:
    """The rows of docs/mixers.json."""
    return json.loads((DOCS / "mixers.json").read_text())


def markdown(rows: list[Row]) -> str:
    """The rows as a table."""
    lines = [
        "# Mixing layers",
        "",
        "What the passes that fuse make of the layers of `dyncc.layers`, and of the same sums in other words (`tests/spelled_mixers.py`):",
        "how many nodes take their place, by which pass, or why none does, in the words of `fuse-linear-attention`.",
        "`python tests/make_mixer_table.py` writes this file; a test fails when a row turns from applied to refused.",
        "",
        "| layer | form | outcome | pass |",
        "|---|---|---|---|",
    ]
    lines += [f"| {r['layer']} | {r['form']} | {_outcome(r)} | {_passes(r)} |" for r in rows]
    return "\n".join(lines) + "\n"


def _outcome(row: Row) -> str:
    return f"applied, {row['nodes']}" if row["applied"] else f"refused: {row['reason']}"


def _passes(row: Row) -> str:
    return ", ".join(f"`{name}`" for name in row["passes"])


def main() -> None:
    """Regenerate both files."""
    rows = [row(layer, form)[0] for layer, form in MIXERS]
    (DOCS / "mixers.json").write_text("[\n" + ",\n".join(json.dumps(x) for x in rows) + "\n]\n")
    (DOCS / "mixers.md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
