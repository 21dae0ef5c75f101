"""Fitted parameters: one safetensors file that `dyncc fit` writes and passes read, with the plan and the model they belong to.

    exit.<layer>.map.weight [D, D], exit.<layer>.map.bias [D]             the state behind the last layer from that behind `layer`
    exit.<layer>.probe.weight [1, D], exit.<layer>.probe.bias [1]         logit of: the head behind the map chooses as at the end
    exit.<layer>.gate.weight [1, 4], exit.<layer>.gate.bias [1]           given: gates of conditional exit probabilities (exit_gates.py)
    exit.controller.weight [3, D]                                         given: stop, exit or continue, for all layers (exit_stop.py)
    unit.<layer>.down.weight [r, D], .up.weight [D, r], .bias [D]         layer(x) - x from x
    unit.<layer>.router.weight [1, D], .router.bias [1]                   from x / rms(x): log of how wrong that is, or a given router
    unit.<layer>.router.quantiles [101]                                   of the router's scores on the calibration data
    unit.<layer>.small.up.weight [s, D], .small.down.weight [D, s]        given: a small MLP in the form of the layer's own (small_mlp.py),
                                                                          with .small.gate.weight [s, D] and biases where that has them
    unit.<layer>.levels.weight [3, D], .levels.bias [3]                   given: skip, small or big, for each token
    iteration.<n>.router.weight [1, D], .router.bias [1]                  given: does a token run iteration n (route_iterations.py)
    iteration.levels.weight [N, D], .levels.bias [N]                      given: which iteration of N is a token's last
    drop.divergence [L], float64                                          what leaving out one layer alone costs
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dyncc.errors import BadParameterFile, BadParameters
from dyncc.outputs import replaced_file
from dyncc.stamped_file import Stamped, digest, read_stamped, write_stamped

FORM, FILE = "dyncc fitted parameters 1", "parameters.safetensors"
SIZES: dict[str, tuple[Any, ...]] = {
    "exit.map.weight": ("D", "D"), "exit.map.bias": ("D",), "exit.probe.weight": (1, "D"), "exit.probe.bias": (1,),
    "exit.gate.weight": (1, 4), "exit.gate.bias": (1,), "exit.controller.weight": (3, "D"),
    "unit.down.weight": ("r", "D"), "unit.up.weight": ("D", "r"), "unit.bias": ("D",),
    "unit.router.weight": (1, "D"), "unit.router.bias": (1,), "unit.router.quantiles": ("Q",),
    "unit.small.up.weight": ("s", "D"), "unit.small.up.bias": ("s",), "unit.small.gate.weight": ("s", "D"),
    "unit.small.gate.bias": ("s",), "unit.small.down.weight": ("D", "s"), "unit.small.down.bias": ("D",),
    "unit.levels.weight": (3, "D"), "unit.levels.bias": (3,),
    "iteration.router.weight": (1, "D"), "iteration.router.bias": (1,),
    "iteration.levels.weight": ("N", "D"), "iteration.levels.bias": ("N",),
    "drop.divergence": ("L",),
}  # fmt: skip
_LAYERED = re.compile(r"(exit|unit|iteration)\.(\d+)\.(.+)")


@dataclass(frozen=True, eq=False)
class Parameters:
    """The tensors of a file, its plan, and the model that they belong to."""

    path: Path
    held: Stamped

    @property
    def plan(self) -> str:
        return str(self.held.told.get("plan", ""))

    @property
    def key(self) -> str:
        """A name for these very numbers."""
        return str(self.held.told["checksum"])[:12]

    def __contains__(self, name: str) -> bool:
        return name in self.held.tensors

    def take(self, name: str) -> Tensor:
        """The tensor of that name.

        Raises:
            BadParameterFile: the file holds none; the message says what was fitted.
        """
        if name not in self.held.tensors:
            raise BadParameterFile(path=self.path, problem=f"it holds no {name}; it was fitted by the plan {self.plan!r}")
        return self.held.tensors[name]

    def of(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Some of the tensors, under names that say whose they are: what a pass brings into a graph."""
        return {self.mark(name): self.take(name) for name in names}

    def mark(self, name: str) -> str:
        """The name of a tensor in a graph."""
        return f"fitted_{self.key}.{name}"

    def check_model(self, tensors: Sequence[Tensor]) -> None:
        """BadParameterFile where some parameters are none of the model's that the file belongs to."""
        if strangers := self.held.strangers(tensors):
            problem = f"it belongs to another model, or to other weights: {strangers} of {len(tensors)} parameters differ"
            raise BadParameterFile(path=self.path, problem=problem)

    def check_width(self, width: int) -> None:
        """BadParameterFile where a tensor is made for a residual stream of another width."""
        for name, tensor in self.held.tensors.items():
            for size, wanted in zip(tensor.shape, SIZES[_kind(name)], strict=True):
                if wanted == "D" and size != width:
                    raise BadParameterFile(path=self.path, problem=f"{name} is {list(tensor.shape)}, the residual stream is {width} wide")


