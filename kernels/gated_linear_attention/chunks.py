"""The chunk form of gated linear attention: products inside chunks of tokens, and one state from each chunk to the next.

Decays are only ever multiplied up from a boundary outwards. A block of 2n tokens is two blocks of n: its second half reads its first half
across the boundary between them, with q times what is kept from the boundary to i and k times what is kept from j to the boundary. Factors
are multiplied, each exp is taken once, and nothing is ever divided: no factor exceeds 1, nothing overflows, what the recurrence keeps is
kept to rounding, and -inf is a decay as any.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from dyncc.kernels.gated_linear_attention.truth import started

CHUNK = 64
BY_PRODUCT = 8
"""Rows of a half block from which on its weights are a matrix product."""
GROUP = 8
"""Chunks whose states are computed from each other at once; groups of them follow one another in the same way."""


def chunk(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None, scale: float = 1.0, size: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """What `truth.step` computes, `size` tokens at a time, a power of two. Loops over no tokens: it can be traced for any length."""
    return _chunk(q, k, v, log_decay, state, scale, size, states_at_once)


def chunk_by_chunk(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None, scale: float = 1.0, size: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """`chunk` with a loop from chunk to chunk: its work and memory grow with the tokens alone."""
    return _chunk(q, k, v, log_decay, state, scale, size, states_in_turn)


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, scale: float, size: int,
    states: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if size < 1 or size & (size - 1):
        raise ValueError(f"a chunk is a power of two, got size={size}")
    held, decay = started(q, k, v, log_decay, state)
    tokens = q.shape[2]
    q, k, values, decay = (in_chunks(x, size) for x in ((q * scale).to(held.dtype), k.to(held.dtype), v.to(held.dtype), decay))
    weights, since, left = blocks(q, k, decay.exp())
    added = (k * left).transpose(3, 4) @ values
    before, last = states(since[:, :, :, -1].unsqueeze(4), added, held)
    out = weights @ values + (q * since) @ before
    return out.flatten(2, 3)[:, :, :tokens].to(v.dtype), last


def in_chunks(x: Tensor, size: int) -> Tensor:
    """[B, H, chunks, size, D]; rows behind the end are zeros: such keys and decays change no state."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size))


def blocks(q: Tensor, k: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of blocks [..., n, D]: weights [..., n, n] of causal pairs, and the products of factors from before each block up to each row, and
    from behind each row to the block's end, [..., n, D or 1]."""
    rows = q.shape[-2]
    if rows == 1:
        return (q * k).sum(-1, keepdim=True), factor, torch.ones_like(factor)
    halves = tuple(x.unflatten(-2, (2, rows // 2)) for x in (q, k, factor))
    weights, since, left = blocks(*halves)
    (one, two), (since_1, since_2), (left_1, left_2) = (x.unbind(-3) for x in (weights, since, left))
    late, early = halves[0].select(-3, 1) * since_2, halves[1].select(-3, 0) * left_1
    across = late @ early.transpose(-1, -2) if rows // 2 >= BY_PRODUCT else (late.unsqueeze(-2) * early.unsqueeze(-3)).sum(-1)
    weights = torch.cat([F.pad(one, (0, rows // 2)), torch.cat([across, two], -1)], -2)
    since = torch.cat([since_1, since_2 * since_1[..., -1:, :]], -2)
    return weights, since, torch.cat([left_1 * since_2[..., -1:, :], left_2], -2)


def states_in_turn(kept: Tensor, added: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """States before each chunk [B, H, chunks, Dk, Dv] and behind the last, where a chunk keeps [..., Dk or 1, 1] and adds [..., Dk, Dv]."""
    before = torch.empty_like(added)
    for n in range(added.shape[2]):
        before[:, :, n] = held
        held = held * kept[:, :, n] + added[:, :, n]
    return before, held


def states_at_once(kept: Tensor, added: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """`states_in_turn` without a loop, in two levels: groups of chunks as if nothing came before, and what came before the groups."""
    chunks = added.shape[2]
    if isinstance(chunks, int) and chunks <= GROUP:
        return _of_all_pairs(kept, added, held)
    behind = (0, 0, 0, 0, 0, -chunks % GROUP)
    kept, added = F.pad(kept, behind, value=1.0), F.pad(added, behind)
    kept, added = (x.unflatten(2, (-1, GROUP)).flatten(1, 2) for x in (kept, added))  # groups stand beside heads
    own, ends = _of_all_pairs(kept, added, torch.zeros_like(added[:, :, 0]))
    since = F.pad(kept[:, :, :-1], (0, 0, 0, 0, 1, 0), value=1.0).cumprod(2)
    whole, ends = (x.unflatten(1, (held.shape[1], -1)) for x in (since[:, :, -1] * kept[:, :, -1], ends))
    first, last = _of_all_pairs(whole, ends, held)
    before = own + since * first.flatten(1, 2).unsqueeze(2)
    return before.unflatten(1, (held.shape[1], -1)).flatten(2, 3)[:, :, :chunks], last


def _of_all_pairs(kept: Tensor, added: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """What each chunk still holds of each earlier one: [chunks, chunks] products for each channel."""
    added = torch.cat([held.unsqueeze(2), added], 2)
    kept = F.pad(kept.squeeze(4), (0, 0, 1, 0), value=1.0)
    at = torch.arange(added.shape[2], device=added.device)
    after = (at.unsqueeze(1) > at).unsqueeze(2)
    share = torch.where(after, kept.unsqueeze(3), 1.0).cumprod(2) * (at.unsqueeze(1) >= at).unsqueeze(2)
    states = torch.einsum("bhnmk,bhmkv->bhnkv", share.expand(*share.shape[:4], added.shape[3]), added)
    return states[:, :, :-1], states[:, :, -1]
