"""The reference engine: the rewritten graph run eagerly, an ATen op at a time."""

from __future__ import annotations

from typing import Any

from dyncc.ir import Program


def lower(program: Program, inputs: list[Any], *, dynamic: bool = False) -> Any:
    """The graph's own generated Python."""
    return program.module
