"""A recurrence that a Python loop wrote out becomes one node: gated linear attention, or the gated delta rule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from dyncc.analysis.series import NotUnrolled, Series, series
from dyncc.analysis.unrolled import Unrolled
from dyncc.ir import argument, emit, is_mutating, op_name, shape, val
from dyncc.kernels.gated_delta_rule import GATED_DELTA_RULE
from dyncc.kernels.gated_linear_attention import GATED_LINEAR_ATTENTION
from dyncc.kernels.gated_linear_attention.op import SHORT

LONGEST = 512
"""Tokens up to which a loop that is written out is read."""


def fuse_unrolled(found: Unrolled) -> None:
    """Put one node in place of all steps.

    Raises:
        NotUnrolled: it has too few or too many tokens, or operands that do not lie as those of a recurrence.
    """
    steps, joined, tokens = found.steps, found.joined, len(found.steps)
    if tokens <= SHORT:
        raise NotUnrolled(f"{tokens} tokens one after the other are faster than a chunk, and stay")
    if tokens > LONGEST:
        raise NotUnrolled(f"a loop over {tokens} tokens is written out, which is read up to {LONGEST}: capture fewer, in several calls")
    inside: frozenset[fx.Node] = frozenset().union(*(s.inside for s in steps), joined.all_input_nodes if found.queries else ())
    outside = check_order(joined, found.last, steps[0].before, inside)
    parts, constant = _parts(found)
    frame = _frame(found)

    def attend(before: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        stream = iter(values)
        whole = {name: part.together(*[next(stream) for _ in part.nodes]) for name, part in parts.items()}
        dropped = {**DROPPED, "q": -1 if whole["q"].shape[-1] == 1 else -2}
        made = {name: frame.tokens(x, dropped[name]) for name, x in whole.items() if name != "q" or not found.queries}
        return frame.attend({"q": frame.blocks(whole["q"]), **made} if found.queries else made, before, constant)

    put(joined, found.last, outside, emit(joined, attend, steps[0].before, *(n for part in parts.values() for n in part.nodes)))


def put(joined: fx.Node, last: fx.Node, outside: set[fx.Node], made: tuple[fx.Node, fx.Node]) -> None:
    """Put the join of all outputs and the last state in place of those that a loop made."""
    for old, new in zip((joined, last), made, strict=True):
        new.meta = {**old.meta, "val": new.meta["val"]}
    joined.replace_all_uses_with(made[0])
    last.replace_all_uses_with(made[1], delete_user_cb=lambda user: user in outside)
    joined.graph.erase_node(joined)


def check_order(joined: fx.Node, last: fx.Node, before: fx.Node, inside: frozenset[fx.Node]) -> set[fx.Node]:
    """Who reads the last state behind the recurrence, which the nodes `inside` are.

    Raises:
        NotUnrolled: it is read before its outputs are joined, or something is written in place between its steps.
    """
    order = {n: i for i, n in enumerate(joined.graph.nodes)}
    outside = {u for u in last.users if u not in inside and u is not joined}
    if any(order[u] < order[joined] for u in outside):
        raise NotUnrolled("its last state is read before its outputs are joined")
    if any(is_mutating(n) and order[before] < i < order[joined] for n, i in order.items()):
        raise NotUnrolled("something is written in place between its steps")
    return outside


def _parts(found: Unrolled) -> tuple[dict[str, Series], float | None]:
    """q, k, v, and what else there is, of all tokens; and the decay where it is a number."""
    steps = found.steps
    delta = steps[0].beta is not None
    if any((s.beta is None) is delta for s in steps):
        raise NotUnrolled("some of its steps follow the delta rule, and some do not")
    names = {"k": "k", "row" if delta else "v": "v", **({"beta": "beta"} if delta else {})}
    blocks = Series(found.queries, None, len(found.queries), ()) if found.queries else None
    parts = {"q": blocks or series([s.q for s in steps if s.q is not None])}
    parts |= {name: series([getattr(s, of) for s in steps]) for name, of in names.items()}
    decays = [s.decay for s in steps]
    if all(isinstance(d, fx.Node) for d in decays):
        return {**parts, "decay": series(decays, logs=True)}, None
    if len(set(decays)) > 1 or (decays[0] is not None and not decays[0] > 0):
        raise NotUnrolled(f"its decays are {', '.join(str(d) for d in dict.fromkeys(decays))}")
    return parts, decays[0]


DROPPED = {"k": -1, "v": -2, "row": None, "beta": None, "decay": -1}
"""The dimension of an operand that the state's other dimension is broadcast over; queries of a matrix product lie the other way."""


