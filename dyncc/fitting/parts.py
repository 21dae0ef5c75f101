"""What can be fitted, as a plan names it: `exits{layers=8,16 probe=true} units{rank=32} drops`. Each part is options and a fitter."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from dyncc.errors import BadOptionValue, UnknownFit, near
from dyncc.fitting.drops import DropsFitter
from dyncc.fitting.exits import ExitsFitter
from dyncc.fitting.subject import Subject
from dyncc.fitting.units import UnitsFitter
from dyncc.options import Layers, at_least, settle
from dyncc.pipeline import Registry, build, parse, render


@dataclass(frozen=True)
class Exits:
    """Maps from the state behind a layer to that behind the last one, for the model's own norm and head to read; and on request probes
    that tell where the head then answers as at the end."""

    name: ClassVar[str] = "exits"

    layers: Layers = Layers("25%,50%,75%")
    ridge: float = 0.001
    probe: bool = False
    rows: int = 4096

    def __post_init__(self) -> None:
        settle(self)
        _check_strength(self.ridge)
        at_least(self, rows=1)

    def fitter(self, subject: Subject) -> ExitsFitter:
        layers = _distinct(self.layers, subject.layers)
        if layers[-1] == subject.layers - 1:
            problem = f"layer {layers[-1]} is the last; an exit behind it skips nothing"
            raise BadOptionValue(option="layers", value=str(self.layers), problem=problem)
        return ExitsFitter(subject, layers, self.ridge, self.probe)


@dataclass(frozen=True)
class Units:
    """Surrogates of whole layers: x + (x down up + bias) in place of layer(x), of rank `rank`; and routers, which tell from x how wrong the
    surrogate will be (Informed Routing, 2025)."""

    name: ClassVar[str] = "units"

    layers: Layers | None = None
    rank: int = 32
    ridge: float = 0.001
    rows: int = 4096

    def __post_init__(self) -> None:
        settle(self)
        _check_strength(self.ridge)
        at_least(self, rank=1, rows=1)

    def fitter(self, subject: Subject) -> UnitsFitter:
        if self.rank > subject.width:
            problem = f"the residual stream is {subject.width} wide: no map has more"
            raise BadOptionValue(option="rank", value=str(self.rank), problem=problem)
        layers = tuple(range(subject.layers)) if self.layers is None else _distinct(self.layers, subject.layers)
        return UnitsFitter(subject, layers, self.rank, self.ridge)


@dataclass(frozen=True)
class Drops:
    """How far the output moves when one layer alone is left out: KL of logits, or 1 - cosine of embeddings."""

    name: ClassVar[str] = "drops"

    by: Literal["kl", "cosine"] = "kl"
    rows: int = 0

    def __post_init__(self) -> None:
        settle(self)

    def fitter(self, subject: Subject) -> DropsFitter:
        return DropsFitter(subject, self.by)


def _itself(kind: type) -> type:
    return kind


KINDS: tuple[Any, ...] = (Exits, Units, Drops)
REGISTRY = Registry(passes=tuple((kind.name, partial(_itself, kind)) for kind in KINDS))


def parts_of(plan: str) -> tuple[Any, ...]:
    """The parts that a plan names.

    Raises:
        DynccUsageError: a part, an option or a value that does not exist, or no part at all.
    """
    names = [kind.name for kind in KINDS]
    for call in parse(plan):
        if call.name not in names:
            raise UnknownFit(name=call.name, near=near(call.name, names), known=", ".join(names))
    parts = build(plan, REGISTRY)
    if not parts or len({p.name for p in parts}) < len(parts):
        raise BadOptionValue(option="plan", value=repr(plan), problem=f"name one or more of {', '.join(names)}, each once")
    return parts


def plan_text(parts: tuple[Any, ...]) -> str:
    """The plan, printed back."""
    return render(parts)


def _distinct(layers: Layers, count: int) -> tuple[int, ...]:
    return tuple(dict.fromkeys(layers.resolve(count)))


def _check_strength(ridge: float) -> None:
    if not 0.0 <= ridge < float("inf"):
        raise BadOptionValue(option="ridge", value=str(ridge), problem="a number of 0 or more")
