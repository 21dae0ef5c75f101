"""Writes tests/golden anew: the text of every kernel that `dyncc kernels` shows. Read the difference before you commit it.

Run it from the root of the repository: `python tests/make_golden.py`.
"""

from __future__ import annotations

from pathlib import Path

from dyncc.kernels.generator import source
from dyncc.kernels.generator.standard import STANDARD

GOLDEN = Path(__file__).parent / "golden"


def main() -> None:
    """One file a kernel; files of kernels that are no more go."""
    for file in GOLDEN.glob("*.txt"):
        file.unlink()
    for spec in STANDARD:
        (GOLDEN / f"{spec.name}.py.txt").write_text(source(spec), encoding="utf-8")


if __name__ == "__main__":
    main()
