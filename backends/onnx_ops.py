"""ATen ops that torch's ONNX exporter does not know, or translates wrongly: op -> its ONNX spelling (onnxscript, traced)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnxscript import ir, opset23
from onnxscript.values import Opset

from dyncc.errors import NotTaken
from dyncc.kernels.evict_keys import SUMS
from dyncc.kernels.group_query_attention import OP as GROUP_QUERY_ATTENTION
from dyncc.kernels.select_keys import NUMBERS

aten = torch.ops.aten
op: Any = opset23  # its type variables do not follow traced values
MICROSOFT = "com.microsoft"
TYPES = ("float", "float16", "bfloat16", "int32", "int64")


def sort(self: Any, dim: int = -1, descending: bool = False) -> Any:
    """TopK of everything: it keeps the lower index of equal values first, so it is a stable sort."""
    size = op.Shape(self, start=dim, end=dim + 1) if dim != -1 else op.Shape(self, start=-1)
    return op.TopK(self, size, axis=dim, largest=1 if descending else 0, sorted=1)


def stable_sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    return sort(self, dim, descending)


def remainder(self: Any, other: Any) -> Any:
    """The sign is the divisor's; the divisor may be a size."""
    divisor = op.CastLike(other, self)
    if not self.dtype.is_floating_point():
        return op.Mod(self, divisor)
    return op.Sub(self, op.Mul(op.Floor(op.Div(self, divisor)), divisor))


def _microsoft(name: str, inputs: str, outputs: str, attributes: tuple[str, ...]) -> Any:
    """An op of ONNX Runtime's, made known to onnx for as long as the process runs: how many inputs and outputs, which attributes."""
    if not onnx.defs.has(name, MICROSOFT):
        schema = onnx.defs.OpSchema
        optional = schema.FormalParameterOption.Optional
        sides = [[schema.FormalParameter(word, f"T{word}", param_option=optional) for word in words.split()] for words in (inputs, outputs)]
        types = [(f"T{word}", [f"tensor({kind})" for kind in TYPES], "") for word in f"{inputs} {outputs}".split()]
        kinds = {"i": schema.AttrType.INT, "f": schema.AttrType.FLOAT}
        known = [schema.Attribute(word[:-2], kinds[word[-1]], required=False) for word in attributes]
        onnx.defs.register_schema(schema(name, MICROSOFT, 1, inputs=sides[0], outputs=sides[1], type_constraints=types, attributes=known))
    return getattr(Opset(MICROSOFT, 1), name)


def group_query_attention(
    q: Any, k: Any, v: Any, past_k: Any, past_v: Any, lengths: Any, total: Any, cos: Any, sin: Any, positions: Any, bias: Any,
    heads: int, groups: int, scale: float,
) -> Any:  # fmt: skip
    names = "q k v past_k past_v lengths total cos sin positions bias"
    call = _microsoft("GroupQueryAttention", names, "out present_k present_v", ("num_heads:i", "kv_num_heads:i", "do_rotary:i", "scale:f"))
    inputs = [q, k, v, past_k, past_v, lengths, total, cos, sin, positions, bias]
    return call(*inputs, num_heads=heads, kv_num_heads=groups, scale=scale, do_rotary=int(cos is not None))


def column_sums(
    q: Any, k: Any, mask: Any, weights: Any, is_causal: bool, scale: float | None, temperature: float, seed: int, start: Any
) -> Any:
    """In one piece, not in tiles: the probabilities of all rows are in memory at once. Seeded noise has no ONNX spelling."""
    if seed >= 0:
        raise NotTaken("seeded noise (keyformer) has no ONNX form; take h2o")
    heads, groups, width = q.shape[1], k.shape[1], q.shape[3]
    least = op.CastLike(op.Constant(value_float=float("-inf")), q)
    turned = op.Transpose(k, perm=[0, 1, 3, 2])
    logits = op.MatMul(op.Reshape(q, op.Constant(value_ints=[0, groups, -1, width])), turned)
    factor = (width**-0.5 if scale is None else scale) / temperature
    logits = op.Reshape(op.Mul(logits, op.CastLike(op.Constant(value_float=factor), q)), op.Constant(value_ints=[0, heads, -1, 0]))
    if is_causal:
        ends = [op.Squeeze(op.Shape(x, start=2, end=3)) for x in (q, k)]
        zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
        rows, keys = (op.Range(zero, end, one) for end in ends)
        logits = op.Where(op.Greater(keys, op.Unsqueeze(rows, op.Constant(value_ints=[1]))), least, logits)
    if mask is not None:
        logits = op.Where(mask, logits, least) if mask.dtype == ir.DataType.BOOL else op.Add(logits, mask)
    found = op.Softmax(op.Cast(logits, to=ir.DataType.FLOAT), axis=-1)
    found = op.Where(op.IsNaN(found), op.Constant(value_float=0.0), found)
    summed = op.ReduceSum(op.Mul(found, op.Unsqueeze(weights, op.Constant(value_ints=[1, 3]))), op.Constant(value_ints=[2]), keepdims=0)
    grouped = op.Reshape(summed, op.Constant(value_ints=[0, groups, heads // groups, -1]))
    return op.ReduceSum(grouped, op.Constant(value_ints=[2]), keepdims=0)


def numbers(values: list[int], sizes: list[int], device: Any) -> Any:
    return op.Reshape(op.Constant(value_ints=values), op.Constant(value_ints=sizes))


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    aten.remainder.Scalar: remainder,
    aten.sort.default: sort,
    aten.sort.stable: stable_sort,
    GROUP_QUERY_ATTENTION: group_query_attention,
    SUMS: column_sums,
    NUMBERS: numbers,
}
