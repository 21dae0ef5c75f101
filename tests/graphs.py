"""Programs of small functions, and their nodes by op name: for tests of the pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from dyncc.capture import from_model
from dyncc.ir import Program, op_name


class Calls(nn.Module):
    """A module that is a function."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, *values: torch.Tensor) -> Any:
        return self.function(*values)


def program(function: Callable[..., Any], *values: torch.Tensor, dynamic: Any = None) -> Program:
    """A captured function; `dynamic` maps dimensions of each value, as for torch.export."""
    shapes = None if dynamic is None else (tuple(dynamic),)
    return from_model(Calls(function), values, dynamic_shapes=shapes)[0]


def node(captured: Program, name: str, nth: int = -1) -> fx.Node:
    """The nth node with an op name."""
    return [n for n in captured.graph.nodes if n.op == "call_function" and op_name(n) == name][nth]


def entry(captured: Program, nth: int = 0) -> fx.Node:
    """The nth placeholder."""
    return [n for n in captured.graph.nodes if n.op == "placeholder"][nth]
