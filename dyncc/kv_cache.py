"""`dyncc.KVCache`: a transformers cache that appends in place, so that a step does not copy the whole past.

    model.generate(**inputs, past_key_values=dyncc.KVCache())

Same tokens as with transformers' growing cache; compiled, two or three graphs serve all lengths that fit the buffers. With
`KVCache("snapkv{budget=1024}")` it holds a bounded number of keys, chosen by the attention they received.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dyncc.errors import BadCachePasses, PackageMissing
from dyncc.kv_store import ROOM, KVStore
from dyncc.pipeline import build, render

try:
    from transformers.cache_utils import Cache, DynamicLayer
except ImportError as error:
    raise PackageMissing(package="transformers", purpose="for dyncc.KVCache") from error


class GrowingLayer(DynamicLayer):
    """One layer's keys and values in a `KVStore`. `keys` and `values` are views of what is held."""

    def __init__(self, **kwargs: Any) -> None:
        self.store = KVStore()
        super().__init__(**kwargs)

    @property
    def keys(self) -> Tensor | None:
        """[B, G, T, D], or None while nothing was written."""
        return self.store.view()[0] if self.store.buffer is not None else None

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._set(value)

    @property
    def values(self) -> Tensor | None:
        """[B, G, T, D], or None while nothing was written."""
        return self.store.view()[1] if self.store.buffer is not None else None

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._set(value)

    def _set(self, value: Tensor | None) -> None:
        if value is not None:
            raise AttributeError("keys and values of a dyncc.KVCache are changed together; use layer.store.change")

    def __copy__(self) -> GrowingLayer:
        twin = GrowingLayer()
        twin.__dict__ |= {**self.__dict__, "store": copy.copy(self.store)}
        return twin

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, G, T, D]; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self.store.append(key_states, value_states)

    def get_seq_length(self) -> int:
        return self.store.length

    def reset(self) -> None:
        self.store = KVStore()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, such as {-tokens_to_remove}")
        self.store.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.store.change(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.store.change(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.store.change(lambda rows: rows[indices, ...])

    def offload(self) -> None:
        self.store.change(lambda rows: rows.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self.store.change(lambda rows: rows.to(self.device, non_blocking=True))


class BoundedLayer(GrowingLayer):
    """A layer that drops keys by `policy`. `keys` holds what is left; lengths and positions go on counting every token that was read.

    `scores` [B, G, T] says what each key held has earned, and is -1 for pads, which go first: rows stay in order, so a mask over the last
    T tokens of the text hides exactly the pads that are left (pads stand on the left).
    """

    def __init__(self, policy: Any, text: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.policy, self.text = policy, text
        self.scores: Tensor | None = None
        self.seen = 0
        self.prompted = False

    def __copy__(self) -> BoundedLayer:
        twin = BoundedLayer(self.policy, self.text)
        twin.__dict__ |= {**self.__dict__, "store": copy.copy(self.store)}
        return twin

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Drop what is due, append [B, G, T, D], and have the scores of all keys held brought up to date by the compiled model."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows: int = key_states.shape[2]
        if self._due(rows):
            assert self.scores is not None, "keys are dropped after a prompt, which scored them"
            index = self.policy.choose(self.scores, enough=True)
            self.store.gather(index, room=(self.policy.every or ROOM) + rows)
            self.scores = self.scores.gather(2, index)
        held, start = self.store.length, self.seen
        keys, values = self.store.append(key_states, value_states)
        self.seen = start + rows
        self.prompted = rows > 1
        if rows == 1 and not self.policy.every:
            self.scores = None
            return keys, values
        old = self.scores if self.scores is not None else keys.new_zeros((keys.shape[0], keys.shape[1], held), dtype=torch.float32)
        new = keys.new_zeros((keys.shape[0], keys.shape[1], rows), dtype=torch.float32)
        keys, self.scores = torch.ops.dyncc.watched(keys, torch.cat([old, new], dim=2), self.text, rows, start)
        return keys, values

    def _due(self, rows: int) -> bool:
        """Whether keys are dropped before the next `rows` tokens are read: in steps only, so that a prompt may come in chunks."""
        if rows != 1:
            return False
        every = self.policy.every
        return self.store.length >= self.policy.budget + every if every else self.prompted and self.store.length > self.policy.budget

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = self.policy.budget if self._due(query_length) else self.store.length
        return held + query_length, self.seen - held

    def get_seq_length(self) -> int:
        return self.seen

    def reset(self) -> None:
        super().reset()
        self.scores, self.seen, self.prompted = None, 0, False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove < 0 and self.seen != self.store.length:
            raise ValueError("this cache has dropped keys, so it cannot go back; keep a copy.copy of it from before")
        super().crop(tokens_to_remove)
        self.seen = self.store.length
        if self.scores is not None:
            self.scores = self.scores[:, :, : self.seen]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda x: x[indices, ...])

    def _rows(self, edit: Callable[[Tensor], Tensor]) -> None:
        """Another batch, scores included."""
        self.store.change(edit)
        self.scores = edit(self.scores) if self.scores is not None else None


class KVCache(Cache):
    """A growing cache for `generate()` and `model(..., past_key_values=...)` that appends in place.

    Copies made with `copy.copy` and caches that were cropped share buffers with what they came from, and move to their own when they
    go on.

    Args:
        passes: one pass or recipe that evicts, such as "snapkv{budget=1024}": the cache then holds so many keys a layer and head, chosen
            by the attention they received, at their original positions. The model must be compiled with backend "dyncc", without
            gradients; pads stand on the left.
    Raises:
        DynccUsageError: `passes` names something else, or has a wrong option.
    """

    def __init__(self, passes: str | None = None) -> None:
        self.passes = passes
        policy = _policy(passes) if passes is not None else None
        made = partial(BoundedLayer, policy, render([policy])) if policy is not None else GrowingLayer
        super().__init__(layer_class_to_replicate=made)

    def __copy__(self) -> KVCache:
        other = KVCache(self.passes)
        other.layers = [copy.copy(layer) for layer in self.layers]
        return other

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values held by all layers."""
        return sum(layer.store.bytes for layer in self.layers)


def _policy(text: str) -> Any:
    built = build(text)
    if len(built) != 1 or built[0].name != "evict-kv":
        raise BadCachePasses(passes=text)
    import dyncc.kernels.evict_keys  # noqa: F401  registers the op that marks keys

    return built[0]
