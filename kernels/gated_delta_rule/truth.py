"""The truth of the gated delta rule, one token after the other (Yang et al. 2024).

    S = exp(g_t) S_{t-1}        S_t = S + k_t' beta_t (v_t - k_t S)        o_t = q_t S_t
"""

from __future__ import annotations

import torch
from torch import Tensor


def step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs [B, H, T, Dv] in v's type, and the state [B, H, Dk, Dv] behind the last token, in at least float32.

    Args:
        q: [B, H, T, Dk], scaled already; k the same; v [B, H, T, Dv].
        beta: [B, H, T], how much of what a key held is replaced.
        log_decay: [B, H, T], at most 0 and possibly -inf, which forgets all before; None is 0.
        state: [B, H, Dk, Dv], what came before; None is zeros.
    Raises:
        ValueError: sizes that do not fit each other.
    """
    held = started(q, k, v, beta, log_decay, state)
    wide, outs = held.dtype, []
    for t in range(q.shape[2]):
        if log_decay is not None:
            held = held * log_decay[:, :, t, None, None].to(wide).exp()
        key = k[:, :, t, :, None].to(wide)
        wrong = v[:, :, t].to(wide) - (key * held).sum(2)
        held = held + key * (beta[:, :, t, None].to(wide) * wrong).unsqueeze(2)
        outs.append(q[:, :, t, None].to(wide) @ held)
    return (torch.cat(outs, 2) if outs else v.new_zeros(v.shape)).to(v.dtype), held


def started(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor | None) -> Tensor:
    """The state before the first token, in at least float32.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    rows = [x for x in (beta, log_decay) if x is not None]
    if q.dim() != 4 or q.shape != k.shape or q.shape[:3] != v.shape[:3] or any(x.shape != q.shape[:3] for x in rows):
        sizes = ", ".join(str(list(x.shape)) for x in (q, k, v, *rows))
        raise ValueError(f"the gated delta rule takes q and k [B, H, T, Dk], v [B, H, T, Dv], beta and log_decay [B, H, T], got {sizes}")
    held = (*q.shape[:2], q.shape[3], v.shape[3])
    if state is not None and tuple(state.shape) != held:
        raise ValueError(f"the state of these keys and values is {list(held)}, got {list(state.shape)}")
    wide = torch.promote_types(v.dtype, torch.float32)
    return v.new_zeros(held, dtype=wide) if state is None else state.to(wide)
