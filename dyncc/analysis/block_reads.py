"""Loops in which a block of tokens reads one state by one product, the state in front of what is written next: o = q S for all its rows."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import fx

from dyncc.analysis.running_sums import pieces_of
from dyncc.analysis.series import NotUnrolled
from dyncc.analysis.unrolled import Step, Unrolled, check_alone, outer, read_update
from dyncc.ir import descendants, op_name, operands, same_sizes, shape

PRODUCTS = {"matmul", "bmm"}


def block_joins(graph: fx.Graph) -> list[fx.Node]:
    """Cats of products with states, the first of which is not computed as those behind it: candidates."""
    return [n for n in graph.nodes if op_name(n) == "cat" and _reads_states(pieces_of(n))]


def _reads_states(pieces: list[fx.Node]) -> bool:
    if len(pieces) < 2 or not all(op_name(p) in PRODUCTS and len(operands(p)) == 2 for p in pieces):
        return False
    one, two = (operands(p)[1] for p in pieces[:2])
    return one is not two and op_name(two) == "add" and _place(one) is None and two in descendants(one)


def read_blocks(joined: fx.Node, longest: int) -> Unrolled:
    """The recurrence behind a candidate, of `longest` tokens at most.

    Raises:
        NotUnrolled: with the first thing that differs from block to block, or is not understood.
    """
    pieces = pieces_of(joined)
    queries, states = zip(*(operands(p) for p in pieces), strict=True)
    if not all(same_sizes(shape(q), shape(queries[0])) for q in queries):
        raise NotUnrolled("blocks of different lengths read its states")
    steps: list[Step] = []
    gaps: dict[int, None] = {}
    for before, state in pairwise(states):
        written = _between(before, state, longest)
        steps += written
        gaps[len(written)] = None
    if len(gaps) > 1:
        raise NotUnrolled(f"its states are read after {', '.join(map(str, gaps))} tokens, and not always after equally many")
    check_alone(joined, steps, frozenset(pieces))
    return Unrolled(joined, tuple(steps), tuple(queries), next(iter(gaps)))


def _between(before: fx.Node, state: fx.Node, longest: int) -> list[Step]:
    """The updates that lead from one state to another."""
    steps: list[Step] = []
    while state is not before:
        if len(steps) > longest:
            raise NotUnrolled("one of its states does not follow from the one that was read before")
        steps.append(read_update(state, _place(state)))
        state = steps[-1].before
    return steps[::-1]


def _place(state: Any) -> tuple[int, int] | None:
    """Where the state before stands in an update: beside the product of a key and a value, and there beside a decay that is smaller."""
    if op_name(state) != "add" or len(operands(state)) != 2:
        return None
    for i in (0, 1):
        kept = state.args[i]
        try:
            outer(state.args[1 - i])
        except NotUnrolled:
            continue
        if op_name(kept) != "mul":
            return i, -1
        whole = [j for j, n in enumerate(kept.args) if isinstance(n, fx.Node) and same_sizes(shape(n), shape(state))]
        return (i, whole[0]) if len(whole) == 1 else None
    return None
