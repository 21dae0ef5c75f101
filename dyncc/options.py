"""The values that pass options take: `Keep`, `Layers`, choices, and their texts.

Text -> value is `convert`, value -> text is `show`; `settle` checks a pass that was built in Python.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
import types
import typing
import warnings
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, Union

from dyncc.errors import BadOptionValue, DynccUsageError, KeepOutOfRange, LayerOutOfRange, UnknownEngine, UnknownEvidence, near

ENGINES = ("auto", "inductor", "onnxruntime", "openvino", "reference")
PEERS = ("eager", "inductor", "onnxruntime", "openvino", "transformers-onnx")
EVIDENCE = ("off", "numeric", "timed")

Keep = Annotated[int | float | tuple[int | float, ...], "keep"]
"""How many rows stay: a float up to 1.0 is a ratio, an integer a count, a tuple one of these per layer."""

_WORD = re.compile(r"[^\s{}=,]+(,[^\s{}=,]+)*")
_RANGE = re.compile(r"(\d+):(\d+)(?::(\d+))?")
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)%")


@dataclasses.dataclass(frozen=True)
class Layers:
    """After which layers, zero-based: `3`, `3,6,9`, `2:11:3` (stop excluded), or depths such as `25%,50%`.

    >>> Layers("2:11:3").resolve(12)
    (2, 5, 8)
    >>> Layers("25%,50%,75%").resolve(12)
    (3, 6, 9)
    """

    text: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", re.sub(r"\s+", "", str(self.text)))
        self.places  # noqa: B018  a bad text fails here, not later

    @functools.cached_property
    def places(self) -> tuple[int | float, ...]:
        """Layer numbers (int), or depths as fractions of the model (float)."""
        places = [place for part in self.text.split(",") for place in _places(part, self.text)]
        kinds = {type(place) for place in places}
        if len(kinds) > 1:
            raise BadOptionValue(option="layers", value=self.text, problem="use layer numbers or percentages, not both")
        if any(b <= a for a, b in itertools.pairwise(places)):
            raise BadOptionValue(option="layers", value=self.text, problem="layers must rise from left to right")
        return tuple(places)

    def __len__(self) -> int:
        return len(self.places)

    def __str__(self) -> str:
        return self.text

    def resolve(self, n_layers: int) -> tuple[int, ...]:
        """One layer number per place; a depth on a shallow model may name one layer twice."""
        return tuple(self._layer(place, n_layers) for place in self.places)

    def schedule(self, keep: Keep, n_layers: int) -> tuple[tuple[int, int | float], ...]:
        """Layer and keep, paired; where two depths fall on one layer the later one holds.

        >>> Layers("25%,50%,75%").schedule((0.7, 0.5, 0.3), 3)
        ((0, 0.7), (1, 0.5), (2, 0.3))
        """
        check_keep(keep, self)
        keeps = keep if isinstance(keep, tuple) else (keep,)
        each = keeps * len(self) if len(keeps) == 1 else keeps
        return tuple(dict(zip(self.resolve(n_layers), each, strict=True)).items())

    def _layer(self, place: int | float, n_layers: int) -> int:
        if isinstance(place, float):
            return min(int(place * n_layers + 1e-9), n_layers - 1)
        if place >= n_layers:
            raise LayerOutOfRange(layer=place, count=n_layers, last=n_layers - 1)
        return place


def _places(part: str, text: str) -> list[int | float]:
    if part.isascii() and part.isdigit():
        return [int(part)]
    percent = _PERCENT.fullmatch(part)
    if percent and 0 <= float(percent[1]) <= 100:
        return [float(percent[1]) / 100]
    span = _RANGE.fullmatch(part)
    places = range(int(span[1]), int(span[2]), int(span[3] or 1)) if span and span[3] != "0" else range(0)
    if not 0 < len(places) <= 10_000:
        problem = f"{part!r} names no layer; write 3 or 3,6,9 or 2:11:3 or 25%,50%"
        raise BadOptionValue(option="layers", value=text, problem=problem)
    return list(places)


def check_keep(keep: Keep, layers: Layers | None = None) -> None:
    """A ratio in (0, 1] or a count >= 1, one for all layers or one per layer; else an error."""
    each = keep if isinstance(keep, tuple) else (keep,)
    for value in each:
        right = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not right or (isinstance(value, float) and not 0.0 < value <= 1.0) or (value < 1 and isinstance(value, int)):
            raise KeepOutOfRange(value=show(value))
    if not each or (layers is not None and len(each) > 1 and len(each) != len(layers)):
        wanted = f"{len(layers)} layers" if layers is not None else "layers"
        problem = f"{len(each)} values for {wanted}; give one for all or one per layer"
        raise BadOptionValue(option="keep", value=show(keep), problem=problem)


_asked: set[str] = set()


def _keep(option: str, text: str) -> Keep:
    parts = tuple(_number(option, part) for part in text.split(","))
    if option == "keep" and any(isinstance(part, int) and part == 1 for part in parts) and option not in _asked:
        _asked.add(option)
        warnings.warn(f"{option}=1 keeps 1 token; did you mean 1.0?", UserWarning, stacklevel=2)
    keep = parts[0] if len(parts) == 1 else parts
    check_keep(keep)
    return keep


def _number(option: str, text: str) -> int | float:
    try:
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    except ValueError:
        raise BadOptionValue(option=option, value=text, problem="expected a number") from None


def _int(option: str, text: str) -> int:
    value = _number(option, text)
    if not isinstance(value, int):
        raise BadOptionValue(option=option, value=text, problem="expected a whole number")
    return value


def _float(option: str, text: str) -> float:
    value = float(_number(option, text))
    if not math.isfinite(value):
        raise BadOptionValue(option=option, value=text, problem="expected a finite number")
    return value


def _bool(option: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise BadOptionValue(option=option, value=text, problem="expected true or false")
    return text == "true"


_CONVERTERS: dict[Any, Callable[[str, str], Any]] = {
    Keep: _keep,
    Layers: lambda option, text: Layers(text),
    bool: _bool,
    int: _int,
    float: _float,
    str: lambda option, text: text,
}


def types_of(kind: Any) -> dict[str, Any]:
    """Option name -> declared type of a pass class; names that start with `_` are no options."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init and field.name[0] != "_"}


