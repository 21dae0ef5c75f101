"""How far two outputs of a model are apart, in the terms of what the model is for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree


def compare(dense: Any, other: Any, vocabulary: int | None = None) -> dict[str, float]:
    """Distances of `other` from `dense`: the largest relative error, and KL and top-1 agreement or cosine of the primary output.

    The primary output counts as logits when its last dimension has the vocabulary's size, else as an embedding.
    """
    left, right = primary(dense), primary(other)
    if left is None or right is None or left.shape != right.shape:
        return {}
    found = {"max_rel_error": max_rel_error(dense, other)}
    if _is_logits(dense, left, vocabulary):
        return {**found, "kl": kl(left, right), "top1_agreement": top1_agreement(left, right)}
    return {**found, "cosine": cosine(left, right)}


def primary(output: Any) -> Tensor | None:
    """The output that matters: `logits` where there is one, else the first floating tensor."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    return next((leaf for leaf in _floats(output)), None)


def max_rel_error(dense: Any, other: Any) -> float:
    """max|a-b| / max|a|, the worst over the outputs whose shapes agree (a pruned cache is shorter on purpose)."""
    pairs = zip(_floats(dense), _floats(other), strict=False)
    errors = [_rel_error(a.float(), b.float()) for a, b in pairs if a.shape == b.shape and a.numel()]
    return max(errors, default=0.0)


def kl(dense: Tensor, other: Tensor) -> float:
    """Mean over positions of KL(dense || other), in nats."""
    p, q = (F.log_softmax(x.float().flatten(0, -2), dim=-1) for x in (dense, other))
    return max(0.0, F.kl_div(q, p, log_target=True, reduction="batchmean").item())


def top1_agreement(dense: Tensor, other: Tensor) -> float:
    """Share of positions at which both choose the same token or class."""
    return (dense.argmax(-1) == other.argmax(-1)).float().mean().item()


def cosine(dense: Tensor, other: Tensor) -> float:
    """Mean cosine of the embeddings; token embeddings are averaged over the tokens first."""
    left, right = (x.float().mean(dim=1) if x.ndim == 3 else x.float() for x in (dense, other))
    return F.cosine_similarity(left, right, dim=-1).mean().item()


def _is_logits(output: Any, tensor: Tensor, vocabulary: int | None) -> bool:
    return isinstance(getattr(output, "logits", None), Tensor) or (vocabulary is not None and tensor.shape[-1] == vocabulary)


def _rel_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / a.abs().max().clamp_min(torch.finfo(torch.float32).tiny)).item()


def _floats(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
