"""Shared by the benchmark scripts: progress on the terminal, and results as JSON beside the scripts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def progress(what: str, done: int, total: int) -> None:
    """One line a step, on stderr, so that stdout holds results only."""
    print(f"  {what}: {done}/{total}", file=sys.stderr, flush=True)


def write(name: str, results: dict[str, Any]) -> Path:
    """Write `results` to `results/<name>.json`; other entries of the file stay as they are."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**kept, **results}, indent=1) + "\n")
    return path
