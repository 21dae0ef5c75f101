"""How much of a cache a decoding step must read at least, by the passes that it was made with."""

from __future__ import annotations

from dyncc.passes.evict_kv import EvictKV
from dyncc.passes.select_kv import SelectKV
from dyncc.pipeline import build


def share_read(passes: str, keys: int, layers: int) -> float:
    """The bytes of keys and values that a step reads, over those of `keys` in all layers; scores not known here count as nothing."""
    held, read = 1.0, 1.0
    for made in build(passes) if passes else ():
        if isinstance(made, EvictKV):
            held = min(1.0, made.budget / keys)
        elif isinstance(made, SelectKV):
            scored = {"vote": 0.5, "logits": 0.5, "bound": 1 / made.page, "mean": 0.5 / made.page}.get(made.score, 0.0)
            dense = made.dense / layers
            read = dense + (1 - dense) * min(1.0, scored + made.budget / (held * keys))
    return held * read
