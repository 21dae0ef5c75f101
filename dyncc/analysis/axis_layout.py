"""How ops carry axes that only lay values out in another way: transposes, views, broadcasts, joins and splits."""

from __future__ import annotations

from torch import fx

from dyncc.analysis.axes import Link, OpAxes, Read
from dyncc.analysis.axis_links import Rule, all_but, broadcast, into, is_one, wrap
from dyncc.ir import argument, op_name, shape

RULES: dict[str, Rule] = {}
rule = into(RULES)


@rule("transpose", "permute", "t", "swapaxes", "swapdims", "numpy_T", "mT", "adjoint", "movedim")
def permute(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    rank, name = len(shape(slots[0])), op_name(node)
    order = list(range(rank))
    if name == "permute":
        order = [wrap(d, rank) for d in argument(node, "dims")]
    elif name in ("transpose", "swapaxes", "swapdims"):
        a, b = (wrap(d, rank) for d in node.args[1:3])  # type: ignore[operator]
        order[a], order[b] = order[b], order[a]
    elif name in ("mT", "adjoint"):
        order[-1], order[-2] = order[-2], order[-1]
    elif name == "movedim":
        source, target = (x if isinstance(x, (list, tuple)) else [x] for x in node.args[1:3])
        pairs = {wrap(t, rank): wrap(s, rank) for s, t in zip(source, target, strict=True)}  # type: ignore[arg-type]
        rest = iter([i for i in range(rank) if i not in pairs.values()])
        order = [pairs[i] if i in pairs else next(rest) for i in range(rank)]
    else:
        order.reverse()
    return OpAxes(links=[Link(i, 0, d) for i, d in enumerate(order)])


@rule("unsqueeze")
def unsqueeze(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    rank = len(shape(node))
    at = wrap(argument(node, "dim"), rank)
    return OpAxes(links=[Link(i if i < at else i + 1, 0, i) for i in range(rank - 1)])


@rule("squeeze")
def squeeze(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    own = shape(slots[0])
    given = argument(node, "dim")
    dims = range(len(own)) if given is None else given if isinstance(given, (list, tuple)) else [given]
    gone = {wrap(d, len(own)) for d in dims if is_one(own[d])}
    return OpAxes(links=[Link(out, 0, i) for out, i in enumerate(i for i in range(len(own)) if i not in gone)])


@rule("expand", "expand_as", "broadcast_to")
def expand(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    return OpAxes(links=broadcast(node, slots, 0))


@rule("repeat")
def repeat(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    times, own = argument(node, "repeats"), shape(slots[0])
    offset = len(times) - len(own)
    same = [i for i in range(len(own)) if is_one(times[i + offset])]
    reads = [Read(0, i, "repeats it") for i in range(len(own)) if i not in same and not is_one(own[i])]
    return OpAxes(links=[Link(i + offset, 0, i) for i in same], reads=reads)


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "_reshape_alias", "view_copy")
def view(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    return OpAxes(regroups=True)


@rule("cat", "concat", "concatenate")
def cat(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    rank = len(shape(node))
    dim = wrap(argument(node, "dim", 0), rank)
    alike = [s for s in range(len(slots)) if len(shape(slots[s])) == rank]
    full = [s for s in alike if not (isinstance(shape(slots[s])[dim], int) and shape(slots[s])[dim] == 0)]
    links = [Link(i, s, i) for s in alike for i in range(rank) if i != dim]
    if len(full) == 1:
        return OpAxes(links=[*links, Link(dim, full[0], dim)])
    return OpAxes(links=links, reads=[Read(s, dim, "concatenates it with other rows") for s in full])


@rule("stack")
def stack(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    rank = len(shape(node))
    dim = wrap(argument(node, "dim", 0), rank)
    return OpAxes(links=[Link(i if i < dim else i + 1, s, i) for s in range(len(slots)) for i in range(rank - 1)])


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def split(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    return all_but(node, slots, {wrap(argument(node, "dim", 0), len(shape(slots[0])))}, "splits it")


@rule("unbind")
def unbind(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    return all_but(node, slots, {wrap(argument(node, "dim", 0), len(shape(slots[0])))}, "splits it", keepdim=False)


@rule("getitem")
def getitem(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    source = slots[0]
    if op_name(source) in ("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk"):
        dim = wrap(argument(source, "dim", 0), len(shape(node)))
        return OpAxes(links=[Link(i, 0, i) for i in range(len(shape(node))) if i != dim])
    if not shape(source) or len(shape(source)) != len(shape(node)):
        return OpAxes(known=False)
    return OpAxes(links=[Link(i, 0, i) for i in range(len(shape(node)))])
