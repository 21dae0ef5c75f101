"""Pipeline texts: `prune-tokens{keep=0.7 layers=3,6,9} drop-repeat-kv` <-> a tuple of passes.

`parse` reads the text into calls, `build` resolves names and options, `render` prints passes back.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dyncc import options as option_values
from dyncc.errors import DuplicatePass, PipelineSyntaxError, UnknownOption, UnknownPass, near

_NAME = re.compile(r"[A-Za-z][\w-]*")
_GAP = re.compile(r"[\s,]*")
_BRACE = re.compile(r"\s*\{")
_EQUALS = re.compile(r"\s*=\s*")
_VALUE = re.compile(r"[^\s{}=,]+(?:\s*,\s*(?![A-Za-z_]\w*\s*=)[^\s{}=,]+)*")


@dataclass(frozen=True)
class Call:
    """One name with its options, and where it stands in the text."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    start: int = field(default=0, compare=False)
    end: int = field(default=0, compare=False)

    def __str__(self) -> str:
        inside = " ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}{{{inside}}}" if inside else self.name


@dataclass(frozen=True)
class Recipe:
    """A published system: what its name `means`, a pass with options as a pipeline text, where it was published, how it differs from that,
    and how sure the values are."""

    name: str
    means: str
    citation: str
    note: str
    confidence: Literal["high", "medium", "low"]
    needs: Literal["training-free", "fitting", "trained weights"] = "training-free"

    @functools.cached_property
    def _call(self) -> Call:
        (call,) = parse(self.means)
        return call

    @property
    def pass_name(self) -> str:
        """The pass that it configures."""
        return self._call.name

    @property
    def options(self) -> Mapping[str, str]:
        """The texts of that pass's options."""
        return self._call.options


@dataclass(frozen=True)
class Registry:
    """The names a pipeline may use. `passes` maps a name to what loads its class; a recipe names a pass and options."""

    passes: tuple[tuple[str, Callable[[], type]], ...]
    recipes: tuple[Recipe, ...] = ()
    exact: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        owners: dict[str, str] = {}
        claims = [(name, "a pass") for name, _ in self.passes] + [(r.name, f"a recipe of {r.pass_name}") for r in self.recipes]
        for name, owner in claims:
            if name in owners:
                raise DuplicatePass(name=name, first=owners[name], second=owner)
            owners[name] = owner

    def names(self) -> tuple[str, ...]:
        """Passes first, then recipes."""
        return tuple(name for name, _ in self.passes) + tuple(recipe.name for recipe in self.recipes)

    def resolve(self, name: str) -> tuple[type, Mapping[str, str]]:
        """The pass class and the option texts that the name stands for."""
        recipe = next((recipe for recipe in self.recipes if recipe.name == name), None)
        loaders = dict(self.passes)
        pass_name = recipe.pass_name if recipe else name
        if pass_name not in loaders:
            raise UnknownPass(name=pass_name, near=near(pass_name, self.names()))
        return loaders[pass_name](), recipe.options if recipe else {}


@functools.cache
def default_registry() -> Registry:
    """The passes and recipes that dyncc ships."""
    from dyncc import passes
    from dyncc.passes.recipes import RECIPES

    loaders = tuple((name, functools.partial(passes.load_pass, name)) for name in passes.names())
    return Registry(passes=loaders, recipes=RECIPES, exact=passes.EXACT)


def parse(text: str) -> tuple[Call, ...]:
    """Read a pipeline text.

    >>> [str(call) for call in parse("evit{ keep = 0.7 layers=3, 6 }, drop-repeat-kv")]
    ['evit{keep=0.7 layers=3,6}', 'drop-repeat-kv']
    """
    calls = []
    position = _GAP.match(text).end()  # type: ignore[union-attr]  # _GAP matches the empty text
    while position < len(text):
        call = _call(text, position)
        calls.append(call)
        position = _GAP.match(text, call.end).end()  # type: ignore[union-attr]
    return tuple(calls)


def unparse(calls: Iterable[Call]) -> str:
    """Print calls; `parse` reads them back."""
    return " ".join(str(call) for call in calls)


def _call(text: str, start: int) -> Call:
    name = _NAME.match(text, start)
    if not name:
        raise PipelineSyntaxError(problem="expected the name of a pass", text=text, position=start)
    brace = _BRACE.match(text, name.end())
    if not brace:
        _check_end(text, name.end())
        return Call(name[0], {}, start, name.end())
    options, end = _options(text, brace.end())
    return Call(name[0], options, start, end)


def _check_end(text: str, position: int) -> None:
    if position < len(text) and not (text[position].isspace() or text[position] == ","):
        raise PipelineSyntaxError(problem=f"unexpected {text[position]!r}", text=text, position=position)


def _options(text: str, position: int) -> tuple[dict[str, str], int]:
    opened = position - 1
    options: dict[str, str] = {}
    while True:
        position = _GAP.match(text, position).end()  # type: ignore[union-attr]
        if position == len(text):
            raise PipelineSyntaxError(problem="this brace is never closed", text=text, position=opened)
        if text[position] == "}":
            _check_end(text, position + 1)
            return options, position + 1
        key, value, end = _option(text, position)
        if key in options:
            raise PipelineSyntaxError(problem=f"option {key!r} is given twice", text=text, position=position)
        options[key], position = value, end


def _option(text: str, position: int) -> tuple[str, str, int]:
    key = _NAME.match(text, position)
    if not key:
        raise PipelineSyntaxError(problem="expected the name of an option", text=text, position=position)
    equals = _EQUALS.match(text, key.end())
    if not equals:
        raise PipelineSyntaxError(problem=f"expected '=' after {key[0]!r}", text=text, position=key.end())
    value = _VALUE.match(text, equals.end())
    if not value:
        raise PipelineSyntaxError(problem=f"expected a value for {key[0]!r}", text=text, position=equals.end())
    return key[0], re.sub(r"\s+", "", value[0]), value.end()


def build(text: str | None, registry: Registry | None = None) -> tuple[Any, ...]:
    """Passes for a pipeline text: None gives the exact passes, an empty text none at all."""
    registry = registry or default_registry()
    if text is None:
        return tuple(registry.resolve(name)[0]() for name in registry.exact)
    return tuple(_build(call, registry) for call in parse(text))


def _build(call: Call, registry: Registry) -> Any:
    kind, texts = registry.resolve(call.name)
    declared = option_values.types_of(kind)
    for key in call.options:
        if key not in declared:
            raise UnknownOption(owner=call.name, name=key, near=near(key, declared), known=", ".join(declared) or "none")
    merged = {**texts, **call.options}
    passed = kind(**{key: option_values.convert(key, declared[key], value) for key, value in merged.items()})
    option_values.settle(passed)
    return passed


def render(passes: Iterable[Any]) -> str:
    """The canonical text of passes: their names, with the options that differ from the defaults."""
    return unparse(Call(passed.name, _changed(passed)) for passed in passes)


def _changed(passed: Any) -> dict[str, str]:
    default = type(passed)()
    names = [field.name for field in dataclasses.fields(passed) if field.name in option_values.types_of(type(passed))]
    pairs = ((name, option_values.show(getattr(passed, name))) for name in names)
    return {name: text for name, text in pairs if text != option_values.show(getattr(default, name))}
