"""How each op carries axes: one small rule per family of ATen ops, found by the op's bare name.

A rule gets the node and its operand slots and returns an `OpAxes`. To teach dyncc an op, add its name to a family (here, axis_layout.py,
axis_positions.py, axis_products.py or axis_whole.py) or write a rule.
An op with no rule breaks the classes and is named wherever that stops a rewrite.
"""

from __future__ import annotations

import torch
from torch import fx

from dyncc.analysis import axis_layout, axis_positions, axis_products, axis_whole
from dyncc.analysis.axes import OpAxes
from dyncc.analysis.axis_links import Rule, elementwise, into
from dyncc.ir import op_name

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


RULES: dict[str, Rule] = {**axis_products.RULES, **axis_layout.RULES, **axis_positions.RULES, **axis_whole.RULES}
rule = into(RULES)


@rule(
    "arange", "zeros", "ones", "full", "empty", "scalar_tensor", "new_zeros", "new_ones", "new_full", "new_empty", "linspace", "eye",
    "rand", "randn", "randint", "tril_indices", "triu_indices", "empty_strided", "new_empty_strided", "tensor", "_tensor_constant",
)
def creation(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    return OpAxes()


@rule("sym_size", "sym_numel", "item", "_local_scalar_dense", "_assert_tensor_metadata", "is_nonzero")
def scalar(node: fx.Node, slots: list[fx.Node]) -> OpAxes:
    return OpAxes()


def rule_for(node: fx.Node) -> Rule:
    """The rule of a node's op; that of unknown ops where there is none."""
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
