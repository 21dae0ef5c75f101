"""dyncc.KVCache: the growing cache's tokens without its copies, and no two continuations of one past that see each other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from test_onnx import decoder
from transformers import DynamicCache

import dyncc
from dyncc.kv_store import ROOM, KVStore

pytestmark = pytest.mark.usefixtures("no_grad")

VOCABULARY, STEPS = 97, 40


def tiny_llama() -> Any:
    """A decoder that never ends a text by itself."""
    return decoder(eos_token_id=None, max_position_embeddings=4096)


def prompt(batch: int = 2, length: int = 7, pads: int = 0) -> dict[str, torch.Tensor]:
    """The first row has `pads` pads on the left."""
    ids = torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :pads], ids[0, :pads] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def rows(count: int, seed: int = 0, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, count, 4, generator=generator), torch.randn(batch, 2, count, 3, generator=generator)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.sampled_from(["append", "crop", "share", "switch"]), st.integers(1, 300)), max_size=14))
def test_any_order_of_appends_crops_and_shares_is_concatenation(steps: list[tuple[str, int]]) -> None:
    stores, models, at = [KVStore()], [[torch.zeros(1, 2, 0, 4), torch.zeros(1, 2, 0, 3)]], 0
    handed: list[tuple[torch.Tensor, torch.Tensor]] = []
    for seed, (step, count) in enumerate(steps):
        if step == "append":
            new = rows(count, seed)
            got = stores[at].append(*new)
            models[at] = [torch.cat(pair, 2) for pair in zip(models[at], new, strict=True)]
            handed += [(view, view.clone()) for view in got]
        elif step == "crop":
            stores[at].crop(count)
            models[at] = [t[:, :, : max(0, t.shape[2] - count)] for t in models[at]]
        elif step == "share":
            stores.append(copy.copy(stores[at]))
            models.append(list(models[at]))
        else:
            at = count % len(stores)
    for store, model in zip(stores, models, strict=True):
        assert store.length == model[0].shape[2]
        if store.buffer is not None:
            assert all(torch.equal(a, b) for a, b in zip(store.view(), model, strict=True))
    assert all(torch.equal(view, then) for view, then in handed)  # what was handed out never changes


def test_appending_writes_in_place_until_the_buffer_is_full() -> None:
    store = KVStore()
    store.append(*rows(ROOM // 2))
    first = store.buffer
    store.append(*rows(ROOM))
    assert store.buffer is first and first is not None and first.keys.shape[2] == ROOM // 2 + ROOM
    store.append(*rows(1))
    assert store.buffer is not first and store.buffer is not None and store.buffer.keys.shape[2] == ROOM // 2 + 2 * ROOM + 1


def test_the_second_continuation_of_one_past_moves_to_its_own_buffer() -> None:
    store = KVStore()
    store.append(*rows(5))
    other = copy.copy(store)
    store.append(*rows(1, seed=1))
    other.append(*rows(1, seed=2))
    assert store.buffer is not other.buffer
    assert torch.equal(store.view()[0][:, :, 5:], rows(1, seed=1)[0]) and torch.equal(other.view()[0][:, :, 5:], rows(1, seed=2)[0])


def test_gathering_keeps_the_chosen_rows_and_gives_the_memory_back() -> None:
    store = KVStore()
    keys, values = rows(1000)
    store.append(keys, values)
    index = torch.stack([torch.arange(0, 1000, 100), torch.arange(5, 15)])[None]
    before = store.bytes
    store.gather(index)
    assert store.bytes * 100 == before and store.buffer is not None and store.buffer.keys.shape[2] == 10
    assert torch.equal(store.view()[0][0, 0], keys[0, 0, ::100]) and torch.equal(store.view()[1][0, 1], values[0, 1, 5:15])
    store.append(*rows(1, seed=3))
    assert store.length == 11 and torch.equal(store.view()[0][0, 0, :10], keys[0, 0, ::100])


@pytest.mark.parametrize("pads", [0, 3])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 3}])
def test_generate_gives_the_tokens_of_the_growing_cache(how: dict[str, Any], pads: int) -> None:
    batch = 1 if "prompt_lookup_num_tokens" in how else 2
    model, given = tiny_llama(), prompt(batch, pads=pads)
    options = {**given, "max_new_tokens": STEPS, "do_sample": False, **how}
    expected = model.generate(**options)
    assert torch.equal(model.generate(**options, past_key_values=dyncc.KVCache()), expected)


def test_a_long_generation_outgrows_its_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dyncc.kv_store.ROOM", 2)
    model, given = tiny_llama(), prompt(1, 9)
    expected = model.generate(**given, max_new_tokens=8, do_sample=False)
    cache = dyncc.KVCache()
    assert torch.equal(model.generate(**given, max_new_tokens=8, do_sample=False, past_key_values=cache), expected)
    assert cache.get_seq_length() == 16 and cache.layers[0].store.buffer.keys.shape[2] == 20  # moved twice


def _logits(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, past_key_values=cache).logits
    return found


def branch(copied: Callable[[Any], Any]) -> None:
    """Two continuations of one past, interleaved, each as if it were alone."""
    model, ids = tiny_llama(), prompt(1, 9)["input_ids"]
    tails = torch.randint(1, VOCABULARY, (2, 1, 6), generator=torch.Generator().manual_seed(5))
    alone = [_logits(model, torch.cat([ids, tail], 1), DynamicCache())[:, 9:] for tail in tails]
    cache = dyncc.KVCache()
    _logits(model, ids, cache)
    caches, found = [cache, copied(cache)], [[], []]
    for step in range(6):
        for which in (0, 1):
            found[which].append(_logits(model, tails[which][:, step : step + 1], caches[which]))
    for which in (0, 1):
        torch.testing.assert_close(torch.cat(found[which], 1), alone[which], rtol=1e-4, atol=1e-5)


def test_branches_of_a_shallow_copy_do_not_overwrite_each_other() -> None:
    branch(copy.copy)


def test_branches_of_a_deep_copy_do_not_overwrite_each_other() -> None:
    branch(copy.deepcopy)


def test_crop_and_retry_leaves_views_of_the_first_try_alone() -> None:
    model, ids = tiny_llama(), prompt(1, 12)["input_ids"]
    cache = dyncc.KVCache()
    _logits(model, ids, cache)
    held = cache.layers[0].keys
    then = held.clone()
    cache.crop(-4)
    retry = _logits(model, ids[:, :4], cache)
    assert torch.equal(held, then)
    whole = _logits(model, torch.cat([ids[:, :8], ids[:, :4]], 1), DynamicCache())
    torch.testing.assert_close(retry, whole[:, 8:], rtol=1e-4, atol=1e-5)


def test_two_sequences_do_not_leak_and_a_reset_forgets() -> None:
    model, ids = tiny_llama(), prompt(2, 9)["input_ids"]
    a, b = dyncc.KVCache(), dyncc.KVCache()
    for step in range(9):
        for row, cache in ((0, a), (1, b)):
            last = _logits(model, ids[row : row + 1, step : step + 1], cache)
            whole = _logits(model, ids[row : row + 1, : step + 1], DynamicCache())
            torch.testing.assert_close(last[:, 0], whole[:, -1], rtol=1e-4, atol=1e-5)
    a.reset()
    assert a.get_seq_length() == 0 and a.bytes == 0
    torch.testing.assert_close(_logits(model, ids[:1], a), _logits(model, ids[:1], DynamicCache()), rtol=1e-4, atol=1e-5)


def test_keys_and_values_are_not_set_one_by_one() -> None:
    cache = dyncc.KVCache()
    _logits(tiny_llama(), prompt(1)["input_ids"], cache)
    with pytest.raises(AttributeError, match="changed together"):
        cache.layers[0].keys = torch.zeros(1)
    with pytest.raises(ValueError, match="negative number, such as -3"):
        cache.layers[0].crop(3)


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.full), 2])
def test_compiled_generation_is_two_graphs_that_dyncc_lowers(batch: int) -> None:
    torch._dynamo.reset()
    model, given = tiny_llama(), prompt(batch, pads=2 if batch == 2 else 0)
    options = {**given, "max_new_tokens": 200, "do_sample": False}
    expected = model.generate(**options)
    before = len(dyncc.reports())
    model.compile(backend="dyncc", options={"engine": "reference"})
    assert torch.equal(model.generate(**options, past_key_values=dyncc.KVCache()), expected)
    reports = dyncc.reports()[before:]
    assert 2 <= len(reports) <= 3
    for report in reports:
        assert report.fallback is None and report.found_attention == report.expected_attention == 2
    torch._dynamo.reset()


@pytest.mark.full
@pytest.mark.parametrize("dynamic", [None, True])
def test_inductor_steps_over_a_cache_that_was_filled_before(dynamic: bool | None) -> None:
    """With `dynamic`, Dynamo starts over when Inductor finds a float that must be fixed: one graph, one report, no fallback."""
    torch._dynamo.reset()
    model, ids = tiny_llama(), prompt(1, ROOM)["input_ids"]
    cache = dyncc.KVCache()
    _logits(model, ids, cache)
    expected = copy.deepcopy(cache)
    compiled, before = torch.compile(model, backend="dyncc", dynamic=dynamic), len(dyncc.reports())
    for token in range(5, 10):
        step = torch.tensor([[token]])
        torch.testing.assert_close(_logits(compiled, step, cache), _logits(model, step, expected), rtol=1e-4, atol=1e-5)
    assert len(dyncc.reports()) - before <= 2 and not any(r.fallback for r in dyncc.reports()[before:])
    torch._dynamo.reset()


def test_a_copied_layer_goes_on_by_itself() -> None:
    cache = dyncc.KVCache()
    _logits(tiny_llama(), prompt(1)["input_ids"], cache)
    layer, twin = cache.layers[0], copy.copy(cache.layers[0])
    new = torch.ones(1, 2, 1, 16)
    layer.update(new, new)
    twin.update(-new, -new)
    assert layer.get_seq_length() == twin.get_seq_length() == 8
    assert (layer.keys[:, :, -1] == 1).all() and (twin.keys[:, :, -1] == -1).all()
