"""The Inductor engine. Inside torch.compile the graph goes straight to Inductor, in the tracing context that called us; offline it goes in
through torch.compile, which guards the sizes that Inductor relies on."""

from __future__ import annotations

from typing import Any

from torch import fx

from dyncc.backends.native import with_native_kernels
from dyncc.backends.open_gates import with_open_gates
from dyncc.backends.packed_operands import with_packed_operands
from dyncc.backends.permuted_keys import spelled_safely
from dyncc.backends.size_symbols import define_sizes
from dyncc.backends.state_guard import StateGuard
from dyncc.ir import Program, is_symbolic, operands, shape
from dyncc.kernels.gated_linear_attention import TRUTHS as COMPILED
from dyncc.kernels.gated_linear_attention.op import SHORT
from dyncc.own_ops import spelled_out

LONGEST = 16384
"""Tokens up to which the chunks of gated linear attention are compiled."""


def lower(program: Program, inputs: list[Any], *, dynamic: bool = False) -> Any:
    """Compile a program; door 1 programs must be lowered before the backend returns (later, lengths would be specialised)."""
    lowered, notes = with_native_kernels(with_open_gates(program))
    safe = spelled_safely(lowered if any(_by_its_kernel(n) for n in lowered.graph.nodes) else spelled_out(lowered, COMPILED))
    safe = with_packed_operands(safe)
    if program.door == 1:
        define_sizes(safe.module.graph)
        run = compile_graph(safe.module, inputs)
    else:
        run = StateGuard(safe, dynamic)
    run.notes = notes
    return run


def _by_its_kernel(node: fx.Node) -> bool:
    """Whether such an op stays as it is: on a GPU it has a generated kernel; Inductor takes minutes to compile its truth for all sizes, few
    tokens do not fill a chunk, and the truth's memory grows with the square of groups of chunks, which the kernel's does not."""
    if node.target not in COMPILED:
        return False
    tokens = shape(operands(node)[0])[2]
    on_gpu = operands(node)[0].meta["val"].device.type == "cuda"
    return on_gpu or any(is_symbolic(size) for size in shape(operands(node)[0])) or not SHORT < tokens <= LONGEST


def compile_graph(module: fx.GraphModule, inputs: list[Any]) -> Any:
    """Plain Inductor on a graph, as torch.compile would do it."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(module, inputs)
