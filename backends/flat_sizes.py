"""Sizes, strides and offsets of a functional program's outputs in a call, from the sizes of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dyncc.backends.functional import Functional, Result
from dyncc.backends.layout import memory_order

Numbers = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where an output lies: sizes, strides and how far behind the start of the input that it is a view of."""

    size: Numbers
    stride: Numbers
    offset: int = 0


@dataclass(frozen=True)
class Shapes:
    """`room`: the sizes of what is computed, in memory order; `places`: a Place, a number or nothing for each result; None where only
    the engine can tell. `bases`: the strides that inputs must have for their views to be right."""

    room: tuple[Numbers | None, ...]
    places: tuple[Place | int | None, ...]
    bases: dict[int, Numbers]


class Sizes:
    """Finds the numbers for symbolic sizes; calls of equal sizes are looked up."""

    def __init__(self, form: Functional) -> None:
        self.form = form
        self.likes = {given.place: given.like for given in form.given}
        self.spots: dict[Any, tuple[int, int]] = {}
        for place, like in self.likes.items():
            for dim, size in enumerate(like.shape):
                if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                    self.spots.setdefault(size.node.expr, (place, dim))
        self._known: dict[Numbers, Shapes] = {}

    def of(self, flat: Sequence[Any]) -> Shapes:
        """The shapes of one call."""
        key = tuple(flat[place].shape[dim] for place, dim in self.spots.values())
        if key not in self._known:
            self._known[key] = self._work_out(dict(zip(self.spots, key, strict=True)))
        return self._known[key]

    def _work_out(self, bound: dict[Any, int]) -> Shapes:
        room = []
        for like in self.form.computed:
            size = _numbers(like.shape, bound)
            room.append(None if size is None else tuple(size[d] for d in memory_order(like)))
        places = tuple(self._place(result, bound) for result in self.form.results)
        viewed = {r.at for r in self.form.results if r.kind == "view"}
        bases = {at: _numbers(self.likes[at].stride(), bound) for at in viewed}
        return Shapes(tuple(room), places, {at: stride or () for at, stride in bases.items()})

    def _place(self, result: Result, bound: dict[Any, int]) -> Place | int | None:
        if result.kind == "size":
            found = _numbers([result.value], bound)
            return None if found is None else found[0]
        if result.kind not in ("computed", "view"):
            return None
        size, stride = _numbers(result.value.shape, bound), _numbers(result.value.stride(), bound)
        base = self.likes[result.at].storage_offset() if result.kind == "view" else result.value.storage_offset()
        offset = _numbers([result.value.storage_offset() - base], bound)
        return None if size is None or stride is None or offset is None else Place(size, stride, offset[0])


def _numbers(sizes: Sequence[Any], bound: dict[Any, int]) -> Numbers | None:
    """The numbers, or None where one depends on values of tensors."""
    found = [s if isinstance(s, int) else s.node.expr.xreplace(bound) for s in sizes]
    return tuple(int(f) for f in found) if all(isinstance(f, int) or f.is_Integer for f in found) else None
