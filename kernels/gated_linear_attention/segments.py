"""Gated linear attention by a kernel whose programs walk a sequence in order: segments of it stand beside each other as more sequences.

    S_{i+1} = exp(a_i) S_i + sum_t (k_t exp(a_{t+1} + ... + a_end))' v_t        a_i: the decays of segment i, summed

What segments add is one batched product, the states in front of them a scan over few, and the kernel starts all segments at once. Decays
are summed from the end of a segment backwards: no factor exceeds 1, no sum is a difference of others, and -inf is a decay as any.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from dyncc.kernels.gated_linear_attention.chunks import states_at_once
from dyncc.kernels.generator.kinds import LinearChunk

AT_ONCE = 128
"""Programs that run at once, about one for each multiprocessor of a large GPU: registers leave room for no more."""
ROUNDS = 8
"""Programs wanted for each of those, so that few multiprocessors wait for the last ones."""
LEAST = 128
"""Tokens of a segment at least."""


def by_segments(
    spec: LinearChunk, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None, scale: float = 1.0,
    at_once: int = AT_ONCE, least: int = LEAST,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What `spec.run` gives, of the rule "add". Tokens that fill no segment run behind the others."""
    batch, heads, tokens, _ = q.shape
    count, length = split(tokens, spec.chunk, batch * heads * spec.programs, at_once, least)
    rows = {"q": q, "k": k, "v": v}
    if log_decay is not None:
        rows["log_decay"] = log_decay.float().expand(batch, heads, tokens, log_decay.shape[3])
    if count == 1:
        return _run(spec, rows, state, scale)
    spec, whole = replace(spec, started=True), count * length
    parts = {name: x[:, :, :whole].unflatten(2, (count, length)) for name, x in rows.items()}
    before, last = in_front(parts["k"], parts["v"], parts.get("log_decay"), state)
    out, _ = _run(spec, {name: beside(x) for name, x in parts.items()}, beside(before), scale)
    out = in_turn(out, batch)
    if whole == tokens:
        return out, last
    rest, last = _run(spec, {name: x[:, :, whole:] for name, x in rows.items()}, last, scale)
    return torch.cat([out, rest], 2), last


def _run(spec: LinearChunk, rows: dict[str, Tensor], state: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return spec.run(rows["q"], rows["k"], rows["v"], log_decay=rows.get("log_decay"), state=state, scale=scale)


def split(tokens: int, chunk: int, programs: int, at_once: int = AT_ONCE, least: int = LEAST) -> tuple[int, int]:
    """How many segments, and the tokens of each, a multiple of a chunk: one of all tokens where so many programs fill a GPU.

    >>> split(4096, 16, 32), split(4100, 16, 32), split(4096, 16, 128), split(200, 16, 32)
    ((32, 128), (32, 128), (1, 4096), (1, 200))
    """
    count = min(-(-ROUNDS * at_once // max(1, programs)), tokens // least)
    if programs >= at_once or count < 2:
        return 1, tokens
    length = max(1, tokens // count // chunk) * chunk
    return tokens // length, length


def in_front(k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """States in front of each segment [B, H, S, Dk, Dv], and behind the last, of k, v and log decays [B, H, S, L, D or 1], in float32."""
    held = k.new_zeros((*k.shape[:2], k.shape[4], v.shape[4]), dtype=torch.float32) if state is None else state.float()
    weighted = k.float() if decay is None else k.float() * left(decay).exp()
    kept = held.new_ones(*k.shape[:3], 1, 1) if decay is None else decay.sum(3).exp().unsqueeze(4)
    return states_at_once(kept, weighted.transpose(3, 4) @ v.float(), held)


def left(decay: Tensor) -> Tensor:
    """The sum of log decays behind each token up to the end of its segment, of [B, H, S, L, D].

    >>> left(torch.tensor([-4.0, -2.0, -1.0]).view(1, 1, 1, 3, 1)).flatten().tolist()
    [-3.0, -1.0, 0.0]
    """
    return F.pad(decay[:, :, :, 1:].flip(3).cumsum(3).flip(3), (0, 0, 0, 1))


def beside(x: Tensor) -> Tensor:
    """[B, H, S, ...] as [B * S, H, ...]: no copy of one sequence, nor of whole ones whose heads lie side by side."""
    return x.transpose(1, 2).flatten(0, 1)


def in_turn(x: Tensor, batch: int) -> Tensor:
    """[B * S, H, L, D] as [B, H, S * L, D]."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
