"""Parity of an ONNX file with the rewritten and with the dense model, in ONNX Runtime, at the example's sizes and two others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dyncc.evidence import TOLERANCE, relative_error
from dyncc.ir import Program, hint


@dataclass(frozen=True)
class Parity:
    """One output at one point: `sizes` are the varying ones, errors are max|a-b| / max|a|; `dense` is what the lossy passes cost."""

    sizes: str
    output: str
    error: float
    dense: float | None
    limit: float

    @property
    def holds(self) -> bool:
        return self.error <= self.limit

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}

    def __str__(self) -> str:
        dense = "" if self.dense is None else f", to the dense model {self.dense:.1e}"
        return f"{self.output} at {self.sizes}: error {self.error:.1e} of {self.limit:.0e}{dense}{'' if self.holds else '  FAILED'}"


Run = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]


def parity(run: Run, rewritten: Run, dense: Run, points: Sequence[Sequence[torch.Tensor]], names: Sequence[str]) -> list[Parity]:
    """Compare `run` (the file) with the two models at every point; an output that the rewrite shortened is not compared with dense."""
    rows = []
    for tensors in points:
        sizes = " x ".join(str(list(t.shape)) for t in tensors[:2])
        columns = zip(names, run(tensors), rewritten(tensors), dense(tensors), strict=True)
        for name, made, wanted, plain in columns:
            got = made.to(wanted.device)
            far = relative_error(plain, got) if plain.shape == got.shape else None
            rows.append(Parity(sizes, name, relative_error(wanted, got), far, TOLERANCE.get(wanted.dtype, 0.0)))
    return rows


def points(program: Program, state: int, example: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The example and, where sizes vary, two more calls with other sizes: one and a half times as long, and shorter."""
    nodes = [n for n in program.graph.nodes if n.op == "placeholder"][state:]
    sizes = [s for n in nodes for s in n.meta["val"].shape if isinstance(s, torch.SymInt)]
    symbols = list(dict.fromkeys(x for s in sizes for x in sorted(s.node.expr.free_symbols, key=str)))
    found = [list(example)]
    for grow in (lambda n: n + n // 2 + 1, lambda n: max(n - n // 3 - 1, 2)):
        if not symbols:
            break
        values = {x: _within(sizes[0], x, grow(_hint(nodes, x))) for x in symbols}
        found.append([_resized(t, n.meta["val"].shape, values) for t, n in zip(example, nodes, strict=True)])
    return found


def _hint(nodes: Sequence[Any], symbol: Any) -> int:
    shapes = (s for n in nodes for s in n.meta["val"].shape if isinstance(s, torch.SymInt))
    plain = next((hint(s) for s in shapes if s.node.expr == symbol), None)
    return 4 if plain is None else plain


def _within(size: Any, symbol: Any, value: int) -> int:
    bounds = size.node.shape_env.bound_sympy(symbol)
    upper = int(bounds.upper) if bounds.upper.is_Integer else value
    return max(int(bounds.lower), min(value, upper))


def _resized(tensor: torch.Tensor, sizes: Sequence[Any], values: dict[Any, int]) -> torch.Tensor:
    """The tensor with every varying dimension cut, or repeated from its start, to its new size."""
    for dim, size in enumerate(sizes):
        if isinstance(size, torch.SymInt):
            wanted = int(size.node.expr.xreplace(values))
            tensor = tensor.index_select(dim, torch.arange(wanted, device=tensor.device) % tensor.shape[dim])
    return tensor
