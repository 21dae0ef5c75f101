"""Edits of a graph that are taken back where they end in a refusal: one of several places must not be left half rewritten."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx

from dyncc.refusal import Refusal


@contextmanager
def undone_if_refused(graph: fx.Graph) -> Iterator[None]:
    """Inside, edits may add nodes and change what nodes take; after a `Refusal` the graph is what it was. No node may be erased."""
    before = [(n, n.args, n.kwargs, dict(n.meta)) for n in graph.nodes]
    try:
        yield
    except Refusal:
        for node, args, kwargs, meta in before:
            node.args, node.kwargs = args, kwargs
            node.meta = meta
        known = {node for node, *_ in before}
        for node in reversed([n for n in graph.nodes if n not in known]):
            graph.erase_node(node)
        raise
