"""The truth of looking ahead: how rows that stand behind a text attend to it.

Row i of P sees what the text's last row sees, and rows 0..i of its own kind (DapQ, Tian et al. 2026; LookaheadKV, Ahn et al. 2026).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyncc.kernels.attention_rows import attention_rows
from dyncc.kernels.evict_keys.truth import probability_sums


def ahead_mask(mask: Tensor | None, keys: Any, rows: int, device: torch.device) -> Tensor:
    """What `rows` rows behind a text of `keys` keys see, bool [B or 1, 1, P, N + P].

    Args:
        mask: that of the text, [B or 1, 1, T, N], bool (True is visible) or added; None where its last row sees everything.
    """
    own = torch.ones(rows, rows, dtype=torch.bool, device=device).tril()
    if mask is None:
        text = torch.ones(1, 1, rows, keys, dtype=torch.bool, device=device)
    else:
        last = mask[:, :, -1:]
        seen = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
        text = seen.expand(-1, -1, rows, -1)
    return torch.cat([text, own.expand(text.shape[0], 1, rows, rows)], 3)


def ahead_sums(q: Tensor, k: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """What each key of the text [B, G, N] receives from rows behind it, summed over rows and a group's heads.

    Args:
        q: [B, H, P, D]; k: [B, G, N + P, D], the rows' own keys last; mask: as `ahead_mask` gives it.
    """
    rows: Any = q.shape[2]
    probabilities = attention_rows(q, k, torch.arange(rows, device=q.device), mask, False, scale)
    text = probabilities[:, :, :, : k.shape[2] - rows]
    return probability_sums(text, probabilities.new_ones(q.shape[0], rows), k.shape[1])
