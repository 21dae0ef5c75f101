"""drop-repeat-kv: grouped-query attention without copying keys and values once per query head.

softmax(q_h k_{g(h)}') v_{g(h)} needs k and v of a group once. Where a graph expands [B, G, T, D] to [B, H, T, D] in front of SDPA, the
copy is dropped. Two forms, equal up to rounding: *native*, SDPA with enable_gqa; *folded*, the query heads of a group become rows,
[B, G, (H/G) Tq, D], possible when all rows of a group share one mask row (one query row, or a mask that is the same for all rows).
Which is faster depends on dtype, shape and machine, so it is measured once and remembered (Ainslie et al. 2023 for GQA).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from dyncc.analysis.attention import AttentionRegion
from dyncc.analysis.facts import Facts
from dyncc.ir import argument, aten, emit, hint, is_tensor, op_name, operands, refresh, same_size, shape, take_place, val
from dyncc.passes.gqa_forms import fastest
from dyncc.restrict import Refusal
from dyncc.rewrite import Context, Pass, PassResult

THROUGH = {"reshape", "view", "_unsafe_view", "clone", "contiguous", "expand", "unsqueeze", "slice", "alias", "to"}


@dataclass(frozen=True)
class DropRepeatKV(Pass):
    """Attend to grouped keys and values directly instead of to copies of them."""

    name: ClassVar[str] = "drop-repeat-kv"
    summary: ClassVar[str] = "grouped-query attention on the grouped keys and values, without repeating them"
    exact: ClassVar[bool] = True
    keeps_gradients: ClassVar[bool] = True

    def run(self, program: Any, facts: Facts, context: Context) -> PassResult:
        """Rewrite every attention whose keys and values are repeated; refuse when there is none."""
        pairs = [(r, repeated(untransposed(r)), repeated(r.v)) for r in facts.attention]
        sites = [(r, k, v) for r, k, v in pairs if k is not None and v is not None]
        if not sites:
            raise Refusal("no attention repeats its keys and values")
        done, misses = 0, []
        for region, k, v in sites:
            problem = _grouped(region, k, v)
            if problem:
                misses.append(f"attention {region.index}: {problem}")
            else:
                done += 1
        if not done:
            raise Refusal(misses[0])
        return PassResult(done, len(sites), misses=tuple(misses))


def untransposed(region: AttentionRegion) -> fx.Node:
    """The keys as [B, H, T, D]: a spelled-out product takes them transposed."""
    source = region.k.args[0] if not region.fused and op_name(region.k) in ("transpose", "permute", "mT") else region.k
    return source if isinstance(source, fx.Node) else region.k


def repeated(node: fx.Node) -> fx.Node | None:
    """The [B, G, T, D] node that a [B, H, T, D] node repeats head by head (each group's copies side by side), or None."""
    if not is_tensor(node) or len(shape(node)) != 4:
        return None
    heads, chain, current = shape(node)[1], [], node
    while op_name(current) in THROUGH and isinstance(current.args[0], fx.Node):
        chain.append(current)
        current = current.args[0]
        if len(shape(current)) == 4 and not same_size(shape(current)[1], heads):
            break
    else:
        return None
    expands = [n for n in chain if op_name(n) == "expand"]
    if not isinstance(heads, int) or not isinstance(shape(current)[1], int) or heads % shape(current)[1] or len(expands) != 1:
        return None
    wide = shape(expands[0])
    groups = shape(current)[1]
    shaped = len(wide) == 5 and wide[1] == groups and wide[2] == heads // groups
    return current if shaped and same_size(shape(current)[2], shape(node)[2]) and same_size(shape(current)[3], shape(node)[3]) else None


def _grouped(region: AttentionRegion, k: fx.Node, v: fx.Node) -> str:
    """Rewrite one attention; the words of a refusal, or ''."""
    if not region.fused:
        return _grouped_spelled(region, k, v)
    sdpa = region.out
    if sdpa.target is not aten.scaled_dot_product_attention.default:
        _replace(sdpa, operands(sdpa)[0], k, v, region.mask, "native", bool(argument(sdpa, "is_causal", False)))
        return ""
    if argument(sdpa, "dropout_p", 0.0):
        return "dropout is active"
    q = operands(sdpa)[0]
    mask = region.mask
    causal = bool(argument(sdpa, "is_causal", False))
    foldable = not causal and (mask is None or _one_row(mask, q))
    sizes = [tuple(hint(s) for s in shape(n)) for n in (q, k)]
    form = fastest(sizes[0], sizes[1], val(q).dtype, None if mask is None else val(mask).dtype, causal, foldable, val(q).device.type)
    if form == "repeated":
        return "repeating is the fastest form here, by measurement"
    _replace(sdpa, q, k, v, mask, form, causal)
    return ""


def _one_row(mask: fx.Node, q: fx.Node) -> bool:
    """Whether every query row of a head sees the same mask, and every head too."""
    sizes = shape(mask)
    rows_alike = isinstance(sizes[-2], int) and sizes[-2] == 1
    heads_alike = len(sizes) < 3 or (isinstance(sizes[-3], int) and sizes[-3] == 1)
    return rows_alike and heads_alike


def _replace(sdpa: fx.Node, q: fx.Node, k: fx.Node, v: fx.Node, mask: fx.Node | None, form: str, causal: bool) -> None:
    new = _native(sdpa, q, k, v, mask, causal) if form == "native" else _folded(sdpa, q, k, v, mask)
    take_place(sdpa, new)


def _native(sdpa: fx.Node, q: fx.Node, k: fx.Node, v: fx.Node, mask: fx.Node | None, causal: bool) -> fx.Node:
    options = {name: x for name, x in sdpa.kwargs.items() if name not in ("attn_mask", "dropout_p", "is_causal")}
    with sdpa.graph.inserting_before(sdpa):
        new = sdpa.graph.call_function(sdpa.target, (q, k, v, mask, 0.0, causal), {**options, "enable_gqa": True})
    refresh(new)
    return new


def _folded(sdpa: fx.Node, q: fx.Node, k: fx.Node, v: fx.Node, mask: fx.Node | None) -> fx.Node:
    scale = argument(sdpa, "scale")
    new: fx.Node = emit(sdpa, lambda q, k, v, *masks: fold(q, k, v, masks[0] if masks else None, scale), q, k, v, *([mask] if mask else []))
    return new


def fold(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None) -> torch.Tensor:
    """SDPA with the query heads [B, H, Tq, D] of each group as rows of its one key head: [B, G, (H/G) Tq, D]."""
    batch, heads, rows, width = q.shape
    groups = k.shape[1]
    rows_of_group = q.reshape(batch, groups, heads // groups * rows, width)
    out = aten.scaled_dot_product_attention.default(rows_of_group, k, v, mask, 0.0, False, scale=scale)
    return out.reshape(batch, heads, rows, v.shape[3])


def _grouped_spelled(region: AttentionRegion, k: fx.Node, v: fx.Node) -> str:
    """Both products of a spelled-out attention, with the heads of a group as rows: the mask between them is not touched."""
    product = next((u for u in region.k.users if op_name(u) == "matmul" and operands(u)[0] is region.q), None)
    if product is None or op_name(region.out) != "matmul" or operands(region.out)[1] is not region.v:
        return "its products are not written as matmul(q, k') and matmul(p, v)"
    flipped = len({op_name(n) for n in (region.k,)} & {"transpose", "permute", "mT"}) == 1
    for node, left, right, flip in ((product, region.q, k, flipped), (region.out, operands(region.out)[0], v, False)):
        new = emit(node, fold_left if not flip else fold_left_transposed, left, right)
        take_place(node, new)
    return ""


def fold_left(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [B, H, M, N] @ b [B, G, N, D], each group's heads of `a` on its one `b`."""
    batch, heads, rows, inner = a.shape
    return (a.reshape(batch, b.shape[1], heads // b.shape[1] * rows, inner) @ b).reshape(batch, heads, rows, b.shape[3])


def fold_left_transposed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [B, H, M, D] @ b' for b [B, G, N, D]."""
    return fold_left(a, b.transpose(-1, -2))