@dataclass(frozen=True)
class _Frame:
    """How operands of all tokens [T, ...] become [B, H, T, D], and outputs what the join made of them: `lead` are the state's sizes in
    front of [Dk, Dv], `dim` is where tokens stand in the `rank` dimensions of the join, `thin` whether it holds outputs [1, Dv]. With `gap`
    blocks of queries read one state, and so many tokens are written from one to the next."""

    lead: tuple[Any, ...]
    dim: int
    rank: int
    thin: bool
    dtype: torch.dtype
    gap: int = 0

    def tokens(self, x: Tensor, dropped: int | None) -> Tensor:
        """[B, H, T, D]."""
        wide = len(self.lead) + 2 - (dropped is None)
        x = x[(slice(None),) + (None,) * (wide + 1 - x.dim())]
        if dropped is not None and x.shape[dropped] != 1:
            raise NotUnrolled("its decays differ among the channels of values")
        x = x if dropped is None else x.squeeze(dropped)
        x = x.expand(x.shape[0], *self.lead, x.shape[-1]).movedim(0, -2)
        return x.unsqueeze(1) if len(self.lead) == 1 else x

    def blocks(self, x: Tensor) -> Tensor:
        """[B, H, blocks, rows, Dk] of queries [blocks, ..., rows, Dk]."""
        x = x.movedim(0, -3).expand(*self.lead, x.shape[0], *x.shape[-2:])
        return x.unsqueeze(1) if len(self.lead) == 1 else x

    def attend(self, made: dict[str, Tensor], before: Tensor, constant: float | None) -> tuple[Tensor, Tensor]:
        """The join of all outputs, and the last state."""
        k, v = (made[name].to(self.dtype) for name in ("k", "row" if "beta" in made else "v"))
        q, state = made["q"].to(self.dtype), before.unsqueeze(1) if len(self.lead) == 1 else before
        decay = made.get("decay") if constant is None else q.new_full((1, 1, 1, 1), math.log(constant))
        if self.gap:
            blocks = _Blocks(q.shape[2], q.shape[3], self.gap)
            q, k, v = blocks.reads(q), blocks.writes(k), blocks.writes(v)
            decay = None if decay is None else blocks.writes(decay.expand(*k.shape[:2], blocks.written, decay.shape[3]))
            made = {**made, "beta": blocks.writes(made["beta"])} if "beta" in made else made
        out, last = _recur(q, k, v, made.get("beta"), decay, state)
        out = blocks.read(out) if self.gap else out
        if len(self.lead) == 1:
            out, last = out.squeeze(1), last.squeeze(1)
        out = out.unsqueeze(-2) if self.thin else out
        return out.movedim(len(self.lead), self.dim), last.to(before.dtype)


def _recur(q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, decay: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [B, H, T, Dv] and the last state, of operands [B, H, T, D]."""
    if beta is None:
        return GATED_LINEAR_ATTENTION(q, k, v, decay, state)  # type: ignore[no-any-return]
    logs = None if decay is None else decay.expand(*q.shape[:3], decay.shape[3])
    if logs is not None and logs.shape[3] != 1:
        raise NotUnrolled("its delta rule has decays that differ among the channels of keys")
    return GATED_DELTA_RULE(q, k, v, beta.squeeze(3), None if logs is None else logs.squeeze(3), state)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Blocks:
    """Blocks of `rows` tokens that only read, with `gap` tokens that only write behind each: what reads writes a key of zeros and keeps
    all, what writes has a query of zeros."""

    count: int
    rows: int
    gap: int

    @property
    def written(self) -> int:
        """Tokens that write: none behind the last block."""
        return (self.count - 1) * self.gap

    def reads(self, q: Tensor) -> Tensor:
        """[B, H, T, D] of queries [B, H, count, rows, D]."""
        return F.pad(q, (0, 0, 0, self.gap)).flatten(2, 3)

    def writes(self, x: Tensor) -> Tensor:
        """[B, H, T, D] of what the tokens that write have, [B, H, written, D]."""
        blocks = F.pad(x, (0, 0, 0, self.gap)).unflatten(2, (self.count, self.gap))
        return F.pad(blocks, (0, 0, self.rows, 0)).flatten(2, 3)

    def read(self, out: Tensor) -> Tensor:
        """The outputs [B, H, count rows, Dv] of tokens that read."""
        return out.unflatten(2, (self.count, self.rows + self.gap))[:, :, :, : self.rows].flatten(2, 3)


def _frame(found: Unrolled) -> _Frame:
    piece, joined, state = found.joined.args[0][0], found.joined, shape(found.last)  # type: ignore[index]
    if len(state) not in (3, 4):
        raise NotUnrolled(f"its states have {len(state)} dimensions; [B, H, Dk, Dv] and [B, Dk, Dv] are known")
    rank, thin, stacked = len(shape(joined)), len(shape(piece)) == len(state), op_name(joined) == "stack"
    dim = argument(joined, "dim", 0) % rank
    if not stacked and not (thin and dim == rank - 2):
        raise NotUnrolled("its outputs are joined along another dimension than that of tokens")
    return _Frame(state[:-2], dim, rank, thin and stacked, val(joined).dtype, found.gap)
