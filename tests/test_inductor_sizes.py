"""Sizes that Inductor could not read off a graph's inputs (backends/size_symbols.py)."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from dyncc.backends.size_symbols import define_sizes


def _symbol(env: ShapeEnv, name: str, hint: int) -> torch.SymInt:
    source = ConstantSource(name)
    made = env.create_symintnode(env.create_symbol(hint, source, DimDynamic.DYNAMIC), hint=hint, source=source)
    assert isinstance(made, torch.SymInt)
    return made


def _graph(given: torch.SymInt, made: Any) -> torch.fx.Graph:
    graph = torch.fx.Graph()
    length = graph.placeholder("length")
    length.meta["val"] = given
    ones = graph.call_function(torch.ones, (length,))
    ones.meta["val"] = made
    graph.output(ones)
    return graph


def test_a_symbol_that_is_no_input_is_read_off_the_input_tied_to_it() -> None:
    env = ShapeEnv(duck_shape=False)
    unread, given = _symbol(env, "unread", 97), _symbol(env, "given", 98)
    first, own = unread.node.expr, given.node.expr
    env._set_replacement(own, first + 1, "a check")
    with FakeTensorMode(shape_env=env):
        made = torch.empty(unread + 2)
    graph = _graph(given, made)
    assert made.shape[0].node.expr == first + 2
    define_sizes(graph)
    assert given.node.expr == own and made.shape[0].node.expr == own + 1 and unread.node.expr == own - 1


def test_what_cannot_be_turned_around_and_what_needs_no_turn_stays() -> None:
    env = ShapeEnv(duck_shape=False)
    unread, given = _symbol(env, "unread", 49), _symbol(env, "given", 98)
    env._set_replacement(given.node.expr, 2 * unread.node.expr, "a check")
    with FakeTensorMode(shape_env=env):
        made = torch.empty(unread)
    before = dict(env.replacements)
    define_sizes(_graph(given, made))
    assert env.replacements == before
    define_sizes(_graph(unread, made))
    assert env.replacements == before and isinstance(made.shape[0].node.expr, sympy.Symbol)
