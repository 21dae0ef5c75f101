"""Writes docs/depth.json and docs/depth.md: which passes that skip layers applied on each model of the zoo, and why not where they did not.

Run it from the root of the repository: `python tests/make_depth_table.py`.
"""

from __future__ import annotations

import json
from functools import cache

import make_coverage as coverage
import torch
import zoo_runs
from make_coverage import DOCS, Row
from zoo import CASES, by_name
from zoo_model import ZooModel

ROUTE = "route-tokens{layers=1 fill=carry score=norm}"
PASSES = ("drop-layers{layers=2}", "exit-early{layers=1 score=saturation}", ROUTE)
MODELS = [model for model, attn in CASES if attn == "sdpa"]


@cache
def row(name: str, passes: str) -> tuple[int, str, bool]:
    """Whether a pass applied on a model, the reason where it did not, and whether outputs keep their shapes and are finite."""
    with torch.no_grad():
        optimized, module, inputs = zoo_runs.optimize(by_name(name), "sdpa", passes)
        (rewrite,) = optimized.report.rewrites
        pairs = [(x if isinstance(x, tuple) else (x,)) for x in (optimized(*inputs), module(*inputs))]
    sound = all(a.shape == b.shape and bool(a.isfinite().all()) for a, b in zip(*pairs, strict=True))
    return int(rewrite.applied), rewrite.reason or "", sound


def rows_of(model: ZooModel) -> list[Row]:
    """One row a pass. All models have layers, so one application is expected of each; but later tokens must not choose earlier ones."""
    rows = []
    for name in PASSES:
        expected = int(not (name == ROUTE and model.causal and model.all_positions))
        applied, reason, _ = row(model.name, name)
        told = "" if applied >= expected else reason
        rows.append({"model": model.name, "attention": "sdpa", "pass": name, "applied": applied, "expected": expected, "reason": told})
    return rows


def checked_in() -> list[Row]:
    """The rows of docs/depth.json."""
    return json.loads((DOCS / "depth.json").read_text())


def markdown(rows: list[Row]) -> str:
    """The rows as a table; refusals follow as notes."""
    text = coverage.markdown(rows).split("\n")
    return "\n".join(
        [
            "# Coverage of passes that skip layers",
            "",
            "Whether each pass applied (4 layers, door 2, reference engine). Where a model answers at all positions, later tokens must not",
            "choose earlier ones: routing them by count is expected to be refused there.",
            "`python tests/make_depth_table.py` writes this file; a test fails when a number falls.",
            *text[4:],
        ]
    )


def main() -> None:
    """Regenerate both files."""
    rows = [row for model in MODELS for row in rows_of(model)]
    (DOCS / "depth.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    (DOCS / "depth.md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
