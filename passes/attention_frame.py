"""The dimensions of attention that is spelled out, as the four that a fused node takes, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dyncc.analysis.spelled import NotRead, Spelled
from dyncc.ir import aten, op_name, same_size, shape
from dyncc.kernels.fused_attention import ATTEND


@dataclass(frozen=True)
class Frame:
    """How an attention's dimensions become [B, H, T, D]: `rank` of its weights, `heads` where products merge them with the batch,
    `grouped` where keys have a dimension of 1 for the heads of a group, `memory` where all rows share keys [Tk, D]."""

    rank: int
    heads: int
    grouped: bool
    memory: bool = False

    def four(self, x: Tensor, shared: bool = False) -> Tensor:
        """[B, H, T, D] of queries, keys, values or a mask; `shared` is of keys and values that the heads of a group share."""
        if self.rank == 5:
            return x.squeeze(2) if shared or (x.shape[1] == 1 and x.shape[2] == 1) else x.flatten(1, 2)
        if self.memory and x.dim() == 2:
            return x[None, None]
        if x.dim() == 3 and self.rank == 4:
            return x.unflatten(0, (-1, self.heads))
        return x[(None,) * (4 - self.rank)] if self.rank < 4 else x


def frame_of(spelled: Spelled) -> Frame:
    weights, product = shape(spelled.softmax), shape(spelled.product)  # type: ignore[arg-type]
    q, kt, v = (shape(n) for n in (spelled.q, spelled.kt, spelled.v))  # type: ignore[arg-type]
    rank, heads = len(weights), weights[1] if len(weights) > 3 else 1
    if len(kt) == len(v) == 2 and len(q) == len(product) == rank and rank in (3, 4):
        return Frame(rank, heads if isinstance(heads, int) else 1, grouped=False, memory=True)
    if not len(q) == len(kt) == len(product) or not all(same_size(a, b) for a, b in zip(q[:-2], product[:-2], strict=True)):
        raise NotRead("queries are repeated along a dimension of the keys")
    if rank > 5 or {len(q), len(v)} - {rank} - ({3} if rank == 4 and isinstance(heads, int) else set()):
        raise NotRead(f"its weights have {rank} dimensions and its products {len(q)} and {len(v)}")
    keys = [*kt[:-2]], [*v[:-2]]
    if len(v) == len(q) and not all(same_size(a, b) for a, b in zip(*keys, strict=True)):
        raise NotRead("keys and values have different heads")
    grouped = rank == 5 and same_size(kt[2], 1) and not same_size(q[2], 1)
    wide = range(2) if grouped else range(1) if rank == 4 and same_size(kt[1], 1) else range(len(kt) - 2)
    if not all(same_size(kt[i], q[i]) for i in wide):
        raise NotRead("keys are shared along a dimension that is not that of heads")
    return Frame(rank, heads, grouped)


def padded(frame: Frame, mask: Tensor, rank: int) -> Tensor:
    """A mask as it was broadcast to logits of `rank` dimensions, in four."""
    mask = mask[(None,) * (rank - mask.dim())] if mask.dim() < rank else mask
    if frame.rank == 4 and rank == 3:
        return mask.unsqueeze(0) if mask.shape[0] == 1 else frame.four(mask)
    if frame.rank == 5 and (mask.shape[1] == 1) != (mask.shape[2] == 1):
        raise NotRead("a mask differs among the heads of a group or among groups alone")
    return frame.four(mask)


@dataclass(frozen=True)
class Form:
    """The fused call of one attention: its `frame`, the result's type and number of dimensions, the scale, and whether keys come as k'."""

    frame: Frame
    dtype: torch.dtype
    scale: float
    flip: bool
    rank: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, more: dict[str, Any]) -> Tensor:
        """The node, between views of its operands and of its result."""
        frame = self.frame
        four = frame.four(q), frame.four(k.transpose(-1, -2) if self.flip else k, frame.grouped), frame.four(v, frame.grouped)
        queries, keys, values = (x if x.dtype == self.dtype else x.to(self.dtype) for x in four)
        if frame.memory:
            keys, values = (x.expand(*queries.shape[:2], *x.shape[2:]) for x in (keys, values))
        op = ATTEND if more else aten.scaled_dot_product_attention.default
        if keys.shape[1] != queries.shape[1]:
            more = {**more, "enable_gqa": True}
        out: Tensor = op(queries, keys, values, mask, 0.0, False, scale=self.scale, **more)
        if self.rank == 5:
            return out.unflatten(1, (q.shape[1], -1))
        return out.flatten(0, 1) if self.rank == 3 and frame.rank == 4 else out[(0,) * (4 - self.rank)] if self.rank < 4 else out


def turned(node: fx.Node) -> bool:
    """Whether a node only swaps the last two dimensions of its operand."""
    rank = len(shape(node))
    if op_name(node) in ("mT", "t", "numpy_T"):
        return op_name(node) == "mT" or rank == 2
    return op_name(node) == "transpose" and {d % rank for d in node.args[1:3]} == {rank - 1, rank - 2}  # type: ignore[operator]
