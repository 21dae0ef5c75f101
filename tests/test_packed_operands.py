"""What branches get under Inductor has one layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dyncc.backends.packed_operands import with_packed_operands
from dyncc.capture import from_model


class Branching(nn.Module):
    """[B, N, D] -> [B, D, N] or [B, N, D], by the sign of a sum."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.turned = turned

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = (2 * x).transpose(1, 2) if self.turned else 2 * x
        found: torch.Tensor = torch.cond(x.sum() > 0, lambda a: a.cos(), lambda a: a.sin(), (given,))
        return found


def strides(program: Any) -> list[tuple[int, ...]]:
    (call,) = program.graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond)
    return [operand.meta["val"].stride() for operand in call.args[3]]


def test_turned_operands_are_packed_and_the_result_is_the_same() -> None:
    x = torch.randn(2, 3, 4)
    program, _ = from_model(Branching(turned=True), (x,))
    packed = with_packed_operands(program)
    assert strides(program) == [(12, 1, 4)] and strides(packed) == [(12, 3, 1)], "the program itself stays as it was"
    for given in (x.abs(), -x.abs()):
        assert torch.equal(packed.module(given)[0], program.module(given)[0])


def test_others_are_left_alone() -> None:
    program, _ = from_model(Branching(turned=False), (torch.randn(2, 3, 4),))
    assert with_packed_operands(program) is program
