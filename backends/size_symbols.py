"""Inductor of torch 2.13 takes the symbol of an integer input as it was first called, and everything else as it is called now.

When a check found two sizes equal (how many tokens two layers of a cache hold), one symbol stands for both. Where that one is no input of
the graph, because only a check reads it, generated code names it and never defines it.
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
    """Let inputs stand for the symbols tied to them (s1 = s10, where s10 = s1 was noted), in the graph's shape environment."""
    inputs = [(n, size) for n in graph.find_nodes(op="placeholder") for size in _sizes(n)]
    known = {_read_off(n, size) for n, size in inputs}
    used = {symbol for n in graph.nodes for size in _sizes(n) for symbol in size.node.expr.free_symbols}
    for missing in sorted(used - known, key=str):
        for _, size in inputs:
            own, tied = size.node._expr, size.node.expr
            if own.is_Symbol and tied.free_symbols == {missing} and _turn_around(size.node.shape_env, own, tied, missing):
                break


def _read_off(node: fx.Node, size: torch.SymInt) -> sympy.Expr:
    """What Inductor reads off an input: a symbol, or an expression that defines none."""
    return size.node._expr if isinstance(node.meta["val"], torch.SymInt) else size.node.expr


def _sizes(node: fx.Node) -> Iterator[torch.SymInt]:
    for value in tree_leaves(node.meta.get("val")):
        found = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
        yield from (size for size in found if isinstance(size, torch.SymInt))


def _turn_around(env: Any, own: sympy.Symbol, tied: sympy.Expr, missing: sympy.Symbol) -> bool:
    """Whether own = tied(missing) could be written as missing = f(own)."""
    if own == missing:
        return False
    solved = try_solve(sympy.Eq(own, tied), missing)
    if solved is None or not solved[1].is_integer:
        return False
    before = env.replacements.pop(own)
    env._update_version_counter()  # what was found so far is remembered by how many replacements there are
    env._set_replacement(missing, solved[1], "read off an input")
    if missing not in env.replacements:
        env.replacements[own] = before
    return missing in env.replacements
