"""Inductor of torch 2.13 reads a size symbol off an input that is that symbol alone.

Where a check tied an input to an expression of a symbol that is no input (a mask's length s16 = s1 + 1, while nothing reads the past's
length s1 itself), generated code names s1 and never defines it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._pytree import tree_leaves
from torch.utils._sympy.solve import try_solve


def define_sizes(graph: fx.Graph) -> None:
    """Turn such ties around (s1 = s16 - 1), in the graph's shape environment, so that every symbol in use can be read off an input."""
    inputs = [size for n in graph.find_nodes(op="placeholder") for size in _sizes(n)]
    known = {size.node.expr for size in inputs if size.node.expr.is_Symbol}
    used = {symbol for n in graph.nodes for size in _sizes(n) for symbol in size.node.expr.free_symbols}
    for missing in sorted(used - known, key=str):
        for size in inputs:
            own, tied = size.node._expr, size.node.expr
            if own.is_Symbol and tied.free_symbols == {missing} and _turn_around(size.node.shape_env, own, tied, missing):
                break


def _sizes(node: fx.Node) -> Iterator[torch.SymInt]:
    for value in tree_leaves(node.meta.get("val")):
        found = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
        yield from (size for size in found if isinstance(size, torch.SymInt))


def _turn_around(env: Any, own: sympy.Symbol, tied: sympy.Expr, missing: sympy.Symbol) -> bool:
    """Whether own = tied(missing) could be written as missing = f(own)."""
    solved = try_solve(sympy.Eq(own, tied), missing)
    if solved is None or not solved[1].is_integer:
        return False
    before = env.replacements.pop(own)
    env._set_replacement(missing, solved[1], "read off an input")
    if missing not in env.replacements:
        env.replacements[own] = before
    return missing in env.replacements
