"""What a pipeline can name, with its options: the data behind `dyncc passes` and `dyncc.list_passes()`."""

from __future__ import annotations

import inspect
import typing
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dyncc import options as option_values
from dyncc.pipeline import Recipe, Registry, default_registry


@dataclass(frozen=True)
class OptionInfo:
    """One option: its name, the text of its default, and the texts it may hold where they are listed."""

    name: str
    default: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class PassInfo:
    """One name for a pipeline: a pass, or a recipe with the pass it configures."""

    name: str
    kind: Literal["pass", "recipe"]
    summary: str
    exact: bool
    default: bool
    options: tuple[OptionInfo, ...]
    configures: str | None = None
    citation: str | None = None
    needs: str | None = None
    confidence: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def list_passes(registry: Registry | None = None) -> list[PassInfo]:
    """Every pass in default order, then every recipe."""
    registry = registry or default_registry()
    passes = [_pass_info(name, load(), name in registry.exact) for name, load in registry.passes]
    return passes + [_recipe_info(recipe, registry) for recipe in registry.recipes]


def _pass_info(name: str, kind: Any, default: bool) -> PassInfo:
    summary = getattr(kind, "summary", "") or (inspect.getdoc(kind) or "").partition("\n")[0]
    return PassInfo(name, "pass", summary, bool(getattr(kind, "exact", False)), default, _options(kind, {}))


def _recipe_info(recipe: Recipe, registry: Registry) -> PassInfo:
    kind, texts = registry.resolve(recipe.name)
    return PassInfo(
        recipe.name,
        "recipe",
        recipe.note,
        bool(getattr(kind, "exact", False)),
        False,
        _options(kind, texts),
        recipe.pass_name,
        recipe.citation,
        recipe.needs,
        recipe.confidence,
    )


def _options(kind: Any, texts: Any) -> tuple[OptionInfo, ...]:
    plain = kind()
    return tuple(
        OptionInfo(name, texts.get(name, option_values.show(getattr(plain, name))), _choices(declared))
        for name, declared in option_values.types_of(kind).items()
    )


def _choices(declared: Any) -> tuple[str, ...]:
    if typing.get_origin(declared) is not Literal:
        return ("true", "false") if declared is bool else ()
    return tuple(option_values.show(choice) for choice in typing.get_args(declared))
