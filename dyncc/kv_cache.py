"""`dyncc.KVCache`: a transformers cache that appends in place, so that a step does not copy the whole past.

    model.generate(**inputs, past_key_values=dyncc.KVCache())

Same tokens as with transformers' growing cache; compiled, two or three graphs serve all lengths that fit the buffers. With
`KVCache("snapkv{budget=1024}")` it holds a bounded number of keys, chosen by the attention they received; with `KVCache("quest")` it
holds all, and steps read a part; with `KVCache("promptdistill{layers=14}")` the prompt is pruned on its way through the layers, and those
behind the cut hold the keys of the tokens that stayed.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from torch import Tensor

from dyncc.errors import BadCachePasses, PackageMissing
from dyncc.kv_layers import GrowingLayer, Policy, PolicyLayer
from dyncc.kv_pruned import PromptCuts
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
            the attention they received, at their original positions; one that selects, such as "quest{budget=512}": a step then reads
            so many of the keys held; one that prunes the prompt, such as "promptdistill{layers=14 keep=1024}": layers behind the cut
            compute and hold its kept tokens alone, at their original positions; or several, one of each. The prompt is what comes first,
            in one call. The model must be compiled with backend "dyncc", without gradients; pads stand on the left. Generation takes
            three graphs, four where `every` is above 1: steps that drop keys are another graph.
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

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As in transformers; a layer is told its number, by which it knows whether it stands behind a cut, and how many tokens the first
        layer holds, for which masks are made."""
        first = self.layers[0].store.length if layer_idx else 0
        found: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, number=layer_idx, first=first, **kwargs)
        return found

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values held by all layers."""
        return sum(layer.store.bytes for layer in self.layers)


def _policy(text: str) -> Policy:
    import dyncc.kernels.evict_keys
    import dyncc.kernels.thin_keys  # noqa: F401  registers the ops that mark keys

    built = build(text)
    prune, evict, select = ([p for p in built if p.name == name] for name in ("prune-tokens", "evict-kv", "select-kv"))
    if not built or max(map(len, (prune, evict, select))) > 1 or len(prune) + len(evict) + len(select) < len(built):
        raise BadCachePasses(passes=text, problem="takes one pass that prunes prompts, one that evicts, one that selects, or one of each")
    if evict and select and evict[0].every and evict[0].score not in ("recents", "fade"):
        problem = "cannot score every key in every step and read a part of them only: take a policy that evicts once (every=0)"
        raise BadCachePasses(passes=text, problem=problem)
    if prune and evict and evict[0].wants_new:
        problem = "scores keys by all rows of the prompt, which pruning takes away: leave out one of the two"
        raise BadCachePasses(passes=text, problem=problem)
    if prune:
        _check_prune(text, prune[0], evict[0] if evict else None)
    cuts = PromptCuts.of(prune[0]) if prune else None
    given, former = evict[0].given() if evict else None, select[0].former if select else None
    return Policy(cuts, evict[0] if evict else None, select[0] if select else None, render(evict), render(select), given, former)


def _check_prune(text: str, prune: Any, evict: Any) -> None:
    if any(isinstance(place, float) for place in prune.layers.places):
        problem = f"does not know how many layers a model has: give their numbers, such as layers=7,15,22 and not layers={prune.layers}"
        raise BadCachePasses(passes=text, problem=problem)
    if evict is None:
        return
    least, keeps = evict.budget + max(evict.every, 1), prune.keep if isinstance(prune.keep, tuple) else (prune.keep,)
    if any(isinstance(keep, float) or keep < least for keep in keeps):
        problem = f"evicts from all layers in the same step, so that the prompt must keep a number of tokens, {least:,} or more"
        raise BadCachePasses(passes=text, problem=problem)
