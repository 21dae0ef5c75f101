"""Which form of grouped attention is fastest here: measured once per shape, dtype and machine, and remembered on disk."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dyncc import verdicts
from dyncc.ir import aten
from dyncc.timing import least_seconds

SMALL = 1 << 20
"""Keys of fewer bytes are not worth a measurement: the native form is taken."""
SLOWER = 1.1
"""The copy stays where every other form is slower than it by more than this..."""
LOOKS = 3
"""... in so many measurements in a row: a busy machine must not decide for the form that takes more memory."""


def fastest(
    q: tuple[int, ...], k: tuple[int, ...], dtype: torch.dtype, mask: torch.dtype | None, causal: bool, foldable: bool, device: str
) -> str:
    """ "native", "folded" or "repeated" for queries q [B, H, Tq, D] and keys k [B, G, Tk, D]."""
    if device != "cpu" or math.prod(k) * dtype.itemsize < SMALL:
        return "native"
    options = f"gqa-forms {q} {k} {dtype} {mask} {causal} {foldable} {torch.get_num_threads()}"
    name = verdicts.key(options, (), "")
    known = verdicts.get(name)
    if known is None:
        known = {"form": _measure(q, k, dtype, mask, causal, foldable)}
        verdicts.put(name, known)
    return str(known["form"])


def _measure(
    q_size: tuple[int, ...], k_size: tuple[int, ...], dtype: torch.dtype, mask_dtype: torch.dtype | None, causal: bool, foldable: bool
) -> str:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        q, k = torch.randn(q_size).to(dtype), torch.randn(k_size).to(dtype)
        v = torch.randn_like(k)
        rows = 1 if foldable else q_size[2]
        mask = None if mask_dtype is None else torch.ones(q_size[0], 1, rows, k_size[2], dtype=torch.bool)
        mask = mask.to(mask_dtype) * 0 if mask is not None and mask_dtype is not None and mask_dtype.is_floating_point else mask
        for _ in range(LOOKS):
            times = least_seconds({name: partial(form, q, k, v, mask, causal) for name, form in _forms(foldable).items()})
            best = min((n for n in times if n != "repeated"), key=lambda n: times[n])
            if times[best] <= times["repeated"] * SLOWER:
                return best
    return "repeated"


def _forms(foldable: bool) -> dict[str, Callable[..., Any]]:
    def repeated(q: Any, k: Any, v: Any, mask: Any, causal: bool) -> Any:
        times = q.shape[1] // k.shape[1]
        return aten.scaled_dot_product_attention.default(q, k.repeat_interleave(times, 1), v.repeat_interleave(times, 1), mask, 0.0, causal)

    def native(q: Any, k: Any, v: Any, mask: Any, causal: bool) -> Any:
        return aten.scaled_dot_product_attention.default(q, k, v, mask, 0.0, causal, enable_gqa=True)

    def folded(q: Any, k: Any, v: Any, mask: Any, causal: bool) -> Any:
        b, h, t, d = q.shape
        return aten.scaled_dot_product_attention.default(q.reshape(b, k.shape[1], -1, d), k, v, mask, 0.0, False).reshape(b, h, t, d)

    return {"repeated": repeated, "native": native, **({"folded": folded} if foldable else {})}
