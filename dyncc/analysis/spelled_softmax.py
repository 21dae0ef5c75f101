"""Softmax that is written as exponentials over their sum, and put back into one node, so that an attention around it can be read.

    exp(x) / sum exp(x)        exp(x - max x) / sum exp(x - max x)        (exp(x) v) / sum exp(x)        exp(x - log sum exp(x))

Exponentials of hidden keys may also be replaced by 0 before they are summed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor, fx

from dyncc.analysis.spelled import NotRead, number
from dyncc.ir import argument, aten, emit, op_name, operands, same_size, shape, val

PASSING = {"to", "_to_copy", "clone", "contiguous", "alias", "expand"}
PRODUCTS = {"matmul", "bmm"}


@dataclass(frozen=True)
class Written:
    """`out` is the softmax, or its product with values where `product` is not None; `exponentials` are what is divided; `parts` are the
    nodes that become one."""

    out: fx.Node
    exponentials: fx.Node
    product: fx.Node | None
    parts: frozenset[fx.Node]


def written_softmaxes(graph: fx.Graph) -> list[Written]:
    """Every quotient of exponentials and something summed over them, and every exp of logits less the log of such a sum."""
    return [found for node in graph.nodes if node.op == "call_function" and (found := _quotient(node) or _of_logs(node)) is not None]


@contextmanager
def as_softmax(written: Written) -> Iterator[fx.Node]:
    """One softmax in its place; what raises `NotRead` inside leaves the graph as it was.

    Raises:
        NotRead: it is something else than a softmax over the last dimension.
    """
    logits, fills = _logits(written)
    if val(logits).dtype != val(written.exponentials).dtype:
        raise NotRead("exponentials change their type on the way")
    first = written.out if written.product is None else written.product
    made: list[fx.Node] = []
    for condition, stays in fills:
        logits = emit(first, partial(_hidden, stays), logits, condition)
        made.append(logits)
    softmax = emit(first, lambda x: aten.softmax.int(x, -1), logits)
    made.append(softmax)
    instead = softmax
    if written.product is not None:
        with written.out.graph.inserting_before(written.out):
            instead = written.out.graph.node_copy(written.product, lambda n: softmax if n is written.exponentials else n)
        made.append(instead)
    written.out.replace_all_uses_with(instead)
    try:
        yield softmax
    except NotRead:
        instead.replace_all_uses_with(written.out)
        for node in [n for n in reversed(made) if not n.users]:
            node.graph.erase_node(node)
        raise


def _hidden(stays: bool, x: Tensor, condition: Tensor) -> Tensor:
    kept: Tensor = aten.where.ScalarOther(condition if stays else condition.logical_not(), x, float("-inf"))
    return kept


def _quotient(node: fx.Node) -> Written | None:
    """Exponentials, or their product with values, divided by what comes from their sum."""
    if op_name(node) not in ("div", "true_divide") or not all(isinstance(a, fx.Node) for a in node.args[:2]):
        return None
    top, bottom = node.args[:2]
    product = top if op_name(top) in PRODUCTS else None  # type: ignore[arg-type]
    exponentials = operands(top)[0] if product is not None else top  # type: ignore[arg-type]
    above, below = _back(exponentials, "exp"), _back(bottom, "sum")  # type: ignore[arg-type]
    if above is None or below is None or operands(below[-1])[0] is not exponentials:
        return None
    parts = {node, *above, *below} | ({product} if product is not None else set())
    return Written(node, exponentials, product, frozenset(parts))  # type: ignore[arg-type]


def _of_logs(node: fx.Node) -> Written | None:
    """exp of log_softmax, or of logits less their logsumexp."""
    inner = operands(node)[0] if op_name(node) == "exp" else None
    if inner is None or inner.op != "call_function":
        return None
    if op_name(inner) == "log_softmax":
        return Written(node, node, None, frozenset({node, inner}))
    logs = [n for n in operands(inner)[1:] if op_name(n) == "logsumexp"] if op_name(inner) == "sub" else []
    if logs and operands(logs[0])[0] is inner.args[0]:
        return Written(node, node, None, frozenset({node, inner, logs[0]}))
    return None


def _back(node: fx.Node, name: str) -> list[fx.Node] | None:
    """The nodes from `node` back to the op of that name, through steps that `_logits` judges."""
    chain = [node]
    while op_name(chain[-1]) != name:
        last = chain[-1]
        known = op_name(last) in {*PASSING, "unsqueeze", "masked_fill", "where", "mul", "add", "clamp", "clamp_min", "maximum"}
        inner = [n for n in operands(last) if op_name(n) not in ("scalar_tensor", "full") and val(n).is_floating_point()] if known else []
        if last.op != "call_function" or not inner:
            return None
        chain.append(inner[0])
    return chain


def _logits(written: Written) -> tuple[fx.Node, list[tuple[fx.Node, bool]]]:
    """What the exponentials are of, and conditions that hide keys: (node, whether keys stay where it is true).

    Raises:
        NotRead: with what makes it no softmax.
    """
    parts = {op_name(n): n for n in written.parts}
    rank = len(shape(written.exponentials))
    if "sum" not in parts:
        sums = parts.get("log_softmax", parts.get("logsumexp"))
        _over_keys(sums, rank)  # type: ignore[arg-type]
        return operands(sums)[0], []  # type: ignore[arg-type]
    for node in _back(written.out.args[1], "sum")[:-1]:  # type: ignore[arg-type, index]
        if op_name(node) not in PASSING | {"unsqueeze"}:
            raise NotRead(f"the sum of exponentials goes through {op_name(node)} before it divides")
    _over_keys(parts["sum"], rank)
    if not same_size(shape(written.out.args[1])[-1], 1) or len(shape(written.out.args[1])) != rank:  # type: ignore[arg-type]
        raise NotRead("the sum of exponentials divides along another dimension than it was summed over")
    fills = []
    for node in _back(written.exponentials, "exp")[:-1]:  # type: ignore[index]
        if op_name(node) in PASSING:
            continue
        fills.append(_fill(node))
    return operands(parts["exp"])[0], fills


def _over_keys(sums: fx.Node, rank: int) -> None:
    dims = argument(sums, "dim")
    if [d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims]) if d is not None] != [rank - 1]:
        raise NotRead("exponentials are summed over another dimension than the last")


def _fill(node: fx.Node) -> tuple[fx.Node, bool]:
    """The condition of a masked_fill or where that puts in 0, and whether it tells what stays."""
    if op_name(node) == "masked_fill" and number(node.args[2]) == 0:
        return node.args[1], False  # type: ignore[return-value]
    if op_name(node) == "where" and len(node.args) == 3 and number(node.args[2]) == 0:
        return node.args[0], True  # type: ignore[return-value]
    raise NotRead(f"exponentials go through {op_name(node)} before they are summed")
