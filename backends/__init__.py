"""Engines, all alike: an engine turns a program into a callable over its flat inputs. Loaded by name, when asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from dyncc.ir import Program

ENGINES: dict[str, str] = {"reference": "reference", "inductor": "inductor"}
"""Engine name -> its module in this folder."""

Lowered = Callable[..., Any]


def lower(engine: str, program: Program, inputs: list[Any], *, dynamic: bool = False) -> Lowered:
    """A callable over the program's flat inputs, returning its flat outputs.

    Args:
        engine: a name in ENGINES; "auto" is inductor.
        inputs: door 1: the example inputs that the compiler handed over; door 2: ignored.
        dynamic: door 2: whether sizes may vary from call to call.
    """
    module = importlib.import_module(f"{__name__}.{ENGINES['inductor' if engine == 'auto' else engine]}")
    lowered: Lowered = module.lower(program, inputs, dynamic=dynamic)
    return lowered
