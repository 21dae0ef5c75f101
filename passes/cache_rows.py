"""prune-tokens over a `dyncc.KVCache`: layers behind a cut write the keys of the rows that stayed, and later steps read those alone.

In a prompt the cache's marks (kernels/thin_keys) become the short keys themselves and the positions they came from. In a step
o = softmax(q K[S]' + m[S]) V[S] with S the rows that a layer holds, ascending: mask columns are taken at their positions in the text, and a
row that nobody may see (a pad) stays hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dyncc.analysis.attention import AttentionRegion, kv_sources
from dyncc.analysis.axes import Axes
from dyncc.analysis.facts import Facts
from dyncc.ir import argument, emit, refresh, same_size, shape, val
from dyncc.kernels.thin_keys import SPREAD, THIN
from dyncc.passes.cut import Cut, size_node
from dyncc.restrict import Plan, Refusal, plan_forward, shorten, where


def marks(graph: fx.Graph, policy: str) -> list[fx.Node]:
    """Where attentions read from a layer whose cache was made with this pass."""
    return [n for n in graph.nodes if n.target is SPREAD and argument(n, "policy") == policy]


def hold_short(graph: fx.Graph, cuts: list[Cut], policy: str) -> None:
    """Of a prompt that was cut: put what layers hold in place of their marks.

    Raises:
        Refusal: the cache counts on other rows than those that stayed.
    """
    order = {n: i for i, n in enumerate(graph.nodes)}
    for mark in [n for n in graph.nodes if n.target is THIN and argument(n, "policy") == policy]:
        keys, values, count, _ = mark.args
        size, wanted = shape(keys)[2], val(count)
        before = [c for c in cuts if c.after.origin is not None and order[c.after.origin] < order[mark]]
        if not before or not same_size(size, wanted):
            raise Refusal(f"{size} rows stay where the cache counts on {wanted}; ask for the last position only (such as logits_to_keep=1)")
        kept = (keys, values, _origin(mark, before[-1]))
        for user in list(mark.users):
            user.replace_all_uses_with(kept[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(mark)
    for mark in marks(graph, policy):
        mark.replace_all_uses_with(mark.args[0])
        graph.erase_node(mark)


def _origin(before: fx.Node, cut: Cut) -> Any:
    origin, valid = cut.after.origin, cut.after.valid
    return emit(before, lambda o, *v: torch.where(v[0], o, -1) if v else o.clone(), origin, *([] if valid is None else [valid]))


def read_held(graph: fx.Graph, facts: Facts, policy: str) -> int:
    """Of a step: let attentions read the rows held; how many were served.

    Raises:
        Refusal: an attention cannot be followed from its keys to its product with the values.
    """
    left = set(marks(graph, policy))
    served = 0
    for region in facts.attention:
        pair = [n for n in kv_sources(region) if n in left]
        if not pair:
            continue
        _shorten(region, pair)
        left -= set(pair)
        served += 1
    if left:
        raise Refusal(f"no attention that dyncc understands reads {where(min(left, key=lambda n: n.name))}")
    return served


def _shorten(region: AttentionRegion, pair: list[fx.Node]) -> None:
    """Run one attention on the held rows of its marked keys and values."""
    axes = Axes(pair[0].graph)
    plan = Plan(axes.dims(pair[0])[2])
    for mark in pair:
        plan.short |= plan_forward(axes, plan.axis, mark, 2, None, (region,), lambda node, read: False).short
    held, origin = pair[0].args[:2]
    first = min(plan.short, key={n: i for i, n in enumerate(pair[0].graph.nodes)}.__getitem__)
    count, batch = size_node(first, held, 2), size_node(first, held, 0)

    def take(before: fx.Node, operand: fx.Node, dims: set[int], user: fx.Node, slot: int) -> fx.Node:
        if len(shape(operand)) != 4 or dims != {3}:
            raise Refusal(f"{where(user)} meets {operand.name} {list(shape(operand))}, which is no mask [batch, heads, rows, keys]")
        made: fx.Node = emit(before, _columns, operand, origin, count)
        return made

    for mark in pair:
        mark.args = (*mark.args[:3], count, mark.args[4])
        refresh(mark)
    shorten(axes, plan, None, None, count, batch, take, None)
    for mark in pair:
        mark.replace_all_uses_with(mark.args[0])
        mark.graph.erase_node(mark)


def _columns(mask: torch.Tensor, origin: torch.Tensor, held: Any) -> torch.Tensor:
    """Of a mask [B, H, R, N] of the whole text: the columns of `held` rows, P of the prompt from `origin` [B, P] and the newest."""
    mask = mask.expand(origin.shape[0], -1, -1, -1)
    at = origin.clamp(min=0)[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
    hidden, old = (origin < 0)[:, None, None, :], mask.gather(3, at)
    old = old & ~hidden if mask.dtype == torch.bool else old.masked_fill(hidden, torch.finfo(mask.dtype).min)
    new = held - origin.shape[1]
    return torch.cat([old, mask[:, :, :, mask.shape[3] - new :]], 3)
