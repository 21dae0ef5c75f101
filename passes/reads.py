"""Which rows of the token axis the outputs read behind the last layer: the first, the last, or computed positions (end of text)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from dyncc.analysis.facts import Facts
from dyncc.analysis.layers import Stack
from dyncc.ir import Program, ancestors, argument, descendants, op_name, operands, shape, val


@dataclass(frozen=True)
class Reads:
    """`first`/`last`: how many rows at either end are read; `nodes`: the selects and slices that read them; `computed`: [B] positions."""

    first: int
    last: int
    nodes: frozenset[fx.Node]
    computed: tuple[fx.Node, ...]


def output_reads(program: Program, facts: Facts, stack: Stack) -> Reads:
    """Collect the position reads downstream of the last attention."""
    first = last = 0
    nodes: set[fx.Node] = set()
    computed: list[fx.Node] = []
    behind = descendants(stack.layers[0].attention.out)
    for node in program.graph.nodes:
        if node not in behind or op_name(node) not in ("select", "slice", "index"):
            continue
        source = operands(node)[0]
        if facts.axes.places(source, stack.axis) == []:
            continue
        if op_name(node) == "index":
            computed += _computed(node, stack, facts, behind)
            continue
        dim = argument(node, "dim", 0) % len(shape(source))
        if dim not in facts.axes.places(source, stack.axis):
            continue
        start, stop = _interval(node, dim)
        if start is not None and start >= 0 and stop > start:
            first, fits = max(first, stop), True
        elif start is not None and start < 0 and stop == 0:
            last, fits = max(last, -start), True
        else:
            fits = False
        if fits:
            nodes.add(node)
    return Reads(first, last, frozenset(nodes), tuple(computed))


def _interval(node: fx.Node, dim: int) -> tuple[int | None, int]:
    """(start, stop) of the rows read; from the end with a negative start and stop 0; (None, 0) when it is not fixed."""
    if op_name(node) == "select":
        index = argument(node, "index")
        if not isinstance(index, int):
            return None, 0
        return (index, index + 1) if index >= 0 or index == -1 else (None, 0)
    start, end = argument(node, "start", 0) or 0, argument(node, "end")
    if not isinstance(start, int) or argument(node, "step", 1) != 1:
        return None, 0
    if start < 0 and (end is None or (isinstance(end, int) and end >= 1 << 62)):
        return start, 0
    size = shape(node)[dim]
    return (start, start + size) if start >= 0 and isinstance(size, int) and isinstance(end, int) and end < 1 << 62 else (None, 0)


def _computed(node: fx.Node, stack: Stack, facts: Facts, behind: set[fx.Node]) -> list[fx.Node]:
    """The position tensor [B] of x[arange(B), positions], when it does not depend on the layers themselves."""
    indices = argument(node, "indices")
    place = facts.axes.places(operands(node)[0], stack.axis)[0]
    index = indices[place] if place < len(indices) else None
    if not isinstance(index, fx.Node) or len(shape(index)) != 1 or val(index).is_floating_point():
        return []
    return [] if ancestors([index]) & behind else [index]
