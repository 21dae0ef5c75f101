"""Examples in docstrings run. Modules are imported by their dyncc names: a bare `passes` would be a second copy."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from types import ModuleType

import pytest

import dyncc
import dyncc.backends
import dyncc.kernels
import dyncc.passes


def modules() -> list[str]:
    rooms: list[ModuleType] = [dyncc, dyncc.passes, dyncc.kernels, dyncc.backends]
    below = {info.name for room in rooms for info in pkgutil.walk_packages(room.__path__, f"{room.__name__}.")}
    return sorted(below | {room.__name__ for room in rooms})


@pytest.mark.parametrize("name", modules())
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_every_room_is_walked_and_examples_are_found() -> None:
    found = modules()
    assert {"dyncc.errors", "dyncc.passes.recipes"} <= set(found)
    with_examples = ("dyncc.errors", "dyncc.options", "dyncc.pipeline")
    assert all(doctest.testmod(importlib.import_module(name)).attempted > 0 for name in with_examples)
