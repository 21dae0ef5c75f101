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

PASSES = ("drop-layers{layers=2}", "exit-early{layers=1 score=saturation}")
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
    """One row a pass: every model of the zoo has layers, so one application is expected of each."""
    found = [(name, *row(model.name, name)[:2]) for name in PASSES]
    return [
        {"model": model.name, "attention": "sdpa", "pass": name, "applied": applied, "expected": 1, "reason": "" if applied else reason}
        for name, applied, reason in found
    ]


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
            "Whether each pass applied; one application is expected of each model (4 layers, door 2, reference engine).",
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
