"""Loops in which a token reads the results of all earlier ones, s_t = f_t + g_t sum_{j<t} W_tj s_j, read back into one triangular system,
(1 - diag(g) W) s = f (Sessa, 2026)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from dyncc.analysis.running_sums import pieces_of
from dyncc.analysis.series import NotUnrolled
from dyncc.ir import argument, op_name, operands, same_size, same_sizes, shape

PRODUCTS = {"matmul", "bmm"}
LOOKS = {"squeeze", "view", "reshape", "_unsafe_view", "contiguous", "clone", "alias"}


@dataclass(frozen=True)
class Feedback:
    """All tokens of one loop; `joined` is the stack or cat of its results, `own` what each token has by itself, `weights` W [..., T, T], of
    which what is below the diagonal is read; `gains` [..., 1] of all tokens but the first, or none."""

    joined: fx.Node
    own: tuple[fx.Node, ...]
    weights: fx.Node
    gains: tuple[fx.Node, ...]


def feedbacks(graph: fx.Graph) -> list[fx.Node]:
    """Joins of all tokens whose third reads a join of the first two: candidates."""
    longest: dict[tuple[fx.Node, ...], fx.Node] = {}
    for node in graph.nodes:
        pieces = pieces_of(node)
        if len(pieces) > 2 and (found := longest.get(tuple(pieces[:2]))) is not node and len(pieces) >= len(pieces_of(found or node)):
            longest[tuple(pieces[:2])] = node
    return [n for n in longest.values() if _reads_both(pieces_of(n))]


def _reads_both(pieces: list[fx.Node]) -> bool:
    third = pieces[2]
    read = [inner for part in operands(third) for inner in (part, *(a for a, _ in _scaled(part)))]
    return op_name(third) == "add" and any(_earlier(inner, pieces[:2]) is not None for inner in read)


def read_feedback(joined: fx.Node) -> Feedback:
    """The triangular system behind a candidate.

    Raises:
        NotUnrolled: with the first thing that differs from step to step, or is not understood.
    """
    pieces = pieces_of(joined)
    own, weights, gains = [pieces[0]], [], []
    inside = {joined, *pieces}
    for t in range(1, len(pieces)):
        alone, row, gain, nodes = _token(pieces[t], pieces[:t])
        inside |= nodes
        own.append(alone)
        weights.append(_matrix(row, t))
        gains += [] if gain is None else [gain]
    if any(w is not weights[0] for w in weights) or not same_size(shape(weights[0])[-1], len(pieces)):
        raise NotUnrolled("its weights are no rows of one matrix of tokens x tokens")
    if gains and len(gains) < len(own) - 1:
        raise NotUnrolled("what some of its tokens read is scaled, and what others read is not")
    if any(u not in inside for p in pieces for u in p.users):
        raise NotUnrolled("results in the middle are read elsewhere")
    return Feedback(joined, tuple(own), weights[0], tuple(gains))


def _token(piece: fx.Node, before: Sequence[fx.Node]) -> tuple[fx.Node, fx.Node, fx.Node | None, set[fx.Node]]:
    """(what a token has by itself, its weights, what multiplies their sum, the nodes of the sum)."""
    if op_name(piece) != "add" or len(operands(piece)) != 2 or argument(piece, "alpha", 1) != 1:
        raise NotUnrolled(f"token {len(before)} is no sum of its own and what it reads")
    for read, own in (operands(piece), operands(piece)[::-1]):
        for inner, gain in ((read, None), *_scaled(read)):
            found = _earlier(inner, before)
            if found is not None and same_sizes(shape(own), shape(piece)):
                return own, found[0], gain, {read, *found[1]}
    raise NotUnrolled(f"token {len(before)} reads no weighted sum of all results before it")


def _scaled(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """(sum, gain) of a product with one number for all channels."""
    if op_name(node) != "mul" or len(operands(node)) != 2:
        return []
    pairs = (operands(node), operands(node)[::-1])
    return [(a, b) for a, b in pairs if shape(b) and same_size(shape(b)[-1], 1) and len(shape(b)) == len(shape(a))]


def _earlier(node: fx.Node, before: Sequence[fx.Node]) -> tuple[fx.Node, set[fx.Node]] | None:
    """(weights, nodes) of a weighted sum over a join of `before`."""
    nodes = {node}
    while op_name(node) in LOOKS and operands(node):
        node = operands(node)[0]
        nodes.add(node)
    if op_name(node) == "sum" and not argument(node, "keepdim") and op_name(operands(node)[0]) == "mul":
        product, rank = operands(node)[0], len(shape(operands(node)[0]))
        over_tokens = [d % rank for d in argument(node, "dim") or []] == [rank - 2]
        for row, held in (operands(product), operands(product)[::-1]) if len(operands(product)) == 2 else ():
            if over_tokens and _joins(held, before) and same_sizes(shape(held), shape(product)) and same_size(shape(row)[-1], 1):
                return row, nodes | {product, held}
    if op_name(node) in PRODUCTS and _joins(operands(node)[1], before) and same_size(shape(node)[-2], 1):
        return operands(node)[0], nodes | {operands(node)[1]}
    return None


def _joins(node: fx.Node, before: Sequence[fx.Node]) -> bool:
    """Whether a node is the join of these results, one row each."""
    rank = len(shape(node))
    return pieces_of(node) == list(before) and argument(node, "dim", 0) % rank == rank - 2 and same_size(shape(node)[-2], len(before))


def _matrix(row: fx.Node, t: int) -> fx.Node:
    """The matrix [..., T, T] of which a node holds the first t numbers of row t.

    Raises:
        NotUnrolled: it does not.
    """
    narrow, chosen, node = False, False, row
    while node.op == "call_function" and not (narrow and chosen):
        name, inner = op_name(node), operands(node)[0] if operands(node) else node
        dim = argument(node, "dim", 0)
        at: Any = dim % len(shape(inner)) if name in ("slice", "select") else None
        first = name == "slice" and (argument(node, "start") or 0, argument(node, "end")) == (0, t)
        if name == "slice" and same_sizes(shape(node), shape(inner)):
            pass
        elif first and at == len(shape(inner)) - 1 and not narrow:
            narrow = True
        elif name in ("select", "slice") and not chosen and _takes(node, inner, t) and at == len(shape(inner)) - 2:
            chosen = True
        elif name not in ("unsqueeze", "alias"):
            break
        node = inner
    if not narrow or not chosen or len(shape(node)) < 2:
        raise NotUnrolled(f"the weights of token {t} are not the first {t} numbers of row {t} of a matrix")
    return node


def _takes(node: fx.Node, inner: fx.Node, t: int) -> bool:
    if op_name(node) == "select":
        return argument(node, "index") == t
    return argument(node, "start") == t and same_size(shape(node)[argument(node, "dim", 0)], 1)
