"""Recurrences that a Python loop over tokens wrote out, read back into one: S_t = d_t S_{t-1} + k_t' v_t, o_t = q_t S_t, for t = 0 .. T-1.

The outputs meet in a stack or cat. Each is a read of a state, each state an update of the one before, and all steps are alike: what they
take is either the same for all steps, or token t of one tensor, or a node of its own that is stacked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from dyncc.analysis.series import NotUnrolled, alike
from dyncc.ir import argument, op_name, operands, same_size, same_sizes, shape

LAID_OUT = {"unsqueeze", "to", "_to_copy", "alias", "view", "reshape", "expand", "select", "slice", "transpose", "contiguous", "clone"}


@dataclass(frozen=True)
class Step:
    """One token: the state [..., Dk, Dv] behind it and before it, the operands of its update and of its read, if it has one, which are as
    wide as the state and 1 where they are broadcast, and the nodes that do nothing else. In a delta rule `beta` and `v` are [..., 1] and
    [..., Dv]."""

    state: fx.Node
    before: fx.Node
    k: fx.Node
    v: fx.Node
    decay: Any
    inside: frozenset[fx.Node]
    beta: fx.Node | None = None
    q: fx.Node | None = None


@dataclass(frozen=True)
class Unrolled:
    """All tokens of one recurrence; `joined` is the stack or cat of its outputs. Where blocks of tokens read one state, `queries` are those
    of each block [..., rows, Dk]; the first reads the state before all tokens, and each other one the state `gap` tokens further on."""

    joined: fx.Node
    steps: tuple[Step, ...]
    queries: tuple[fx.Node, ...] = ()
    gap: int = 0

    @property
    def last(self) -> fx.Node:
        return self.steps[-1].state


def joins(graph: fx.Graph) -> list[fx.Node]:
    """Stacks and cats whose pieces all come from reads of states: candidates."""
    return [n for n in graph.nodes if n.op == "call_function" and op_name(n) in ("stack", "cat") and _all_read(n)]


def _all_read(node: fx.Node) -> bool:
    pieces = node.args[0]
    if not isinstance(pieces, (list, tuple)) or len(pieces) < 2 or len(set(pieces)) < len(pieces):
        return False
    states = [_read(p) for p in pieces if isinstance(p, fx.Node)]
    return len(states) == len(pieces) and None not in states and _follows(states[1][0], states[0][0])  # type: ignore[index]


def read_steps(joined: fx.Node) -> Unrolled:
    """The recurrence behind a candidate.

    Raises:
        NotUnrolled: with the first thing that differs from step to step, or is not understood.
    """
    reads = [_read(piece) for piece in joined.args[0]]  # type: ignore[union-attr]
    place = place_of(reads[1][0], reads[0][0])  # type: ignore[index]
    steps: list[Step] = []
    for t, read in enumerate(reads):
        state, q, nodes = read  # type: ignore[misc]
        if t and not _follows(state, steps[-1].state):
            raise NotUnrolled(f"the state of token {t} does not follow from the one before")
        step = read_update(state, place)
        steps.append(replace(step, q=q, inside=step.inside | nodes))
        if t and steps[-1].before is not steps[-2].state:
            raise NotUnrolled(f"token {t} is not computed as token {t - 1}")
    check_alone(joined, steps)
    return Unrolled(joined, tuple(steps))


def _read(piece: fx.Node) -> tuple[fx.Node, fx.Node, frozenset[fx.Node]] | None:
    """(state, query as wide as a state, nodes) of (q S).sum(-2), or of q @ S."""
    name, rank = op_name(piece), len(shape(piece))
    if name == "sum" and not argument(piece, "keepdim"):
        product, dims = operands(piece)[0], argument(piece, "dim")
        if op_name(product) != "mul" or len(operands(product)) != 2 or [d % (rank + 1) for d in dims or []] != [rank - 1]:
            return None
        for state, q in (operands(product), operands(product)[::-1]):
            if op_name(state) == "add" and same_sizes(shape(state), shape(product)) and shape(q) and same_size(shape(q)[-1], 1):
                return state, q, frozenset({piece, product})
        return None
    if name in ("matmul", "bmm") and op_name(operands(piece)[1]) == "add" and same_size(shape(piece)[-2], 1):
        q, state = operands(piece)
        return state, q, frozenset({piece})
    return None


def _follows(state: fx.Node, before: fx.Node) -> bool:
    return place_of(state, before) is not None


def place_of(state: fx.Node, before: fx.Node) -> tuple[int, int] | None:
    """Where `before` stands in an update: which operand of the sum, and which of that one's product (-1: it is not multiplied)."""
    for i, part in enumerate(state.args[:2]):
        if part is before:
            return i, -1
        if isinstance(part, fx.Node) and op_name(part) == "mul" and before in part.args:
            return i, part.args.index(before)
    return None