def load_fitted(path: str | Path) -> Parameters:
    """The parameters in a file, or in the folder that `dyncc fit` wrote.

    Raises:
        BadParameterFile: there is no such file, or it is damaged, is something else, or holds tensors of wrong shapes.
    """
    path = Path(path).expanduser()
    path = path / FILE if path.is_dir() else path
    try:
        found = read_stamped(path, FORM, "fitted parameters")
    except ValueError as error:
        raise BadParameterFile(path=path, problem=error) from error
    if problem := shape_problem(found.tensors):
        raise BadParameterFile(path=path, problem=problem)
    return Parameters(path, found)


def write_fitted(path: Path, tensors: Mapping[str, Tensor], told: Mapping[str, Any], stamp: frozenset[str]) -> Path:
    """Write such a file in one step.

    Raises:
        OutputNotWritable: it cannot be written.
    """
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replaced_file(path) as fresh:
        write_stamped(fresh, FORM, Stamped(kept, told, stamp))
    return path


def save_parameters(model: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> Path:
    """Write parameters that were trained elsewhere, such as routers of mixture of depths, as passes take them; returns the path.

    Args:
        model: the model that they were trained with, in the precision it will run in.
        tensors: by the names and with the shapes that dyncc/fitted.py lists.
    Raises:
        BadParameters: a name is unknown, or a shape does not fit.
        OutputNotWritable: the file cannot be written.
    """
    if problem := shape_problem(tensors):
        raise BadParameters(problem=problem)
    return write_fitted(Path(path), tensors, {"plan": "given"}, frozenset(digest(p) for p in model.parameters()))


def shape_problem(tensors: Mapping[str, Tensor]) -> str:
    """Why these are no parameters; ''. Sizes called by one letter must agree, the ranks `r` and `s` within a layer."""
    if not tensors:
        return "it holds no tensors"
    bound: dict[str, int] = {}
    for name, tensor in sorted(tensors.items()):
        wanted = SIZES.get(_kind(name))
        if wanted is None:
            return f"{name!r} is no name of a parameter"
        layer = (_LAYERED.fullmatch(name) or ["", "", ""])[2]
        letters = [f"{w}{layer}" if w in ("r", "s") else f"{w}{name}" if w == "Q" else w for w in wanted]
        sizes_fit = (n == (bound.setdefault(w, n) if isinstance(w, str) else w) for n, w in zip(tensor.shape, letters, strict=False))
        if tensor.dim() != len(letters) or not all(sizes_fit) or not tensor.is_floating_point():
            sizes = ", ".join(str(bound.get(str(w), w)) for w in letters)
            return f"{name} is {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}; floating point [{sizes}] is wanted"
        if not bool(torch.isfinite(tensor).all()):
            return f"{name} holds NaN or infinite numbers"
    return ""


def _kind(name: str) -> str:
    layered = _LAYERED.fullmatch(name)
    return f"{layered[1]}.{layered[3]}" if layered else name
