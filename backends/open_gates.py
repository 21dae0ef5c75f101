"""Gates of attention for Inductor on a CPU: it fuses their product with its neighbours, which the attention's own node cannot.

    attend(q, k, v, gate=g)  ->  act(g) * attend(q, k, v)        and attend is SDPA where nothing else is asked
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from dyncc.ir import Program, argument, emit, take_place, val
from dyncc.kernels.fused_attention import ATTEND
from dyncc.kernels.fused_attention.truth import gated

SDPA = torch.ops.aten.scaled_dot_product_attention.default
GATE = {"gate", "activation"}
BEYOND = {a.name for a in ATTEND._schema.arguments} - {a.name for a in SDPA._schema.arguments} - GATE
"""What `dyncc::attend` is asked that SDPA has no argument for."""


def with_open_gates(program: Program) -> Program:
    """The program itself, or a copy in which every gated attention on a CPU is followed by its gate."""
    if not any(_gated_on_cpu(n) for n in program.graph.nodes):
        return program
    opened = program.copy()
    for node in [n for n in opened.graph.nodes if _gated_on_cpu(n)]:
        new = emit(node, partial(_open, tuple(node.kwargs)), *node.args, *node.kwargs.values())
        take_place(node, new)
    opened.graph.lint()
    opened.module.recompile()
    return opened


def _gated_on_cpu(node: fx.Node) -> bool:
    return node.target is ATTEND and argument(node, "gate") is not None and val(node).device.type == "cpu"


def _open(names: tuple[str, ...], *values: Any) -> Tensor:
    count = len(values) - len(names)
    told = dict(zip(names, values[count:], strict=True))
    gate, activation = told.pop("gate"), told.pop("activation", "sigmoid")
    beyond = any(isinstance(told.get(name), Tensor) or told.get(name) for name in BEYOND)
    if not beyond:
        told = {name: x for name, x in told.items() if name not in BEYOND}
    return gated((ATTEND if beyond else SDPA)(*values[:count], **told), gate, activation)
