"""Two ops that stand for what only a pass can say: which rows of a prompt stay, and that an attention reads those rows alone.

`dyncc::thin` is asked by a cache for the `count` rows [B, G, count, D] of a prompt's keys and values that stay, and where they stood,
[B, count] (-1: a pad, or a row that a sequence's own length does not allow). `dyncc::spread` stands for the rows of the whole text in place
of the `held` ones, so that masks made for the whole text fit while a model is captured; in a prompt those are the `dense` keys themselves.
`prune-tokens` puts the held rows in its place. Neither computes anything, so a model that dyncc did not compile is told so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyncc.errors import CacheNotServed

_library = torch.library.Library("dyncc", "FRAGMENT")
_library.define("thin(Tensor keys, Tensor values, SymInt count, str policy) -> (Tensor, Tensor, Tensor)")
_library.define("spread(Tensor held, Tensor? origin, Tensor? dense, SymInt length, str policy) -> Tensor")


def _thin(keys: Tensor, values: Tensor, count: int, policy: str) -> tuple[Tensor, Tensor, Tensor]:
    raise CacheNotServed(passes=policy, problem=CacheNotServed.not_compiled)


def _spread(held: Tensor, origin: Tensor | None, dense: Tensor | None, length: int, policy: str) -> Tensor:
    raise CacheNotServed(passes=policy, problem=CacheNotServed.not_compiled)


_library.impl("thin", _thin, "CompositeExplicitAutograd")
_library.impl("spread", _spread, "CompositeExplicitAutograd")


@torch.library.register_fake("dyncc::thin")
def _fake_thin(keys: Tensor, values: Tensor, count: Any, policy: str) -> tuple[Tensor, Tensor, Tensor]:
    kept = (x.new_empty((x.shape[0], x.shape[1], count, x.shape[3])) for x in (keys, values))
    return (*kept, keys.new_empty((keys.shape[0], count), dtype=torch.int64))


@torch.library.register_fake("dyncc::spread")
def _fake_spread(held: Tensor, origin: Tensor | None, dense: Tensor | None, length: Any, policy: str) -> Tensor:
    return torch.empty_like(dense) if dense is not None else held.new_empty((held.shape[0], held.shape[1], length, held.shape[3]))


THIN = torch.ops.dyncc.thin.default
SPREAD = torch.ops.dyncc.spread.default
