"""FLOPs of a graph from its shapes: what `torch.utils.flop_counter` would count when it runs."""

from __future__ import annotations

import math

import torch
from torch import fx

from dyncc.ir import ATTENTION, ancestors, hint, is_tensor, op_name, operands, outputs, shape

RECURRENT = {"gated_linear_attention": 4, "gated_delta_rule": 6}
"""Operations a token, channel of keys and channel of values: written to the state, read from it, and read before it is replaced."""
COND = torch.ops.higher_order.cond


def count_flops(graph: fx.Graph) -> int:
    """Multiply-adds count two; symbolic sizes take their values in the example inputs; dead nodes count nothing; of the two sides of a
    condition the dearer one counts."""
    live = ancestors(n for n in outputs(graph) if isinstance(n, fx.Node))
    calls = [n for n in graph.nodes if n in live and n.op == "call_function"]
    return sum(_dearest(n) if n.target is COND else _flops(n) for n in calls if is_tensor(n) or op_name(n) in RECURRENT or n.target is COND)


def _dearest(node: fx.Node) -> int:
    modules = [getattr(node.graph.owning_module, str(body.target)) for body in node.args[1:3]]  # type: ignore[union-attr]
    return max(count_flops(module.graph) for module in modules)


def _flops(node: fx.Node) -> int:
    name = op_name(node)
    slots = operands(node)
    if name in ("linear", "mm", "bmm", "matmul"):
        return 2 * _numel(node) * _size(slots[0], -1)
    if name in ("addmm", "baddbmm"):
        return 2 * _numel(node) * _size(slots[1], -1)
    if name in ATTENTION:
        rows = _numel(node) // _size(node, -1)
        return 2 * rows * _size(slots[1], -2) * (_size(slots[0], -1) + _size(slots[2], -1))
    if name == "attend_row":
        return 2 * (_numel(node) // _size(node, -1)) * _keys_read(node) * (_size(slots[0], -1) + _size(slots[2], -1))
    if name == "score_keys":
        return 0 if node.args[3] == "recents" else 2 * _numel(slots[0]) * _size(slots[1], -2)
    if name == "score_pages":
        return 4 * _numel(slots[0]) * _size(slots[1], -2)
    if name == "attend_slots":
        return 2 * (_numel(node) // _size(node, -1)) * (_numel(slots[1]) + _numel(slots[2]))
    if name in RECURRENT:
        return RECURRENT[name] * _numel(slots[0]) * _size(slots[2], -1)
    if name in ("conv1d", "conv2d", "conv3d", "convolution"):
        return 2 * _numel(node) * math.prod(hint(s) for s in shape(slots[1])[1:])
    return 0


def _keys_read(node: fx.Node) -> int:
    """Of `dyncc::attend_row`: those that its index names, keys or whole pages, or all."""
    index, page = node.args[4], node.args[5]
    return _size(index, -1) * int(page) if isinstance(index, fx.Node) else _size(operands(node)[1], -2)


def _numel(node: fx.Node) -> int:
    return math.prod(hint(s) for s in shape(node))


def _size(node: fx.Node, dim: int) -> int:
    return hint(shape(node)[dim])
