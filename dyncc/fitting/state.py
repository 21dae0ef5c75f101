"""The sums of a fit that is not finished, in its output folder: written under a temporary name and renamed, and read again later."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dyncc.errors import BadCalibration
from dyncc.fitting.calibration import running_hash
from dyncc.outputs import replaced_file
from dyncc.stamped_file import Stamped, read_stamped, write_stamped

FORM, FILE = "dyncc fit state 1", "state.safetensors"


class State:
    """How far a fit is: `done` batches of `rows` rows whose contents are hashed in `seen`."""

    def __init__(self, path: Path, plan: str, stamp: frozenset[str], fitters: Sequence[Any]) -> None:
        self.path, self.plan, self.stamp, self.fitters = path, plan, stamp, fitters
        self.done = self.rows = 0
        self.seen, self.wanted = running_hash(), ""

    @classmethod
    def begin(cls, folder: Path, plan: str, stamp: frozenset[str], fitters: Sequence[Any]) -> State:
        """A new state, or the one that an interrupted fit left.

        Raises:
            BadCalibration: it is damaged, or another fit's.
        """
        state = cls(folder / FILE, plan, stamp, fitters)
        if state.path.exists():
            state._load()
        return state

    def _load(self) -> None:
        try:
            found = read_stamped(self.path, FORM, "sums of a fit")
        except ValueError as error:
            raise BadCalibration(problem=f"{self.path} is left of an interrupted fit, but {error}; remove it") from error
        if found.told["plan"] != self.plan or found.parameters != self.stamp:
            other = f"the plan {found.told['plan']!r}" if found.told["plan"] != self.plan else "another model, or other weights"
            raise BadCalibration(problem=f"{self.path} is the state of a fit of {other}; remove it, or give another folder")
        self.done, self.rows, self.wanted = found.told["done"], found.told["rows"], found.told["seen"]
        for number, fitter in enumerate(self.fitters):
            mark = f"{number}."
            device = fitter.subject.device
            fitter.restore({name.removeprefix(mark): t.to(device) for name, t in found.tensors.items() if name.startswith(mark)})

    def check_data(self) -> None:
        """BadCalibration where the batches that were skipped are not those that the state was made from."""
        if self.seen.hexdigest() != self.wanted:
            problem = f"the first {self.done} batches are not those that {self.path} was made from; remove it, or give that data"
            raise BadCalibration(problem=problem)

    def save(self) -> None:
        """Write it in one step.

        Raises:
            OutputNotWritable: the folder cannot be written.
        """
        tensors = {f"{i}.{name}": t for i, fitter in enumerate(self.fitters) for name, t in fitter.state().items()}
        told = {"plan": self.plan, "done": self.done, "rows": self.rows, "seen": self.seen.hexdigest()}
        with replaced_file(self.path) as fresh:
            write_stamped(fresh, FORM, Stamped({name: torch.atleast_1d(t) for name, t in tensors.items()}, told, self.stamp))

    def remove(self) -> None:
        """The fit is done."""
        self.path.unlink(missing_ok=True)
