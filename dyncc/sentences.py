"""Passages of English for a sentence encoder, and how far its pruned embeddings are from the dense ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dyncc.models import english_text


def passages(tokenizer: Any, length: int, batch: int, count: int) -> list[dict[str, Tensor]]:
    """`count` batches of disjoint passages, every one exactly `length` tokens with the special tokens at its ends."""
    ids = tokenizer(english_text(), add_special_tokens=False, verbose=False)["input_ids"]
    body = length - 2
    if len(ids) < count * batch * body:
        raise ValueError(f"{count * batch} passages of {body} tokens are needed, the text has {len(ids)} tokens")
    rows = [[tokenizer.cls_token_id, *ids[i * body : (i + 1) * body], tokenizer.sep_token_id] for i in range(count * batch)]
    stacked = torch.tensor(rows).view(count, batch, length)
    return [{"input_ids": group, "attention_mask": torch.ones_like(group)} for group in stacked]


def mean_pooled(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The sentence embedding: the mean over the real tokens, normalised."""
    weights = attention_mask[..., None].to(hidden.dtype)
    return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


@torch.no_grad()
def embedding_cosines(dense: Callable[..., Any], pruned: Callable[..., Any], batches: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Mean and smallest cosine between the dense and the pruned embeddings of all passages."""
    found = []
    for batch in batches:
        left, right = (mean_pooled(_hidden(run(**batch)), batch["attention_mask"]) for run in (dense, pruned))
        found.append((left * right).sum(-1))
    cosines = torch.cat(found)
    return {"passages": cosines.numel(), "mean_cosine": cosines.mean().item(), "smallest_cosine": cosines.min().item()}


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
    return hidden
