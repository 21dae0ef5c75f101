"""dyncc's own ops written out: engines and formats that do not know them get their truths in ATen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import fx

from dyncc.ir import Program, emit
from dyncc.kernels import append_rows, decayed_sum, fused_attention, gated_delta_rule, gated_linear_attention, one_row, slot_attention

TRUTHS = {
    **one_row.TRUTHS, **fused_attention.TRUTHS, **gated_linear_attention.TRUTHS, **gated_delta_rule.TRUTHS, **decayed_sum.TRUTHS,
    **slot_attention.TRUTHS,
}  # fmt: skip
"""The truth of every op of dyncc's own that passes emit and that computes something."""

EXPORTED = {**TRUTHS, **append_rows.TRUTHS}
"""With that of the op whose memory outlives a call, which PyTorch alone can run."""


def spelled_out(program: Program, truths: Mapping[Any, Callable[..., Any]] = TRUTHS) -> Program:
    """The program itself, or a copy in which every op that has a truth among `truths` is that truth."""
    if not any(n.target in truths for n in program.graph.nodes):
        return program
    spelled = program.copy()
    for node in [n for n in spelled.graph.nodes if n.target in truths]:
        new = emit(node, partial(_called, truths[node.target], tuple(node.kwargs)), *node.args, *node.kwargs.values())
        _replace(node, new)
    spelled.graph.lint()
    spelled.module.recompile()
    return spelled


def _replace(node: fx.Node, new: Any) -> None:
    """Put a truth's result in place of an op's: where it is several tensors, in place of each that is taken."""
    taken = [(n, new[n.args[1]]) for n in list(node.users)] if isinstance(new, (tuple, list)) else [(node, new)]
    for old, made in taken:
        if made.op != "placeholder":
            made.meta = {**old.meta, "val": made.meta["val"]}
        old.replace_all_uses_with(made)
        old.graph.erase_node(old)
    if node not in [old for old, _ in taken]:
        node.graph.erase_node(node)


def _called(truth: Callable[..., Any], names: tuple[str, ...], *values: Any) -> Any:
    """A truth on the values of a node's arguments, of which the last ones have names."""
    count = len(values) - len(names)
    return truth(*values[:count], **dict(zip(names, values[count:], strict=True)))
