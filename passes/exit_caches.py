"""Caches that are written in place behind an exit: the rows are read from where they were made, and written when all is done.

    buffer[:, :, a:b] = new;  read buffer[:, :, :b]     ->     read cat(buffer[:, :, :a], new);  buffer[:, :, a:b] = new, last

A branch must not write. So it gives `new`, as it gives other keys, and the graph writes what came out of it: a skipped layer's projection
or its own rows. A step copies the keys that it reads behind the exit, as transformers' growing cache does in every layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from dyncc.ir import argument, aten, descendants, is_tensor, op_name, output_node, refresh, same_size, same_sizes, shape, val
from dyncc.restrict import Refusal, where

WHOLE = {"alias", "detach"}


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of a buffer [B, G, N, D], sizes or nodes of sizes; None: all of it."""

    buffer: fx.Node
    start: Any = None
    stop: Any = None


def written_keys(graph: fx.Graph, state: fx.Node, early: fx.Node) -> dict[fx.Node, fx.Node]:
    """Rows behind `state` that are appended to a buffer in place, and the node that writes them, which stands last from then on. A buffer
    that is made there in the likeness of such rows is made in that of `early`, a node in front of `state`.

    Raises:
        Refusal: something else reads the buffer behind the write.
    """
    end, behind = output_node(graph), descendants(state)
    found: dict[fx.Node, fx.Node] = {}
    for write in [n for n in graph.nodes if n in behind and op_name(n) == "copy_" and not n.users]:
        target, new = _part(write.args[0]), write.args[1]
        if target.start is None or len(shape(target.buffer)) != 4 or val(new).dtype != val(target.buffer).dtype:
            continue
        for reader in _readers(write, target):
            reader.replace_all_uses_with(_joined(reader, target, new))
        if target.buffer in behind and op_name(target.buffer) == "new_zeros":
            made = val(target.buffer)
            target.buffer.replace_input_with(target.buffer.args[0], early)  # type: ignore[arg-type]
            target.buffer.kwargs = {**target.buffer.kwargs, "dtype": made.dtype, "device": made.device}
        end.prepend(write)
        found[new] = write
    return found


def _part(node: Any) -> Part:
    """Which rows of a buffer a view is."""
    if not is_tensor(node) or not (op_name(node) in WHOLE or (op_name(node) == "slice" and argument(node, "step", 1) == 1)):
        return Part(node)
    inner, dim = _part(node.args[0]), argument(node, "dim", 0)
    if op_name(node) in WHOLE or (dim != 2 and same_size(shape(node)[dim], shape(node.args[0])[dim])):
        return inner
    if dim != 2 or inner.start is not None:
        return Part(node)
    start = argument(node, "start", 0)
    return Part(inner.buffer, 0 if start is None else start, argument(node, "end"))


def _readers(write: fx.Node, target: Part) -> list[fx.Node]:
    """The views of all rows up to those written, made behind the write."""
    views, stack = list[fx.Node](), [target.buffer]
    after = {n: i for i, n in enumerate(write.graph.nodes)}
    while stack:
        for user in stack.pop().users:
            part = _part(user)
            if part.buffer is not target.buffer:
                if after[user] > after[write] and user is not output_node(write.graph):
                    raise Refusal(f"{where(user)} reads all of a cache that is written behind the first exit; use dyncc.KVCache")
                continue
            if part.start is None:
                stack.append(user)
            elif after[user] > after[write]:
                views.append(user)
    for view in views:
        part = _part(view)
        if not same_size(val(part.start), 0) or not same_size(val(part.stop), val(target.stop)):
            raise Refusal(f"{where(view)} reads other rows of a cache than those that are held; use dyncc.KVCache")
    return views


def _joined(reader: fx.Node, target: Part, new: Any) -> fx.Node:
    """What a view of all rows holds, of the old ones and the new ones."""
    if same_size(val(target.start), 0):
        return new  # type: ignore[no-any-return]
    graph = reader.graph
    with graph.inserting_before(reader):
        old = graph.call_function(aten.slice.Tensor, (target.buffer, 2, 0, target.start))
        refresh(old)
        made = graph.call_function(aten.cat.default, ([old, new], 2))
        refresh(made)
    if not same_sizes(shape(made), shape(reader)):
        raise Refusal(f"{where(reader)} reads {list(shape(reader))} of a cache that holds {list(shape(made))}")
    return made
