"""Rows behind a prompt that were trained: embeddings of their own, and adapters of linear layers that act on them alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx
from torch.nn import functional as F

from dyncc.ir import emit, operands, same_size, shape
from dyncc.restrict import Refusal, where


@dataclass(frozen=True)
class Given:
    """What was trained for the rows: their embeddings `rows` [P, C], and by weights [out, in] of linear layers `down` [r, in] and `up`
    [out, r], whose product times `scale` is added to the weight."""

    rows: fx.Node
    adapters: Mapping[fx.Node, tuple[fx.Node, fx.Node]]
    scale: float


def embedded(node: fx.Node, rows: fx.Node) -> fx.Node:
    """The rows in place of what an embedding `node` [B, T, C] would give them.

    Raises:
        Refusal: they are not as wide.
    """
    if len(shape(node)) != 3 or not same_size(shape(node)[2], shape(rows)[1]):
        raise Refusal(f"{where(node)} gives {list(shape(node))}, the rows given are {list(shape(rows))}")
    made: fx.Node = emit(node.next, lambda x, rows: rows.to(x).expand(x.shape[0], -1, -1), node, rows)
    return made


def adapted(node: fx.Node, made: fx.Node, given: Given) -> fx.Node:
    """`made`, which a linear layer `node` gives for the rows, with its adapter; `made` itself where the layer has none."""
    adapter, scale = given.adapters.get(operands(node)[1]), given.scale
    if adapter is None:
        return made

    def add(whole: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return whole + scale * F.linear(F.linear(x, down.to(x)), up.to(x))

    wider: fx.Node = emit(node.next if made.next is node.next else made.next, add, made, operands(made)[0], *adapter)
    return wider
