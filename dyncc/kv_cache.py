"""`dyncc.KVCache`: a transformers cache that appends in place, so that a step does not copy the whole past.

    model.generate(**inputs, past_key_values=dyncc.KVCache())

Same tokens as with transformers' growing cache; compiled, two or three graphs serve all lengths that fit the buffers.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from dyncc.errors import PackageMissing
from dyncc.kv_store import KVStore

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


class KVCache(Cache):
    """A growing cache for `generate()` and `model(..., past_key_values=...)` that appends in place.

    Copies made with `copy.copy` and caches that were cropped share buffers with what they came from, and move to their own when they
    go on.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=GrowingLayer)

    def __copy__(self) -> KVCache:
        other = KVCache()
        other.layers = [copy.copy(layer) for layer in self.layers]
        return other

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values held by all layers."""
        return sum(layer.store.bytes for layer in self.layers)
