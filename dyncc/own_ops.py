"""dyncc's own ops written out: engines and formats that do not know them get their truths in ATen."""

from __future__ import annotations

from functools import partial

from dyncc.ir import Program, emit
from dyncc.kernels import fused_attention, one_row

TRUTHS = {**one_row.TRUTHS, **fused_attention.TRUTHS}
"""The truth of every op of dyncc's own that passes emit."""


def spelled_out(program: Program) -> Program:
    """The program itself, or a copy in which every op that has a truth is that truth."""
    if not any(n.target in TRUTHS for n in program.graph.nodes):
        return program
    spelled = program.copy()
    for node in [n for n in spelled.graph.nodes if n.target in TRUTHS]:
        new = emit(node, partial(TRUTHS[node.target], **node.kwargs), *node.args)
        new.meta = {**node.meta, "val": new.meta["val"]}
        node.replace_all_uses_with(new)
        spelled.graph.erase_node(node)
    spelled.graph.lint()
    spelled.module.recompile()
    return spelled
