"""`dyncc.fit`: one pass over calibration data, sums kept on disk on the way, parameters in one file that knows its model."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sized
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dyncc.errors import BadCalibration, NotFinite
from dyncc.fitted import FILE, write_fitted
from dyncc.fitting.calibration import Batch, batches
from dyncc.fitting.parts import parts_of, plan_text
from dyncc.fitting.state import State
from dyncc.fitting.subject import Subject, all_finite, subject_of
from dyncc.outputs import writable_folder
from dyncc.stamped_file import digest
from dyncc.timing import Progress

SECONDS = 30.0
"""How often the sums are written to disk."""


@dataclass(frozen=True)
class Fitted:
    """What was written: the file, the plan, how much data it saw, and how good each fit is on that data."""

    path: Path
    plan: str
    batches: int
    rows: int
    figures: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"path": str(self.path), "plan": self.plan, "batches": self.batches, "rows": self.rows, "figures": self.figures}

    def __str__(self) -> str:
        rows = [f"  {name}: {', '.join(f'{what} {value:.3f}' for what, value in told.items())}" for name, told in self.figures.items()]
        return "\n".join([f"{self.path}: {self.plan}", f"  {self.batches} batches, {self.rows:,} rows", *rows])


def fit(
    model: nn.Module, *, data: Iterable[Any], plan: str, output: str | Path, progress: Progress | None = None, every: float = SECONDS
) -> Fitted:
    """Fit what a plan names on calibration data and write `parameters.safetensors` into the folder `output`.

    Args:
        model: in the precision it will run in; its residual stream is found in its graph.
        data: calls of one size, each a tensor, a tuple of arguments or a dict of keywords; read once, in order.
        plan: such as "exits{layers=8,16 probe=true} units{rank=32} drops".
        output: sums go there as `state.safetensors` every `every` seconds; called again after an interruption with the same data, the fit
            goes on from them.
    Raises:
        BadCalibration: the data is empty, of several sizes, or not what the model takes, or the folder holds the state of another fit.
        NotFinite: an activation is NaN or infinite.
        LayerOutOfRange, BadOptionValue, UnknownFit: the plan does not fit the model.
        OutputNotWritable: the folder cannot be written.
    """
    parts = parts_of(plan)
    folder = writable_folder(output)
    stream = batches(data)
    first = next(stream, None)
    if first is None:
        raise BadCalibration(problem="no calibration data is given")
    subject = subject_of(model, first)
    fitters = [part.fitter(subject) for part in parts]
    stamp = frozenset(digest(p) for p in model.parameters())
    state = State.begin(folder, plan_text(parts), stamp, fitters)
    total = len(data) if isinstance(data, Sized) else 0
    kept = _stream(subject, chain([first], stream), fitters, state, max(p.rows for p in parts), every, lambda n: _tell(progress, n, total))
    for fitter in fitters:
        fitter.solve()
    for batch in kept:
        known, values, real = _run(subject, batch, 0, fitters)
        for fitter in fitters:
            fitter.look(known, values, real)
    tensors, figures = dict[str, Tensor](), dict[str, Any]()
    for fitter in fitters:
        made, told = fitter.result()
        tensors |= made
        figures |= told
    facts = {"plan": state.plan, "batches": state.done, "rows": state.rows, "data": state.seen.hexdigest(), "figures": figures}
    path = write_fitted(folder / FILE, tensors, facts, stamp)
    state.remove()
    return Fitted(path, state.plan, state.done, state.rows, figures)


def _stream(
    subject: Subject, stream: Iterable[Batch], fitters: list[Any], state: State, wanted: int, every: float, tell: Any
) -> list[Batch]:
    """Add up every batch that the state does not hold yet; returns the first ones, up to `wanted` rows, for a second look."""
    kept: list[Batch] = []
    rows, saved, resumed = 0, time.monotonic(), state.done
    for number, batch in enumerate(stream):
        if rows < wanted:
            kept.append(batch)
            rows += _row_count(subject)
        batch.note(state.seen)
        if number < resumed:
            if number + 1 == resumed:
                state.check_data()
            continue
        known, values, real = _run(subject, batch, number, fitters)
        for fitter in fitters:
            fitter.add(known, values, real)
        state.done, state.rows = number + 1, state.rows + (int(real.sum()) if real is not None else _row_count(subject))
        tell(state.done)
        if time.monotonic() - saved >= every:
            state.save()
            saved = time.monotonic()
    if state.done > number + 1:
        raise BadCalibration(problem=f"the data has {number + 1} batches, the state in {state.path} saw {state.done}; remove it")
    return kept


def _row_count(subject: Subject) -> int:
    batch, tokens, _ = subject.states[0].meta["val"].shape
    return int(batch) * int(tokens)


def _run(subject: Subject, batch: Batch, number: int, fitters: list[Any]) -> tuple[dict[Any, Any], dict[Any, Tensor], Tensor | None]:
    """The graph's inputs, what the fitters watch, and which rows are real.

    Raises:
        NotFinite: something that is watched is NaN or infinite.
    """
    known = subject.inputs(batch, number)
    watched = tuple(dict.fromkeys(n for fitter in fitters for n in fitter.watch))
    wanted = watched if subject.real is None else (*watched, subject.real)
    values = subject.run(known, wanted)
    real = None if subject.real is None else values[subject.real]
    for node in watched:
        if not all_finite(subject.rows(values[node], real)):
            place = subject.states.index(node) - 1 if node in subject.states else None
            where = "at the output" if place is None else "in front of layer 0" if place < 0 else f"behind layer {place}"
            raise NotFinite(batch=number, where=where)
    return known, values, real


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress("calibration batches", done, max(total, done))
