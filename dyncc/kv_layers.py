"""One layer of a `dyncc.KVCache`: keys and values that grow in place, and what its passes want to know about them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyncc.errors import CacheNotServed, PackageMissing
from dyncc.kv_pages import pages_for
from dyncc.kv_pruned import PromptCuts, PrunedPrompt
from dyncc.kv_store import ROOM, KVStore

try:
    from transformers.cache_utils import DynamicLayer
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
            raise AttributeError("keys and values of a dyncc.KVCache are changed together; use layer.change")

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
        self.change(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.change(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.change(lambda rows: rows[indices, ...])

    def offload(self) -> None:
        self.change(lambda rows: rows.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self.change(lambda rows: rows.to(self.device, non_blocking=True))

    def change(self, edit: Callable[[Tensor], Tensor]) -> None:
        """Put `edit(x)` in place of everything held: another batch, another device."""
        self.store.change(edit)


@dataclass(frozen=True)
class Policy:
    """What the passes of a cache do: `prune` shortens a prompt on its way through the layers, `evict` drops keys, `select` reads a part of
    them in a step; each may be None. With texts of the latter two, the weights that were trained for `evict`, and what `select` remembers
    between steps (`former`)."""

    prune: PromptCuts | None
    evict: Any
    select: Any
    evict_text: str = ""
    select_text: str = ""
    given: Any = None
    former: Any = None


class PolicyLayer(GrowingLayer):
    """A layer that drops keys, never gets those of pruned tokens, or marks keys for selection. `keys` holds what is left; lengths and
    positions go on counting every token that was read.

    `scores` [B, G, T] says what each key held has earned, and is -1 for pads, which go first: rows stay in order, so a mask over the last
    T tokens of the text hides exactly the pads that are left (pads stand on the left). `read` [B, G, T] says when each key was read, for
    scores that age. `state` is what a pass that selects left at the step before; None where it starts anew.
    """

    def __init__(self, policy: Policy, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.policy = policy
        self.scores: Tensor | None = None
        self.read: Tensor | None = None
        self.seen = 0
        self.prompted = False
        self.pages = pages_for(policy.select)
        self.state: list[Tensor] | None = None
        self.pruned = PrunedPrompt(policy.prune) if policy.prune is not None else None

    def __copy__(self) -> PolicyLayer:
        twin = PolicyLayer(self.policy)
        pages = self.pages.copy() if self.pages is not None else None
        pruned = self.pruned.copy() if self.pruned is not None else None
        twin.__dict__ |= {**self.__dict__, "store": copy.copy(self.store), "pages": pages, "pruned": pruned}
        return twin

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: Any, number: int = 0, first: int = 0, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Drop what is due, append the rows [B, G, T, D] of layer `number`, and mark what dyncc serves in the compiled model."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows: int = key_states.shape[2]
        if self._due(rows):
            self._drop(rows)
        start, self.seen, self.prompted = self.seen, self.seen + rows, rows > 1
        new, dense = (key_states, value_states), None
        if self.pruned is not None and start == self.store.length == 0 and self.pruned.cuts.prunes(rows):  # both are guarded: no row is old
            new, dense = self.pruned.thin(key_states, value_states, number), new
        keys, values = self.store.append(*new)
        if self.policy.evict is not None:
            keys = self._watched(keys, new, start, number)
        if self.policy.select is not None:
            keys = self._partly_read(keys, rows)
        if self.pruned is not None:
            keys, values = self.pruned.stand_for((keys, values), dense, first)
        return keys, values

    def _due(self, rows: int) -> bool:
        """Whether keys are dropped before the next `rows` tokens are read: in steps only, so that a prompt may come in chunks."""
        evict, held = self.policy.evict, self.store.length
        if evict is None or rows != 1:
            return False
        return bool(held >= evict.budget + evict.every if evict.every else self.prompted and held > evict.budget)

    def _drop(self, rows: int) -> None:
        assert self.scores is not None, "keys are dropped after a prompt, which scored them"
        evict = self.policy.evict
        ages = self.seen - self.read if self.read is not None else None
        index = evict.choose(self.scores, enough=True, ages=ages)
        self.store.gather(index, room=(evict.every or ROOM) + rows)
        self.scores = self.scores.gather(2, index)
        self.read = self.read.gather(2, index) if self.read is not None else None
        self._forget()
        if self.pruned is not None:
            self.pruned.forget()

    def _watched(self, keys: Tensor, new: tuple[Tensor, Tensor], start: int, number: int) -> Tensor:
        """The keys, through the op in whose place `evict-kv` puts their new scores."""
        rows: int = new[0].shape[2]
        if rows == 1 and not self.policy.evict.every:
            self.scores = None
            return keys
        batch, groups, held, _ = keys.shape
        old = self.scores if self.scores is not None else keys.new_zeros((batch, groups, held - rows), dtype=torch.float32)
        grown = torch.cat([old, keys.new_zeros((batch, groups, rows), dtype=torch.float32)], dim=2)
        wanted = list(new) if self.policy.evict.wants_new else []
        given = self.policy.given.of_layer(number) if self.policy.given is not None else []
        keys, self.scores = torch.ops.dyncc.watched(keys, grown, wanted, given, self.policy.evict_text, rows, start)
        if self.policy.evict.score == "fade":
            read = torch.arange(start, start + rows, device=keys.device).expand(batch, groups, rows)
            self.read = read if self.read is None else torch.cat([self.read, read], dim=2)
        return keys

    def _partly_read(self, keys: Tensor, rows: int) -> Tensor:
        """The keys, through the op by which `select-kv` knows them; prompts read all of them."""
        if not torch.compiler.is_compiling():
            raise CacheNotServed(passes=self.policy.select_text, problem=CacheNotServed.not_compiled)
        if rows != 1:
            self._forget()
            return keys
        assert self.store.buffer is not None
        pages = self.pages.append(keys, rows, self.store.buffer.keys.shape[2]) if self.pages is not None else ()
        marked: Tensor = torch.ops.dyncc.partly_read(keys, list(pages), self.policy.select_text)
        if self.policy.former is not None:
            state = self.state if self.state is not None else self.policy.former.state(keys)
            self.state = list(torch.ops.dyncc.remembered(marked, state, self.policy.select_text))
        return marked

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = self.policy.evict.budget if self._due(query_length) else self.store.length
        return held + query_length, self.seen - held

    def get_seq_length(self) -> int:
        return self.seen

    def reset(self) -> None:
        super().reset()
        self.scores, self.read, self.seen, self.prompted = None, None, 0, False
        self._forget()
        if self.pruned is not None:
            self.pruned.forget()

    def crop(self, tokens_to_remove: int) -> None:
        prompt = self.pruned.tokens if self.pruned is not None else 0
        if tokens_to_remove < 0 and prompt and self.seen + tokens_to_remove < prompt:
            raise ValueError("this cache holds a pruned prompt, so it cannot go back into it; read the prompt into another cache")
        if tokens_to_remove < 0 and not prompt and self.seen != self.store.length:
            raise ValueError("this cache has dropped keys, so it cannot go back; keep a copy.copy of it from before")
        super().crop(tokens_to_remove)
        self.seen = max(0, self.seen + tokens_to_remove)
        if self.scores is not None:
            self.scores = self.scores[:, :, : self.store.length]
        if self.read is not None:
            self.read = self.read[:, :, : self.store.length]
        self._forget()

    def change(self, edit: Callable[[Tensor], Tensor]) -> None:
        super().change(edit)
        self.scores = edit(self.scores) if self.scores is not None else None
        self.read = edit(self.read) if self.read is not None else None
        self.state = [edit(x) for x in self.state] if self.state is not None else None
        if self.pages is not None:
            self.pages.forget()
        if self.pruned is not None:
            self.pruned.change(edit)

    def _forget(self) -> None:
        """Other keys stand where those of pages and choices stood."""
        self.state = None
        if self.pages is not None:
            self.pages.forget()
