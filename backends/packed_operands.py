"""Operands of torch.cond in one layout: Inductor may lay out a computed tensor whose dimensions are turned in another way than it compiled
the branches for, and their checks of strides then fail. An op that Inductor does not look into packs such operands first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from dyncc.ir import Program, is_tensor, refresh, val

_library = torch.library.Library("dyncc", "FRAGMENT")
_library.define("packed(Tensor x) -> Tensor")


def packed(x: Tensor) -> Tensor:
    """A copy of x without gaps, its dimensions in order."""
    return x.clone(memory_format=torch.contiguous_format)


_library.impl("packed", packed, "CompositeExplicitAutograd")
torch.library.register_fake("dyncc::packed", packed)
PACKED = torch.ops.dyncc.packed.default


def with_packed_operands(program: Program) -> Program:
    """The program itself, or a copy in which branches get packed operands."""
    if not any(_turned(operand) for call in _calls(program.graph) for operand in call.args[3]):  # type: ignore[union-attr]
        return program
    copy = program.copy()
    for call in _calls(copy.graph):
        known: dict[fx.Node, fx.Node] = {}
        operands = [_packed(call, operand, known) if _turned(operand) else operand for operand in call.args[3]]  # type: ignore[union-attr]
        call.args = (*call.args[:3], tuple(operands))
    copy.graph.lint()
    copy.module.recompile()
    return copy


def _calls(graph: fx.Graph) -> list[fx.Node]:
    return list(graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond))


def _turned(operand: Any) -> bool:
    return is_tensor(operand) and operand.op != "placeholder" and not val(operand).is_contiguous()


def _packed(call: fx.Node, operand: Any, known: dict[fx.Node, fx.Node]) -> fx.Node:
    if operand not in known:
        with call.graph.inserting_before(call):
            known[operand] = call.graph.call_function(PACKED, (operand,))
        refresh(known[operand])
    return known[operand]
