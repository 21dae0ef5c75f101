"""Writes docs/onnx.json and docs/onnx.md: which models of the zoo export to ONNX, dense and pruned, and what is refused why.

Run it from the root of the repository: `python tests/make_onnx_table.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import zoo_onnx
from zoo import ZOO

DOCS = Path(__file__).parent.parent / "docs"


def checked_in() -> list[dict[str, Any]]:
    """The rows of docs/onnx.json."""
    return json.loads((DOCS / "onnx.json").read_text())


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table; refusals follow as notes."""
    lines = [
        "# ONNX export",
        "",
        "The zoo exported with dynamic sizes, checked by `onnx.checker`, and run in ONNX Runtime at three points (one where all sizes are",
        "fixed) against the rewritten model: the largest difference is within 1e-4 of the largest value. Pruned is",
        f"`{zoo_onnx.PRUNE}`. `python tests/make_onnx_table.py` writes this file; a test fails when a model no longer exports.",
        "",
        "| model | dense | pruned | fused ops of ONNX Runtime (dense) |",
        "|---|---|---|---|",
    ]
    for row in rows:
        fused = ", ".join(f"{n} {name}" for name, n in row["dense_fused"].items())
        lines.append(f"| {row['model']} | {row['dense']} | {row['pruned']} | {fused} |")
    notes = [f"- {row['model']}, {kind}: {row[f'{kind}_reason']}" for row in rows for kind in ("dense", "pruned") if row[f"{kind}_reason"]]
    return "\n".join([*lines, "", "Notes:" if notes else "Everything was exported.", "", *notes]).rstrip() + "\n"


def main() -> None:
    """Regenerate both files; names on the command line renew those rows only."""
    chosen = sys.argv[1:]
    kept = {row["model"]: row for row in checked_in()} if chosen else {}
    rows = []
    for model in ZOO:
        rows.append(kept[model.name] if chosen and model.name not in chosen else zoo_onnx.row(model.name))
        print(rows[-1], flush=True)
    (DOCS / "onnx.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    (DOCS / "onnx.md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
