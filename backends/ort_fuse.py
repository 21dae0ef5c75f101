"""Attention with its rotary embedding and its cache as the one op that ONNX Runtime has for it, found by dataflow.

A causal attention over keys and values, each new ones alone or `cat(past input, new)`, becomes `dyncc::group_query_attention`, which
exports as com.microsoft GroupQueryAttention. With it the cache can grow in one buffer, and heads are never transposed.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dyncc.analysis.attention import AttentionRegion
from dyncc.analysis.facts import Facts, analyse
from dyncc.analysis.mask_values import CARRY, CAUSAL, Abstract, evaluate
from dyncc.backends.rotary import Rotary, find_rotary
from dyncc.ir import Program, argument, aten, drop_dead, emit, is_tensor, op_name, same_size, shape, val
from dyncc.kernels.group_query_attention import OP
from dyncc.passes.drop_repeat_kv import repeated

MERGES = ("reshape", "view", "flatten")


@dataclass(frozen=True)
class Site:
    """One attention that the op covers: `q` [B, H, S, D], `k` and `v` [B, G, S, D] new, `past` inputs, `held` what holds past and new."""

    region: AttentionRegion
    q: fx.Node
    k: fx.Node
    v: fx.Node
    past: tuple[fx.Node, fx.Node] | None
    held: tuple[fx.Node, fx.Node]


def fuse_attention(program: Program) -> tuple[Program, Counter[str]]:
    """A copy with every fitting attention as one op, and counts: `attention` fused of `expected`, `rotary` taken in."""
    fused = program.copy()
    facts = analyse(fused)
    counts: Counter[str] = Counter(expected=facts.expected)
    shared = Shared(fused)
    for region in facts.attention:
        site = _site(region, facts)
        if site is None:
            continue
        counts["attention"] += 1
        counts["rotary"] += _fuse(site, shared)
    drop_dead(fused.graph)
    fused.graph.lint()
    fused.module.recompile()
    return (fused if counts["attention"] else program), counts


def _site(region: AttentionRegion, facts: Facts) -> Site | None:
    if not region.fused or region.extras or argument(region.out, "dropout_p", 0.0) or len(shape(region.q)) != 4:
        return None
    k, v = (repeated(n) or n for n in (region.k, region.v))
    if len(shape(k)) != 4 or shape(k)[1] != shape(v)[1] or shape(k)[3] != shape(v)[3] or not isinstance(shape(k)[1], int):
        return None
    pairs = [_past_and_new(n, facts) for n in (k, v)]
    grown = all(past is not None for past, _ in pairs)
    if grown != any(past is not None for past, _ in pairs):
        return None
    past = (pairs[0][0], pairs[1][0]) if grown else None
    new = (pairs[0][1], pairs[1][1])
    rows = shape(region.q)[2]
    if not same_size(shape(new[0])[2], rows) or not same_size(shape(new[1])[2], rows):
        return None
    return Site(region, region.q, *new, past, (k, v)) if _is_causal(region, grown) else None  # type: ignore[arg-type]


def _past_and_new(node: fx.Node, facts: Facts) -> tuple[fx.Node | None, fx.Node]:
    """The cache input that a key or value node is grown from, and what it grew by."""
    if op_name(node) != "cat" or argument(node, "dim", 0) not in (-2, 2):
        return None, node
    parts: Any = [n for n in node.args[0] if shape(n) != (0,)]  # type: ignore[union-attr]  # a cache may start as an empty vector
    if len(parts) == 1:
        return None, parts[0]
    return (parts[0], parts[1]) if len(parts) == 2 and parts[0] in facts.kv_inputs else (None, node)


def _is_causal(region: AttentionRegion, grown: bool) -> bool:
    """Whether no row may see a later key: the op hides those whatever the mask says."""
    one_row = same_size(shape(region.q)[2], 1)
    if grown:
        return one_row and not argument(region.out, "is_causal", False)
    if region.mask is None:
        return bool(argument(region.out, "is_causal", False)) or (one_row and same_size(shape(region.k)[2], 1))
    return val(region.mask).dtype == torch.bool and _implies_causal(region.mask, {})


def _implies_causal(node: Any, known: dict[fx.Node, Abstract]) -> bool:
    """Whether a bool mask is a conjunction with a causal one in it."""
    if not isinstance(node, fx.Node) or not is_tensor(node):
        return False
    if evaluate(node, known) == CAUSAL:
        return True
    if op_name(node) in ("__and__", "bitwise_and", "logical_and"):
        return any(_implies_causal(n, known) for n in node.args)
    same = op_name(node) in CARRY and isinstance(node.args[0], fx.Node) and shape(node)[-2:] == shape(node.args[0])[-2:]
    return same and _implies_causal(node.args[0], known)


class Shared:
    """What all attentions of a graph use alike, made once: lengths, rotary tables, biases."""

    def __init__(self, program: Program) -> None:
        self.graph = program.graph
        self.known: dict[Any, Any] = {}

    def lengths(self, site: Site) -> tuple[fx.Node, fx.Node]:
        """[B] the last key's position and, a scalar, the number of keys, as int32."""
        rows, past = site.k, site.past[0] if site.past else None

        def make(new: torch.Tensor, *old: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            total = new.shape[2] + (old[0].shape[2] if old else 0)
            last = aten.full.default([new.shape[0]], total - 1, dtype=torch.int32)
            return last, aten.full.default([], total, dtype=torch.int32)

        found: tuple[fx.Node, fx.Node] = self._once("lengths", site, make, rows, *([past] if past else []))
        return found

    def tables(self, site: Site, rotary: Rotary) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Rows of cosine and sine [max(total, B * S), D / 2] and, [B, S], the row of each token."""
        past = [site.past[0]] if site.past else []

        def make(new: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *old: torch.Tensor) -> tuple[torch.Tensor, ...]:
            batch, rows = new.shape[0], new.shape[2]
            room = old[0].shape[2] if old else 0

            def table(x: torch.Tensor) -> torch.Tensor:
                flat = x[..., : x.shape[-1] // 2].expand(batch, -1, -1).reshape(batch * rows, x.shape[-1] // 2)
                return aten.constant_pad_nd.default(flat, [0, 0, 0, room]) if old else flat

            places = aten.arange.default(batch * rows).reshape(batch, rows)
            return table(cos), table(sin), places

        found: tuple[fx.Node, fx.Node, fx.Node] = self._once(("tables", rotary.cos), site, make, site.k, rotary.cos, rotary.sin, *past)
        return found

    def bias(self, site: Site) -> tuple[fx.Node | None, fx.Node | None]:
        """The mask as numbers to add and, for a bool mask, which rows [B, 1, S, 1] see any key at all."""
        mask = site.region.mask
        if mask is None or val(mask).dtype != torch.bool:
            return mask, None

        def make(seen: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            lowest = torch.finfo(q.dtype).min
            zero = aten.full.default([], 0.0, dtype=q.dtype)
            return aten.where.ScalarOther(seen, zero, lowest), aten.any.dim(seen, -1, True)

        found: tuple[fx.Node, fx.Node] = self._once(("bias", mask), site, make, mask, site.q)
        return found

    def _once(self, key: Any, site: Site, make: Any, *args: Any) -> Any:
        if key not in self.known:
            self.known[key] = emit(site.region.out, make, *args)
        return self.known[key]


def _fuse(site: Site, shared: Shared) -> bool:
    """Put the op in the place of one attention; whether the rotary embedding went in too."""
    out = site.region.out
    rotaries = [find_rotary(site.q), find_rotary(site.k)]
    inside = all(r is not None for r in rotaries) and rotaries[0].cos is rotaries[1].cos and rotaries[0].sin is rotaries[1].sin  # type: ignore[union-attr]
    q, k = (rotaries[0].x, rotaries[1].x) if inside else (site.q, site.k)  # type: ignore[union-attr]
    tables: tuple[Any, ...] = shared.tables(site, rotaries[0]) if inside and rotaries[0] else (None, None, None)
    bias, some = shared.bias(site)
    heads, groups, width = shape(site.q)[1], shape(site.k)[1], shape(site.q)[3]
    scale = argument(out, "scale")
    scale = width**-0.5 if scale is None else scale
    with out.graph.inserting_before(out):
        merged = [_merged(n, out) for n in (q, k, site.v)]
        past = site.past or (None, None)
        new = out.graph.call_function(OP, (*merged, *past, *shared.lengths(site), *tables, bias, heads, groups, float(scale)))
    args, _ = fx.node.map_arg((new.args, {}), val)
    new.meta["val"] = OP(*args)
    results = [_item(new, i) for i in range(3)]
    later = set(itertools.takewhile(lambda n: n is not new, reversed(out.graph.nodes)))
    for old, present in zip(site.held, results[1:], strict=True):
        old.replace_all_uses_with(present, delete_user_cb=later.__contains__)
    _put(out, results[0], some, heads)
    return bool(inside)


def _item(node: fx.Node, index: int) -> fx.Node:
    with node.graph.inserting_after(node):
        item = node.graph.call_function(operator.getitem, (node, index))
    item.meta["val"] = node.meta["val"][index]
    return item


def _merged(node: fx.Node, before: fx.Node) -> fx.Node:
    """Heads side by side, [B, S, H * D], of a [B, H, S, D] node: what it was split from, where that is in the graph."""
    if op_name(node) == "transpose" and set(node.args[1:]) in ({1, 2}, {-3, -2}):
        split = node.args[0]
        source = split.args[0] if isinstance(split, fx.Node) and op_name(split) in ("view", "reshape", "unflatten") else None
        if isinstance(source, fx.Node) and is_tensor(source) and len(shape(source)) == 3 and _same_rows(source, node):
            return source
    merged: fx.Node = emit(before, lambda x: x.transpose(1, 2).flatten(2), node)
    return merged


def _same_rows(merged: fx.Node, split: fx.Node) -> bool:
    b, s, width = shape(merged)
    return same_size(b, shape(split)[0]) and same_size(s, shape(split)[2]) and same_size(width, shape(split)[1] * shape(split)[3])


def _put(out: fx.Node, result: fx.Node, some: fx.Node | None, heads: int) -> None:
    """Give the users of an attention [B, H, S, D] its result [B, S, H * D]; those that merge the heads get it as it is."""
    if some is not None:
        result = emit(out, lambda x, seen: aten.where.ScalarOther(seen.squeeze(1), x, 0.0), result, some)
    for turned in [u for u in out.users if op_name(u) == "transpose" and set(u.args[1:]) in ({1, 2}, {-3, -2})]:
        for merged in [u for u in turned.users if op_name(u) in MERGES and _is_merge(u, result)]:
            merged.replace_all_uses_with(result)
            out.graph.erase_node(merged)
        if not turned.users:
            out.graph.erase_node(turned)
    if out.users:
        split = emit(out, lambda x: x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2), result)
        out.replace_all_uses_with(split)
    out.graph.erase_node(out)  # not left to dead code elimination: with dropout it could be random


def _is_merge(node: fx.Node, result: fx.Node) -> bool:
    return len(shape(node)) == 3 and all(same_size(a, b) for a, b in zip(shape(node), shape(result), strict=True))
