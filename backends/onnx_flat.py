"""A functional program as an ONNX model whose state is input like everything else, and the same model with some of the state inside.

Nothing that state holds is folded into the model at export, so that weights which change need no new export.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch.utils import _pytree as pytree

from dyncc.analysis.facts import Facts, analyse
from dyncc.backends.functional import Functional, functional
from dyncc.backends.onnx_export import OnnxExportError, to_onnx
from dyncc.backends.onnx_names import Names
from dyncc.capture import Signature
from dyncc.errors import NotTaken
from dyncc.ir import Program, outputs

if TYPE_CHECKING:
    import onnx

ELEMENTS = {
    torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.uint16: 4, torch.int16: 5, torch.int32: 6, torch.int64: 7, torch.bool: 9,
    torch.float16: 10, torch.float64: 11, torch.uint32: 12, torch.uint64: 13, torch.bfloat16: 16,
}  # fmt: skip
"""ONNX's number of each dtype."""
SMALL = 1024
"""State of up to so many bytes is written into the model, where its values can shape the graph."""


def prepare(program: Program, facts: Facts) -> Program:
    """The place for rewrites that ONNX Runtime profits from, before the export."""
    return program


_made: weakref.WeakKeyDictionary[Program, tuple[Functional, onnx.ModelProto]] = weakref.WeakKeyDictionary()


def exported(program: Program) -> tuple[Functional, onnx.ModelProto]:
    """The functional form of a program and its model, made once.

    Raises:
        NotTaken: the program has no such form.
    """
    if program not in _made:
        form = functional(program)
        _made[program] = form, export(form)
    return _made[program]


def export(form: Functional) -> onnx.ModelProto:
    """The model of a functional program; inputs are called as in the program, outputs `out_0`, `out_1`, ...

    Raises:
        NotTaken: the program has no ONNX form.
    """
    import onnx_ir

    program = prepare(form.program, analyse(form.program))
    fakes = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"]
    for tensor in (*fakes, *form.computed):
        if tensor.dtype not in ELEMENTS or tensor.layout is not torch.strided:
            raise NotTaken(f"{tensor.dtype} ({tensor.layout}) has no ONNX form")
    names = tuple(given.name for given in program.inputs)
    returned = tuple(f"out_{i}" for i in range(len(outputs(program.graph))))
    nothing = pytree.tree_flatten(())[1]
    signature = Signature(nothing, nothing, (), tuple(range(len(names))), (), names, (), len(returned))
    try:
        with torch._guards.tracing(None):
            model = to_onnx(program, signature, fakes, Names(names, returned, {}))
    except OnnxExportError as error:
        raise NotTaken(str(error)) from error
    made: onnx.ModelProto = onnx_ir.to_proto(model)
    return made


def with_state(model: onnx.ModelProto, state: Mapping[str, torch.Tensor], inline: bool = False) -> onnx.ModelProto:
    """A copy of a model in which the named inputs are initialisers; only small ones are inside, unless all are to be `inline`."""
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(model)
    kept = [value for value in made.graph.input if value.name not in state]
    del made.graph.input[:]
    made.graph.input.extend(kept)
    used = used_names(made.graph)
    for name, tensor in state.items():
        if name not in used:
            continue
        size = tensor.numel() * tensor.element_size()
        held = made.graph.initializer.add(name=name, dims=list(tensor.shape), data_type=ELEMENTS[tensor.dtype])
        if inline or size <= SMALL:
            held.raw_data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        else:
            held.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", "weights"), ("offset", "0"), ("length", str(size))):
                held.external_data.add(key=key, value=value)
    return made


def used_names(graph: onnx.GraphProto) -> set[str]:
    """The names of all values that nodes read, those of subgraphs included, and of the outputs."""
    found = {value.name for value in graph.output}
    for node in graph.node:
        found.update(node.input)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                found |= used_names(inner) if inner.node else set()
    return found


def is_outside(tensor: torch.Tensor) -> bool:
    """Whether `with_state` leaves a tensor's values out of the model."""
    return tensor.numel() * tensor.element_size() > SMALL