def convert(option: str, declared: Any, text: str) -> Any:
    """Text -> value of the declared type, or an error that says what was expected."""
    if typing.get_origin(declared) is Literal:
        return _choice(option, text, typing.get_args(declared))
    if declared in _CONVERTERS:
        return _CONVERTERS[declared](option, text)
    if typing.get_origin(declared) in (Union, types.UnionType):
        return _maybe(option, text, typing.get_args(declared))
    raise TypeError(f"option {option!r} is declared as {declared!r}, which has no text form")


def _maybe(option: str, text: str, members: tuple[Any, ...]) -> Any:
    inner = [member for member in members if member is not type(None)]
    if len(inner) != 1 or len(inner) == len(members):
        raise TypeError(f"option {option!r} mixes types; only `T | None` has a text form")
    return None if text == "none" else convert(option, inner[0], text)


def _choice(option: str, value: Any, choices: tuple[Any, ...]) -> Any:
    by_text = {show(choice): choice for choice in choices}
    if show(value) not in by_text:
        problem = f"choose one of {', '.join(by_text)}{near(show(value), by_text)}"
        raise BadOptionValue(option=option, value=show(value), problem=problem)
    return by_text[show(value)]


def show(value: Any) -> str:
    """Value -> text; `convert` reads it back.

    >>> show((0.7, 32)), show(True), show(None)
    ('0.7,32', 'true', 'none')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return ",".join(show(member) for member in value)
    return str(value)


def settle(options: Any) -> None:
    """For `__post_init__` of a pass: turn plain values into option values and check every one of them."""
    for name, declared in types_of(type(options)).items():
        value = getattr(options, name)
        if declared in (Layers, Layers | None) and not isinstance(value, (Layers, types.NoneType)):
            text = show(tuple(value)) if isinstance(value, list) else show(value)
            object.__setattr__(options, name, Layers(text))
        elif declared == Keep:
            object.__setattr__(options, name, tuple(value) if isinstance(value, list) else value)
            check_keep(getattr(options, name), getattr(options, "layers", None) if name == "keep" else None)
        else:
            _check(name, declared, value)


def at_least(options: Any, **least: int) -> None:
    """Check numbers by their least values.

    Raises:
        BadOptionValue: one is lower.
    """
    for name, lowest in least.items():
        if getattr(options, name) < lowest:
            raise BadOptionValue(option=name, value=str(getattr(options, name)), problem=f"{lowest} is the least")


def _check(name: str, declared: Any, value: Any) -> None:
    if isinstance(value, str) and not _WORD.fullmatch(value):
        raise BadOptionValue(option=name, value=repr(value), problem="spaces, braces and = cannot be written in a pipeline")
    convert(name, declared, show(value))


def check_engine(name: str, known: Iterable[str] = ENGINES) -> str:
    """The name, or UnknownEngine."""
    return _known(name, tuple(known), UnknownEngine)


def check_evidence(name: str, known: Iterable[str] = EVIDENCE) -> str:
    """The name, or UnknownEvidence."""
    return _known(name, tuple(known), UnknownEvidence)


def _known(name: str, known: tuple[str, ...], error: type[DynccUsageError]) -> str:
    if name not in known:
        raise error(name=name, near=near(name, known), known=", ".join(known))
    return name