def read_update(state: fx.Node, place: tuple[int, int] | None) -> Step:
    """How a state comes from the one before, which stands at `place`.

    Raises:
        NotUnrolled: it is no sum of the one before, maybe decayed, and the product of a key and a value.
    """
    if place is None or op_name(state) != "add" or argument(state, "alpha", 1) != 1:
        raise NotUnrolled("its states are no sums of the one before and something new")
    i, j = place
    kept, added = state.args[i], state.args[1 - i]
    if j >= 0 and (not isinstance(kept, fx.Node) or op_name(kept) != "mul"):
        raise NotUnrolled("the first state is computed in another way than those behind it")
    before, decay = (kept, None) if j < 0 else (kept.args[j], kept.args[1 - j])  # type: ignore[union-attr]
    inside = {state, added} | ({kept} if j >= 0 else set())
    if not isinstance(before, fx.Node) or not isinstance(added, fx.Node) or not same_sizes(shape(before), shape(state)):
        raise NotUnrolled("its first state is no tensor as large as the others")
    k, v = outer(added)
    return _delta(Step(state, before, k, v, decay, frozenset(inside)), kept)  # type: ignore[arg-type]


def outer(added: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(k, v) of k' v, as a product of [..., Dk, 1] and [..., 1, Dv].

    Raises:
        NotUnrolled: it is no such product.
    """
    if op_name(added) not in ("mul", "matmul", "bmm") or len(operands(added)) != 2:
        raise NotUnrolled(f"what its states add is {op_name(added)}, no product of a key and a value")
    for k, v in (operands(added), operands(added)[::-1] if op_name(added) == "mul" else operands(added)):
        if len(shape(k)) == len(shape(v)) == len(shape(added)) and same_size(shape(k)[-1], 1) and same_size(shape(v)[-2], 1):
            return k, v
    raise NotUnrolled("what its states add is no product of a key and a value")


def _delta(step: Step, kept: fx.Node) -> Step:
    """The same step, or that of a delta rule: what is added is beta (v - k S), where S is what was kept."""
    row = operands(step.v)[0] if op_name(step.v) == "unsqueeze" else None
    if row is None or op_name(row) != "mul" or len(operands(row)) != 2:
        return step
    for wrong, beta in (operands(row), operands(row)[::-1]):
        parts = operands(wrong) if op_name(wrong) == "sub" else []
        if len(parts) != 2 or op_name(parts[1]) != "sum" or argument(wrong, "alpha", 1) != 1:
            continue
        product, dims = operands(parts[1])[0], argument(parts[1], "dim")
        others = [n for n in operands(product) if n is not kept]
        if len(others) == 1 and _equal(others[0], step.k) and [d % len(shape(product)) for d in dims or []] == [len(shape(product)) - 2]:
            nodes = step.inside | {step.v, row, wrong, parts[1], product}
            return Step(step.state, step.before, step.k, parts[0], step.decay, nodes, beta)
    return step


def _equal(a: Any, b: Any, depth: int = 6) -> bool:
    """Whether two nodes compute the same: the same operation of the same operands, as code that is written twice gives."""
    if a is b or not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return a is b
    pure = a.op == b.op == "call_function" and a.target is b.target and op_name(a) in LAID_OUT and depth > 0
    same = pure and alike(a, b) and len(operands(a)) == len(operands(b)) == 1
    return same and _equal(operands(a)[0], operands(b)[0], depth - 1)


def check_alone(joined: fx.Node, steps: Sequence[Step], reads: frozenset[fx.Node] = frozenset()) -> None:
    """States and outputs in the middle are read by the recurrence alone; the last state may be read by all.

    Raises:
        NotUnrolled: one is read elsewhere.
    """
    inside = frozenset().union(*(s.inside for s in steps)) | reads | {joined}
    for node in inside - {joined, steps[-1].state}:
        if not all(u in inside for u in node.users):
            raise NotUnrolled("a state or output in the middle is read elsewhere")
