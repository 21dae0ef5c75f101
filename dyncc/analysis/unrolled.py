"""Recurrences that a Python loop over tokens wrote out, read back into one: S_t = d_t S_{t-1} + k_t' v_t, o_t = q_t S_t, for t = 0 .. T-1.

The outputs meet in a stack or cat. Each is a read of a state, each state an update of the one before, and all steps are alike: what they
take is either the same for all steps, or token t of one tensor, or a node of its own that is stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dyncc.ir import argument, op_name, operands, same_size, same_sizes, shape, val

LAID_OUT = {"unsqueeze", "to", "_to_copy", "alias", "view", "reshape", "expand", "select", "slice", "transpose", "contiguous", "clone"}
POSITIVE = {"exp", "sigmoid"}


class NotUnrolled(Exception):
    """Why outputs that are joined are no recurrence that is understood."""


@dataclass(frozen=True)
class Step:
    """One token: the state [..., Dk, Dv] behind it and before it, the operands of its update and of its read, which are as wide as the
    state and 1 where they are broadcast, and the nodes that do nothing else. In a delta rule `beta` and `v` are [..., 1] and [..., Dv]."""

    state: fx.Node
    before: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    decay: Any
    inside: frozenset[fx.Node]
    beta: fx.Node | None = None


@dataclass(frozen=True)
class Unrolled:
    """All tokens of one recurrence; `joined` is the stack or cat of its outputs."""

    joined: fx.Node
    steps: tuple[Step, ...]

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
    place = _place(reads[1][0], reads[0][0])  # type: ignore[index]
    steps: list[Step] = []
    for t, read in enumerate(reads):
        state, q, nodes = read  # type: ignore[misc]
        if t and not _follows(state, steps[-1].state):
            raise NotUnrolled(f"the state of token {t} does not follow from the one before")
        steps.append(_step(state, q, nodes, place))
        if t and steps[-1].before is not steps[-2].state:
            raise NotUnrolled(f"token {t} is not computed as token {t - 1}")
    _check_alone(joined, steps)
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
    return _place(state, before) is not None


def _place(state: fx.Node, before: fx.Node) -> tuple[int, int] | None:
    """Where `before` stands in an update: which operand of the sum, and which of that one's product (-1: it is not multiplied)."""
    for i, part in enumerate(state.args[:2]):
        if part is before:
            return i, -1
        if isinstance(part, fx.Node) and op_name(part) == "mul" and before in part.args:
            return i, part.args.index(before)
    return None


def _step(state: fx.Node, q: fx.Node, nodes: frozenset[fx.Node], place: tuple[int, int] | None) -> Step:
    if place is None or op_name(state) != "add" or argument(state, "alpha", 1) != 1:
        raise NotUnrolled("its states are no sums of the one before and something new")
    i, j = place
    kept, added = state.args[i], state.args[1 - i]
    if j >= 0 and (not isinstance(kept, fx.Node) or op_name(kept) != "mul"):
        raise NotUnrolled("the first state is computed in another way than those behind it")
    before, decay = (kept, None) if j < 0 else (kept.args[j], kept.args[1 - j])  # type: ignore[union-attr]
    inside = {state, added, *nodes} | ({kept} if j >= 0 else set())
    if not isinstance(before, fx.Node) or not isinstance(added, fx.Node) or not same_sizes(shape(before), shape(state)):
        raise NotUnrolled("its first state is no tensor as large as the others")
    k, v = _outer(added)
    return _delta(Step(state, before, q, k, v, decay, frozenset(inside)), kept)  # type: ignore[arg-type]


