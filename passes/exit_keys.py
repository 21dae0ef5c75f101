"""Keys and values of layers that a row skips: what these layers' own projections make of the state that the row left with.

k_j = W_k norm_j(h_exit), v_j likewise, for every skipped layer j (CALM, Schuster et al., NeurIPS 2022), so that later tokens find as many
keys at all layers. An approximation of what the layers would have stored.
"""

from __future__ import annotations

from torch import fx

from dyncc.analysis.facts import Facts
from dyncc.analysis.layers import Stack
from dyncc.ir import Program, ancestors, descendants, hoist, outputs
from dyncc.region import copy_nodes


def keys_behind(program: Program, facts: Facts, state: fx.Node, until: fx.Node | None) -> list[fx.Node]:
    """The keys and values that the graph returns and computes from `state`, but not from the later state `until`."""
    inside = descendants(state) - (descendants(until) if until is not None else set())
    returned = outputs(program.graph)
    return list(dict.fromkeys(returned[i] for i in sorted(facts.kv_outputs) if returned[i] in inside))


def projected(stack: Stack, keys: fx.Node, state: fx.Node, before: fx.Node) -> fx.Node:
    """A layer's keys or values, computed as in that layer, from an earlier state in place of its own."""
    needed = ancestors([keys])
    layer = next(x for x in reversed(stack.layers) if x.start in needed)
    cone = descendants(layer.start) & needed
    nodes = [n for n in keys.graph.nodes if n in cone]
    order = {n: i for i, n in enumerate(keys.graph.nodes)}
    for operand in {n for node in nodes for n in node.all_input_nodes if n not in cone and n is not layer.start}:
        hoist(operand, before, order)
    made: fx.Node = copy_nodes(nodes, keys.graph, {layer.start: state}, before)[keys]
    return made
