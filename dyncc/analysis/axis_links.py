"""What the axis rules of all families are made from: which dimensions of an op's operands its result carries on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from dyncc.analysis.axes import Link, OpAxes, Read
from dyncc.ir import shape

Rule = Callable[[fx.Node, list[fx.Node]], OpAxes]
"""A rule gets the node and its operand slots."""


def into(table: dict[str, Rule]) -> Callable[..., Callable[[Rule], Rule]]:
    """A decorator that enters a rule in a family's table, by the bare names of its ops."""

    def rule(*names: str) -> Callable[[Rule], Rule]:
        def register(function: Rule) -> Rule:
            table.update(dict.fromkeys(names, function))
            return function

        return register

    return rule


def wrap(dim: int, rank: int) -> int:
    return dim % rank if rank else 0


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def broadcast(node: fx.Node, slots: list[fx.Node], slot: int) -> list[Link]:
    """Right-aligned links of one operand; size-1 dimensions carry nothing."""
    out, own = shape(node), shape(slots[slot])
    offset = len(out) - len(own)
    carried = (i for i in range(len(own)) if i + offset >= 0 and (not is_one(own[i]) or is_one(out[i + offset])))
    return [Link(i + offset, slot, i) for i in carried]


def all_but(node: fx.Node, slots: list[fx.Node], gone: set[int], why: str, keepdim: bool = True) -> OpAxes:
    """All dimensions of operand 0 are carried but those in `gone`, which are read."""
    rank, out, links = len(shape(slots[0])), 0, []
    for i in range(rank):
        if i not in gone:
            links.append(Link(out, 0, i))
        if i not in gone or keepdim:
            out += 1
    return OpAxes(links=links, reads=[Read(0, i, why) for i in sorted(gone)])


def in_place_of(node: fx.Node, slots: list[fx.Node], read: set[int], why: str) -> OpAxes:
    """Every dimension is carried, and some are read as well."""
    rank = len(shape(slots[0]))
    return OpAxes(links=[Link(i, 0, i) for i in range(rank)], reads=[Read(0, i, why) for i in sorted(read)])


def elementwise(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    """Every dimension of every operand is carried."""
    tensors = [i for i, n in enumerate(slots) if isinstance(n.meta.get("val"), torch.Tensor)]
    links = [link for s in tensors for link in broadcast(node, slots, s)]
    return OpAxes(links=links)
