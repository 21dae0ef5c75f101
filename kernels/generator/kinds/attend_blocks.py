"""Block-sparse attention: rows of a tile read only the blocks of keys that a list names (Child et al. 2019; lists as in Dong et al. 2024,
FlexAttention).
"""

from __future__ import annotations

import torch
from torch import Tensor


def listed_mask(listed: Tensor, counts: Tensor, tile: tuple[int, int], rows: int, keys: int) -> Tensor:
    """[B or 1, H or 1, rows, keys] bool: what the lists let each row see.

    Args:
        listed: [B or 1, H or 1, tiles of rows, slots] int64, different blocks of keys in any order.
        counts: [B or 1, H or 1, tiles of rows] int64, how many of them are read; what stands behind is not looked at.
        tile: rows of a tile, and keys of a block.

    >>> listed_mask(torch.tensor([[[[1, 7]]]]), torch.tensor([[[1]]]), (2, 2), 2, 3).int().tolist()
    [[[[0, 0, 1], [0, 0, 1]]]]
    """
    blocks = -(-keys // tile[1])
    read = torch.arange(listed.shape[-1], device=listed.device) < counts.unsqueeze(-1)
    places = torch.where(read, listed, blocks)  # the others go to a block behind the last
    seen = torch.zeros((*listed.shape[:-1], blocks + 1), dtype=torch.bool, device=listed.device).scatter(-1, places, True)
    return seen[..., :blocks].repeat_interleave(tile[0], -2).repeat_interleave(tile[1], -1)[..., :rows, :keys]
