"""Scores from some channels of queries and keys alone (FASA, Wang et al. 2026), and the op that holds their numbers in a graph."""

from __future__ import annotations

import torch
from torch import Tensor

from dyncc.kernels.select_keys.truth import shared_scores

_library = torch.library.Library("dyncc", "FRAGMENT")
_library.define("numbers(int[] values, int[] sizes, Device device) -> Tensor")


def _numbers(values: list[int], sizes: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device).view(sizes)


_library.impl("numbers", _numbers, "CompositeExplicitAutograd")


@torch.library.register_fake("dyncc::numbers")
def _fake(values: list[int], sizes: list[int], device: torch.device) -> Tensor:
    return torch.empty(sizes, dtype=torch.int64, device=device)


NUMBERS = torch.ops.dyncc.numbers.default
"""A constant tensor of int64: graphs hold no constants but scalars."""


def pair_scores(q: Tensor, k: Tensor, channels: Tensor, share: str) -> Tensor:
    """Dot products over each head's own channels, [B, C, N]; over all of them they are q.k.

    Args:
        q: [B, H, 1, D]; k: [B, G, N, D] with H a multiple of G; channels: [H, W] int64; share: as `key_scores` takes it.
    """
    batch, heads, _, _ = q.shape
    groups, keys = k.shape[1], k.shape[2]
    each, wide = heads // groups, channels.shape[1]
    row = q.squeeze(2).gather(2, channels.expand(batch, heads, wide)).view(batch, groups, each, wide, 1)
    at = channels.reshape(groups, 1, each * wide).expand(batch, groups, keys, each * wide)
    parts = k.gather(3, at).view(batch, groups, keys, each, wide).transpose(2, 3)
    return shared_scores((parts @ row).view(batch, heads, keys).float(), groups, share)


def pair_channels(width: int, layout: str, rotary: int) -> list[tuple[int, int]]:
    """The channels of each rotary pair of a head, D / 2 of them; those behind the `rotary` first ones are paired with their neighbours.

    >>> pair_channels(6, "half", 4), pair_channels(6, "interleaved", 4)
    ([(0, 2), (1, 3), (4, 5)], [(0, 1), (2, 3), (4, 5)])
    """
    half = rotary // 2
    turned = [(i, i + half) if layout == "half" else (2 * i, 2 * i + 1) for i in range(half)]
    return turned + [(i, i + 1) for i in range(rotary, width, 2)]
