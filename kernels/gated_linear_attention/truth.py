"""The truth of gated linear attention, one token after the other, and the dense form that pairs all tokens (Yang et al. 2023).

    S_t = diag(exp(a_t)) S_{t-1} + k_t' v_t        o_t = scale q_t S_t
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Outputs [B, H, T, Dv] in v's type, and the state [B, H, Dk, Dv] behind the last token, in at least float32.

    Args:
        q: [B, H, T, Dk]; k the same; v [B, H, T, Dv].
        log_decay: broadcastable to [B, H, T, Dk], at most 0 and possibly -inf, which forgets all before; None is 0. One number a head
            that never changes is RetNet (Sun et al. 2023), none at all is causal linear attention (Katharopoulos et al. 2020).
        state: [B, H, Dk, Dv], what came before; None is zeros.
    Raises:
        ValueError: sizes that do not fit each other.
    """
    held, decay = started(q, k, v, log_decay, state)
    wide, outs, decay = held.dtype, [], decay.exp()
    for t in range(q.shape[2]):
        held = held * decay[:, :, t, :, None] + k[:, :, t, :, None].to(wide) * v[:, :, t, None, :].to(wide)
        outs.append((q[:, :, t, None].to(wide) * scale) @ held)
    return (torch.cat(outs, 2) if outs else v.new_zeros(v.shape)).to(v.dtype), held


def dense(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """What `step` computes, from all pairs of tokens at once: [B, H, T, T, Dk] numbers where decays differ among channels."""
    held, decay = started(q, k, v, log_decay, state)
    q, k, values = ((q * scale).to(held.dtype), k.to(held.dtype), v.to(held.dtype))
    tokens = torch.arange(q.shape[2] + 1, device=q.device)
    edges = F.pad(decay, (0, 0, 1, 0))  # row 0 stands for what came before
    after = (tokens.unsqueeze(1) > tokens)[..., None]
    kept = torch.where(after, edges.unsqueeze(3), 0.0).cumsum(2).exp()  # [B, H, i, j, D]: what row i still holds of row j
    weights = q @ k.transpose(2, 3) * kept[:, :, 1:, 1:, 0] if decay.shape[3] == 1 else torch.einsum(
        "bhic,bhjc,bhijc->bhij", q, k, kept[:, :, 1:, 1:]
    )  # fmt: skip
    out = weights.tril() @ values + (q * kept[:, :, 1:, 0]) @ held
    return out.to(v.dtype), held * kept[:, :, -1, 0, :, None] + (k * kept[:, :, -1, 1:]).transpose(2, 3) @ values


def started(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The state before the first token and log decays [B, H, T, Dk or 1], both in at least float32.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    if q.dim() != 4 or q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        sizes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(f"gated linear attention takes q and k [B, H, T, Dk] and v [B, H, T, Dv], got {sizes}")
    held = (*q.shape[:2], q.shape[3], v.shape[3])
    if state is not None and tuple(state.shape) != held:
        raise ValueError(f"the state of these keys and values is {list(held)}, got {list(state.shape)}")
    wide = torch.promote_types(v.dtype, torch.float32)
    if log_decay is None:
        decay = q.new_zeros((*q.shape[:3], 1), dtype=wide)
    else:
        width = log_decay.shape[-1] if log_decay.dim() else 1
        decay = log_decay.to(wide).expand(*q.shape[:3], width if width == 1 else q.shape[3])
    return (v.new_zeros(held, dtype=wide) if state is None else state.to(wide)), decay