def _outer(added: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(k, v) of k' v, as a product of [..., Dk, 1] and [..., 1, Dv]."""
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
            return Step(step.state, step.before, step.q, step.k, parts[0], step.decay, nodes, beta)
    return step


def _equal(a: Any, b: Any, depth: int = 6) -> bool:
    """Whether two nodes compute the same: the same operation of the same operands, as code that is written twice gives."""
    if a is b or not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return a is b
    pure = a.op == b.op == "call_function" and a.target is b.target and op_name(a) in LAID_OUT and depth > 0
    same = pure and _alike(a, b) and len(operands(a)) == len(operands(b)) == 1
    return same and _equal(operands(a)[0], operands(b)[0], depth - 1)


def _check_alone(joined: fx.Node, steps: Sequence[Step]) -> None:
    inside = frozenset().union(*(s.inside for s in steps)) | {joined}
    for node in inside - {joined, steps[-1].state}:
        if not all(u in inside for u in node.users):
            raise NotUnrolled("a state or output in the middle is read elsewhere")


@dataclass(frozen=True)
class Series:
    """One operand of all steps, to be put together along a new first dimension: `nodes` are stacked, or the one node has its dimension
    `dim` moved there, or it is the same for all of `tokens` steps (`dim` None). Then `ops` follow."""

    nodes: tuple[fx.Node, ...]
    dim: int | None
    tokens: int
    ops: tuple[Callable[[Tensor], Tensor], ...]

    def together(self, *values: Tensor) -> Tensor:
        """[T, ...] of the nodes' values."""
        one = values[0].unsqueeze(0) if self.dim is None else values[0].movedim(self.dim, 0)
        x = torch.stack(values) if len(values) > 1 else one
        for op in self.ops:
            x = op(x)
        return x.expand(self.tokens, *x.shape[1:])


def series(nodes: Sequence[fx.Node], *, logs: bool = False) -> Series:
    """What the steps' operands come from; with `logs` their logarithms, which need no exp that was just taken.

    Raises:
        NotUnrolled: with `logs`, where nothing says that they are positive.
    """
    chains = [_peeled(n) for n in nodes]
    alike = all(len(c) == len(chains[0]) and all(_alike(a, b) for a, b in zip(c[:-1], chains[0][:-1], strict=True)) for c in chains)
    bases = [c[-1] for c in chains] if alike else list(nodes)
    links = list(reversed(chains[0][:-1])) if alike else []
    first, tokens = bases[0], len(nodes)
    dim = _token_dim(bases)
    if len(set(bases)) == 1:
        found = Series((first,), None, tokens, ())
    else:
        found = Series((operands(first)[0],), dim, tokens, ()) if dim is not None else Series(tuple(bases), None, tokens, ())
    outer = [i for i, link in enumerate(links) if op_name(link) not in ("unsqueeze", "slice")]
    makers = [links[outer[-1]]] if outer else bases
    if logs and not all(_positive(n) for n in makers):
        raise NotUnrolled("its decays are neither exp nor sigmoid of anything: whether they are positive is not known")
    taken = outer[-1] if logs and outer and op_name(links[outer[-1]]) == "exp" else None
    ops = [_op(link, len(shape(operands(link)[0]))) for i, link in enumerate(links) if i != taken]
    ops += [torch.log] if logs and taken is None else []
    return Series(found.nodes, found.dim, tokens, tuple(ops))


def _peeled(node: fx.Node) -> list[fx.Node]:
    """The node and what it only looks at, scales or activates, down to the token that was taken."""
    chain = [node]
    while chain[-1].op == "call_function" and op_name(chain[-1]) in ("unsqueeze", "exp", "sigmoid", "mul", "slice", "to", "_to_copy"):
        last = chain[-1]
        plain = len(operands(last)) == 1 and last.args[0] is operands(last)[0]
        if not plain or (op_name(last) == "slice" and not same_sizes(shape(last), shape(operands(last)[0]))):
            break
        chain.append(operands(last)[0])
    return chain


def _positive(node: fx.Node) -> bool:
    """Whether a node is exp or sigmoid of something, laid out or not."""
    while node.op == "call_function" and op_name(node) in LAID_OUT and operands(node):
        node = operands(node)[0]
    return node.op == "call_function" and op_name(node) in POSITIVE


def _alike(a: fx.Node, b: fx.Node) -> bool:
    return a.target is b.target and str(a.args[1:]) == str(b.args[1:]) and str(a.kwargs) == str(b.kwargs)


def _token_dim(bases: Sequence[fx.Node]) -> int | None:
    """The dimension from which the bases take tokens 0, 1, ... of one tensor; None where they do not."""
    first = bases[0]
    if op_name(first) != "select" or not all(op_name(b) == "select" and operands(b)[0] is operands(first)[0] for b in bases):
        return None
    source = operands(first)[0]
    dim = argument(first, "dim") % len(shape(source))
    same = all(argument(b, "dim") % len(shape(source)) == dim for b in bases)
    counted = [argument(b, "index") for b in bases] == list(range(len(bases))) and same_size(shape(source)[dim], len(bases))
    return dim if same and counted else None


def _op(link: fx.Node, rank: int) -> Callable[[Tensor], Tensor]:
    """What a link does to its operand of `rank` dimensions, with one more in front."""
    name = op_name(link)
    if name == "unsqueeze":
        dim = argument(link, "dim")
        return lambda x: x.unsqueeze(dim + 1 if dim >= 0 else dim)
    if name == "mul":
        factor = link.args[1]
        return lambda x: x * factor
    if name in ("to", "_to_copy"):
        dtype = val(link).dtype
        return lambda x: x.to(dtype)
    return {"exp": torch.exp, "sigmoid": torch.sigmoid}.get(name, lambda x: x)
