"""Calling an ONNX model as a program is called: state guarded, outputs in PyTorch's own memory, strides and mutations as promised."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dyncc.backends.flat_sizes import Place, Shapes, Sizes
from dyncc.backends.functional import Functional, Result
from dyncc.backends.layout import inverse, laid_out, memory_order, moved
from dyncc.errors import NotTaken
from dyncc.ir import Program

NOTES = 20
"""So many rebuilds are told one by one; `builds` counts on."""


class Session(Protocol):
    """An engine's compiled model."""

    def run(self, inputs: Sequence[torch.Tensor], room: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """The outputs, written to `room`; where that is None only the engine can tell the size, and it makes the tensor."""


Open = Callable[[Mapping[str, torch.Tensor]], Session]


@dataclass(frozen=True)
class Held:
    """A tensor that is part of a session, as it was when that was made."""

    tensor: torch.Tensor
    version: int
    address: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Held:
        return cls(tensor, tensor._version, tensor.data_ptr())

    def is_still(self, tensor: torch.Tensor) -> bool:
        return tensor is self.tensor and tensor._version == self.version and tensor.data_ptr() == self.address


class FlatCall:
    """A program's flat inputs -> its flat outputs. `builds` counts the sessions made, `notes` says why each further one was.

    Parameters, buffers and constants are part of the session for as long as they are the same unchanged tensors. Buffers that change
    are inputs of the next session, and so are tensors made under `torch.inference_mode`, whose changes are not counted.
    """

    def __init__(self, engine: str, program: Program, form: Functional, open_session: Open, values: Sequence[Any]) -> None:
        self.engine, self.program, self.form = engine, program, form
        self.open_session = open_session
        self.builds, self.notes = 0, list[str]()
        self.sizes = Sizes(form)
        self.orders = {given.place: given.order for given in form.given}
        self.names = dict(zip(self.orders, (given.name for given in form.program.inputs), strict=True))
        self.computed_orders = [memory_order(like) for like in form.computed]
        held = [place for place in self.orders if program.inputs[place].kind in ("parameter", "buffer", "constant")]
        self.state = [place for place in held if place not in form.mutated and not values[place].is_inference()]
        if self._overlaps(values, list(self.orders)):
            raise NotTaken("a tensor that the graph writes to shares memory with another one")
        self._build(values)

    def __call__(self, *flat: Any) -> list[Any]:
        self._guard(flat)
        shapes = self.sizes.of(flat)
        if self._overlaps(flat, self.fed) or any(flat[at].stride() != stride for at, stride in shapes.bases.items()):
            return list(self.program.module(*flat))
        with torch.no_grad():
            try:
                made = self._computed(flat, shapes)
            except Exception as error:
                return self._eagerly(flat, error)
            news = made[len(made) - len(self.form.mutated) :]
            for place, new in zip(self.form.mutated, news, strict=True):
                flat[place].copy_(new)
            return [_result(r, place, flat, made) for r, place in zip(self.form.results, shapes.places, strict=True)]

    def _computed(self, flat: Sequence[Any], shapes: Shapes) -> list[torch.Tensor]:
        inputs = [flat[place].permute(self.orders[place]).contiguous() for place in self.fed]
        likes = zip(shapes.room, self.form.computed, strict=True)
        room = [None if size is None else torch.empty(size, dtype=like.dtype, device=like.device) for size, like in likes]
        made = self.session.run(inputs, room)
        pairs = zip(made, self.form.computed, strict=True)
        made = [m if m.dtype is like.dtype else m.view(like.dtype) for m, like in pairs]  # truth values may come as bytes
        return [m.permute(inverse(order)) if moved(order) else m for m, order in zip(made, self.computed_orders, strict=True)]

    def _eagerly(self, flat: Sequence[Any], error: Exception) -> list[Any]:
        """The session failed before anything was written: the call is made eagerly, and that is said."""
        words = " ".join(str(error).split())[:300]
        warnings.warn(f"{self.engine} failed in a call, which ran eagerly ({words})", stacklevel=3)
        return list(self.program.module(*flat))

    def _guard(self, flat: Sequence[Any]) -> None:
        """Make a new session where state or the number of threads is no longer what it was."""
        changed = [place for place, held in self.held.items() if not held.is_still(flat[place])]
        if not changed and self.threads == torch.get_num_threads():
            return
        kinds = [self.program.inputs[place].kind for place in changed]
        self.state = [p for p in self.state if p not in changed or self.program.inputs[p].kind == "parameter"]
        counts = ", ".join(f"{kinds.count(k)} {k}{'s' if kinds.count(k) > 1 else ''} changed" for k in dict.fromkeys(kinds))
        reason = counts or f"{torch.get_num_threads()} threads instead of {self.threads}"
        self._build(flat)
        if len(self.notes) < NOTES:
            self.notes.append(f"session {self.builds}: {reason}")

    def _build(self, flat: Sequence[Any]) -> None:
        self.session: Any = None  # the old one goes first: two would hold the weights twice
        state = {place: flat[place].detach().permute(self.orders[place]).contiguous() for place in self.state}
        self.session = self.open_session({self.names[place]: tensor for place, tensor in state.items()})
        self.held = {place: Held.of(flat[place]) for place in self.state}
        self.fed = [place for place in self.orders if place not in self.held]
        self.threads = torch.get_num_threads()
        self.builds += 1

    def _overlaps(self, flat: Sequence[Any], places: Sequence[int]) -> bool:
        """Whether a tensor that is written to shares memory with another input: then the order of reads and writes matters."""
        if not self.form.mutated:
            return False
        owners = [flat[place].untyped_storage().data_ptr() for place in places if flat[place].numel()]
        return any(owners.count(flat[place].untyped_storage().data_ptr()) > 1 for place in self.form.mutated)


def _result(result: Result, place: Place | int | None, flat: Sequence[Any], made: Sequence[torch.Tensor]) -> Any:
    if result.kind == "constant":
        return result.value
    if result.kind == "input":
        return flat[result.at]
    if result.kind == "view":
        assert isinstance(place, Place)
        base = flat[result.at]
        return base.as_strided(place.size, place.stride, base.storage_offset() + place.offset)
    if result.kind == "size":
        return place
    return laid_out(made[result.at], place.stride) if isinstance(place, Place) else made[result.at]
