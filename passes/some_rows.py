"""Run a layer for some of its rows: everything row-wise on those alone, keys and values on all (restrict backward from its end)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from dyncc.analysis.axes import Axes
from dyncc.analysis.layers import Layer, Stack
from dyncc.ir import argument, aten, emit, is_attention, op_name, operands, refresh, same_size, shape
from dyncc.kernels.route_rows import first_rows
from dyncc.kernels.select_rows import alive_rows, rank_rows
from dyncc.passes.cut import size_node
from dyncc.restrict import Refusal, TakeRows, gather_rows, plan_backward, scatter_rows, shorten

WORK = {"linear", "addmm", "mm", "matmul"}


def select_rows_of(
    before: fx.Node, score: fx.Node, real: fx.Node | None, count: Callable[[Any], Any], level: float | None
) -> tuple[fx.Node, fx.Node | None]:
    """Sorted positions [B, K] of the rows that run, and which of those K truly do (None: all).

    Args:
        score: [B, T], higher runs; real: [B, T] bool, rows that are no padding, or None.
        count: K from T. Of a padded sequence as large a share runs as of a full one: others among the K do not count.
        level: rows run whose score lies above it, the first K of them at most; None: the K best ones.
    """
    extra = [] if real is None else [real]
    if level is not None:

        def above(score: Tensor, *real: Tensor) -> tuple[Tensor, Tensor]:
            wanted = score > level
            return first_rows(wanted & real[0] if real else wanted, count(score.shape[1]))

        index, valid = emit(before, above, score, *extra)
        return index, valid
    order = emit(before, lambda s, *real: rank_rows(s, valid=real[0] if real else None), score, *extra)
    index = emit(before, lambda order: order[:, : count(order.shape[1])].sort(dim=1).values, order)
    if real is None:
        return index, None

    def counted(order: Tensor, index: Tensor, real: Tensor) -> Tensor:
        return (real & alive_rows(order, count(real.sum(1)))).gather(1, index)

    return index, emit(before, counted, order, index, real)


def run_some_rows(
    axes: Axes, stack: Stack, layer: Layer, index: fx.Node, valid: fx.Node | None, base: fx.Node, weight: fx.Node | None = None
) -> None:
    """Edit the graph so that `layer` runs for the rows `index` [B, K], and the others are those of `base` [B, T, C].

    Args:
        valid: [B, K] which of them count; the others take the base's rows too.
        weight: [B, K] that multiplies what the layer adds to its rows.
    Raises:
        Refusal: nothing row-wise and costly can be left out, or an operand cannot follow; the graph is of no use then.
    """
    end, dim, axis = layer.end, stack.dim, axes.dims(layer.start)[stack.dim]
    graph = end.graph
    with graph.inserting_after(end):
        mark = graph.call_function(aten.alias.default, (end,))
    refresh(mark)
    users = [u for u in end.users if u is not mark]
    for user in users:
        user.replace_input_with(end, mark)
    batch = axes.dims(layer.start)[0]
    plan = plan_backward(axes, axis, mark, dim, batch)
    if not any(op_name(n) in WORK for n in plan.short):
        raise Refusal(f"the rows of layer {layer.index} cannot be run apart: nothing row-wise stands in front of its end alone")
    _write_out_causal(layer, plan.short, index)
    full, rows = size_node(index.next, layer.start, dim), size_node(index.next, index, 1)
    shorten(axes, plan, None, None, rows, size_node(index.next, layer.start, 0), TakeRows(axes, plan, index, batch), full)
    refresh(mark)
    extra = [n for n in (valid, weight) if n is not None]

    def whole(rows: Tensor, start: Tensor, base: Tensor, index: Tensor, *extra: Tensor) -> Tensor:
        stream = iter(extra)
        keep = next(stream) if valid is not None else None
        if weight is not None:
            own = gather_rows(start, index, 1, 0)
            rows = own + next(stream).to(rows.dtype).unsqueeze(-1) * (rows - own)
        if keep is not None:
            rows = torch.where(keep.unsqueeze(-1), rows, gather_rows(base, index, 1, 0))
        return scatter_rows(rows, base, index, 1)

    made = emit(mark.next, whole, mark, layer.start, base, index, *extra)
    mark.replace_all_uses_with(made, delete_user_cb=lambda user: user in users)


def _write_out_causal(layer: Layer, short: dict[fx.Node, set[int]], index: fx.Node) -> None:
    """A causal attention of some rows gets its mask written out: row i sees the keys up to its own position."""
    for node in [n for n in short if is_attention(n) and argument(n, "is_causal", False)]:
        q, k = operands(node)[:2]
        if argument(node, "window", 0) or not same_size(shape(q)[-2], shape(k)[-2]):
            raise Refusal("the causal flag of its attention counts other rows than keys")

        def seen(k: Tensor, index: Tensor) -> Tensor:
            keys = torch.arange(k.shape[-2], device=k.device)
            return keys <= index[:, None, :, None]

        mask = emit(node, seen, k, index)
        node.args = tuple(node.args[:3])
        node.kwargs = {**{x: y for x, y in node.kwargs.items() if x not in ("attn_mask", "dropout_p", "is_causal")}, "attn_mask": mask}
