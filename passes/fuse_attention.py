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
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx

from dyncc.analysis.facts import Facts
from dyncc.analysis.mask_values import Abstract, evaluate
from dyncc.analysis.slopes import read_slopes
from dyncc.analysis.spelled import NotRead, Spelled, read, softmaxes
from dyncc.analysis.spelled_softmax import as_softmax, written_softmaxes
from dyncc.ir import aten, emit, is_mutating, op_name, operands, same_size, shape, take_place, val
from dyncc.passes.attention_frame import Form, frame_of, padded, turned
from dyncc.passes.join_masks import join_masks
from dyncc.passes.mask_edges import edge_of
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
        known: dict[fx.Node, Abstract] = {}
        done, misses = 0, []
        for site in (*whole, *written):
            try:
                with nullcontext(site) if isinstance(site, fx.Node) else as_softmax(site) as softmax:
                    _fuse(read(softmax, () if isinstance(site, fx.Node) else site.parts), program.needs_grad, known)
                done += 1
            except NotRead as why:
                misses.append(f"{(site if isinstance(site, fx.Node) else site.out).name}: {why}")
        if not done:
            raise Refusal(misses[0])
        return PassResult(done, len(whole) + len(written), misses=tuple(misses))


def _fuse(spelled: Spelled, needs_grad: bool, known: dict[fx.Node, Abstract]) -> None:
    """Put the fused node in place of one attention; `known` are abstract values of masks.

    Raises:
        NotRead: its sizes are not those of an attention, or gradients would be lost.
    """
    out, v = spelled.out, spelled.v
    assert out is not None and v is not None
    beyond = {"cap": spelled.cap} if spelled.cap else {}
    if needs_grad and (spelled.cap or spelled.sinks):
        raise NotRead("gradients are on, for which attention with a soft cap or sinks stays written out; wrap the call in torch.no_grad()")
    frame = frame_of(spelled)
    k = spelled.kt.args[0] if turned(spelled.kt) else spelled.kt
    sloped = None if needs_grad else read_slopes(spelled.masks)
    masks = spelled.masks if sloped is None else list(sloped.rest)
    form = Form(frame, val(out).dtype, spelled.scale * (spelled.cap or 1.0), k is spelled.kt, len(shape(out)))
    mask = emit(out, join_masks(masks, frame, form.dtype), *(m.node for m in masks)) if masks else None
    if not needs_grad and _pays_to_count(mask, spelled, known):
        beyond["window"] = 0
    named = {"sinks": spelled.sinks, "slopes": None if sloped is None else sloped.node}
    ranks = {"sinks": frame.rank, "slopes": 0 if sloped is None else len(shape(sloped.at))}
    named = {name: node for name, node in named.items() if node is not None}
    split = len(spelled.scales)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *extras: Any) -> Tensor:
        more = dict(beyond)
        for name, x in zip(named, extras[split:], strict=True):
            x = padded(frame, x, ranks[name]) if isinstance(x, Tensor) else q.new_full((1, 1, 1, 1), x)
            more[name] = x.to(form.dtype) if name == "sinks" else x if sloped is None or sloped.factor == 1.0 else x * sloped.factor
        return form.attend(math.prod(extras[:split], start=q), k, v, mask, more)

    new = emit(out, attend, spelled.q, k, v, mask, *spelled.scales, *named.values())
    if not all(same_size(a, b) for a, b in zip(shape(new), shape(out), strict=True)):
        raise NotRead("queries, keys and values are not one batch of heads")
    _loosen_views(out)
    take_place(out, new)


def _pays_to_count(mask: fx.Node | None, spelled: Spelled, known: dict[fx.Node, Abstract]) -> bool:
    """Whether a mask is a window or a prefix of so few keys that counting them, which SDPA cannot, leaves half of the logits out."""
    rows, keys = shape(spelled.softmax)[-2], shape(spelled.product)[-1]  # type: ignore[arg-type]
    if mask is None or not isinstance(keys, int) or keys < LONG:
        return False
    edge = edge_of(evaluate(mask, known), mask, rows, keys)
    return edge is not None and 0 < max(edge) <= keys // 2


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
