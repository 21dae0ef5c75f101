"""How products carry axes: linear layers, matrix products, attention, convolutions. What they sum over is contracted."""

from __future__ import annotations

from torch import fx

from dyncc.analysis.axes import Contract, Link, OpAxes, Read
from dyncc.analysis.axis_links import Rule, broadcast, into, is_one
from dyncc.ir import ATTENTION, argument, same_size, shape

RULES: dict[str, Rule] = {}
rule = into(RULES)


@rule("linear")
def linear(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    x, rank = shape(slots[0]), len(shape(node))
    links = [Link(i, 0, i) for i in range(len(x) - 1)] + [Link(rank - 1, 1, 0)]
    if len(slots) > 2:
        links.append(Link(rank - 1, 2, 0))
    return OpAxes(links=links, contracts=[Contract(0, len(x) - 1, 1, 1)])


@rule("attend_slots")
def attend_slots(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    rank = len(shape(node))
    links = [Link(i, 0, i) for i in range(rank - 1)] + [Link(rank - 1, 2, 1)]
    return OpAxes(links=links, contracts=[Contract(0, rank - 1, 1, 1), Contract(1, 0, 2, 0)])


def _product(node: fx.Node, slots: list[fx.Node], a: int, b: int) -> OpAxes:
    sa, sb, out = shape(slots[a]), shape(slots[b]), len(shape(node))
    links: list[Link] = []
    for slot, own in ((a, sa), (b, sb)):
        offset = out - len(own)
        links += [Link(i + offset, slot, i) for i in range(len(own) - 2) if i + offset >= 0 and not is_one(own[i])]
    if len(sa) > 1:
        links.append(Link(out - 2 if len(sb) > 1 else out - 1, a, len(sa) - 2))
    if len(sb) > 1:
        links.append(Link(out - 1, b, len(sb) - 1))
    return OpAxes(links=links, contracts=[Contract(a, len(sa) - 1, b, max(0, len(sb) - 2))])


@rule("matmul", "bmm", "mm", "mv", "dot")
def matmul(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    return _product(node, slots, 0, 1)


@rule("addmm", "baddbmm", "addbmm")
def addmm(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    op = _product(node, slots, 1, 2)
    op.links += broadcast(node, slots, 0)
    return op


@rule(*ATTENTION)
def attention(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    rank, q = len(shape(node)), shape(slots[0])
    links = [Link(i, 0, i) for i in range(rank - 1)] + [Link(rank - 1, 2, rank - 1)]
    for slot in (1, 2):
        links += [Link(i, slot, i) for i in range(rank - 2) if same_size(shape(slots[slot])[i], q[i])]
    contracts = [Contract(0, rank - 1, 1, rank - 1), Contract(1, rank - 2, 2, rank - 2)]
    mask = argument(node, "attn_mask")
    for slot in range(3, len(slots)):  # a mask, sinks, a gate: all broadcast, and only a mask counts keys
        own = shape(slots[slot])
        offset, last = rank - len(own), len(own) - 1
        if slots[slot] is mask and not is_one(own[last]):
            contracts.append(Contract(1, rank - 2, slot, last))
        links += [Link(i + offset, slot, i) for i in range(last + (slots[slot] is argument(node, "gate"))) if not is_one(own[i])]
    counted = next((name for name in ("window", "prefix", "slopes") if argument(node, name)), None)
    reads = [Read(1, rank - 2, f"counts a {counted.removesuffix('s')} along it")] if counted else []
    return OpAxes(links=links, contracts=contracts, reads=reads)


@rule("conv1d", "conv2d", "conv3d", "convolution", "_convolution", "conv_transpose2d", "conv_transpose1d")
def convolution(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    rank = len(shape(slots[0]))
    reads = [Read(0, 1, "contracts it with a weight")] + [Read(0, i, "convolves over it") for i in range(2, rank)]
    return OpAxes(links=[Link(0, 0, 0), Link(1, 1, 0)], reads=reads)
