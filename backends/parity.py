"""Whether an engine computes what the graph says: one call of each on the example inputs, which are as they were afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dyncc.evidence import beyond_tolerance, own_random_numbers
from dyncc.ir import Program, hint, is_mutating


def real(inputs: Sequence[Any]) -> list[Any]:
    """Flat inputs as numbers and tensors: symbolic sizes as in the example."""
    return [hint(v) if isinstance(v, torch.SymInt) else v for v in inputs]


def parity(program: Program, run: Callable[..., Any], values: Sequence[Any]) -> tuple[float, str]:
    """The largest error of an engine's outputs and of what it wrote to its inputs, and words where that is out of tolerance."""
    return beyond_tolerance(_call(program, program.module, values), _call(program, run, values))


def _call(program: Program, run: Callable[..., Any], values: Sequence[Any]) -> list[Any]:
    with own_random_numbers(values), torch.no_grad(), restored(program, values) as written:
        outputs = [o.clone() if isinstance(o, torch.Tensor) else o for o in run(*values)]
        return outputs + [value.clone() for value in written]


@contextmanager
def restored(program: Program, values: Sequence[Any]) -> Iterator[list[torch.Tensor]]:
    """Afterwards the inputs hold what they held; yields those that the program may write to. Untouched ones are not written to."""
    mutates = any(is_mutating(n) for n in program.graph.nodes)
    tensors = [v for v, given in zip(values, program.inputs, strict=True) if isinstance(v, torch.Tensor) and given.kind != "parameter"]
    before = [(value, value.clone()) for value in tensors] if mutates else []
    try:
        yield [value for value, _ in before]
    finally:
        with torch.no_grad():
            for value, old in before:
                if not torch.equal(value, old):
                    value.copy_(old)
