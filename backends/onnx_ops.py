"""ATen ops that torch's ONNX exporter does not know, or translates wrongly: op -> its ONNX spelling (onnxscript, traced)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnxscript import opset23 as op
from onnxscript.values import Opset

from dyncc.kernels.group_query_attention import OP as GROUP_QUERY_ATTENTION

aten = torch.ops.aten
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


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    aten.remainder.Scalar: remainder,
    aten.sort.default: sort,
    aten.sort.stable: stable_sort,
    GROUP_QUERY_ATTENTION: group_query_attention,
}
