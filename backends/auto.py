"""Engine "auto": every engine that takes the graph is timed once on the example inputs; the fastest that computes the same runs.

The choice is kept on disk, by graph, sizes, weights, versions, processor and threads: the next process compares and times nothing.
"""

from __future__ import annotations

import importlib.metadata
import statistics
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch

from dyncc import verdicts
from dyncc.backends.parity import parity, real, restored
from dyncc.errors import DynccError, NotTaken
from dyncc.evidence import sample
from dyncc.ir import Program
from dyncc.rewrite import graph_text
from dyncc.timing import seconds_of

CANDIDATES = ("inductor", "onnxruntime", "openvino")
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "openvino")
ROUNDS = 9
SECONDS = 2.0
"""Timing stops after so many rounds, or when an engine has run for so long."""


class Chosen:
    """The engine that was chosen: its callable, its name, and what led to it."""

    def __init__(self, run: Any, engine: str, words: str) -> None:
        self.run, self.engine = run, engine
        self.notes = [words, *getattr(run, "notes", [])]

    def __call__(self, *flat: Any) -> Any:
        return self.run(*flat)


def lower(program: Program, inputs: list[Any], *, dynamic: bool = False) -> Chosen:
    """The fastest engine for a program; Inductor where gradients are asked for."""
    if program.needs_grad:
        return Chosen(_lowered("inductor", program, inputs, dynamic), "inductor", "chosen because gradients are on")
    values = real(inputs)
    key = verdicts.key(graph_text(program.graph), (), _surroundings(program, values))
    known = verdicts.get(key)
    if known is not None and known.get("engine") in CANDIDATES:
        try:
            return Chosen(_lowered(known["engine"], program, inputs, dynamic), known["engine"], f"{known['words']} (measured earlier)")
        except DynccError:
            pass  # it was there when it was chosen: choose again
    taken, refused = _candidates(program, inputs, values, dynamic)
    seconds = _times(program, taken, values)
    engine = min(seconds, key=lambda name: seconds[name])
    words = "chosen from " + ", ".join(f"{name} {1000 * s:.3g} ms" for name, s in sorted(seconds.items(), key=lambda item: item[1]))
    words += "".join(f"; {name} not taken: {reason}" for name, reason in refused.items())
    verdicts.put(key, {"engine": engine, "words": words})
    return Chosen(taken[engine], engine, words)


def _lowered(engine: str, program: Program, inputs: list[Any], dynamic: bool) -> Any:
    return import_module(f"dyncc.backends.{engine}").lower(program, inputs, dynamic=dynamic)


def _candidates(program: Program, inputs: list[Any], values: list[Any], dynamic: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """The engines that take the program and compute what it says, lowered; and why others do not."""
    taken: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for name in CANDIDATES:
        try:
            run = _lowered(name, program, inputs, dynamic)
            words = parity(program, run, values)[1]
        except Exception as problem:
            if name == "inductor":
                raise
            words = str(problem) if isinstance(problem, DynccError) else f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
        if words:
            refused[name] = words
        else:
            taken[name] = run
    if not taken:
        raise NotTaken("; ".join(f"{name}: {words}" for name, words in refused.items()))
    return taken, refused


def _times(program: Program, taken: dict[str, Any], values: list[Any]) -> dict[str, float]:
    """Median seconds of a call, the engines taking turns. Parity was their warm-up."""
    spent: dict[str, list[float]] = {name: [] for name in taken}
    for number in range(ROUNDS if len(taken) > 1 else 1):
        names = list(taken)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            with torch.no_grad(), restored(program, values):
                spent[name].append(seconds_of(partial(taken[name], *values)))
        if max(sum(times) for times in spent.values()) > SECONDS:
            break
    return {name: statistics.median(times) for name, times in spent.items()}


def _surroundings(program: Program, values: Sequence[Any]) -> str:
    """What else could change the choice: weights, sizes, threads and versions."""
    state = [v for v, given in zip(values, program.inputs, strict=True) if given.kind in ("parameter", "constant")]
    sizes = [(tuple(v.shape), v.stride()) if isinstance(v, torch.Tensor) else v for v in values]
    versions = [(name, _version(name)) for name in PACKAGES]
    return f"engine {sample([state])} {sizes} {program.door} {torch.get_num_threads()} {versions}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
