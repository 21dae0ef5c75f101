"""Why a rewrite does not fit."""

from __future__ import annotations

from torch import fx

from dyncc.ir import op_name, source_line


class Refusal(Exception):
    """Why a rewrite does not fit, in words a user can act on. Caught by the rewrite framework, never by the user."""


def where(node: fx.Node) -> str:
    line = source_line(node)
    return f"{op_name(node)} ({node.name}{', ' + line if line else ''})"
