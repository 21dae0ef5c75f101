"""fuse-attention: attention that is spelled out becomes one node.

softmax(cap tanh(scale q k' / cap) + mask) v, written as products, scaling, masks and a softmax, is SDPA; it is `dyncc::attend` where
there is a soft cap or a sink, where slopes times distances are added (ALiBi), or where a long window or prefix mask counts keys. Both work
without a matrix of rows x keys. How it was written does not matter (matmul, bmm or einsum, scale before or after, masks added or filled
in, softmax in fp32 or exponentials over their sum, a maximum subtracted, heads merged with the batch, keys repeated). Exact up to
rounding, with two exceptions: a row whose logits are all -inf, and exponentials that overflow, give NaN when written out, and zeros and
the result when fused. Weights that somebody reads are not fused away.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from dyncc.analysis.facts import Facts
from dyncc.analysis.mask_values import evaluate
from dyncc.analysis.slopes import read_slopes
from dyncc.analysis.spelled import Mask, NotRead, Spelled, read, softmaxes
from dyncc.analysis.spelled_softmax import as_softmax, written_softmaxes
from dyncc.ir import aten, emit, is_mutating, op_name, operands, same_size, shape, val
from dyncc.kernels.fused_attention import ATTEND
from dyncc.passes.simplify_mask import edge_of
from dyncc.restrict import Refusal
from dyncc.rewrite import Context, Pass, PassResult

LONG = 1024
"""Tokens from which on a window or prefix is counted instead of being handed to SDPA as a mask."""
LAID_OUT = {"transpose", "permute", "unsqueeze", "squeeze", "view", "reshape", "slice", "select"}


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Make one node of every attention that is spelled out."""

    name: ClassVar[str] = "fuse-attention"
    summary: ClassVar[str] = "one fused operation in place of attention that is spelled out"
    exact: ClassVar[bool] = True
    keeps_gradients: ClassVar[bool] = True

    def run(self, program: Any, facts: Facts, context: Context) -> PassResult:
        """Rewrite every attention that can be read; refuse when there is none."""
        whole, written = softmaxes(program.graph), written_softmaxes(program.graph)
        if not whole and not written:
            raise Refusal("no softmax in the graph: its attention is fused already")
        done, misses = 0, []
        for site in (*whole, *written):
            try:
                with nullcontext(site) if isinstance(site, fx.Node) else as_softmax(site) as softmax:
                    _fuse(read(softmax, () if isinstance(site, fx.Node) else site.parts), program.needs_grad)
                done += 1
            except NotRead as why:
                misses.append(f"{(site if isinstance(site, fx.Node) else site.out).name}: {why}")
        if not done:
            raise Refusal(misses[0])
        return PassResult(done, len(whole) + len(written), misses=tuple(misses))


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


def _fuse(spelled: Spelled, needs_grad: bool) -> None:
    """Put the fused node in place of one attention.

    Raises:
        NotRead: its sizes are not those of an attention, or gradients would be lost.
    """
    out, v = spelled.out, spelled.v
    assert out is not None and v is not None
    beyond = {"cap": spelled.cap} if spelled.cap else {}
    if needs_grad and (spelled.cap or spelled.sinks):
        raise NotRead("gradients are on, for which attention with a soft cap or sinks stays written out; wrap the call in torch.no_grad()")
    frame = _frame(spelled)
    k = spelled.kt.args[0] if _turned(spelled.kt) else spelled.kt
    sloped = None if needs_grad else read_slopes(spelled.masks)
    masks = spelled.masks if sloped is None else list(sloped.rest)
    form = Form(frame, val(out).dtype, spelled.scale * (spelled.cap or 1.0), k is spelled.kt, len(shape(out)))
    mask = emit(out, _masks(masks, frame, form.dtype), *(m.node for m in masks)) if masks else None
    if not needs_grad and _pays_to_count(mask, spelled):
        beyond["window"] = 0
    named = {"sinks": spelled.sinks, "slopes": None if sloped is None else sloped.node}
    ranks = {"sinks": frame.rank, "slopes": 0 if sloped is None else len(shape(sloped.at))}
    named = {name: node for name, node in named.items() if node is not None}
    split = len(spelled.scales)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *extras: Any) -> Tensor:
        more = dict(beyond)
        for name, x in zip(named, extras[split:], strict=True):
            x = _padded(frame, x, ranks[name]) if isinstance(x, Tensor) else q.new_full((1, 1, 1, 1), x)
            more[name] = x.to(form.dtype) if name == "sinks" else x if sloped is None or sloped.factor == 1.0 else x * sloped.factor
        return form.attend(math.prod(extras[:split], start=q), k, v, mask, more)

    new = emit(out, attend, spelled.q, k, v, mask, *spelled.scales, *named.values())
    if not all(same_size(a, b) for a, b in zip(shape(new), shape(out), strict=True)):
        raise NotRead("queries, keys and values are not one batch of heads")
    new.meta = {**out.meta, "val": new.meta["val"]}
    _loosen_views(out)
    out.replace_all_uses_with(new)
    out.graph.erase_node(out)


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


