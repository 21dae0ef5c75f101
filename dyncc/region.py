"""Regions: a part of the graph that starts from some nodes and ends at others, and copies of it that run on fewer rows of the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dyncc.analysis.axes import Axes, Dim, Read
from dyncc.ir import (
    ancestors,
    descendants,
    emit,
    is_effect,
    is_tensor,
    operands,
    output_node,
    refresh,
    replace_operands,
    shape,
    size_expr,
    val,
)
from dyncc.restrict import IT, Refusal, resize, where


@dataclass(frozen=True)
class Region:
    """`nodes` lead, in order, from `entries` to `exits`, the last ones among them; `operands` are what they read from outside."""

    entries: tuple[fx.Node, ...]
    exits: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    operands: tuple[fx.Node, ...]


def find_region(entries: Sequence[fx.Node], exits: Sequence[fx.Node]) -> Region:
    """Everything that depends on `entries` and that `exits` depend on, other than through an entry.

    Raises:
        Refusal: it writes in place or draws random numbers, or something outside reads what is inside; the node is named.
    """
    graph = entries[0].graph
    inside = set().union(*(descendants(n) for n in entries)) & ancestors(exits, set(entries))
    nodes = tuple(n for n in graph.nodes if n in inside)
    for node in nodes:
        if is_effect(node):
            raise Refusal(f"{where(node)} writes in place or draws random numbers, which a branch must not do")
        stranger = next((u for u in node.users if u not in inside), None) if node not in exits else None
        if stranger is not None:
            raise Refusal(_read_outside(node, stranger))
    read = {n for node in nodes for n in node.all_input_nodes if n not in inside}
    return Region(tuple(entries), tuple(exits), nodes, tuple(n for n in graph.nodes if n in read))


def _read_outside(node: fx.Node, stranger: fx.Node) -> str:
    if stranger is not output_node(node.graph):
        return f"{where(stranger)} reads {node.name} from inside the part that would be left out"
    position = next(i for i, n in enumerate(stranger.args[0]) if n is node)  # type: ignore[arg-type, union-attr]
    return f"output {position} is made inside the part that would be left out ({where(node)}); ask the model not to return it"


class Rows:
    """Which dimension of a node is the batch, and how a copy of a region gets another number of rows."""

    def __init__(self, axes: Axes, batch: Dim):
        self.axes, self.batch = axes, batch

    def dim(self, node: fx.Node) -> int | None:
        """Where the batch stands; None where the node does not have one.

        Raises:
            Refusal: it stands at two places, or is merged with another axis.
        """
        places = self.axes.places(node, self.batch) if self.batch else []
        if len(places) > 1 or any(self.axes.dims(node)[i] != self.batch for i in places):
            raise Refusal(f"{where(node)} holds the batch merged with another axis, or twice")
        return places[0] if places else None

    def is_size(self, node: fx.Node) -> bool:
        """Whether a size node is the number of rows itself."""
        return not is_tensor(node) and len(self.batch) == 1 and size_expr(val(node)) == self.batch[0].size

    def fit(self, copy: fx.Node, original: fx.Node, rows: int) -> None:
        """Make the copy of a node run on so many rows; its operands already do.

        Raises:
            Refusal: it has sizes that do not follow.
        """
        self._check_apart(original)
        self._count_anew(copy, original, rows)
        dims = self.axes.dims(original)
        short = [i for i, d in enumerate(dims) if _holds(d, self.batch)]
        resize(copy, dims, short, self.batch, rows, None)
        try:
            refresh(copy)
        except Exception as problem:
            raise Refusal(f"{where(original)} does not run on {rows} rows of the batch: {str(problem).splitlines()[0]}") from problem
        expected = [s for i, s in enumerate(shape(original)) if i not in short]
        found = [s for i, s in enumerate(shape(copy)) if i not in short]
        if is_tensor(original) and [size_expr(s) for s in expected] != [size_expr(s) for s in found]:
            raise Refusal(f"{where(original)} does not run on {rows} rows of the batch alone")

    def _is_counted(self, node: fx.Node, read: Read) -> bool:
        """Whether row b of a result reads row b of the batch, as x[arange(B), last] does."""
        return read.counted is not None and bool(self.batch) and self.axes.dims(operands(node)[read.slot])[read.dim] == self.batch

    def _count_anew(self, copy: fx.Node, original: fx.Node, rows: int) -> None:
        """Rows that were gathered are read from 0 on, wherever they stood in the batch."""
        op = self.axes.ops.get(original)
        for read in op.reads if op is not None else ():
            if self._is_counted(original, read) and read.counted is not None:
                slots = operands(copy)
                rank, at = len(shape(slots[read.counted])), self.axes.places(operands(original)[read.counted], self.batch)[0]
                sizes = [rows if i == at else 1 for i in range(rank)]
                index = emit(copy, lambda x, sizes=sizes: torch.arange(rows, device=x.device).view(sizes), slots[read.slot])
                replace_operands(copy, {read.counted: index})

    def _check_apart(self, node: fx.Node) -> None:
        """Whether every row of a node's result follows from that row of its operands."""
        slots, op = operands(node), self.axes.ops.get(node)
        if not self.batch or op is None or not any(_holds(d, self.batch) for s in slots for d in self.axes.dims(s)):
            return
        if not op.known:
            raise Refusal(f"{where(node)} has no axis rule, so the batch cannot be followed through it")
        read = [(slots[r.slot], r.dim, r.why) for r in op.reads if not self._is_counted(node, r)]
        read += [(slots[s], d, "sums over it") for c in op.contracts for s, d in ((c.slot, c.dim), (c.other, c.other_dim))]
        for source, dim, why in read:
            dims = self.axes.dims(source)
            if dim < len(dims) and _holds(dims[dim], self.batch):
                told = IT.sub("the batch", why.replace("the token axis", "the batch"))
                raise Refusal(f"{where(node)} mixes the rows of the batch ({told})")


def _holds(dim: Dim, axis: Dim) -> bool:
    return bool(axis) and any(dim[i : i + len(axis)] == axis for i in range(len(dim) - len(axis) + 1))


def copy_nodes(
    nodes: Sequence[fx.Node], graph: fx.Graph, known: Mapping[fx.Node, Any], before: fx.Node, rows: Rows | None = None, count: int = 0
) -> dict[fx.Node, Any]:
    """Copy nodes into a graph in front of `before`; `known` says what stands for what they read. With `rows` they run on `count` rows."""
    made = dict(known)
    with graph.inserting_before(before):
        for node in nodes:
            made[node] = graph.node_copy(node, lambda n: made.get(n, n))
            if rows is not None:
                rows.fit(made[node], node, count)
    return made
