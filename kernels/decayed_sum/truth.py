"""The truth of decayed sums, token after token, and equal forms with fewer steps.

    s_t = f_t s_{t-1} + x_t        for every number of x by itself, with factors of at most 1 in size
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dyncc.kernels.gated_linear_attention.chunks import CHUNK, states_at_once


def step(x: Tensor, factor: Tensor, state: Tensor | None = None) -> Tensor:
    """All sums [B, T, N] in x's type, computed in at least float32.

    Args:
        x: [B, T, N].
        factor: broadcastable to [B, T, N], [B or 1, T or 1, N or 1]; of any sign, at most 1 in size.
        state: [B, N], the sum before the first token; None is zeros.
    Raises:
        ValueError: sizes that do not fit each other.
    """
    x_, factor, held = _started(x, factor, state)
    outs = []
    for t in range(x.shape[1]):
        held = torch.addcmul(x_[:, t], factor[:, t], held)
        outs.append(held)
    return torch.stack(outs, 1).to(x.dtype) if outs else torch.empty_like(x)


def in_chunks(x: Tensor, factor: Tensor, state: Tensor | None = None) -> Tensor:
    """`step` in two loops of about sqrt(T) steps: inside all chunks at once, and from chunk to chunk."""
    x_, factor, held = _started(x, factor, state)
    tokens, size = x.shape[1], _size(x.shape[1])
    chunks, factors = (F.pad(v, (0, 0, 0, -tokens % size), value=1.0).unflatten(1, (-1, size)) for v in (x_, factor))
    owns, sinces = [chunks[:, :, 0]], [factors[:, :, 0]]
    for i in range(1, size):
        owns.append(torch.addcmul(chunks[:, :, i], factors[:, :, i], owns[-1]))
        sinces.append(sinces[-1] * factors[:, :, i])
    own, since = torch.stack(owns, 2), torch.stack(sinces, 2)
    before = [held]
    for n in range(chunks.shape[1] - 1):
        before.append(torch.addcmul(own[:, n, -1], since[:, n, -1], before[-1]))
    return torch.addcmul(own, since, torch.stack(before, 1).unsqueeze(2)).flatten(1, 2)[:, :tokens].to(x.dtype)


def at_once(x: Tensor, factor: Tensor, state: Tensor | None = None) -> Tensor:
    """`step` without a loop over tokens, so that it can be traced for any length: sums of 1, 2, 4, ... tokens inside chunks, and the states
    between chunks at once."""
    x_, factor, held = _started(x, factor, state)
    own, since = (F.pad(v, (0, 0, 0, -x.shape[1] % CHUNK)).unflatten(1, (-1, CHUNK)) for v in (x_, factor))
    reach = 1
    while reach < CHUNK:
        own = own + since * F.pad(own[:, :, :-reach], (0, 0, reach, 0))
        since = since * F.pad(since[:, :, :-reach], (0, 0, reach, 0), value=1.0)
        reach *= 2
    since = since.expand(own.shape)
    kept, added = (v[:, None, :, -1].unsqueeze(4) for v in (since, own))
    before, _ = states_at_once(kept, added, held[:, None, :, None])
    return (own + since * before.squeeze(4).transpose(1, 2)).flatten(1, 2)[:, : x.shape[1]].to(x.dtype)


def _size(tokens: int) -> int:
    """A power of two near the square root."""
    return 1 << (max(tokens, 1).bit_length() // 2)


def _started(x: Tensor, factor: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x, factors [B or 1, T, N] and the sum before the first token [B, N], all in at least float32."""
    if x.dim() != 3 or factor.dim() != 3 or any(a not in (1, b) for a, b in zip(factor.shape, x.shape, strict=True)):
        raise ValueError(f"decayed sums take x [B, T, N] and factors that are broadcast to it, got {list(x.shape)}, {list(factor.shape)}")
    if state is not None and state.shape != (x.shape[0], x.shape[2]):
        raise ValueError(f"the state of these tokens is {[x.shape[0], x.shape[2]]}, got {list(state.shape)}")
    wide = torch.promote_types(x.dtype, torch.float32)
    held = x.new_zeros((x.shape[0], x.shape[2]), dtype=wide) if state is None else state.to(wide)
    return x.to(wide), factor.to(wide).expand(factor.shape[0], x.shape[1], x.shape[2]), held
