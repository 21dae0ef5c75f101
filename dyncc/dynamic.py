"""Which sizes of a model's inputs may vary, guessed from the inputs: the batch of every tensor, the length of token ids and masks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

Call = tuple[tuple[Any, ...], dict[str, Any]]


def widened(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """The call with two rows where every tensor has one, which a capture would hold for a constant; None for other calls."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if any(tensor.dim() < 2 or tensor.shape[0] != 1 for tensor in tensors):
        return None
    call: Call = pytree.tree_map_only(torch.Tensor, lambda tensor: torch.cat([tensor, tensor]), (args, kwargs))
    return call


def varying_sizes(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`dynamic_shapes` for torch.export, which finds out by itself how much of it the model allows."""
    free = torch.export.Dim.AUTO(min=1)
    sizes = torch.export.ShapesCollection()
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            sizes[leaf] = {0: free, 1: free} if _has_length(leaf) else {0: free}
    return sizes.dynamic_shapes(model, args, kwargs)


def _has_length(tensor: torch.Tensor) -> bool:
    return tensor.dim() == 2 and not tensor.is_floating_point() and not tensor.is_complex()


@contextlib.contextmanager
def one_is_a_size() -> Iterator[None]:
    """Inside, torch decides nothing from a size that varies being other than one: what is captured holds for one row as well."""
    from torch.fx.experimental import _config

    with _config.patch(backed_size_oblivious=True):
        yield
