"""How each op carries axes: one small rule per family of ATen ops, found by the op's bare name.

A rule gets the node and its operand slots and returns an `OpAxes`. To teach dyncc an op, add its name to a family below or write a rule.
An op with no rule breaks the classes and is named wherever that stops a rewrite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from dyncc.analysis.axes import Contract, Link, OpAxes, Read
from dyncc.ir import ATTENTION, argument, op_name, same_size, shape

Rule = Callable[[fx.Node, list[fx.Node]], OpAxes]
RULES: dict[str, Rule] = {}

ELEMENTWISE = {
    "add", "sub", "rsub", "mul", "div", "true_divide", "floor_divide", "remainder", "fmod", "pow", "neg", "abs", "sign", "square", "sqrt",
    "rsqrt", "reciprocal", "exp", "exp2", "expm1", "log", "log2", "log1p", "sin", "cos", "tan", "tanh", "atan", "erf", "sigmoid", "logit",
    "relu", "relu6", "gelu", "silu", "mish", "elu", "selu", "celu", "softplus", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu",
    "threshold", "clamp", "clamp_min", "clamp_max", "clip", "maximum", "minimum", "where", "masked_fill", "eq", "ne", "lt", "le", "gt",
    "ge", "logical_and", "logical_or", "logical_not", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_not", "bitwise_xor", "__and__",
    "__or__", "__xor__", "isnan", "isinf", "isfinite", "nan_to_num", "floor", "ceil", "round", "trunc", "to", "_to_copy", "type_as",
    "clone", "contiguous", "alias", "detach", "lift_fresh_copy", "lift_fresh", "dropout", "feature_dropout", "native_dropout",
    "alpha_dropout", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "bernoulli", "lerp", "addcmul",
    "addcdiv", "ldexp", "float_power", "positive", "isneginf", "isposinf", "heaviside", "copysign", "xlogy", "special_expit", "view_as",
    "partly_read",
}  # fmt: skip


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def rule_for(node: fx.Node) -> Rule:
    name = op_name(node)
    if name in RULES:
        return RULES[name]
    plain = name.removesuffix("_")
    target = node.target
    pointwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    if pointwise or name in ELEMENTWISE or plain in ELEMENTWISE:
        return elementwise
    return unknown


def unknown(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    return OpAxes(known=False)


def _wrap(dim: int, rank: int) -> int:
    return dim % rank if rank else 0


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _tensor_slots(slots: list[fx.Node]) -> list[int]:
    return [i for i, n in enumerate(slots) if isinstance(n.meta.get("val"), torch.Tensor)]


def _broadcast(node: fx.Node, slots: list[fx.Node], slot: int, dims: range | None = None) -> list[Link]:
    """Right-aligned links of one operand; size-1 dimensions carry nothing."""
    out, own = shape(node), shape(slots[slot])
    offset = len(out) - len(own)
    picked = range(len(own)) if dims is None else dims
    return [Link(i + offset, slot, i) for i in picked if i + offset >= 0 and (not _is_one(own[i]) or _is_one(out[i + offset]))]


def elementwise(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    links = [link for s in _tensor_slots(slots) for link in _broadcast(node, slots, s)]
    return OpAxes(links=links)


def _except(node: fx.Node, slots: list[fx.Node], gone: set[int], why: str, keepdim: bool = True) -> OpAxes:
    """All dimensions of operand 0 are carried but those in `gone`, which are read."""
    rank, out, links = len(shape(slots[0])), 0, []
    for i in range(rank):
        if i not in gone:
            links.append(Link(out, 0, i))
        if i not in gone or keepdim:
            out += 1
    return OpAxes(links=links, reads=[Read(0, i, why) for i in sorted(gone)])


def _in_place_of(node: fx.Node, slots: list[fx.Node], read: set[int], why: str) -> OpAxes:
    """Every dimension is carried, and some are read as well."""
    rank = len(shape(slots[0]))
    return OpAxes(links=[Link(i, 0, i) for i in range(rank)], reads=[Read(0, i, why) for i in sorted(read)])


@rule("linear")
def linear(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    x, rank = shape(slots[0]), len(shape(node))
    links = [Link(i, 0, i) for i in range(len(x) - 1)] + [Link(rank - 1, 1, 0)]
    if len(slots) > 2:
        links.append(Link(rank - 1, 2, 0))
    return OpAxes(links=links, contracts=[Contract(0, len(x) - 1, 1, 1)])


def _product(node: fx.Node, slots: list[fx.Node], a: int, b: int) -> OpAxes:
    sa, sb, out = shape(slots[a]), shape(slots[b]), len(shape(node))
    links: list[Link] = []
    for slot, own in ((a, sa), (b, sb)):
        offset = out - len(own)
        links += [Link(i + offset, slot, i) for i in range(len(own) - 2) if i + offset >= 0 and not _is_one(own[i])]
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
    op.links += _broadcast(node, slots, 0)
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
        if slots[slot] is mask and not _is_one(own[last]):
            contracts.append(Contract(1, rank - 2, slot, last))
        links += [Link(i + offset, slot, i) for i in range(last + (slots[slot] is argument(node, "gate"))) if not _is_one(own[i])]
    counted = next((name for name in ("window", "prefix", "slopes") if argument(node, name)), None)
    reads = [Read(1, rank - 2, f"counts a {counted.removesuffix('s')} along it")] if counted else []
    return OpAxes(links=links, contracts=contracts, reads=reads)


@rule("layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    rank, n = len(shape(slots[0])), len(argument(node, "normalized_shape"))
    op = _in_place_of(node, slots, set(range(rank - n, rank)), "normalises over it")
    op.links += [link for s in range(1, len(slots)) for link in _broadcast(node, slots, s)]
    return op


@rule("batch_norm", "group_norm", "instance_norm", "_native_batch_norm_legit", "native_batch_norm")
def batch_norm(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    rank = len(shape(slots[0]))
    return _in_place_of(node, slots, set(range(rank)), "normalises over it")


@rule(
    "softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "logcumsumexp", "flip", "roll", "sort",
    "argsort", "tril", "triu", "renorm", "glu",
)
def along(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    rank, name = len(shape(slots[0])), op_name(node)
    if name in ("tril", "triu"):
        return _in_place_of(node, slots, {rank - 2, rank - 1}, "reads positions along it")
    given = argument(node, "dims", argument(node, "dim", -1))
    dims = {_wrap(d, rank) for d in (given if isinstance(given, (list, tuple)) else [given])} or set(range(rank))
    if name == "glu":
        return _except(node, slots, dims, "halves it")
    why = "takes a softmax over it" if "softmax" in name else "reads positions along it"
    return _in_place_of(node, slots, dims, why)


@rule("transpose", "permute", "t", "swapaxes", "swapdims", "numpy_T", "mT", "adjoint", "movedim")
def permute(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    rank, name = len(shape(slots[0])), op_name(node)
    order = list(range(rank))
    if name == "permute":
        order = [_wrap(d, rank) for d in argument(node, "dims")]
    elif name in ("transpose", "swapaxes", "swapdims"):
        a, b = (_wrap(d, rank) for d in node.args[1:3])  # type: ignore[operator]
        order[a], order[b] = order[b], order[a]
    elif name in ("mT", "adjoint"):
        order[-1], order[-2] = order[-2], order[-1]
    elif name == "movedim":
        source, target = (x if isinstance(x, (list, tuple)) else [x] for x in node.args[1:3])
        pairs = {_wrap(t, rank): _wrap(s, rank) for s, t in zip(source, target, strict=True)}  # type: ignore[arg-type]
        rest = iter([i for i in range(rank) if i not in pairs.values()])
        order = [pairs[i] if i in pairs else next(rest) for i in range(rank)]
    else:
        order.reverse()
    return OpAxes(links=[Link(i, 0, d) for i, d in enumerate(order)])


@rule("unsqueeze")
def unsqueeze(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    rank = len(shape(node))
    at = _wrap(argument(node, "dim"), rank)
    return OpAxes(links=[Link(i if i < at else i + 1, 0, i) for i in range(rank - 1)])


@rule("squeeze")
def squeeze(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    own = shape(slots[0])
    given = argument(node, "dim")
    dims = range(len(own)) if given is None else given if isinstance(given, (list, tuple)) else [given]
    gone = {_wrap(d, len(own)) for d in dims if _is_one(own[d])}
    return OpAxes(links=[Link(out, 0, i) for out, i in enumerate(i for i in range(len(own)) if i not in gone)])


@rule("expand", "expand_as", "broadcast_to")
def expand(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    return OpAxes(links=_broadcast(node, slots, 0))


@rule("repeat")
def repeat(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    times, own = argument(node, "repeats"), shape(slots[0])
    offset = len(times) - len(own)
    same = [i for i in range(len(own)) if _is_one(times[i + offset])]
    reads = [Read(0, i, "repeats it") for i in range(len(own)) if i not in same and not _is_one(own[i])]
    return OpAxes(links=[Link(i + offset, 0, i) for i in same], reads=reads)


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "_reshape_alias", "view_copy")
def view(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    return OpAxes(regroups=True)


@rule("slice")
def slice_(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    own, out = shape(slots[0]), shape(node)
    dim = _wrap(argument(node, "dim", 0), len(own))
    if same_size(own[dim], out[dim]) and argument(node, "step", 1) == 1:
        return OpAxes(links=[Link(i, 0, i) for i in range(len(own))])
    return _except(node, slots, {dim}, "reads positions along it")


@rule("narrow", "index_select", "diagonal_scatter")
def narrow(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    return _except(node, slots, {_wrap(argument(node, "dim"), len(shape(slots[0])))}, "reads positions along it")


@rule("select")
def select(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    return _except(node, slots, {_wrap(argument(node, "dim"), len(shape(slots[0])))}, "reads positions along it", keepdim=False)


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
        links += [Link(used[0] + width - len(sizes) + j, slot, j) for j, s in enumerate(sizes) if not _is_one(s)]
    same, reads = [], []
    for slot, dim in zip(range(1, len(slots)), used, strict=True):
        wide = [j for j, s in enumerate(shape(slots[slot])) if not _is_one(s)]
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
    dim = _wrap(argument(node, "dim"), rank)
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
    read = set(range(rank)) if given is None else {_wrap(given, rank)}
    return _in_place_of(node, slots, read, "writes positions along it")


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


@rule("cat", "concat", "concatenate")
def cat(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    rank = len(shape(node))
    dim = _wrap(argument(node, "dim", 0), rank)
    alike = [s for s in range(len(slots)) if len(shape(slots[s])) == rank]
    full = [s for s in alike if not (isinstance(shape(slots[s])[dim], int) and shape(slots[s])[dim] == 0)]
    links = [Link(i, s, i) for s in alike for i in range(rank) if i != dim]
    if len(full) == 1:
        return OpAxes(links=[*links, Link(dim, full[0], dim)])
    return OpAxes(links=links, reads=[Read(s, dim, "concatenates it with other rows") for s in full])


@rule("stack")
def stack(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    rank = len(shape(node))
    dim = _wrap(argument(node, "dim", 0), rank)
    return OpAxes(links=[Link(i if i < dim else i + 1, s, i) for s in range(len(slots)) for i in range(rank - 1)])


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def split(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    return _except(node, slots, {_wrap(argument(node, "dim", 0), len(shape(slots[0])))}, "splits it")


@rule("unbind")
def unbind(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    return _except(node, slots, {_wrap(argument(node, "dim", 0), len(shape(slots[0])))}, "splits it", keepdim=False)


@rule("getitem")
def getitem(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    source = slots[0]
    if op_name(source) in ("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk"):
        dim = _wrap(argument(source, "dim", 0), len(shape(node)))
        return OpAxes(links=[Link(i, 0, i) for i in range(len(shape(node))) if i != dim])
    if not shape(source) or len(shape(source)) != len(shape(node)):
        return OpAxes(known=False)
    return OpAxes(links=[Link(i, 0, i) for i in range(len(shape(node)))])


@rule(
    "mean", "sum", "amax", "amin", "any", "all", "argmax", "argmin", "var", "std", "norm", "linalg_vector_norm", "logsumexp", "prod",
    "max", "min", "count_nonzero", "median",
)
def reduce(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    rank = len(shape(slots[0]))
    if len(slots) > 1:
        return elementwise(node, slots)
    given = argument(node, "dim")
    dims = given if isinstance(given, (list, tuple)) and given else [given] if isinstance(given, int) else range(rank)
    keepdim = bool(argument(node, "keepdim", False))
    return _except(node, slots, {_wrap(d, rank) for d in dims}, "reduces over it", keepdim)


@rule("topk", "kthvalue")
def topk(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    return _except(node, slots, {_wrap(argument(node, "dim", -1), len(shape(slots[0])))}, "reduces over it")


@rule("conv1d", "conv2d", "conv3d", "convolution", "_convolution", "conv_transpose2d", "conv_transpose1d")
def convolution(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    rank = len(shape(slots[0]))
    reads = [Read(0, 1, "contracts it with a weight")] + [Read(0, i, "convolves over it") for i in range(2, rank)]
    return OpAxes(links=[Link(0, 0, 0), Link(1, 1, 0)], reads=reads)


@rule("constant_pad_nd", "pad")
def pad(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    own, out = shape(slots[0]), shape(node)
    changed = {i for i in range(len(own)) if not same_size(own[i], out[i])}
    return _except(node, slots, changed, "pads it")


@rule("avg_pool1d", "avg_pool2d", "max_pool1d", "max_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "upsample_bilinear2d",
      "upsample_bicubic2d", "upsample_nearest2d", "upsample_linear1d", "pixel_shuffle", "unfold", "im2col")
def spatial(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    return OpAxes(links=[Link(0, 0, 0)], reads=[Read(0, i, "mixes neighbours along it") for i in range(1, len(shape(slots[0])))])


@rule(
    "arange", "zeros", "ones", "full", "empty", "scalar_tensor", "new_zeros", "new_ones", "new_full", "new_empty", "linspace", "eye",
    "rand", "randn", "randint", "tril_indices", "triu_indices", "empty_strided", "new_empty_strided", "tensor", "_tensor_constant",
)
def creation(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    return OpAxes()


@rule("sym_size", "sym_numel", "item", "_local_scalar_dense", "_assert_tensor_metadata", "is_nonzero")
def scalar(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    return OpAxes()
