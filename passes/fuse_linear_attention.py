"""fuse-linear-attention: linear attention that pairs all tokens, or loops over them, becomes one node that does neither.

    (scale q k' * decays * causal) v        decays_ij = exp(a_{j+1} + ... + a_i)

written as products, a causal mask (tril, or filled in) and no softmax, is the recurrence S_t = exp(a_t) S_{t-1} + k_t' v_t with
o_t = scale q_t S_t (Katharopoulos et al. 2020; Yang et al. 2023 for decays): `dyncc::gated_linear_attention` computes it in time and
memory that grow with the tokens alone. Decays are read where they are exp of a difference of one running sum, for each channel where
queries are multiplied by exp of it and keys by exp of its negative, or powers of the distance between tokens; such powers alone are an
average that moves. Attention to earlier tokens alone is the same recurrence on keys and values of the token before. Weights may be divided
by their sums over keys: values get a column of ones, which gives the sums. Where nothing is hidden, (q k') v is q (k' v), if that
multiplies less.

Loops over tokens that a capture wrote out are read too: such recurrences and the gated delta rule, where tokens read their own state or
blocks of them one state (unrolled_recurrence.py), averages that move (running_sum.py), and tokens that read all earlier results, which one
triangular solve gives (feedback_solve.py). Attention to many learned slots whose scores have unit length (TokenFormer) is computed a few
rows at a time (slots_by_rows.py).

Which of the equal forms runs is one rule: token after token up to 4 tokens, chunks beyond, and all pairs where no form is read. Exact up to
rounding, with one exception: decays that overflow before they are hidden or taken back give NaN when written out, and none when fused.
Weights somebody reads stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from dyncc.analysis.block_reads import block_joins, read_blocks
from dyncc.analysis.decays import NotLinear
from dyncc.analysis.facts import Facts
from dyncc.analysis.feedback import feedbacks, read_feedback
from dyncc.analysis.linear_attention import PRODUCTS, Linear, pairs, powers, read_linear, read_powers
from dyncc.analysis.other_mixers import why_none
from dyncc.analysis.running_sums import read_sums, sums
from dyncc.analysis.series import NotUnrolled
from dyncc.analysis.slots import NotSlots, read_slots, slots
from dyncc.analysis.unrolled import joins, read_steps
from dyncc.ir import descendants, emit, hint, hoist, is_mutating, is_symbolic, op_name, shape, take_place
from dyncc.kernels.gated_linear_attention import GATED_LINEAR_ATTENTION
from dyncc.passes.feedback_solve import fuse_feedback
from dyncc.passes.running_sum import fuse_sum
from dyncc.passes.slots_by_rows import fuse_slots
from dyncc.passes.unrolled_recurrence import LONGEST, fuse_unrolled
from dyncc.restrict import Refusal
from dyncc.rewrite import Context, Pass, PassResult

FEWEST = 256
"""Tokens from which on chunks were measured to be faster than a product with a matrix of powers (128 are even)."""


@dataclass(frozen=True)
class FuseLinearAttention(Pass):
    """Make one node of every linear attention that pairs all tokens or loops over them."""

    name: ClassVar[str] = "fuse-linear-attention"
    summary: ClassVar[str] = "linear attention, with decays or without, in chunks instead of a matrix of tokens x tokens or a loop"
    exact: ClassVar[bool] = True

    def run(self, program: Any, facts: Facts, context: Context) -> PassResult:
        """Rewrite every linear attention that can be read; refuse when there is none."""
        sites = [(node, fuse) for candidates, fuse in FORMS for node in candidates(program.graph)]
        done, misses, gain = 0, [], ""
        for node, fuse in sites:
            try:
                gain = fuse(node) or gain
                done += 1
            except (NotLinear, NotUnrolled, NotSlots) as why:
                misses.append(f"{node.name}: {why}")
        if not done:
            raise Refusal(misses[0] if misses else why_none(program.graph))
        return PassResult(done, len(sites), misses=tuple(misses), pays_from=gain)


def _products(graph: fx.Graph, kind: Callable[[fx.Node], bool]) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function" and op_name(n) in PRODUCTS and kind(n)]


def _fuse_pairs(out: fx.Node) -> str:
    found = read_linear(out)
    least = 0 if found.causal else _least_tokens(found)
    return _fuse(found, least, "its weights hide no later tokens, and {} tokens are too few for another order of its products")


def _fuse_powers(out: fx.Node) -> str:
    return _fuse(read_powers(out), FEWEST, "a matrix of powers is as fast as chunks up to some hundred tokens, and these are {}")


def _fuse_loop(joined: fx.Node) -> str:
    fuse_unrolled(read_steps(joined))
    return ""


def _fuse_blocks(joined: fx.Node) -> str:
    fuse_unrolled(read_blocks(joined, LONGEST))
    return ""


def _fuse_sum(joined: fx.Node) -> str:
    fuse_sum(read_sums(joined))
    return ""


def _fuse_feedback(joined: fx.Node) -> str:
    fuse_feedback(read_feedback(joined))
    return ""


def _fuse_slots(out: fx.Node) -> str:
    return fuse_slots(read_slots(out))


FORMS: tuple[tuple[Callable[[fx.Graph], list[fx.Node]], Callable[[fx.Node], str]], ...] = (
    (lambda graph: _products(graph, pairs), _fuse_pairs),
    (lambda graph: _products(graph, powers), _fuse_powers),
    (joins, _fuse_loop),
    (block_joins, _fuse_blocks),
    (sums, _fuse_sum),
    (feedbacks, _fuse_feedback),
    (slots, _fuse_slots),
)
"""What finds candidates of one form in a graph, and what puts a node in place of one; it returns from which length on that pays."""


def _fuse(found: Linear, least: int, few: str) -> str:
    """Put what does not pair tokens in place of one linear attention; returns from which length on that pays, where lengths vary.

    Raises:
        NotLinear: it has fewer tokens than `least`, or its operands are not there yet where its sums are read.
    """
    out = found.out
    if hint(found.tokens) < least:
        raise NotLinear(few.format(hint(found.tokens)))
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
        instead[node] = take_place(node, emit(node, lambda x, behind=behind, rank=rank: _mass_like(x, behind, rank), mass))
    rows = [instead.get(n, n) for _, n in found.rows]
    take_place(out, emit(out, lambda x, *rows: _by_rows(x, found, rows), mixed, *rows))
    if not least or not is_symbolic(found.tokens):
        return ""
    return f"{'faster' if found.q is None else 'fewer operations'} from {least} tokens on; the graph serves any number"


def _least_tokens(found: Linear) -> int:
    """From how many tokens on (q k') v takes more multiplications than q (k' v)."""
    width, wide = (hint(shape(n)[-1]) for n in (found.q, found.v) if n is not None)
    return 2 * width * wide // (width + wide) + 1


def _attend(found: Linear, *parts: Tensor) -> tuple[Tensor, Tensor]:
    """The product with values, and the sums of weights over keys [..., T, 1]."""
    stream = iter(parts)
    q, k, v = (next(stream) if node is not None else None for node in (found.q, found.kt, found.v))
    assert v is not None
    if q is None or k is None:
        q = k = torch.ones_like(v[..., :1])
    elif found.causal and (found.decays is None or found.decays.kind != "channels"):
        k = k.transpose(-1, -2)
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1) if found.masses else v
    if not found.causal:
        made = (q * found.scale if found.scale != 1.0 else q) @ (k @ v)
    else:
        logs = None if found.decays is None else found.decays.logs(next(stream, found.decays.node), v)
        made = _causal(q, *(_earlier(k, v, logs) if found.nearest else (k, v)), logs, found.scale)
    return (made[..., :-1], made[..., -1:]) if found.masses else (made, made)


def _earlier(k: Tensor, v: Tensor, logs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values of the token before each: what a recurrence that reads before it writes has read."""
    k, v = (F.pad(x[..., :-1, :], (0, 0, 1, 0)) for x in (k, v))
    return (k if logs is None else k * logs.exp().to(k.dtype)), v


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
