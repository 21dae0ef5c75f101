"""Attention of one query row over many keys, on a CPU: the generated C++ kernel in place of SDPA, where it is measured to be faster.

SDPA's CPU kernel splits its work by query rows and heads, so that a decoding step leaves cores idle and reads grouped keys once a query
head. The kernel splits keys (flash decoding, Dao et al. 2023) and reads each once for all heads of its group. The measurement compares
results too, and is remembered.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import fx

from dyncc import verdicts
from dyncc.ir import Program, argument, aten, emit, hint, is_symbolic, operands, shape, take_place, val
from dyncc.kernels.native import TYPES
from dyncc.kernels.one_row import ATTEND_ROW, TRUTHS
from dyncc.timing import least_seconds

SMALL = 1 << 19
"""Keys of fewer bytes leave nothing to win: SDPA stays, unmeasured."""
MOST_ROWS = 16
"""Query rows of one head that share a mask row and may be taken for heads (grouped queries that were folded)."""
GROWN = 2048
"""Keys at which a growing cache is measured, at least."""
GAIN = 1.1
"""How much faster the kernel must be."""


def sites(program: Program) -> list[fx.Node]:
    """SDPAs of few query rows that see the same keys, which the kernel could compute."""
    return [n for n in program.graph.nodes if _fits(n)]


def _fits(node: fx.Node) -> bool:
    """SDPA of few query rows that see the same keys, over keys that the kernel reads."""
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    if argument(node, "is_causal", False) or argument(node, "dropout_p", 0.0):
        return False
    q, k, v = operands(node)[:3]
    sizes, keys, values = shape(q), shape(k), shape(v)
    plain = [*sizes[1:], keys[1], keys[3], values[1], values[3]]
    if not len(sizes) == len(keys) == len(values) == 4 or any(is_symbolic(s) for s in plain):
        return False
    if sizes[2] > MOST_ROWS or sizes[1] % keys[1] or keys[1] != values[1] or val(q).dtype not in TYPES:
        return False
    mask = argument(node, "attn_mask")
    if not isinstance(mask, fx.Node):
        return True
    rows = shape(mask)
    alike = len(rows) == 4 and not any(is_symbolic(s) for s in rows[1:3]) and rows[2] == 1 and (sizes[2] == 1 or rows[1] == 1)
    return alike and (val(mask).dtype == torch.bool or val(mask).dtype.is_floating_point)


def pays(node: fx.Node) -> bool:
    """Whether the kernel is faster here, by measurement."""
    q, k, v = (tuple(hint(s) for s in shape(n)) for n in operands(node)[:3])
    if is_symbolic(shape(operands(node)[1])[2]):  # a cache that grows is judged by what it grows to
        many = max(k[2], GROWN)
        k, v = (*k[:2], many, k[3]), (*v[:2], many, v[3])
    mask = argument(node, "attn_mask")
    kind = val(mask).dtype if isinstance(mask, fx.Node) else None
    dtype = val(operands(node)[0]).dtype
    if math.prod(k) * dtype.itemsize < SMALL:
        return False
    name = verdicts.key(f"row-kernel {q} {k} {v} {dtype} {kind} {torch.get_num_threads()}", (), "")
    known = verdicts.get(name)
    if known is None:
        known = {"pays": _measure(q, k, v, dtype, kind)}
        verdicts.put(name, known)
    return bool(known["pays"])


def _measure(q_size: tuple[int, ...], k_size: tuple[int, ...], v_size: tuple[int, ...], dtype: torch.dtype, kind: Any) -> bool:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        q, k, v = (torch.randn(size).to(dtype) for size in (q_size, k_size, v_size))
        mask = None if kind is None else torch.ones(q_size[0], 1, 1, k_size[2], dtype=torch.bool)
        mask = mask if mask is None or kind == torch.bool else torch.zeros_like(mask, dtype=kind)
        ways = {"sdpa": partial(TRUTHS[ATTEND_ROW], q, k, v, mask, None, 1, None), "kernel": partial(attend, q, k, v, mask, None)}
        best = least_seconds(ways)
        error = (ways["sdpa"]() - ways["kernel"]()).abs().max()
    return bool(best["kernel"] * GAIN < best["sdpa"]) and bool(error <= (1e-4 if dtype == torch.float32 else 2e-2))


def attend(q: Any, k: Any, v: Any, mask: Any, scale: float | None) -> Any:
    """The kernel on queries [B, H, R, D] whose R rows see the same keys."""
    batch, heads, rows, width = q.shape
    out = ATTEND_ROW(q.reshape(batch, heads * rows, 1, width), k, v, mask, None, 1, scale)
    return out.reshape(batch, heads, rows, v.shape[3])


def replace(node: fx.Node) -> None:
    """Put the kernel in place of an SDPA."""
    q, k, v = operands(node)[:3]
    mask, scale = argument(node, "attn_mask"), argument(node, "scale")
    masks = [mask] if isinstance(mask, fx.Node) else []
    new = emit(node, lambda q, k, v, *masks: attend(q, k, v, masks[0] if masks else None, scale), q, k, v, *masks)
    take_place(node, new)
