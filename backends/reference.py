"""The reference engine: the rewritten graph run eagerly, an ATen op at a time; dyncc's own ops are written out."""

from __future__ import annotations

from typing import Any

from dyncc.ir import Program
from dyncc.own_ops import spelled_out


def lower(program: Program, inputs: list[Any], *, dynamic: bool = False) -> Any:
    """The graph's own generated Python."""
    return spelled_out(program).module
