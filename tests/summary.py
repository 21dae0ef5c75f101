"""`python tests/summary.py build/full.xml [more.xml]`: the results of pytest runs as a Markdown table, one row a test file."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from pathlib import Path

OUTCOMES = ("failure", "error", "skipped")


def counts(junit: Path) -> tuple[dict[str, Counter[str]], dict[str, float]]:
    """Per test file: how many passed, failed or were skipped, and the seconds."""
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    seconds: dict[str, float] = defaultdict(float)
    for case in ET.parse(junit).iter("testcase"):
        file = case.get("classname", "").split(".")[-1] or case.get("name", "")
        outcome = next((kind for kind in OUTCOMES if case.find(kind) is not None), "passed")
        outcomes[file]["failed" if outcome in ("failure", "error") else outcome] += 1
        seconds[file] += float(case.get("time", 0))
    return outcomes, seconds


def skips(junit: Path) -> dict[str, list[str]]:
    """What was skipped: the tests of each reason."""
    found: dict[str, list[str]] = defaultdict(list)
    for case in ET.parse(junit).iter("testcase"):
        skipped = case.find("skipped")
        if skipped is not None:
            found[skipped.get("message", "")].append(case.get("name", ""))
    return found


def table(junits: list[Path]) -> str:
    """The table over one or more runs (the quick tests and those marked full, say), with a line of totals."""
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    seconds: dict[str, float] = defaultdict(float)
    for junit in junits:
        found, took = counts(junit)
        for file in found:
            outcomes[file] += found[file]
            seconds[file] += took[file]
    lines = ["| file | passed | failed | skipped | seconds |", "|---|---|---|---|---|"]
    for file in sorted(outcomes):
        found = outcomes[file]
        lines.append(f"| {file} | {found['passed']} | {found['failed']} | {found['skipped']} | {seconds[file]:.0f} |")
    total: Counter[str] = sum(outcomes.values(), Counter())
    whole = sum(seconds.values())
    lines.append(f"| **all** | {total['passed']} | {total['failed']} | {total['skipped']} | {whole:.0f} |")
    return "\n".join(lines)


def main() -> None:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    print(f"# The last full run\n\nPython {platform.python_version()}, {versions}.\n\n{table([Path(name) for name in sys.argv[1:]])}")


if __name__ == "__main__":
    main()
