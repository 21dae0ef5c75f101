"""dyncc run over the zoo, each run once a process: what the tests and the coverage table look at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from zoo import by_name
from zoo_model import LAYERS, ZooModel, relative_error

import dyncc
from dyncc.passes import EXACT


@dataclass(frozen=True)
class PruneRun:
    """What one `prune-tokens` run did, without its tensors."""

    applied: bool
    reason: str
    flops: int
    dense_flops: int
    error_to_masked: float
    error_to_dense: float
    same_shapes: bool


def optimize(model: ZooModel, attn: str, passes: str, *, padding: bool = False, dynamic: bool = False, masked: bool = False) -> Any:
    """The zoo's model through door 2 with the reference engine: `(optimized, eager module, inputs)`."""
    module, inputs = model.build(attn), model.inputs(padding=padding)
    shapes = model.dynamic_shapes(padding) if dynamic else None
    optimized = dyncc.optimize(
        module, inputs, passes=passes, dynamic_shapes=shapes, engine="reference", evidence="off", masked=masked
    )  # fmt: skip
    return optimized, module, inputs


def prune(name: str, attn: str, options: str, padding: bool = False) -> PruneRun:
    """`prune-tokens{options}` on one model: its verdict, costs, and distance to the masked form and to the dense model."""
    return _prune(name, attn, options, padding)


@cache
def _prune(name: str, attn: str, options: str, padding: bool) -> PruneRun:
    with torch.no_grad():
        optimized, module, inputs = optimize(by_name(name), attn, f"prune-tokens{{{options}}}", padding=padding, masked=True)
        (rewrite,) = optimized.report.rewrites
        pruned, dense = optimized(*inputs), module(*inputs)
        masked = optimized.masked(*inputs) if rewrite.applied else dense
    pairs = zip(*(value if isinstance(value, tuple) else (value,) for value in (pruned, dense)), strict=True)
    return PruneRun(
        rewrite.applied,
        rewrite.reason or "",
        optimized.flops,
        optimized.dense_flops,
        relative_error(pruned, masked),
        relative_error(pruned, dense),
        all(a.shape == b.shape for a, b in pairs),
    )


@dataclass(frozen=True)
class ExactRun:
    """How many regions an exact pass rewrote, why not more, and how far the result is from eager."""

    applied: int
    reason: str
    error: float


@cache
def exact(name: str, attn: str) -> dict[str, ExactRun]:
    """The exact passes, in their default order, on one model."""
    with torch.no_grad():
        optimized, module, inputs = optimize(by_name(name), attn, " ".join(EXACT))
        error = relative_error(optimized(*inputs), module(*inputs))
    return {r.name: ExactRun(r.found if r.applied else 0, r.reason or "", error) for r in optimized.report.rewrites}


def expected_exact(model: ZooModel, attn: str, name: str) -> int:
    """How often an exact pass should fire, from the model's config alone."""
    if name == "fuse-attention":
        return model.expected_attention() if attn == "eager" else model.extra_attention  # pooling heads are always spelled out
    if name == "simplify-mask":
        return LAYERS if model.plain_masks else 0
    if name == "slice-last-token":
        return int(model.fixed_rows)
    return LAYERS if model.grouped_heads else 0
