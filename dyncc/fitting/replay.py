"""Run a part of a graph: from values that are known to the nodes that are wanted, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from dyncc.ir import ancestors, operands


@torch.no_grad()
def replay(graph: fx.Graph, known: Mapping[fx.Node, Any], wanted: Sequence[fx.Node]) -> dict[fx.Node, Any]:
    """The values of the `wanted` nodes; what they need is computed in the graph's order and freed behind its last use.

    Args:
        known: values of placeholders, and of nodes in the middle: what lies in front of those alone is not run.
    """
    needed = ancestors(wanted, known)
    left = Counter(s for n in needed for s in operands(n))
    values = {n: v for n, v in known.items() if n in left or n in wanted}
    for node in graph.nodes:
        if node not in needed:
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        values[node] = node.target(*args, **kwargs)
        left.subtract(operands(node))
        for source in set(operands(node)):
            if not left[source] and source not in wanted and source not in known:
                del values[source]
    return {n: values[n] for n in wanted}
