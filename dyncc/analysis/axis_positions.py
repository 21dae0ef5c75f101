"""How ops carry axes that read or write some positions along them: slices, indices, gathers, scatters, embeddings, padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dyncc.analysis.axes import Contract, Link, OpAxes, Read
from dyncc.analysis.axis_links import Rule, all_but, in_place_of, into, is_one, wrap
from dyncc.ir import argument, op_name, same_size, shape

RULES: dict[str, Rule] = {}
rule = into(RULES)


@rule("slice")
def slice_(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    own, out = shape(slots[0]), shape(node)
    dim = wrap(argument(node, "dim", 0), len(own))
    if same_size(own[dim], out[dim]) and argument(node, "step", 1) == 1:
        return OpAxes(links=[Link(i, 0, i) for i in range(len(own))])
    return all_but(node, slots, {dim}, "reads positions along it")


@rule("narrow", "index_select", "diagonal_scatter")
def narrow(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    return all_but(node, slots, {wrap(argument(node, "dim"), len(shape(slots[0])))}, "reads positions along it")


@rule("select")
def select(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    return all_but(node, slots, {wrap(argument(node, "dim"), len(shape(slots[0])))}, "reads positions along it", keepdim=False)


@rule("index")
def index(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    indices = argument(node, "indices")
    own, out = shape(slots[0]), len(shape(node))
    used = [i for i, n in enumerate(indices) if n is not None]
    if any(n.meta["val"].dtype == torch.bool for n in indices if n is not None) or used != list(range(used[0], used[-1] + 1)):
        return OpAxes(known=False)
    width = out - (len(own) - len(used))
    links = [Link(i, 0, i) for i in range(used[0])]
    links += [Link(i - len(used) + width, 0, i) for i in range(used[-1] + 1, len(own))]
    for slot in range(1, len(slots)):
        sizes = shape(slots[slot])
        links += [Link(used[0] + width - len(sizes) + j, slot, j) for j, s in enumerate(sizes) if not is_one(s)]
    same, reads = [], []
    for slot, dim in zip(range(1, len(slots)), used, strict=True):
        wide = [j for j, s in enumerate(shape(slots[slot])) if not is_one(s)]
        counted = len(wide) == 1 and counts_up(slots[slot], own[dim])
        reads.append(Read(0, dim, "reads positions along it", slot if counted else None))
        if counted:
            same.append(Contract(0, dim, slot, wide[0]))
    return OpAxes(links=links, reads=reads, same=same)


def counts_up(node: fx.Node, size: Any) -> bool:
    """Whether a node holds 0, 1, ..., size-1 (an arange, reshaped): indexing with it reads every position in order."""
    while op_name(node) in ("unsqueeze", "slice", "expand", "view", "reshape", "to", "alias", "add") and node.args:
        if op_name(node) == "add" and node.args[1] != 0:
            return False
        node = node.args[0]  # type: ignore[assignment]
    if op_name(node) != "arange" or (argument(node, "start", 0) or 0) != 0 or argument(node, "step", 1) != 1:
        return False
    return len(shape(node)) == 1 and same_size(shape(node)[0], size)


@rule("gather", "take_along_dim")
def gather(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    rank = len(shape(node))
    dim = wrap(argument(node, "dim"), rank)
    links = [Link(i, 1, i) for i in range(rank)]
    links += [Link(i, 0, i) for i in range(rank) if i != dim and same_size(shape(slots[0])[i], shape(node)[i])]
    return OpAxes(links=links, reads=[Read(0, dim, "reads positions along it")])


@rule(
    "scatter", "scatter_add", "index_copy", "index_add", "index_copy_", "scatter_", "index_put", "index_put_", "slice_scatter",
    "select_scatter",
)
def scatter(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    rank = len(shape(slots[0]))
    given = argument(node, "dim", None)
    read = set(range(rank)) if given is None else {wrap(given, rank)}
    return in_place_of(node, slots, read, "writes positions along it")


@rule("thin")
def thin(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    """Which rows of the keys and values stay is what a pass that prunes knows."""
    links = [Link(i, 0, i) for i in (0, 1, 3)]
    return OpAxes(links=links, reads=[Read(slot, 2, "picks rows of it") for slot in (0, 1)])


@rule("spread")
def spread(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    """Stands for its operand `dense` where that is given; else its rows are those of a text that is nowhere in the graph."""
    dense = argument(node, "dense")
    if dense is None:
        return OpAxes(links=[Link(i, 0, i) for i in (0, 1, 3)])
    return OpAxes(links=[Link(i, slots.index(dense), i) for i in range(4)])


@rule("embedding")
def embedding(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    rank = len(shape(node))
    return OpAxes(links=[Link(i, 1, i) for i in range(rank - 1)] + [Link(rank - 1, 0, 1)], reads=[Read(0, 0, "looks rows up in it")])


@rule("constant_pad_nd", "pad")
def pad(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    own, out = shape(slots[0]), shape(node)
    changed = {i for i in range(len(own)) if not same_size(own[i], out[i])}
    return all_but(node, slots, changed, "pads it")
