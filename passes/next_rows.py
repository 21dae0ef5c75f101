"""How what comes from outside goes on behind a prompt: positions count on, content repeats its last rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from dyncc.ir import emit, op_name, val
from dyncc.passes.token_inputs import says_what
from dyncc.restrict import Refusal, where


def says_content(node: fx.Node, dim: int) -> bool:
    """Whether an input holds content (token ids, embeddings) of the rows along `dim`, and not their positions."""
    return node.op == "placeholder" and (val(node).is_floating_point() or says_what(node, dim))


def go_on(node: fx.Node, dim: int, count: int) -> fx.Node:
    """`count` rows behind those of an input or of positions, along `dim`.

    Raises:
        Refusal: nothing says how it goes on.
    """
    if op_name(node) != "arange" and (node.op != "placeholder" or node.meta.get("role") != "input"):
        raise Refusal(f"{where(node)} holds a row for each token, and nothing says how it goes on behind the prompt")
    before = next(n for n in node.graph.nodes if n.op != "placeholder") if node.op == "placeholder" else node.next
    more = _last if says_content(node, dim) else _count_on
    made: fx.Node = emit(before, lambda x: more(x, count, dim), node)
    return made


def look_up(node: fx.Node, table: fx.Node, at: fx.Node) -> fx.Node:
    """What an embedding `node` gives at positions `at`: learned positions end somewhere, and rows behind their last one stand at it."""
    rest = node.args[2:]

    def look(table: Tensor, at: Tensor) -> Tensor:
        found: Tensor = torch.ops.aten.embedding.default(table, at.clamp(max=table.shape[0] - 1), *rest)
        return found

    made: fx.Node = emit(node.next, look, table, at)
    return made


def _last(rows: Tensor, count: int, dim: int) -> Tensor:
    at = torch.arange(count, device=rows.device) + (rows.shape[dim] - count)
    return rows.index_select(dim, at.clamp(min=0))


def _count_on(positions: Tensor, count: int, dim: int) -> Tensor:
    more = torch.arange(1, count + 1, device=positions.device, dtype=positions.dtype)
    wide: list[Any] = [1] * positions.dim()
    wide[dim] = count
    return positions.narrow(dim, positions.shape[dim] - 1, 1) + more.view(wide)
