"""The residual spine and the layers on it, by dominators of the dataflow.

Attention regions that share one query axis are a *stack*. A stack's sink is the last node that still carries that axis; the nodes that
dominate the sink are its spine. Between two spine nodes lie the regions: layer l ends at the spine node that feeds attention l+1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import networkx as nx
from torch import fx

from dyncc.analysis.attention import AttentionRegion
from dyncc.analysis.axes import Axes, Dim
from dyncc.ir import ancestors, descendants, is_tensor, op_name, outputs, shape, val

NORMS = {"layer_norm", "rms_norm", "_fused_rms_norm"}


@dataclass(frozen=True)
class Layer:
    """Layer `index` of a stack: its attention, the spine node it starts from, the one after its attention, and the one it ends at."""

    index: int
    attention: AttentionRegion
    start: fx.Node
    middle: fx.Node
    end: fx.Node


@dataclass(frozen=True)
class Stack:
    """Layers over one token axis. `dim` is where the token axis stands in the spine nodes; `batch` may be () when it is 1. `tail` are later
    attentions with other queries over the same keys: pooling heads, a last layer of which only one row is computed."""

    axis: Dim
    batch: Dim
    dim: int
    layers: tuple[Layer, ...]
    spine: tuple[fx.Node, ...]
    sink: fx.Node
    tail: tuple[AttentionRegion, ...] = ()


def find_stacks(graph: fx.Graph, axes: Axes, regions: tuple[AttentionRegion, ...]) -> tuple[tuple[Stack, ...], tuple[str, ...]]:
    """The stacks of a graph, deepest first, and why any attention stands in none."""
    groups: dict[Dim, list[AttentionRegion]] = {}
    tails: dict[Dim, list[AttentionRegion]] = {}
    misses: list[str] = []
    for region in regions:
        axis, keys = axes.dims(region.q)[-2], axes.dims(region.v)[-2]
        (groups if axis else tails).setdefault(axis or keys, []).append(region)
    alone = [r for keys, members in tails.items() if keys not in groups for r in members]
    if alone:
        misses.append(f"{len(alone)} attentions of one query row ({alone[0].out.name}, ...) stand on no token axis")
    stacks = []
    for axis, members in groups.items():
        found = _stack(graph, axes, axis, members)
        if isinstance(found, Stack):
            found = replace(found, tail=tuple(tails.get(axis, ())))
        if isinstance(found, str):
            misses.append(found)
        else:
            stacks.append(found)
    return tuple(sorted(stacks, key=lambda s: -len(s.layers))), tuple(misses)


def find_row_stack(graph: fx.Graph, axes: Axes, regions: tuple[AttentionRegion, ...]) -> Stack | None:
    """The stack of a decoding step, whose attentions have one query row each: its residual stream [B, 1, C] has no token axis to follow."""
    alone = [r for r in regions if not axes.dims(r.q)[-2]]
    found = _stack(graph, axes, (), alone) if alone and len(alone) == len(regions) else None
    return found if isinstance(found, Stack) else None


def _carries(axes: Axes, axis: Dim, node: fx.Node) -> bool:
    """Whether a node may be a state of the stream: it holds the token axis once; where that is one row, it is [B, 1, C]."""
    if not axis:
        return len(shape(node)) == 3 and isinstance(shape(node)[1], int) and shape(node)[1] == 1
    return len(axes.places(node, axis)) == 1


def _stack(graph: fx.Graph, axes: Axes, axis: Dim, members: list[AttentionRegion]) -> Stack | str:
    order = {n: i for i, n in enumerate(graph.nodes)}
    reach = descendants(members[-1].out)
    live = ancestors(n for n in outputs(graph) if isinstance(n, fx.Node))
    carrying = [n for n in reach if n in live and n.op == "call_function" and is_tensor(n) and _carries(axes, axis, n)]
    carrying = [n for n in carrying if val(n).is_floating_point()]
    if not carrying:
        return f"attention {members[0].index}: no node after the last attention carries its token axis"
    sink = max(carrying, key=lambda n: order[n])
    inside = ancestors([sink]) - {r.mask for r in members}
    failures: list[str] = []
    for source in _sources(inside, order):
        chain = _dominators(source, sink, inside)
        chain = {n for n in chain if is_tensor(n) and val(n).is_floating_point() and _carries(axes, axis, n)}
        spine = sorted(chain, key=lambda n: order[n])
        found = _layers(axes, axis, members, spine, sink, order)
        if isinstance(found, Stack):
            return found
        failures.append(found)
    return failures[0] if failures else f"attention {members[0].index}: no input reaches it"


def _sources(inside: set[fx.Node], order: dict[fx.Node, int]) -> list[fx.Node]:
    """The inputs that activations may flow from, those that reach most first."""
    roots = [n for n in inside if n.op == "placeholder" and is_tensor(n) and n.meta.get("role") == "input"]
    return sorted(roots, key=lambda n: (-len(descendants(n) & inside), order[n]))


def _dominators(source: fx.Node, sink: fx.Node, inside: set[fx.Node]) -> set[fx.Node]:
    """The nodes that every path from one input to the sink goes through, the input (it may hold the embedded tokens) among them."""
    reach = descendants(source) & inside
    flow = nx.DiGraph()
    flow.add_node(source)
    for node in reach:
        flow.add_edges_from((n, node) for n in node.all_input_nodes if is_tensor(node) and (n in reach or n is source))
    if sink not in flow or not nx.has_path(flow, source, sink):
        return set()
    tree = nx.immediate_dominators(flow.subgraph(nx.descendants(flow, source) | {source}), source)
    chain, node = {source}, sink
    while node is not source:
        chain.add(node)
        node = tree[node]
    return chain


def _layers(
    axes: Axes, axis: Dim, members: list[AttentionRegion], spine: list[fx.Node], sink: fx.Node, order: dict[fx.Node, int]
) -> Stack | str:
    starts: list[fx.Node] = []
    for region in members:
        before = ancestors([region.q, region.k, region.v])
        feeding = [n for n in spine if n in before]
        if not feeding:
            return f"attention {region.index}: no residual spine node feeds it"
        starts.append(feeding[-1])
    if len(set(starts)) < len(starts):
        return f"attention {members[0].index}: no residual spine lies between the attentions"
    after = [_behind(r.out, spine, order) for r in members]
    if any(not a for a in after):
        return f"attention {next(r.index for r, a in zip(members, after, strict=True) if not a)}: it does not return to the residual spine"
    last = last_residual(after[-1], starts[-1])
    ends = [*starts[1:], last]
    layers = tuple(
        Layer(i, region, start, _middle(start, follow, end, order), end)
        for i, (region, start, follow, end) in enumerate(zip(members, starts, after, ends, strict=True))
    )
    dims = axes.dims(starts[-1])
    place = axes.places(starts[-1], axis)[0] if axis else 1
    others = [d for i, d in enumerate(dims) if i < place]
    batch = others[0] if len(others) == 1 else ()
    return Stack(axis, batch, place, layers, tuple(spine), sink)


def _behind(out: fx.Node, spine: list[fx.Node], order: dict[fx.Node, int]) -> list[fx.Node]:
    reach = descendants(out)
    return [n for n in spine if order[n] > order[out] and n in reach]


def last_residual(after: list[fx.Node], start: fx.Node) -> fx.Node:
    """Where the last layer ends: the last residual add behind its attention; with post-norm, the norm that follows it."""
    adds = [
        n
        for n in after
        if op_name(n) in ("add", "add_") and len([m for m in n.all_input_nodes if is_tensor(m)]) > 1 and shape(n) == shape(start)
    ]
    if not adds:
        return after[0]
    if op_name(start) in NORMS:
        behind = after[after.index(adds[-1]) :]
        return next((n for n in behind if op_name(n) in NORMS), adds[-1])
    return adds[-1]


def _middle(start: fx.Node, follow: list[fx.Node], end: fx.Node, order: dict[fx.Node, int]) -> fx.Node:
    inside = [n for n in follow if order[n] <= order[end]]
    if op_name(start) in NORMS:
        inside = [n for n in inside if op_name(n) in NORMS]
    return inside[0] if inside else end
