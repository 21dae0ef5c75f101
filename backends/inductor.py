"""The Inductor engine. Inside torch.compile the graph goes straight to Inductor, in the tracing context that called us; offline it goes in
through torch.compile, which guards the sizes that Inductor relies on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from dyncc.backends.native import with_native_kernels
from dyncc.backends.open_gates import with_open_gates
from dyncc.backends.packed_operands import with_packed_operands
from dyncc.backends.permuted_keys import spelled_safely
from dyncc.backends.size_symbols import define_sizes
from dyncc.backends.state_guard import StateGuard
from dyncc.ir import Program, argument, is_symbolic, operands, shape, val
from dyncc.kernels.decayed_sum import DECAYED_SUM, in_chunks
from dyncc.kernels.decayed_sum.op import WIDE
from dyncc.kernels.gated_linear_attention import GATED_LINEAR_ATTENTION, chunk
from dyncc.kernels.gated_linear_attention.op import SHORT
from dyncc.own_ops import spelled_out

LEAST = 8192
"""A thread gets so many numbers at least: for fewer, as decoding steps have, it takes longer to wake another than to go on alone."""
LONGEST = 16384
"""Tokens up to which the chunks of gated linear attention are compiled."""
MOST = 4096
"""Tokens up to which a decayed sum is compiled: its two loops of about the root of that are written out."""


def lower(program: Program, inputs: list[Any], *, dynamic: bool = False) -> Any:
    """Compile a program; door 1 programs must be lowered before the backend returns (later, lengths would be specialised)."""
    lowered, notes = with_native_kernels(with_open_gates(program))
    ours = {n.target for n in lowered.graph.nodes if n.target in COMPILED and not COMPILED[n.target][1](n)}
    safe = spelled_safely(spelled_out(lowered, {op: form for op, (form, _) in COMPILED.items() if op not in ours}))
    safe = with_packed_operands(safe)
    if program.door == 1:
        define_sizes(safe.module.graph)
        run = compile_graph(safe.module, inputs)
    else:
        run = StateGuard(safe, dynamic, options())
    run.notes = notes
    return run


def _chunks_pay(node: fx.Node) -> bool:
    """Whether gated linear attention is compiled. On a GPU its kernel is faster (on an H200 2.2 to 2.6 times; with decays a channel
    the compiled truth is, 1.8 to 2.2 times); Inductor takes minutes to compile its truth for all sizes, few tokens do not fill a chunk,
    and the truth's memory grows with the square of groups of chunks, which the kernel's does not."""
    q, decay = operands(node)[0], argument(node, "log_decay")
    by_channel = isinstance(decay, fx.Node) and shape(decay)[3] == shape(q)[3]
    if val(q).device.type == "cuda" and not by_channel:
        return False
    return not any(is_symbolic(size) for size in shape(q)) and SHORT < shape(q)[2] <= LONGEST


def _sums_pay(node: fx.Node) -> bool:
    """Whether a decayed sum is compiled: called op by op, narrow ones are dominated by the calls."""
    sizes = shape(operands(node)[0])
    return not any(is_symbolic(size) for size in sizes) and sizes[0] * sizes[2] < WIDE and 0 < sizes[1] <= MOST


COMPILED: dict[Any, tuple[Callable[..., Any], Callable[[fx.Node], bool]]] = {
    GATED_LINEAR_ATTENTION: (chunk, _chunks_pay),
    DECAYED_SUM: (lambda *given, **named: in_chunks(*given, **named).contiguous(), _sums_pay),
}
"""Ops that Inductor gets in ATen, each in the form that it compiles best, and where that pays; where it does not for all, they stay."""


def options() -> dict[str, Any]:
    """What Inductor is told beside its own settings; more numbers a thread than `LEAST` stay what the user set."""
    from torch._inductor import config

    return {"cpp.min_chunk_size": max(config.cpp.min_chunk_size, LEAST)}


def compile_graph(module: fx.GraphModule, inputs: list[Any]) -> Any:
    """Inductor on a graph, as torch.compile would do it, with `options`."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    with config.patch(options()):
        return compile_fx(module, inputs)
