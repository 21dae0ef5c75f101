"""Branch: run a region of the graph for some rows of the batch only. The second act of the algebra, beside restrict.

    exit[b] = region(entries)[b] if active[b] else otherwise[b]

Three realisations, equal by test: `select` computes the region for every row and selects, the masked form and reference of the others;
`cond` leaves the region out when no row is active; `compact` also gathers the active rows into the smallest of a few batch sizes that holds
them, runs the region on those alone and takes them back in order. All are static graphs: `torch.cond` by counts, gathers by index, so that
nothing is compiled anew for another batch, and ONNX has `If` and `Gather` for them. A branch mutates nothing and returns no input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx

from dyncc.ir import GETITEM, Program, emit, is_tensor, refresh, val
from dyncc.region import Region, Rows, copy_nodes
from dyncc.restrict import Refusal, where

Realise = Literal["select", "cond", "compact"]


@dataclass(frozen=True)
class Branch:
    """A region, the rows [B] (bool) that it runs for, what the others get for each exit, and how the rows are found."""

    region: Region
    active: fx.Node
    otherwise: tuple[fx.Node, ...]
    rows: Rows

    @property
    def given(self) -> tuple[fx.Node, ...]:
        """What a body reads, each node once."""
        return tuple(dict.fromkeys((self.active, *self.otherwise, *self.region.operands)))

    def exit_dim(self, node: fx.Node) -> int:
        """Where the batch stands in an exit: dimension 0 of a batch of one."""
        dim = self.rows.dim(node)
        if dim is None and self.rows.batch:
            raise Refusal(f"{where(node)} does not hold the batch, so that rows cannot be told apart")
        return dim or 0


def branch(program: Program, made: Branch, realise: Realise, buckets: Sequence[int] = ()) -> tuple[fx.Node, ...]:
    """Make a region conditional; whoever read its exits reads what is returned.

    Args:
        buckets: for `compact`, the batch sizes besides the whole batch.
    Raises:
        Refusal: the region cannot run on fewer rows; the node that stands in the way is named.
    """
    region = made.region
    before = region.nodes[-1].next
    inside = set(region.nodes)
    readers = [[u for u in e.users if u not in inside] for e in region.exits]
    if realise == "select":
        results = [emit(before, partial(chosen, dim=made.exit_dim(e)), made.active, e, o) for e, o in _pairs(made)]
    else:
        some = _compacted(made, sorted(set(buckets))) if realise == "compact" else _whole(made)
        needed = emit(before, lambda active: active.any(), made.active)
        results = _cond(before, needed, some, _nothing(made), made.given, program.module)
    for given, result, users in zip(region.exits, results, readers, strict=True):
        for user in users:
            user.replace_input_with(given, result)
    if realise != "select":
        for node in reversed(region.nodes):
            program.graph.erase_node(node)
    return tuple(results)


def chosen(active: Tensor, rows: Tensor, otherwise: Tensor, dim: int = 0) -> Tensor:
    """`rows` where active [B], `otherwise` elsewhere, in memory of its own.

    >>> chosen(torch.tensor([True, False]), torch.tensor([1, 2]), torch.tensor([3, 4])).tolist()
    [1, 4]
    """
    mask = active.view([-1 if i == dim else 1 for i in range(rows.dim())])
    if rows.dtype is torch.bool:  # ONNX Runtime has no Where of truth values
        return (mask & rows) | (~mask & otherwise)
    return torch.where(mask, rows, otherwise).clone(memory_format=torch.contiguous_format)  # strides alike in all branches


def active_rows(active: Tensor, count: int) -> Tensor:
    """[count] positions of the active rows in order; behind them any rows. `count` is at least the number of active rows.

    >>> active_rows(torch.tensor([False, True, False, True]), 2).tolist()
    [1, 3]
    """
    places = torch.arange(count, device=active.device)
    before = active.to(torch.int64).cumsum(0)[None, :] <= places[:, None]
    return before.to(torch.int64).sum(1).clamp(max=active.shape[0] - 1)


def taken_back(active: Tensor, rows: Tensor, otherwise: Tensor, dim: int = 0) -> Tensor:
    """The rows that `active_rows` gathered at their places in the batch, `otherwise` elsewhere.

    >>> taken_back(torch.tensor([False, True, False, True]), torch.tensor([7, 8]), torch.zeros(4, dtype=torch.int64)).tolist()
    [0, 7, 0, 8]
    """
    rank = (active.to(torch.int64).cumsum(0) - 1).clamp(min=0, max=rows.shape[dim] - 1)
    return chosen(active, rows.index_select(dim, rank), otherwise, dim)


def _pairs(made: Branch) -> list[tuple[fx.Node, fx.Node]]:
    return list(zip(made.region.exits, made.otherwise, strict=True))


class _Body:
    """A graph of its own over what a branch reads."""

    def __init__(self, made: Branch):
        self.graph = fx.Graph()
        self.of: dict[fx.Node, Any] = {}
        for node in made.given:
            self.of[node] = self.graph.placeholder(node.name)
            self.of[node].meta = {"val": val(node)}
        self.end = self.graph.output(())
        self.root = torch.nn.Module()

    def emit(self, function: Callable[..., Any], *args: Any) -> Any:
        return emit(self.end, function, *args)

    def returning(self, results: Sequence[fx.Node]) -> fx.GraphModule:
        self.end.args = (tuple(results),)
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph)


def _nothing(made: Branch) -> fx.GraphModule:
    """No row is active."""
    body = _Body(made)
    copied = [body.emit(lambda x: x.clone(memory_format=torch.contiguous_format), body.of[o]) for o in made.otherwise]
    return body.returning(copied)


def _whole(made: Branch) -> fx.GraphModule:
    """The region for every row."""
    body = _Body(made)
    known = copy_nodes(made.region.nodes, body.graph, body.of, body.end)
    pairs = _pairs(made)
    return body.returning([body.emit(partial(chosen, dim=made.exit_dim(e)), body.of[made.active], known[e], body.of[o]) for e, o in pairs])


def _bucket(made: Branch, count: int) -> fx.GraphModule:
    """The region for the active rows, of which there are at most `count`."""
    body = _Body(made)
    index = body.emit(partial(active_rows, count=count), body.of[made.active])
    known: dict[fx.Node, Any] = {}
    for operand in made.region.operands:
        if made.rows.is_size(operand):
            known[operand] = count
            continue
        dim = made.rows.dim(operand) if is_tensor(operand) else None
        given = body.of[operand]
        known[operand] = given if dim is None else body.emit(lambda x, i, dim=dim: x.index_select(dim, i), given, index)
    known = copy_nodes(made.region.nodes, body.graph, known, body.end, made.rows, count)
    back = [(partial(taken_back, dim=made.exit_dim(e)), known[e], body.of[o]) for e, o in _pairs(made)]
    return body.returning([body.emit(function, body.of[made.active], rows, rest) for function, rows, rest in back])


def _compacted(made: Branch, buckets: Sequence[int]) -> fx.GraphModule:
    """The region in the smallest bucket that holds the active rows."""
    if not buckets:
        return _whole(made)
    body = _Body(made)
    few = body.emit(lambda active: active.to(torch.int64).sum() <= buckets[0], body.of[made.active])
    bodies = _bucket(made, buckets[0]), _compacted(made, buckets[1:])
    return body.returning(_cond(body.end, few, *bodies, [body.of[n] for n in made.given], body.root))


def _cond(
    before: fx.Node, predicate: fx.Node, yes: fx.GraphModule, no: fx.GraphModule, given: Sequence[fx.Node], root: torch.nn.Module
) -> list[fx.Node]:
    """A call of torch.cond in front of a node; its results."""
    graph = before.graph
    number = sum(name.startswith("branch_") for name, _ in root.named_children()) // 2
    names = f"branch_{number}_yes", f"branch_{number}_no"
    for name, body in zip(names, (yes, no), strict=True):
        root.add_module(name, body)
    with graph.inserting_before(before):
        bodies = [graph.create_node("get_attr", name) for name in names]
        call = graph.call_function(torch.ops.higher_order.cond, (predicate, *bodies, tuple(given)))
        call.meta["val"] = tuple(val(n) for n in yes.graph.output_node().args[0])
        results = [graph.call_function(GETITEM, (call, i)) for i in range(len(call.meta["val"]))]
    for result in results:
        refresh(result)
    return results
