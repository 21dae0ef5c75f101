"""torch.compile of a flat graph without one guard for each parameter: for a small batch Dynamo's checks of them take as long as
several layers. Parameters, buffers and constants are looked at together instead: where each lies, its dtype and sizes, whether it has
gradients. Where that changes and their kinds do too, the graph is compiled anew; inputs keep Dynamo's guards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dyncc.ir import Program

STATE = ("parameter", "buffer", "constant")


def address(tensor: Tensor) -> tuple[Any, ...]:
    """What changes where a tensor's memory is exchanged, as `module.to()` does, or looked at in another way."""
    return tensor.data_ptr(), tensor.dtype, tensor.requires_grad, tensor.size(), tensor.stride()


def kind(tensor: Tensor) -> tuple[Any, ...]:
    """What compiled code relies on."""
    return type(tensor), tensor.dtype, tensor.device, tensor.requires_grad, tensor.size(), tensor.stride()


class StateGuard:
    """A program's flat inputs -> its flat outputs, compiled by Inductor; `builds` counts how often."""

    def __init__(self, program: Program, dynamic: bool, options: Mapping[str, Any]) -> None:
        self.module, self.dynamic, self.options = program.module, dynamic, options
        names = [node.name for node in program.module.graph.find_nodes(op="placeholder")]
        self.places = [i for i, given in enumerate(program.inputs) if given.kind in STATE]
        self.names = {names[i] for i in self.places}
        self.builds = 0
        self.addresses: list[Any] | None = None
        self.kinds: list[Any] | None = None

    def __call__(self, *flat: Any) -> Any:
        addresses = [address(flat[i]) for i in self.places]
        if addresses != self.addresses:
            self._settle([kind(flat[i]) for i in self.places])
            self.addresses = addresses
        return self.run(*flat)

    def _settle(self, kinds: list[Any]) -> None:
        """Compile where kinds changed; memory alone may be exchanged."""
        if kinds == self.kinds:
            return
        again = fx.GraphModule(self.module, self.module.graph)  # code of its own: Dynamo keeps what it compiled by code
        self.run = torch.compile(
            again, backend="inductor", dynamic=self.dynamic, fullgraph=True, options={**self.options, "guard_filter_fn": self._wanted}
        )
        self.kinds, self.builds = kinds, self.builds + 1

    def _wanted(self, guards: Sequence[Any]) -> list[bool]:
        """All but the guards of state, by the names of the graph's inputs."""
        return [guard.name.removeprefix("L['").removesuffix("']") not in self.names for guard in guards]
