"""Keys and values of layers that a row skips: what these layers' own projections make of the state that the row left with.

k_j = W_k norm_j(h_exit), v_j likewise, for every skipped layer j (CALM, Schuster et al., NeurIPS 2022), so that later tokens find as many
keys at all layers. An approximation of what the layers would have stored.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from dyncc.analysis.facts import Facts
from dyncc.analysis.layers import Stack
from dyncc.ir import Program, ancestors, argument, descendants, hoist, op_name, output_node, outputs
from dyncc.region import copy_nodes


def stored_keys(program: Program, facts: Facts, stack: Stack) -> dict[fx.Node, fx.Node]:
    """The keys and values that the layers add to what the graph returns, and who reads them for that.

    A step returns cat([past, new]), which its attention reads too. The output gets a copy of that cat of its own, so that a branch gives
    `new` alone: the past goes into no branch's result, and every layer's cache grows by one row whoever left.
    """
    end, found = output_node(program.graph), dict[fx.Node, fx.Node]()
    late = descendants(stack.layers[0].start)
    for keys in dict.fromkeys(outputs(program.graph)[i] for i in sorted(facts.kv_outputs)):
        parts = list(argument(keys, "tensors", ())) if op_name(keys) == "cat" else []
        if len(parts) != 2 or parts[0] in late or parts[1] not in late:
            found[keys] = end
            continue
        copied = copy_nodes([keys], program.graph, {}, end)[keys]
        end.replace_input_with(keys, copied)
        found[parts[1]] = copied
    return found


def keys_behind(stored: Iterable[fx.Node], state: fx.Node, until: fx.Node | None) -> list[fx.Node]:
    """Those of the `stored` keys and values that are computed from `state`, but not from the later state `until`."""
    inside = descendants(state) - (descendants(until) if until is not None else set())
    return [n for n in stored if n in inside]


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
