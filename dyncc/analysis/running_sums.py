"""Loops whose results are their states, s_t = d_t s_{t-1} + x_t, such as averages that move: read back into one decayed sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from dyncc.analysis.series import NotUnrolled
from dyncc.analysis.unrolled import LAID_OUT, place_of
from dyncc.ir import argument, op_name, operands, same_sizes, shape

AT_MOST_1 = {"exp", "sigmoid", "tanh"}


@dataclass(frozen=True)
class RunningSum:
    """All tokens of one loop: `joined` is the stack or cat of its states; `before` the state in front of them, or None for none; `added`
    what each adds, times `share` where that is not None; `decays` are numbers, nodes, or None where states are not multiplied."""

    joined: fx.Node
    before: fx.Node | None
    added: tuple[fx.Node, ...]
    share: fx.Node | float | None
    decays: tuple[Any, ...]
    inside: frozenset[fx.Node]


def sums(graph: fx.Graph) -> list[fx.Node]:
    """Stacks and cats of states that follow from each other: candidates."""
    found = []
    for node in graph.nodes:
        pieces = pieces_of(node)
        if len(pieces) > 2 and all(op_name(p) == "add" for p in pieces[1:3]) and all(_follows(pieces, t) for t in (1, 2)):
            found.append(node)
    return found


def pieces_of(node: fx.Node) -> list[fx.Node]:
    """What a stack or cat joins."""
    found = node.args[0] if node.op == "call_function" and op_name(node) in ("stack", "cat") and node.args else ()
    return [p for p in found if isinstance(p, fx.Node)] if isinstance(found, (list, tuple)) else []


def _follows(pieces: Sequence[fx.Node], t: int) -> bool:
    return place_of(pieces[t], pieces[t - 1]) is not None


def read_sums(joined: fx.Node) -> RunningSum:
    """The decayed sum behind a candidate.

    Raises:
        NotUnrolled: with the first thing that differs from step to step, or is not understood.
    """
    pieces = pieces_of(joined)
    place = place_of(pieces[1], pieces[0])
    assert place is not None
    before, first, nodes = _first(pieces[0], place)
    added, decays, inside = [first[0]], [first[1]], set(nodes)
    for t in range(1, len(pieces)):
        if place_of(pieces[t], pieces[t - 1]) != place or op_name(pieces[t]) != "add" or argument(pieces[t], "alpha", 1) != 1:
            raise NotUnrolled(f"the state of token {t} is not computed as that of token 1")
        (new, decay), nodes = _taken(pieces[t], place)
        added.append(new)
        decays.append(decay)
        inside |= nodes
    if before is None:
        decays[0] = decays[1]
    if not all(isinstance(n, fx.Node) and same_sizes(shape(n), shape(pieces[0])) for n in added):
        raise NotUnrolled("what its states add is smaller than they are")
    _check_alone(joined, pieces, inside)
    _check_size(decays)
    factor, plain = _share(added)
    return RunningSum(joined, before, tuple(plain), factor, tuple(decays), frozenset(inside))


def _first(state: fx.Node, place: tuple[int, int]) -> tuple[fx.Node | None, tuple[Any, Any], set[fx.Node]]:
    """(state before, (what the first state adds, its decay), nodes): the first state may be what a first token adds."""
    i, j = place
    kept = state.args[i] if op_name(state) == "add" and len(state.args) > i else None
    if not isinstance(kept, fx.Node) or argument(state, "alpha", 1) != 1 or (j >= 0 and op_name(kept) != "mul"):
        return None, (state, None), set()
    before = kept if j < 0 else kept.args[j]
    if not isinstance(before, fx.Node) or not same_sizes(shape(before), shape(state)):
        return None, (state, None), set()
    taken, nodes = _taken(state, place)
    return before, taken, nodes


def _taken(state: fx.Node, place: tuple[int, int]) -> tuple[tuple[Any, Any], set[fx.Node]]:
    """((what a state adds, its decay), the nodes that do nothing else)."""
    i, j = place
    kept = state.args[i]
    if j < 0 or not isinstance(kept, fx.Node):
        return (state.args[1 - i], None), {state}
    return (state.args[1 - i], kept.args[1 - j]), {state, kept}


def _check_alone(joined: fx.Node, pieces: Sequence[fx.Node], inside: set[fx.Node]) -> None:
    """States may be read by the next one and the join alone; the last may be read by all."""
    for node in inside - {pieces[-1]}:
        if not all(u in inside or u is joined for u in node.users):
            raise NotUnrolled("a state in the middle is read elsewhere")
    if len(set(pieces)) < len(pieces):
        raise NotUnrolled("a state is joined twice")


def _check_size(decays: Sequence[Any]) -> None:
    for decay in dict.fromkeys(decays):
        if isinstance(decay, (int, float)) and not abs(decay) <= 1:
            raise NotUnrolled(f"a state is multiplied by {decay}, and grows")
        if isinstance(decay, fx.Node) and not _at_most_1(decay):
            raise NotUnrolled("its decays are no exp, sigmoid or tanh of anything: whether they are at most 1 is not known")


def _at_most_1(node: fx.Node) -> bool:
    """Whether a node is exp, sigmoid or tanh of something, or 1 less a sigmoid, laid out or not."""
    while node.op == "call_function" and op_name(node) in LAID_OUT | {"repeat_interleave", "repeat"} and operands(node):
        node = operands(node)[0]
    if op_name(node) in ("rsub", "sub") and len(operands(node)) == 1:
        one = node.args[1] if op_name(node) == "rsub" else node.args[0]
        inner = operands(node)[0]
        return one == 1 and op_name(inner) == "sigmoid"
    return node.op == "call_function" and op_name(node) in AT_MOST_1


def _share(added: Sequence[fx.Node]) -> tuple[fx.Node | float | None, Sequence[fx.Node]]:
    """(c, x) where all tokens add c x with one c."""
    if not all(op_name(n) == "mul" and len(n.args) == 2 for n in added):
        return None, added
    for i in (0, 1):
        factors = {n.args[i] for n in added}
        others = [n.args[1 - i] for n in added]
        if len(factors) == 1 and all(isinstance(o, fx.Node) and same_sizes(shape(o), shape(n)) for o, n in zip(others, added, strict=True)):
            return factors.pop(), others  # type: ignore[return-value]
    return None, added
