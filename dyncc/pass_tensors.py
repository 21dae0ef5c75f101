"""Tensors that passes bring into a graph, fitted maps for example: inputs of the program from the beginning, constants to every engine.

The captured program gets them too, where nothing reads them: the programs that evidence compares take the same inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from dyncc.errors import BadParameterFile
from dyncc.ir import Input, Program, device_beside, fake_mode_of


def brought_by(passes: Iterable[Any], program: Program) -> dict[str, Tensor]:
    """What passes bring, by name, on the device of the program's inputs."""
    tensors = {name: tensor for passed in passes for name, tensor in passed.tensors().items()}
    device = device_beside((), program.graph)
    return {name: tensor if device is None else tensor.to(device) for name, tensor in tensors.items()}


def with_tensors(program: Program, tensors: Mapping[str, Tensor], at: int) -> Program:
    """The program with these inputs in front of its input number `at`."""
    mode = fake_mode_of(program.graph)
    if not tensors or mode is None:
        return program
    made = program.copy()
    graph = made.graph
    nodes = list(graph.nodes)
    placeholders = [n for n in nodes if n.op == "placeholder"]
    before = placeholders[at] if at < len(placeholders) else next(n for n in nodes if n.op != "placeholder")
    for name, tensor in tensors.items():
        with graph.inserting_before(before):
            node = graph.placeholder(name.replace(".", "_"))
        node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
    made.module.recompile()
    new = tuple(Input("constant", name) for name in tensors)
    return replace(made, inputs=(*program.inputs[:at], *new, *program.inputs[at:]))


def brought(program: Program, name: str) -> fx.Node:
    """The node of a tensor that a pass brought."""
    nodes = [n for n in program.graph.nodes if n.op == "placeholder"]
    return next(n for n, given in zip(nodes, program.inputs, strict=True) if given.name == name)


def check_belongs(parameters: Any, program: Program, values: Any, width: int) -> None:
    """Whether fitted parameters are of the model that a program was captured from; `values` are its inputs, None where not known.

    Raises:
        BadParameterFile: they are not, or are for a residual stream of another width.
    """
    if values is None:
        raise BadParameterFile(path=parameters.path, problem="the model's own parameters are not at hand, so it cannot be checked")
    pairs = zip(values, program.inputs, strict=True)
    parameters.check_model([v for v, given in pairs if given.kind == "parameter" and isinstance(v, Tensor)])
    parameters.check_width(width)
