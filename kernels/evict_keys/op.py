"""Two ops: `dyncc::watched` marks keys whose cache wants scores, `dyncc::column_sums` is its truth as one op.

A cache cannot see queries. It hands its keys through `watched`, and the pass `evict-kv` puts what the scores become in its place; the op
itself computes nothing, so a model that dyncc did not compile is told so. `new` are the keys and values [B, G, T, D] of this call alone,
for scores that are made where those come from, and `given` weights that were trained for this layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyncc.errors import CacheNotServed
from dyncc.kernels.evict_keys.truth import column_sums

_library = torch.library.Library("dyncc", "FRAGMENT")
_library.define(
    "watched(Tensor keys, Tensor scores, Tensor[] new, Tensor[] given, str policy, SymInt rows, SymInt start) -> (Tensor, Tensor)"
)
_library.define(
    "column_sums(Tensor q, Tensor k, Tensor? mask, Tensor weights, bool is_causal, float? scale, float temperature, int seed, SymInt start)"
    " -> Tensor"
)
_library.impl("column_sums", column_sums, "CompositeExplicitAutograd")


def _watched(
    keys: Tensor, scores: Tensor, new: list[Tensor], given: list[Tensor], policy: str, rows: int, start: int
) -> tuple[Tensor, Tensor]:
    raise CacheNotServed(passes=policy, problem=CacheNotServed.not_compiled)


_library.impl("watched", _watched, "CompositeExplicitAutograd")


@torch.library.register_fake("dyncc::watched")
def _fake_watched(
    keys: Tensor, scores: Tensor, new: list[Tensor], given: list[Tensor], policy: str, rows: Any, start: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(keys), torch.empty_like(scores)


@torch.library.register_fake("dyncc::column_sums")
def _fake_sums(q: Tensor, k: Tensor, mask: Tensor | None, weights: Tensor, *rest: Any) -> Tensor:
    return q.new_empty((k.shape[0], k.shape[1], k.shape[2]), dtype=torch.float32)


WATCHED = torch.ops.dyncc.watched.default
SUMS = torch.ops.dyncc.column_sums.default
