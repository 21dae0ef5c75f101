"""How ops carry axes that compute with every position along them: norms, softmaxes, sums, sorts, pooling."""

from __future__ import annotations

from torch import fx

from dyncc.analysis.axes import Link, OpAxes, Read
from dyncc.analysis.axis_links import Rule, all_but, broadcast, elementwise, in_place_of, into, wrap
from dyncc.ir import argument, op_name, shape

RULES: dict[str, Rule] = {}
rule = into(RULES)


@rule("layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    rank, n = len(shape(slots[0])), len(argument(node, "normalized_shape"))
    op = in_place_of(node, slots, set(range(rank - n, rank)), "normalises over it")
    op.links += [link for s in range(1, len(slots)) for link in broadcast(node, slots, s)]
    return op


@rule("batch_norm", "group_norm", "instance_norm", "_native_batch_norm_legit", "native_batch_norm")
def batch_norm(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    rank = len(shape(slots[0]))
    return in_place_of(node, slots, set(range(rank)), "normalises over it")


@rule(
    "softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "logcumsumexp", "flip", "roll", "sort",
    "argsort", "tril", "triu", "renorm", "glu",
)
def along(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    rank, name = len(shape(slots[0])), op_name(node)
    if name in ("tril", "triu"):
        return in_place_of(node, slots, {rank - 2, rank - 1}, "reads positions along it")
    given = argument(node, "dims", argument(node, "dim", -1))
    dims = {wrap(d, rank) for d in (given if isinstance(given, (list, tuple)) else [given])} or set(range(rank))
    if name == "glu":
        return all_but(node, slots, dims, "halves it")
    why = "takes a softmax over it" if "softmax" in name else "reads positions along it"
    return in_place_of(node, slots, dims, why)


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
    return all_but(node, slots, {wrap(d, rank) for d in dims}, "reduces over it", keepdim)


@rule("topk", "kthvalue")
def topk(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    return all_but(node, slots, {wrap(argument(node, "dim", -1), len(shape(slots[0])))}, "reduces over it")


@rule("avg_pool1d", "avg_pool2d", "max_pool1d", "max_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "upsample_bilinear2d",
      "upsample_bicubic2d", "upsample_nearest2d", "upsample_linear1d", "pixel_shuffle", "unfold", "im2col")
def spatial(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    return OpAxes(links=[Link(0, 0, 0)], reads=[Read(0, i, "mixes neighbours along it") for i in range(1, len(shape(slots[0])))])
