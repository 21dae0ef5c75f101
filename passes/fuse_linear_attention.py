"""fuse-linear-attention: linear attention that pairs all tokens, or loops over them, becomes one node that does neither.

    (scale q k' * decays * causal) v        decays_ij = exp(a_{j+1} + ... + a_i)

written as products, a causal mask (tril, or filled in) and no softmax, is the recurrence S_t = exp(a_t) S_{t-1} + k_t' v_t with
o_t = scale q_t S_t (Katharopoulos et al. 2020; Yang et al. 2023 for decays): `dyncc::gated_linear_attention` computes it in time and
memory that grow with the tokens alone. Decays are read where they are exp of a difference of one running sum, or for each channel where
queries are multiplied by exp of it and keys by exp of its negative. Weights may be divided by their sums over keys: values get a column of
ones, which gives the sums. Where nothing is hidden, (q k') v is q (k' v), if that multiplies less. Loops over tokens that a capture wrote
out are read too (passes/unrolled_recurrence.py), the gated delta rule among them.

Which of the equal forms runs is one rule: token after token up to 4 tokens, chunks beyond, and all pairs where no form is read. Exact up to
rounding, with one exception: decays that overflow before they are hidden or taken back give NaN when written out, and none when fused.
Weights somebody reads stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from dyncc.analysis.facts import Facts
from dyncc.analysis.linear_attention import PRODUCTS, Linear, NotLinear, pairs, read_linear
from dyncc.analysis.other_mixers import why_none
from dyncc.analysis.unrolled import NotUnrolled, joins, read_steps
from dyncc.ir import descendants, emit, hint, hoist, is_mutating, is_symbolic, op_name, shape
from dyncc.kernels.gated_linear_attention import GATED_LINEAR_ATTENTION
from dyncc.passes.unrolled_recurrence import fuse_unrolled
from dyncc.restrict import Refusal
from dyncc.rewrite import Context, Pass, PassResult


@dataclass(frozen=True)
class FuseLinearAttention(Pass):
    """Make one node of every linear attention that pairs all tokens or loops over them."""

    name: ClassVar[str] = "fuse-linear-attention"
    summary: ClassVar[str] = "linear attention, with decays or without, in chunks instead of a matrix of tokens x tokens or a loop"
    exact: ClassVar[bool] = True

    def run(self, program: Any, facts: Facts, context: Context) -> PassResult:
        """Rewrite every linear attention that can be read; refuse when there is none."""
        found = [n for n in program.graph.nodes if n.op == "call_function" and op_name(n) in PRODUCTS and pairs(n)]
        loops = joins(program.graph)
        done, misses, gain = 0, [], ""
        for out, fuse in [*((n, _fuse) for n in found), *((n, _fuse_loop) for n in loops)]:
            try:
                gain = fuse(out) or gain
                done += 1
            except (NotLinear, NotUnrolled) as why:
                misses.append(f"{out.name}: {why}")
        if not done:
            raise Refusal(misses[0] if misses else why_none(program.graph))
        return PassResult(done, len(found) + len(loops), misses=tuple(misses), pays_from=gain)


def _fuse_loop(joined: fx.Node) -> str:
    fuse_unrolled(read_steps(joined))
    return ""


def _fuse(out: fx.Node) -> str:
    """Put what does not pair tokens in place of one linear attention; returns from which length on that pays, where lengths vary.

    Raises:
        NotLinear: it is none, it does not pay, or its operands are not there yet where its sums are read.
    """
    found = read_linear(out)
    least = 0 if found.causal else _least_tokens(found)
    if hint(found.tokens) < least:
        raise NotLinear(f"its weights hide no later tokens, and {hint(found.tokens)} tokens are too few for another order of its products")
    order = {n: i for i, n in enumerate(out.graph.nodes)}
    first = min([out, *(m for m, _ in found.masses)], key=lambda n: order[n])
    if any(is_mutating(n) and min(order[p] for p in found.parts) < i < order[out] for n, i in order.items()):
        raise NotLinear("something is written in place between its products")
    late = descendants(first)
    if any(p in late for p in found.parts):
        raise NotLinear("its values are computed from the sums of its weights")
    for part in found.parts:
        hoist(part, first, order)
    mixed, mass = emit(first, lambda *parts: _attend(found, *parts), *found.parts)
    instead: dict[fx.Node, fx.Node] = {}
    for node, behind in found.masses:
        rank = len(shape(node))
        instead[node] = _replace(node, emit(node, lambda x, behind=behind, rank=rank: _mass_like(x, behind, rank), mass))
    rows = [instead.get(n, n) for _, n in found.rows]
    _replace(out, emit(out, lambda x, *rows: _by_rows(x, found, rows), mixed, *rows))
    return f"fewer operations from {least} tokens on; the graph serves any number" if least and is_symbolic(found.tokens) else ""


def _replace(node: fx.Node, new: fx.Node) -> fx.Node:
    new.meta = {**node.meta, "val": new.meta["val"]}
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return new


def _least_tokens(found: Linear) -> int:
    """From how many tokens on (q k') v takes more multiplications than q (k' v)."""
    width, wide = hint(shape(found.q)[-1]), hint(shape(found.v)[-1])
    return 2 * width * wide // (width + wide) + 1


def _attend(found: Linear, q: Tensor, k: Tensor, v: Tensor, *decay: Tensor) -> tuple[Tensor, Tensor]:
    """The product with values, and the sums of weights over keys [..., T, 1]."""
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1) if found.masses else v
    if not found.causal:
        made = (q * found.scale if found.scale != 1.0 else q) @ (k @ v)
    else:
        k = k if found.by_channel else k.transpose(-1, -2)
        logs = None if not decay else decay[0] if found.by_channel else decay[0].unsqueeze(-1)
        made = _causal(q, k, v, logs, found.scale)
    return (made[..., :-1], made[..., -1:]) if found.masses else (made, made)


def _causal(q: Tensor, k: Tensor, v: Tensor, logs: Tensor | None, scale: float) -> Tensor:
    if q.dim() == 4:
        return GATED_LINEAR_ATTENTION(q, k, v, logs, None, scale)[0]  # type: ignore[no-any-return]
    q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    logs = None if logs is None else logs.unsqueeze(-3)
    return GATED_LINEAR_ATTENTION(q, k, v, logs, None, scale)[0].squeeze(1)  # type: ignore[no-any-return]


def _mass_like(mass: Tensor, behind: float, rank: int) -> Tensor:
    """A sum as it was written: without what multiplies the weights behind it, and with the dimension of keys or without."""
    mass = mass if behind == 1.0 else mass / behind
    return mass if rank == mass.dim() else mass.squeeze(-1)


def _by_rows(mixed: Tensor, found: Linear, rows: tuple[Tensor, ...]) -> Tensor:
    """What multiplies or divides the weights of a row does so with its result."""
    for (name, _), x in zip(found.rows, rows, strict=True):
        mixed = mixed * x if name == "mul" else mixed / x
    return mixed
