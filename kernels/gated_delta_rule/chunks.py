"""The chunk form of the gated delta rule: a triangular solve inside chunks of tokens, and one state from each chunk to the next.

What token i writes is

    u_i = beta_i (v_i - sum_{j<i} exp(g_{j+1} + ... + g_i) (k_i k_j) u_j - exp(g_1 + ... + g_i) k_i S)

so that all u of a chunk solve one triangular system, by its inverse. Sums of log decays are never subtracted from another: no factor
exceeds 1, and -inf is a decay as any.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dyncc.kernels.gated_delta_rule.truth import started
from dyncc.kernels.gated_linear_attention.chunks import CHUNK, in_chunks


def chunk(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None, size: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """What `truth.step` computes, `size` tokens at a time, a power of two."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"a chunk is a power of two, got size={size}")
    held = started(q, k, v, beta, log_decay, state)
    tokens, wide = q.shape[2], held.dtype
    decay = q.new_zeros(q.shape[:3], dtype=wide) if log_decay is None else log_decay.to(wide)
    q, k, v_, beta, decay = (in_chunks(x.to(wide), size) for x in (q, k, v, beta.unsqueeze(3), decay.unsqueeze(3)))
    kept = between(decay.squeeze(4))
    since = decay.cumsum(3).exp()
    system = (beta * (k @ k.transpose(3, 4)) * kept).tril(-1)
    both = inverse(system) @ torch.cat([beta * v_, beta * since * k], 4)
    own, of_state = both.split([v_.shape[4], k.shape[4]], 4)
    weights = ((q @ k.transpose(3, 4)) * kept).tril()
    reads, writes = q * since, (k * kept[:, :, :, -1].unsqueeze(4)).transpose(3, 4)
    outs = []
    for n in range(q.shape[2]):
        written = own[:, :, n] - of_state[:, :, n] @ held
        outs.append(reads[:, :, n] @ held + weights[:, :, n] @ written)
        held = held * since[:, :, n, -1:] + writes[:, :, n] @ written
    out = torch.cat(outs, 2)[:, :, :tokens] if outs else v.new_zeros(v.shape)
    return out.to(v.dtype), held


def between(decay: Tensor) -> Tensor:
    """exp(decay_{j+1} + ... + decay_i) [..., i, j] for j <= i, of log decays [..., T]; behind the diagonal 1."""
    rows = torch.arange(decay.shape[-1], device=decay.device)
    after = rows.unsqueeze(1) > rows
    return torch.where(after, decay.unsqueeze(-1), 0.0).cumsum(-2).exp()


def inverse(system: Tensor) -> Tensor:
    """The inverse of 1 + system, strictly lower triangular [..., n, n]: by halves, in products alone, which every engine knows."""
    rows = system.shape[-1]
    if rows == 1:
        return torch.ones_like(system)
    half = rows // 2
    across = system[..., half:, :half]
    one, two = inverse(torch.stack([system[..., :half, :half], system[..., half:, half:]], -3)).unbind(-3)
    return torch.cat([F.pad(one, (0, half)), torch.cat([-(two @ across @ one), two], -1)], -2)
