"""Engines, all alike: an engine turns a program into a callable over its flat inputs. Loaded by name, when asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from dyncc.ir import Program

ENGINES: dict[str, str] = {name: name for name in ("reference", "inductor", "onnxruntime", "openvino", "auto")}
"""Engine name -> its module in this folder."""

Lowered = Callable[..., Any]


def lower(engine: str, program: Program, inputs: list[Any], *, dynamic: bool = False) -> Lowered:
    """A callable over the program's flat inputs, returning its flat outputs; it may carry `engine` and `notes` for the report.

    Args:
        engine: a name in ENGINES.
        inputs: flat example inputs; in door 1 as the compiler handed them over, with symbolic sizes.
        dynamic: door 2: whether sizes may vary from call to call.
    Raises:
        NotTaken: the engine does not take the program.
        PackageMissing: the engine is not installed.
    """
    module = importlib.import_module(f"{__name__}.{ENGINES[engine]}")
    lowered: Lowered = module.lower(program, inputs, dynamic=dynamic)
    return lowered
