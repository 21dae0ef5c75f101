"""Which rows run an iteration, and the graph in which they alone do: restrict forward from its first state to its last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dyncc.analysis.attention import AttentionRegion
from dyncc.analysis.axes import Axes
from dyncc.analysis.layers import Stack
from dyncc.ir import Program, ancestors, argument, aten, emit, op_name, output_node, refresh
from dyncc.kernels.route_rows import first_rows
from dyncc.kernels.select_rows import alive_rows, rank_rows
from dyncc.passes.cut import hide_keys, size_node
from dyncc.passes.iterations import Iteration
from dyncc.passes.kept_rows import row_count
from dyncc.restrict import Plan, Refusal, TakeRows, gather_rows, plan_forward, scatter_rows, shorten, where


@dataclass(frozen=True)
class Chosen:
    """The rows of one iteration: sorted positions `index` [B, K]; which of those truly run, `valid` [B, K] (None: all); the same as a mask
    `alive` [B, T]; and what a row's result is multiplied by before it is added, `weight` [B, K] (None: it takes the row's place)."""

    index: fx.Node
    valid: fx.Node | None
    alive: fx.Node
    weight: fx.Node | None = None


def best_rows(before: fx.Node, score: fx.Node, real: fx.Node | None, alive: fx.Node | None, keep: int | float) -> Chosen:
    """The `keep` best of a sequence's rows, of those `alive` [B, T] (None: all); a ratio is one of its `real` [B, T] rows (None: all)."""
    given = [n for n in (real, alive) if n is not None]

    def best(score: Tensor, *given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        order = rank_rows(score, valid=given[-1] if given else None)
        most = row_count(keep, score.shape[1])
        index = order[:, :most].sort(dim=1).values
        kept = torch.zeros_like(order, dtype=torch.bool).scatter(1, index, True)
        if real is not None and isinstance(keep, float):
            kept = alive_rows(order, row_count(keep, given[0].sum(1)))
        kept = kept & given[-1] if given else kept
        return index, kept.gather(1, index), kept

    index, valid, kept = emit(before, best, score, *given)
    return Chosen(index, None if real is None else valid, kept)


def wanted_rows(before: fx.Node, wanted: fx.Node, alive: fx.Node | None, keep: int | float) -> Chosen:
    """The first `keep` rows of a sequence that are wanted [B, T] and alive."""
    extra = [] if alive is None else [alive]

    def first(wanted: Tensor, *alive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = wanted & alive[0] if alive else wanted
        index, valid = first_rows(own, row_count(keep, own.shape[1]))
        return index, valid, torch.zeros_like(own).scatter(1, index, valid)

    index, valid, kept = emit(before, first, wanted, *extra)
    return Chosen(index, valid, kept)


def run_iteration(
    program: Program, stack: Stack, iteration: Iteration, chosen: Chosen, behind: tuple[fx.Node, fx.Node] | None = None
) -> None:
    """Edit the graph so that an iteration runs for its chosen rows; the others keep what the one before it gave.

    Args:
        behind: a state x [B, T, C] and weights w [B, T]: readers get x + w times the result.
    Raises:
        Refusal: an operation cannot follow, or something outside reads rows that may not have run; the graph is of no use then.
    """
    start, stop = _marked(iteration), iteration.stop
    axes = Axes(program.graph)
    regions = tuple(x.attention for x in iteration.layers)
    plan = plan_forward(axes, axes.dims(start)[stack.dim], start, stack.dim, stop, regions, lambda node, read: False)
    _check_apart(plan, stop)
    short = emit(start.next, lambda x, i: gather_rows(x, i, 1, 0), start, chosen.index)
    take = TakeRows(axes, plan, chosen.index, axes.dims(start)[0])
    before = short.next
    sizes = size_node(before, short, 1), size_node(before, start, 0), size_node(before, start, 1)
    shorten(axes, plan, start, short, sizes[0], sizes[1], take, sizes[2], stop)
    for region in regions if chosen.valid is not None else ():
        if region.v in plan.short:
            _hide(region, chosen.valid)
    _put_back(plan, iteration, chosen, behind)


def _marked(iteration: Iteration) -> fx.Node:
    """A node of its own for the state as the iteration reads it: whoever else reads the state gets all rows."""
    start, inside = iteration.start, ancestors([iteration.stop])
    own = [u for u in start.users if u in inside]
    first = next(n for n in start.graph.nodes if n in own)
    with start.graph.inserting_before(first):
        mark = start.graph.call_function(aten.alias.default, (start,))
    refresh(mark)
    for user in own:
        user.replace_input_with(start, mark)
    return mark


def _check_apart(plan: Plan, stop: fx.Node) -> None:
    if stop not in plan.short:
        raise Refusal("the rows of an iteration do not come out where the next one starts")
    for node in plan.short:
        reader = next((u for u in node.users if u not in plan.short and op_name(u) != "sym_size"), None) if node is not stop else None
        if reader is output_node(node.graph):
            told = "what the model returns of an iteration, such as its keys, would hold the chosen tokens alone; ask it not to return that"
            raise Refusal(f"{told} (use_cache=False)")
        if reader is not None:
            raise Refusal(f"{where(reader)} reads rows of an iteration from outside, and some of them do not run")


def _hide(region: AttentionRegion, valid: fx.Node) -> None:
    """Keys of rows that do not run are not seen."""
    if not region.fused or argument(region.out, "attn_mask") is not None:
        return hide_keys(region, valid)
    if region.extras:
        raise Refusal(f"attention {region.index}: {region.extras}")
    causal = bool(argument(region.out, "is_causal", False))

    def seen(k: Tensor, valid: Tensor) -> Tensor:
        keys = torch.arange(k.shape[-2], device=k.device)
        own = keys[:, None] == keys  # so that no row sees nothing
        shown = valid[:, None, None, :] | own
        return shown & (keys <= keys[:, None]) if causal else shown

    out = region.out
    mask = emit(out, seen, out.args[1], valid)
    out.args = tuple(out.args[:3])
    out.kwargs = {**{x: y for x, y in out.kwargs.items() if x not in ("attn_mask", "dropout_p", "is_causal")}, "attn_mask": mask}
    return None


def _put_back(plan: Plan, iteration: Iteration, chosen: Chosen, behind: tuple[fx.Node, fx.Node] | None) -> None:
    """The rows that ran, at their places among those that did not."""
    stop = iteration.stop
    readers = [u for u in stop.users if u not in plan.short and op_name(u) != "sym_size"]
    extra = [n for n in (chosen.valid, chosen.weight, *(behind or ())) if n is not None]

    def back(rows: Tensor, base: Tensor, index: Tensor, *extra: Any) -> Tensor:
        stream = iter(extra)
        own = gather_rows(base, index, 1, 0)
        keep = next(stream) if chosen.valid is not None else None
        if chosen.weight is not None:
            rows = own + next(stream).to(rows.dtype).unsqueeze(-1) * rows
        if keep is not None:
            rows = torch.where(keep.unsqueeze(-1), rows, own)
        whole = scatter_rows(rows, base, index, 1)
        if behind is None:
            return whole
        x, weight = next(stream), next(stream)
        return x + weight.to(whole.dtype).unsqueeze(-1) * whole

    whole = emit(stop.next, back, stop, iteration.before, chosen.index, *extra)
    for user in readers:
        user.replace_input_with(stop, whole)
