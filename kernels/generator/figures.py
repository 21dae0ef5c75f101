"""What each shown kernel took on each target when its figures were last put on record (`tests/make_kernel_figures.py`)."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from dyncc import verdicts
from dyncc.kernels.generator.compiled import Compiled

FILE = Path(__file__).parent / "figures.json"
TOLD = ("registers", "spills", "shared_memory", "occupancy")


@functools.cache
def table() -> dict[str, Any]:
    """`triton`, the version that compiled them, and `kernels`: figures by "name target"."""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def before(made: Compiled) -> dict[str, Any] | None:
    """A kernel's figures on record; None where it has none, or where another Triton compiled them."""
    kept = table()
    found: dict[str, Any] | None = kept["kernels"].get(f"{made.name} {made.target}")
    return found if kept["triton"] == verdicts.version("triton") else None


def worse(made: Compiled) -> list[str]:
    """In what a kernel got worse: more spills, more shared memory, lower occupancy."""
    kept = before(made) or {}
    more = [name for name in ("spills", "shared_memory") if name in kept and getattr(made, name) > kept[name]]
    less = [name for name in ("occupancy",) if name in kept and getattr(made, name) < kept[name]]
    return [f"{name} {getattr(made, name)}, before {kept[name]}" for name in (*more, *less)]
