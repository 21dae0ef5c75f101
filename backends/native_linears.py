"""Linear layers of few rows, on a CPU: those that read the same rows run as one C++ kernel, where it is measured to be faster.

A step of decoding is bound by reading its weights. Libraries of matrix products are not made for one row, and every call of theirs wakes
the threads once. The measurement runs over more weights than caches hold, compares results too, and is remembered.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import fx

from dyncc import verdicts
from dyncc.ir import Program, aten, is_mutating, is_symbolic, operands, refresh, shape, val
from dyncc.kernels.native import TYPES
from dyncc.kernels.row_linears import ROW_LINEARS, row_linears
from dyncc.kernels.row_linears.cpu import MOST_ROWS
from dyncc.timing import least_seconds

SMALL = 1 << 18
"""Weights of fewer bytes leave nothing to win."""
COLD = 96 << 20
"""Bytes of weights that are read between two looks at the same one: no cache holds them."""
GAIN = 1.05
"""How much faster the kernel must be."""


def sites(program: Program) -> list[list[fx.Node]]:
    """Linear layers of few rows with weights that the program is given, grouped by what they read."""
    groups: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in program.graph.nodes:
        if _fits(node):
            groups[operands(node)[0]].append(node)
    return [group for x, group in groups.items() if not any(is_mutating(user) for user in x.users)]


def _fits(node: fx.Node) -> bool:
    if node.target is not aten.linear.default:
        return False
    x, *given = operands(node)
    sizes = shape(x)
    if any(is_symbolic(s) for s in sizes) or not 0 < math.prod(sizes[:-1]) <= MOST_ROWS or val(x).dtype not in TYPES:
        return False
    fixed = all(n.op == "placeholder" and val(n).is_contiguous() and val(n).dtype == val(x).dtype for n in given)
    return fixed and len(shape(given[0])) == 2


def threads(group: list[fx.Node]) -> int | None:
    """How many threads make the kernel fastest here, by measurement; None where the layers one by one are faster."""
    x = operands(group[0])[0]
    rows, width = math.prod(shape(x)[:-1]), shape(x)[-1]
    columns = [shape(n)[-1] for n in group]
    dtype = val(x).dtype
    if sum(columns) * width * dtype.itemsize < SMALL:
        return None
    name = verdicts.key(f"row-linears {rows} {width} {columns} {dtype} {torch.get_num_threads()}", (), "")
    known = verdicts.get(name)
    if known is None:
        known = {"threads": _measure(rows, width, columns, dtype)}
        verdicts.put(name, known)
    found = known["threads"]
    return None if found is None else int(found)


def _measure(rows: int, width: int, columns: list[int], dtype: torch.dtype) -> int | None:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        x = torch.randn(rows, width).to(dtype)
        size = width * sum(columns)
        pool = [(torch.randn(size) / width**0.5).to(dtype)]
        pool += [pool[0].clone() for _ in range(COLD // (size * dtype.itemsize))]
        layers = [[w.view(c, width) for w, c in zip(weights.split([c * width for c in columns]), columns, strict=True)] for weights in pool]
        none = [None] * len(columns)
        ways = {"linear": row_linears} | {str(n): partial(ROW_LINEARS, threads=n) for n in sorted({1, torch.get_num_threads()})}
        best = least_seconds({name: partial(_all, way, x, layers, none) for name, way in ways.items()})
        found, wanted = ROW_LINEARS(x, layers[0], none, 0), row_linears(x.float(), [w.float() for w in layers[0]], none)
        error = max((a.float() - b).abs().max().item() for a, b in zip(found, wanted, strict=True))
    first = min(best, key=lambda name: best[name])
    exact = error <= (1e-4 if dtype == torch.float32 else 5e-2)
    return int(first) if exact and first != "linear" and best[first] * GAIN < best["linear"] else None


def _all(way: Any, x: Any, layers: Any, none: Any) -> None:
    for weights in layers:
        way(x, weights, none)


def replace(group: list[fx.Node], threads: int) -> None:
    """Put one call of the kernel in place of linear layers that read the same rows."""
    given = [operands(n) for n in group]
    graph = group[0].graph
    with graph.inserting_before(group[0]):
        weights, biases = [g[1] for g in given], [g[2] if len(g) > 2 else None for g in given]
        together = graph.call_function(ROW_LINEARS, (given[0][0], weights, biases, threads))
        refresh(together)
        for i, node in enumerate(group):
            part = graph.call_function(operator.getitem, (together, i))
            part.meta = dict(node.meta)
            node.replace_all_uses_with(part)
    for node in group:
        graph.erase_node(node)
