"""A decoder's phases as modules of tensors, and reading on from caches of unequal lengths."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from dyncc.decoding import Decode, Prefill, StaticDecode, compare_continuations, continuation_nll, continue_text, grow_from

TOKENS = 24


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(97, (1, TOKENS), generator=torch.Generator().manual_seed(1))


def test_prefill_gives_the_last_logits_and_all_keys(model: LlamaForCausalLM, ids: Tensor) -> None:
    logits, *past = Prefill(model, keys=True)(ids, torch.ones_like(ids))
    assert torch.allclose(logits, model(ids).logits[:, -1:], atol=1e-5)
    assert [tuple(tensor.shape) for tensor in past] == [(1, 2, TOKENS, 8)] * 6
    assert len(Prefill(model)(ids)) == 1


@pytest.mark.parametrize("masked", [False, True])
def test_a_decoded_token_equals_the_full_text(model: LlamaForCausalLM, ids: Tensor, masked: bool) -> None:
    _, *past = Prefill(model, keys=True)(ids[:, :-1])
    expected = model(ids).logits[:, -1:]
    mask = torch.ones_like(ids) if masked else None
    logits, *grown = Decode(model)(ids[:, -1:], mask, *past)
    assert torch.allclose(logits, expected, atol=1e-5) and grown[0].shape[-2] == TOKENS
    static = StaticDecode(model, past, capacity=TOKENS + 8)
    for _ in range(3):
        static.rewind()
        assert torch.allclose(static(ids[:, -1:], mask)[0], expected, atol=1e-5)


def test_the_growing_cache_holds_the_tensors_themselves(model: LlamaForCausalLM, ids: Tensor) -> None:
    _, *past = Prefill(model, keys=True)(ids)
    cache = grow_from(past)
    assert isinstance(cache, DynamicCache) and cache.get_seq_length() == TOKENS and cache.layers[1].values is past[3]


def test_reading_on_in_one_go_equals_the_full_text(model: LlamaForCausalLM, ids: Tensor) -> None:
    _, *past = Prefill(model, keys=True)(ids[:, :16])
    assert torch.allclose(continue_text(model, past, ids[:, 16:], 16), model(ids).logits[:, 16:], atol=1e-5)


def test_reading_on_from_unequal_layers_equals_token_by_token(model: LlamaForCausalLM, ids: Tensor) -> None:
    _, *past = Prefill(model, keys=True)(ids[:, :16])
    pruned = _without_rows(past, layer=1)
    cache, steps = grow_from(pruned), []
    for position in range(16, TOKENS):
        token, where = ids[:, position : position + 1], torch.tensor([[position]])
        steps.append(model(token, past_key_values=cache, position_ids=where).logits)
    assert torch.allclose(continue_text(model, pruned, ids[:, 16:], 16), torch.cat(steps, dim=1), atol=1e-5)


def test_the_masks_are_taken_off_again(model: LlamaForCausalLM, ids: Tensor) -> None:
    before = model(ids).logits
    _, *past = Prefill(model, keys=True)(ids[:, :16])
    continue_text(model, past, ids[:, 16:], 16)
    assert torch.equal(model(ids).logits, before)


def test_a_cache_of_another_depth_is_refused(model: LlamaForCausalLM, ids: Tensor) -> None:
    _, *past = Prefill(model, keys=True)(ids[:, :16])
    with pytest.raises(ValueError, match="holds 2 layers, but the model has 3"):
        continue_text(model, past[:4], ids[:, 16:], 16)


def test_likelihood_of_a_continuation_equals_the_full_text(model: LlamaForCausalLM, ids: Tensor) -> None:
    expected = torch.nn.functional.cross_entropy(model(ids).logits[0, 15:-1], ids[0, 16:], reduction="none")
    assert torch.allclose(continuation_nll(model, Prefill(model, keys=True)(ids[:, :16]), ids[:, 16:], 16), expected, atol=1e-5)


def test_continuations_are_compared_over_disjoint_documents(model: LlamaForCausalLM) -> None:
    read: list[Tensor] = []
    dense = Prefill(model, keys=True)

    def pruned(prompt: Tensor) -> Sequence[Tensor]:
        read.append(prompt)
        logits, *past = dense(prompt)
        return (logits, *_without_rows(past, layer=1))

    tokens = torch.arange(90)
    same = compare_continuations(model, dense, dense, tokens, prompt=16, ahead=6, documents=4)
    assert same["first_token_agreement"] == 1.0 and same["perplexity_change"] == 0.0
    found = compare_continuations(model, dense, pruned, tokens, prompt=16, ahead=6, documents=4)
    assert found["perplexity_pruned"] != found["perplexity_dense"] and found["documents"] == 4
    assert [prompt[0, 0].item() for prompt in read] == [0, 22, 44, 66]
    with pytest.raises(ValueError, match="5 documents of 22 tokens are needed, the text has 90"):
        compare_continuations(model, dense, dense, tokens, prompt=16, ahead=6, documents=5)


def _without_rows(past: Sequence[Tensor], layer: int) -> list[Tensor]:
    """Layers after `layer` keep every second key."""
    return [tensor if index // 2 <= layer else tensor[:, :, ::2] for index, tensor in enumerate(past)]
