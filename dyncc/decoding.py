"""A decoder's two phases as plain modules of tensors: `Prefill` reads a prompt, `Decode` reads one token after cached keys.

The cache goes in and out as a flat tuple `k0, v0, k1, v1, ...`, so that the modules can be exported, compiled and compared without
a cache object. `continue_text` reads on from such a tuple even where layers hold different numbers of keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dyncc.timing import Progress


class Prefill(nn.Module):
    """Read a whole prompt; returns the last position's logits and, when asked, the keys and values of every layer."""

    def __init__(self, model: nn.Module, keys: bool = False) -> None:
        super().__init__()
        self.model = model
        self.keys = keys

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=self.keys, logits_to_keep=1)
        return (out.logits, *flatten_cache(out.past_key_values)) if self.keys else (out.logits,)


class Decode(nn.Module):
    """Read one token after `past`; returns its logits and, when asked, the keys and values grown by one."""

    def __init__(self, model: nn.Module, keys: bool = True) -> None:
        super().__init__()
        self.model = model
        self.keys = keys

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, *past: Tensor) -> tuple[Tensor, ...]:
        return self._step(past, input_ids=input_ids, attention_mask=attention_mask)

    def _step(self, past: Sequence[Tensor], **given: Any) -> tuple[Tensor, ...]:
        out = self.model(**given, past_key_values=grow_from(past), logits_to_keep=1)
        return (out.logits, *flatten_cache(out.past_key_values)) if self.keys else (out.logits,)


class EvictedDecode(Decode):
    """`Decode` after a past from which keys were dropped: the token's own position [B, 1] is given, the mask is one of the keys held."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self._step(past, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)


class StaticDecode(nn.Module):
    """Read one token at a fixed place of a preallocated cache, as `generate(cache_implementation="static")` does.

    `rewind` sets the fill level back, so that every call does the same step.
    """

    def __init__(self, model: nn.Module, past: Sequence[Tensor], capacity: int) -> None:
        super().__init__()
        from transformers import StaticCache

        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=capacity)
        self.filled = past[0].shape[-2]
        for index, (key, value) in enumerate(zip(past[::2], past[1::2], strict=True)):
            self.cache.update(key, value, index)

    def rewind(self) -> None:
        """Forget what was read since the module was made."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.filled)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, ...]:
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=self.cache, logits_to_keep=1)
        return (out.logits,)


def flatten_cache(cache: Any) -> tuple[Tensor, ...]:
    """`k0, v0, k1, v1, ...` of a transformers cache."""
    return tuple(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


def grow_from(past: Sequence[Tensor]) -> Any:
    """A growing transformers cache that holds `past` itself, not copies: `cache.update` would concatenate with nothing first."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    for key, value in zip(past[::2], past[1::2], strict=True):
        layer = DynamicLayer()
        layer.keys, layer.values = key, value
        layer.dtype, layer.device, layer.is_initialized = key.dtype, key.device, True
        cache.layers.append(layer)
    return cache


@torch.no_grad()
def continue_text(model: nn.Module, past: Sequence[Tensor], input_ids: Tensor, position: int) -> Tensor:
    """Logits of `input_ids` read in one go after `past`; the first of them stands at `position` of the original text.

    Every layer attends to all the keys it holds and causally to the new ones, however many keys the other layers hold.
    """
    length = input_ids.shape[1]
    positions = torch.arange(position, position + length, device=input_ids.device)[None]
    with _causal_masks(model, [key.shape[-2] for key in past[::2]], length, input_ids.device):
        return model(input_ids=input_ids, position_ids=positions, past_key_values=grow_from(past)).logits


@torch.no_grad()
def continuation_nll(model: nn.Module, prefilled: Sequence[Tensor], following: Tensor, position: int) -> Tensor:
    """Negative log-likelihood of each of the tokens `following` a prompt that `Prefill(keys=True)` has read, teacher-forced."""
    first, *past = prefilled
    rest = continue_text(model, past, following[:, :-1], position)
    logits = torch.cat([first[:, -1:], rest], dim=1).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none")


def compare_continuations(
    model: nn.Module,
    dense: Callable[[Tensor], Sequence[Tensor]],
    pruned: Callable[[Tensor], Sequence[Tensor]],
    tokens: Tensor,
    prompt: int,
    ahead: int = 128,
    documents: int = 16,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Read `documents` disjoint stretches of `tokens` densely and pruned, and compare what is predicted after each prompt.

    `dense` and `pruned` map prompt ids to what `Prefill(keys=True)` returns.
    """
    span = prompt + ahead
    if tokens.numel() < documents * span:
        raise ValueError(f"{documents} documents of {span} tokens are needed, the text has {tokens.numel()} tokens")
    agreed, losses = 0, {"dense": 0.0, "pruned": 0.0}
    for number in range(documents):
        ids = tokens[number * span : (number + 1) * span][None]
        read, following = ids[:, :prompt], ids[:, prompt:]
        with torch.no_grad():
            outputs = {"dense": dense(read), "pruned": pruned(read)}
        agreed += int(outputs["dense"][0][:, -1].argmax() == outputs["pruned"][0][:, -1].argmax())
        for name, output in outputs.items():
            losses[name] += continuation_nll(model, output, following, prompt).mean().item()
        if progress is not None:
            progress("documents", number + 1, documents)
    perplexity = {name: math.exp(loss / documents) for name, loss in losses.items()}
    return {
        "documents": documents,
        "prompt_tokens": prompt,
        "tokens_ahead": ahead,
        "first_token_agreement": agreed / documents,
        "perplexity_dense": perplexity["dense"],
        "perplexity_pruned": perplexity["pruned"],
        "perplexity_change": perplexity["pruned"] / perplexity["dense"] - 1,
    }


@contextmanager
def _causal_masks(model: nn.Module, held: Sequence[int], length: int, device: torch.device) -> Iterator[None]:
    """Give each attention layer the mask that fits its own number of held keys."""
    layers = [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "num_key_value_groups")]
    if len(layers) != len(held):
        raise ValueError(f"the cache holds {len(held)} layers, but the model has {len(layers)} attention modules")
    new = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    hooks = []
    for module in layers:
        old = torch.ones(length, held[module.layer_idx], dtype=torch.bool, device=device)
        hooks.append(module.register_forward_pre_hook(_replace_mask(torch.cat([old, new], dim=1)[None, None]), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _replace_mask(mask: Tensor) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "attention_mask": mask}

    return hook
