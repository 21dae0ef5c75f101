"""`dyncc.KVCache`: a transformers cache that appends in place, so that a step does not copy the whole past.

    model.generate(**inputs, past_key_values=dyncc.KVCache())

Same tokens as with transformers' growing cache; compiled, two or three graphs serve all lengths that fit the buffers. With
`KVCache("snapkv{budget=1024}")` it holds a bounded number of keys, chosen by the attention they received; with `KVCache("quest")` it
holds all, and steps read a part.
"""

from __future__ import annotations

import copy
from functools import partial

from dyncc.errors import BadCachePasses, PackageMissing
from dyncc.kv_layers import GrowingLayer, Policy, PolicyLayer
from dyncc.pipeline import build, render

try:
    from transformers.cache_utils import Cache
except ImportError as error:
    raise PackageMissing(package="transformers", purpose="for dyncc.KVCache") from error


class KVCache(Cache):
    """A growing cache for `generate()` and `model(..., past_key_values=...)` that appends in place.

    Copies made with `copy.copy` and caches that were cropped share buffers with what they came from, and move to their own when they
    go on.

    Args:
        passes: a pass or recipe that evicts, such as "snapkv{budget=1024}": the cache then holds so many keys a layer and head, chosen by
            the attention they received, at their original positions; or one that selects, such as "quest{budget=512}": a step then reads
            so many of the keys held; or both, one of each. The model must be compiled with backend "dyncc", without gradients; pads
            stand on the left. Generation takes three graphs, four where `every` is above 1: steps that drop keys are another graph.
    Raises:
        DynccUsageError: `passes` names something else, has a wrong option, or two passes contradict each other.
    """

    def __init__(self, passes: str | None = None) -> None:
        self.passes = passes
        made = partial(PolicyLayer, _policy(passes)) if passes is not None else GrowingLayer
        super().__init__(layer_class_to_replicate=made)

    def __copy__(self) -> KVCache:
        other = KVCache(self.passes)
        other.layers = [copy.copy(layer) for layer in self.layers]
        return other

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values held by all layers."""
        return sum(layer.store.bytes for layer in self.layers)


def _policy(text: str) -> Policy:
    import dyncc.kernels.evict_keys  # noqa: F401  registers the op that marks keys

    built = build(text)
    evict, select = ([p for p in built if p.name == name] for name in ("evict-kv", "select-kv"))
    if not built or len(evict) > 1 or len(select) > 1 or len(evict) + len(select) < len(built):
        raise BadCachePasses(passes=text, problem="takes one pass that evicts, one that selects, or one of each")
    if evict and select and evict[0].every and evict[0].score != "recents":
        problem = "cannot score every key in every step and read a part of them only: take a policy that evicts once (every=0)"
        raise BadCachePasses(passes=text, problem=problem)
    return Policy(evict[0] if evict else None, select[0] if select else None, render(evict), render(select))
