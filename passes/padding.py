"""Which rows are real: the [B, T] mask that an attention mask was made from, found by dataflow."""

from __future__ import annotations

from torch import fx

from dyncc.analysis.attention import AttentionRegion
from dyncc.analysis.axes import Axes, Dim
from dyncc.ir import ancestors, emit, is_tensor, op_name, operands, shape, val
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
    found = [n for n in sources if len(shape(n)) == 2 and axes.places(n, axis) and not any(op_name(u) == "embedding" for u in n.users)]
    found = [n for n in found if not val(n).is_floating_point() and not _is_positions(n, regions)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(n.name for n in sources)
    hint = "pass a [batch, tokens] attention_mask"
    raise Refusal(f"the attention mask is made from {names} in a way that does not say which tokens are padding; {hint}")


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


def real_rows(before: fx.Node, source: fx.Node) -> fx.Node:
    """The input as a bool node: True where a token is real."""
    return emit(before, lambda m: m != 0, source)
