"""Evidence: how far values move, measured in the reference engine on the caller's inputs; isolated runs, distances, tolerances."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dyncc.timing import finish

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""Largest max|a-b| / max|a| of an output or of a rewritten value after an exact pass, by dtype: rounding of another summation order,
accumulated over layers where whole runs are compared."""


def cloned(values: Sequence[Any]) -> list[Any]:
    """Clones that share nothing with the caller's tensors; aliases among them stay aliases."""
    made: dict[int, torch.Tensor] = {}

    def clone(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        storage = value.untyped_storage()._cdata
        if storage not in made:
            made[storage] = torch.empty(0, dtype=torch.uint8, device=value.device).set_(value.untyped_storage().clone())
        copy = torch.empty(0, dtype=value.dtype, device=value.device)
        copy.set_(made[storage].untyped_storage(), value.storage_offset(), value.shape, value.stride())
        return copy

    return [clone(v) for v in values]


def run_isolated(function: Callable[..., Any], values: Sequence[Any], mutates: bool) -> tuple[list[Any], float]:
    """Outputs (and inputs after the call, when the graph mutates) of one call that leaves inputs and RNG state alone; and its seconds."""
    held = cloned(values) if mutates else list(values)
    with own_random_numbers(held), torch.no_grad():
        finish()
        start = time.perf_counter()
        result = function(*held)
        finish()
        seconds = time.perf_counter() - start
    outputs = [r.clone() if isinstance(r, torch.Tensor) else r for r in result]
    return outputs + ([h for h in held if isinstance(h, torch.Tensor)] if mutates else []), seconds


def own_random_numbers(values: Sequence[Any]) -> Any:
    """A context that leaves the random numbers of the CPU, and of the GPUs that hold some of the values, as they were."""
    on_gpus = {v.device.index for v in values if isinstance(v, torch.Tensor) and v.device.type == "cuda"}
    return torch.random.fork_rng(devices=sorted(on_gpus))


def relative_error(a: Any, b: Any) -> float:
    """max|a-b| / max|a|; infinite where one is finite and the other is not, 0 for equal non-tensors.

    >>> relative_error(torch.tensor([2.0]), torch.tensor([1.0])), relative_error(torch.ones(1), torch.ones(1))
    (0.5, 0.0)
    """
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.numel() == 0:
        return 0.0 if isinstance(a, torch.Tensor) == isinstance(b, torch.Tensor) else float("inf")
    if a.shape != b.shape:
        return float("inf")
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    if a.dtype.itemsize < 4:
        a, b = a.float(), b.float()
    worst, scale = _largest(a - b), _largest(a)
    if scale and math.isfinite(worst) and math.isfinite(scale):
        return worst / scale
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    gap = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=math.inf)
    scale = a[a.isfinite()].abs().amax().item() if bool(a.isfinite().any()) else 0.0
    return float(gap.amax().item()) / scale if scale else float("inf")


def _largest(x: torch.Tensor) -> float:
    """max|x|; NaN where one is in it."""
    low, high = (end.item() for end in torch.aminmax(x))
    return float(max(abs(low), abs(high), key=lambda end: math.inf if math.isnan(end) else end))


def out_of_tolerance(what: str, error: float, dtype: torch.dtype | None) -> str:
    """Words about a value that moved by more than rounding; '' where it did not."""
    limit = TOLERANCE.get(dtype, 0.0) if dtype is not None else 0.0
    return f"{what} differs by {error:.1e} of its largest value, more than {limit:.0e} for {dtype}" if error > limit else ""


def beyond_tolerance(dense: Sequence[Any], other: Sequence[Any]) -> tuple[float, str]:
    """The worst error over outputs and, when one is out of tolerance, words about it."""
    worst, words = 0.0, ""
    for i, (a, b) in enumerate(zip(dense, other, strict=False)):
        error = relative_error(a, b)
        words = words or out_of_tolerance(f"output {i}", error, a.dtype if isinstance(a, torch.Tensor) else None)
        worst = max(worst, error)
    return worst, words


def quality(dense: Sequence[Any], other: Sequence[Any]) -> dict[str, float]:
    """How far the first comparable float output moved: worst error, cosine of the rows, and KL and top-1 agreement for logits."""
    for a, b in zip(dense, other, strict=False):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.is_floating_point() and a.shape == b.shape and a.dim() > 1:
            x, y = a.float().flatten(0, -2), b.float().flatten(0, -2)
            measured = {"error": relative_error(a, b), "cosine": torch.nn.functional.cosine_similarity(x, y, dim=-1).mean().item()}
            p, q = x.log_softmax(-1), y.log_softmax(-1)
            measured["kl"] = (p.exp() * (p - q)).sum(-1).mean().item()
            measured["top1"] = (x.argmax(-1) == y.argmax(-1)).float().mean().item()
            return measured
    return {}


def sample(examples: Sequence[list[Any]]) -> str:
    """A short text of the examples' and weights' sizes and a few of their values: another model or input is another verdict."""
    digest = hashlib.sha256()
    for values in examples:
        for value in values:
            if isinstance(value, torch.Tensor):
                flat = value.detach().flatten()
                some = flat[:: max(1, flat.numel() // 16)][:16].float().tolist()
                digest.update(f"{tuple(value.shape)}{value.dtype}{some}".encode())
            else:
                digest.update(str(value).encode())
    return digest.hexdigest()