def _turned(node: fx.Node) -> bool:
    """Whether a node only swaps the last two dimensions of its operand."""
    rank = len(shape(node))
    if op_name(node) in ("mT", "t", "numpy_T"):
        return op_name(node) == "mT" or rank == 2
    return op_name(node) == "transpose" and {d % rank for d in node.args[1:3]} == {rank - 1, rank - 2}  # type: ignore[operator]


def _frame(spelled: Spelled) -> Frame:
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


def _pays_to_count(mask: fx.Node | None, spelled: Spelled) -> bool:
    """Whether a mask is a window or a prefix of so few keys that counting them, which SDPA cannot, leaves half of the logits out."""
    rows, keys = shape(spelled.softmax)[-2], shape(spelled.product)[-1]  # type: ignore[arg-type]
    if mask is None or not isinstance(keys, int) or keys < LONG or rows != keys or shape(mask)[-2:] != (rows, keys):
        return False
    edge = edge_of(evaluate(mask, {}), additive=val(mask).is_floating_point())
    return edge is not None and 0 < max(edge) <= keys // 2


def _masks(masks: list[Mask], frame: Frame, dtype: torch.dtype) -> Callable[..., Tensor | None]:
    """What makes one mask of all: bool where nothing is added and hidden logits are -inf, else added."""
    told: list[tuple[Mask, int]] = [(m, len(shape(m.at))) for m in masks]
    boolean = all(m.kind != "added" and m.value == float("-inf") for m, _ in told)
    if any(m.kind == "added" and val(m.node).dtype == torch.bool for m, _ in told):
        raise NotRead("a boolean is added to the logits")

    def joined(*tensors: Tensor) -> Tensor | None:
        bias: Tensor | None = None
        seen: Tensor | None = None
        hidden = 0.0
        for (mask, rank), tensor in zip(told, tensors, strict=True):
            part = _padded(frame, tensor, rank)
            if mask.kind == "added":
                part = (part if mask.factor == 1.0 else part * mask.factor).to(dtype)
                bias = part if bias is None else bias + part
            else:
                part = part if mask.kind == "seen" else torch.logical_not(part)
                seen = part if seen is None else torch.logical_and(seen, part)
                hidden = min(hidden, max(mask.value, torch.finfo(dtype).min) if mask.value > float("-inf") else mask.value)
        if seen is None or boolean:
            return seen if bias is None else bias
        least = torch.finfo(dtype).min if hidden > float("-inf") else hidden
        return torch.where(seen, aten.scalar_tensor(0.0, dtype=dtype, device=seen.device) if bias is None else bias, least)

    return joined


def _padded(frame: Frame, mask: Tensor, rank: int) -> Tensor:
    """A mask as it was broadcast to logits of `rank` dimensions, in four."""
    mask = mask[(None,) * (rank - mask.dim())] if mask.dim() < rank else mask
    if frame.rank == 4 and rank == 3:
        return mask.unsqueeze(0) if mask.shape[0] == 1 else frame.four(mask)
    if frame.rank == 5 and (mask.shape[1] == 1) != (mask.shape[2] == 1):
        raise NotRead("a mask differs among the heads of a group or among groups alone")
    return frame.four(mask)


def _loosen_views(out: fx.Node) -> None:
    """Fused attention lays its result out in another way: what only looked at it another way may have to copy now."""
    stack = [out]
    while stack:
        for user in list(stack.pop().users):
            if is_mutating(user):
                raise NotRead(f"{op_name(user)} writes into its result")
            if op_name(user) in LAID_OUT and operands(user)[0].op == "call_function":
                if user.target is aten.view.default:
                    user.target = aten.reshape.default
                stack.append(user)
