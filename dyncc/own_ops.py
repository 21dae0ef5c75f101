"""dyncc's own ops written out: engines and formats that do not know them get their truths in ATen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from dyncc.ir import Program, emit
from dyncc.kernels import fused_attention, gated_linear_attention, one_row

TRUTHS = {**one_row.TRUTHS, **fused_attention.TRUTHS, **gated_linear_attention.TRUTHS}
"""The truth of every op of dyncc's own that passes emit."""


def spelled_out(program: Program) -> Program:
    """The program itself, or a copy in which every op that has a truth is that truth."""
    if not any(n.target in TRUTHS for n in program.graph.nodes):
        return program
    spelled = program.copy()
    for node in [n for n in spelled.graph.nodes if n.target in TRUTHS]:
        new = emit(node, partial(_called, TRUTHS[node.target], tuple(node.kwargs)), *node.args, *node.kwargs.values())
        new.meta = {**node.meta, "val": new.meta["val"]}
        node.replace_all_uses_with(new)
        spelled.graph.erase_node(node)
    spelled.graph.lint()
    spelled.module.recompile()
    return spelled


def _called(truth: Callable[..., Any], names: tuple[str, ...], *values: Any) -> Any:
    """A truth on the values of a node's arguments, of which the last ones have names."""
    count = len(values) - len(names)
    return truth(*values[:count], **dict(zip(names, values[count:], strict=True)))
