"""Spells attention so that Inductor's own attention fusion reads its permutations right.

Inductor matches softmax(q @ permute(k)) @ v without looking at the permutation: it takes any for k', any in front of it (and of q and v)
for the swap of heads and rows, and computes something else, or fails, where it is another (seen on torch 2.13 and 2.14; pytorch#195320).
So the permutation of keys is written as a swap of the last two dimensions behind the rest, permute(k, p) = permute(k, p')' with p' being p
with its last two swapped, and whatever is not the swap of heads and rows is computed (`clone`), which no pattern sees through.
"""

from __future__ import annotations

from math import prod

import torch
from torch import fx

from dyncc.ir import Program, aten, emit, is_tensor, op_name, operands, shape, take_place

PRODUCTS = {"matmul", "bmm"}
PERMUTES = {"permute", "transpose", "t", "mT", "numpy_T", "swapaxes", "swapdims", "movedim", "moveaxis"}
VIEWS = {"view", "reshape", "_unsafe_view", "expand", "clone", "contiguous", "alias"}
SOFTMAX = {"softmax", "_softmax", "_safe_softmax"}
SIZES = (2, 3, 5, 7)
HEADS_AND_ROWS = (0, 2, 1, 3)

Order = tuple[int, ...]


def spelled_safely(program: Program) -> Program:
    """The program itself, or a copy in which no permutation is mistaken."""
    if not _misread(program.graph):
        return program
    safe = program.copy()
    for node, is_key in _misread(safe.graph).items():
        _respell(node, is_key)
    safe.graph.lint()
    safe.module.recompile()
    return safe


def _misread(graph: fx.Graph) -> dict[fx.Node, bool]:
    """The permutations in front of attention's products that a pattern would mistake; True for those of keys."""
    calls = [n for n in graph.nodes if n.op == "call_function"]
    found: dict[fx.Node, bool] = {}
    if not any(op_name(n) in SOFTMAX for n in calls):
        return found
    for node in calls:
        if op_name(node) not in PRODUCTS:
            continue
        left, right = operands(node)[-2:]
        mixes = _through(left, VIEWS | {"to", "_to_copy", "dropout"})
        if op_name(mixes) not in SOFTMAX:
            found |= {n: True for n in [_permute(right)] if n is not None and not _plain_key(n)}
            found |= {n: False for n in [_permute(left)] if n is not None and not _plain(n)}
        else:
            found |= {n: False for n in [_permute(right)] if n is not None and not _plain(n)}
    return found


def _through(node: fx.Node, names: set[str]) -> fx.Node:
    while op_name(node) in names and isinstance(node.args[0], fx.Node) and is_tensor(node.args[0]):
        node = node.args[0]
    return node


def _permute(node: fx.Node) -> fx.Node | None:
    """The permutation of three or four dimensions that an operand is, views aside."""
    found = _through(node, VIEWS)
    return found if op_name(found) in PERMUTES and is_tensor(found) and len(shape(found)) in (3, 4) else None


def permutation(node: fx.Node) -> Order:
    """The order of dimensions that a transposing op gives, whatever its name: found by running it on different sizes."""
    sizes = SIZES[: len(shape(node))]
    with torch.no_grad():
        moved = node.target(torch.empty(sizes, device="meta"), *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return tuple(sizes.index(size) for size in moved.shape)


def _plain(node: fx.Node) -> bool:
    return len(shape(node)) == 3 or permutation(node) == HEADS_AND_ROWS


def _plain_key(node: fx.Node) -> bool:
    inner = _permute(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    return _rest(node) == tuple(range(len(shape(node)))) and (inner is None or _plain(inner))


def _rest(node: fx.Node) -> Order:
    """The permutation in front of the swap of the last two dimensions."""
    order = permutation(node)
    return (*order[:-2], order[-1], order[-2])


def _respell(node: fx.Node, is_key: bool) -> None:
    first = _rest(node) if is_key else permutation(node)

    def spelled(value: torch.Tensor) -> torch.Tensor:
        moved = aten.permute.default(value, list(first))
        fixed = moved if is_key and first == HEADS_AND_ROWS else _computed(moved)
        return aten.transpose.int(fixed, -2, -1) if is_key else fixed

    new = emit(node, spelled, node.args[0])
    take_place(node, new)


def _computed(moved: torch.Tensor) -> torch.Tensor:
    """The same values in a form that patterns stop at. A clone that moves nothing would be taken out again: then views stand there."""
    sizes = moved.shape
    if all(isinstance(size, int) for size in sizes) and moved.is_contiguous():
        return aten.view.default(aten.view.default(moved, [prod(sizes)]), list(sizes))
    return aten.clone.default(moved, memory_format=torch.contiguous_format)
