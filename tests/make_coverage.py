"""Writes docs/coverage.json and docs/coverage.md: how often each pass applied on each model of the zoo, against what its config says.

Run it from the root of the repository: `python tests/make_coverage.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import zoo_runs
from zoo import CASES
from zoo_model import ZooModel

DOCS = Path(__file__).parent.parent / "docs"
PRUNE = "keep=0.5 layers=1 score=hidden-norm"
Row = dict[str, Any]


def rows_of(model: ZooModel, attn: str) -> list[Row]:
    """One row a pass: `applied` regions of the `expected` ones, and the reason when some are missing."""
    exact, prune = zoo_runs.exact(model.name, attn), zoo_runs.prune(model.name, attn, PRUNE)
    rows = [_row(model, attn, name, run.applied, zoo_runs.expected_exact(model, attn, name), run.reason) for name, run in exact.items()]
    return [*rows, _row(model, attn, f"prune-tokens{{{PRUNE}}}", int(prune.applied), 1, prune.reason)]


def _row(model: ZooModel, attn: str, name: str, applied: int, expected: int, reason: str) -> Row:
    reason = "" if applied >= expected else reason
    return {"model": model.name, "attention": attn, "pass": name, "applied": applied, "expected": expected, "reason": reason}


def key(row: Row) -> tuple[str, str, str]:
    """What names a row."""
    return row["model"], row["attention"], row["pass"]


def checked_in() -> list[Row]:
    """The rows of docs/coverage.json."""
    return json.loads((DOCS / "coverage.json").read_text())


def markdown(rows: list[Row]) -> str:
    """The rows as a table, one line a model and attention, one column a pass; refusals follow as notes."""
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    cases = list(dict.fromkeys((row["model"], row["attention"]) for row in rows))
    cell = {key(row): f"{row['applied']}/{row['expected']}" for row in rows}
    lines = [
        "# Coverage",
        "",
        "Regions that each pass rewrote, of those that the model's config promises (4 layers, door 2, reference engine).",
        "`python tests/make_coverage.py` writes this file; a test fails when a number falls.",
        "",
        "| model | attention | " + " | ".join(f"`{name}`" for name in passes) + " |",
        "|---" * (2 + len(passes)) + "|",
    ]
    lines += [f"| {model} | {attn} | " + " | ".join(cell[model, attn, name] for name in passes) + " |" for model, attn in cases]
    notes = [f"- {row['model']}, {row['attention']}, `{row['pass']}`: {row['reason']}" for row in rows if row["reason"]]
    return "\n".join([*lines, "", "Refused:" if notes else "Nothing was refused.", "", *notes]).rstrip() + "\n"


def main() -> None:
    """Regenerate both files."""
    rows = [row for model, attn in CASES for row in rows_of(model, attn)]
    DOCS.mkdir(exist_ok=True)
    (DOCS / "coverage.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    (DOCS / "coverage.md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
