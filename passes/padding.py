"""Which rows are real: the [B, T] mask that an attention mask was made from, found by dataflow."""

from __future__ import annotations

import torch
from torch import fx

from dyncc.analysis.attention import AttentionRegion
from dyncc.analysis.axes import Axes, Dim
from dyncc.analysis.axis_positions import counts_up
from dyncc.ir import ancestors, argument, emit, is_tensor, op_name, operands, same_size, shape, val
from dyncc.restrict import Refusal


def padding_input(regions: list[AttentionRegion], axes: Axes, axis: Dim, batch: Dim) -> fx.Node | None:
    """The input [B, T] that says which tokens are real, or None when no attention mask depends on an input.

    Raises:
        Refusal: the mask depends on inputs, but not on one [batch, token] input that is used as a mask only.
    """
    masks = [r.mask for r in regions if r.mask is not None]
    sources = [n for n in ancestors(masks) if n.op == "placeholder" and n.meta.get("role") == "input" and is_tensor(n)]
    sources = [n for n in sources if not _only_its_size(n, masks)]
    if not sources:
        return None
    found = [n for n in sources if len(shape(n)) == 2 and not any(op_name(u) == "embedding" for u in n.users)]
    found = [n for n in found if axes.places(n, axis) or _read_in_order(n, axes, axis)]
    found = [n for n in found if not val(n).is_floating_point() and not _is_positions(n, regions)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(n.name for n in sources)
    hint = "pass a [batch, tokens] attention_mask"
    raise Refusal(f"the attention mask is made from {names} in a way that does not say which tokens are padding; {hint}")


def _read_in_order(node: fx.Node, axes: Axes, axis: Dim) -> bool:
    """Whether its columns are read at 0, 1, ... of the axis: it may be longer, where two sizes vary and nobody says that they are equal."""
    for user in node.users:
        if op_name(user) in ("to", "ne", "alias") and _read_in_order(user, axes, axis):
            return True
        index = argument(user, "indices")[-1] if op_name(user) == "index" and operands(user)[0] is node else None
        wide = [size for size in shape(index) if size != 1] if isinstance(index, fx.Node) else []
        if len(wide) == 1 and counts_up(index, wide[0]) and axes.places(index, axis):
            return True
    return False


def _only_its_size(node: fx.Node, masks: list[fx.Node]) -> bool:
    inside = ancestors(masks)
    return all(op_name(u) == "sym_size" for u in node.users if u in inside)


def _is_positions(node: fx.Node, regions: list[AttentionRegion]) -> bool:
    """Whether the input reaches the first layer's queries other than by counting (rotary tables do): then it is no mask."""
    turned = ancestors([regions[0].q])
    return any(u in turned and op_name(u) not in ("sym_size", "to", "cumsum", "ne") and not _times_its_count(u, node) for u in node.users)


def _times_its_count(user: fx.Node, node: fx.Node) -> bool:
    """cumsum(mask) * mask: positions counted over the real tokens."""
    others = [s for s in operands(user) if s is not node]
    return op_name(user) == "mul" and all(op_name(s) == "cumsum" and operands(s)[0] is node for s in others)


def real_rows(before: fx.Node, source: fx.Node, hidden: fx.Node) -> fx.Node:
    """The input as a bool node [B, T]: True where a token of the residual stream `hidden` [B, T, C] is real."""

    def real(mask: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        count = hidden.shape[1]
        return (mask if same_size(mask.shape[1], count) else mask[:, :count]) != 0

    made: fx.Node = emit(before, real, source, hidden)
    return made
