"""A program as a program of torch.export again, so that whatever reads those (ONNX, AOTInductor, `.pt2`) can take a rewritten model.

The graph is already in the form that torch.export gives, so it is put together directly, without tracing anything again: sizes stay as
they were captured, and no guard is added. Two faces: `flat` takes the tensor inputs in order and returns the caller's tensors;
`shaped` is called like the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._export.verifier import TrainingIRVerifier
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymIntArgument,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from dyncc.capture import Signature
from dyncc.ir import Program, drop_dead, output_node, outputs
from dyncc.own_ops import EXPORTED, spelled_out

KINDS = {"parameter": InputKind.PARAMETER, "buffer": InputKind.BUFFER, "constant": InputKind.CONSTANT_TENSOR, "input": InputKind.USER_INPUT}


def flat(program: Program, signature: Signature, example: Sequence[torch.Tensor]) -> ExportedProgram:
    """An exported program over the tensor inputs alone, which returns a tuple of the caller's tensors; `example` holds one an input."""
    copy = spelled_out(program, EXPORTED).copy()
    _, in_spec = pytree.tree_flatten((tuple(example), {}))
    kept = [i for i in _user_outputs(copy, signature) if isinstance(outputs(copy.graph)[i], fx.Node)]
    _, out_spec = pytree.tree_flatten((0,) * len(kept))
    exported = _assemble(copy, signature, kept, (in_spec, out_spec), (tuple(example), {}))
    call = exported.module_call_graph[0].signature
    assert call is not None
    for argument in (*call.inputs, *call.outputs):
        argument.name = ""  # decomposition gives other names and does not follow with these
    return exported


def shaped(program: Program, signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    """An exported program that is called like the model that was captured, with example inputs inside."""
    copy = spelled_out(program, EXPORTED).copy()
    _restore_constants(copy.graph, signature)
    kept = list(_user_outputs(copy, signature))
    return _assemble(copy, signature, kept, (signature.in_spec, signature.out_spec), (args, kwargs), list(signature.arguments) or None)


def _user_outputs(program: Program, signature: Signature) -> Iterator[int]:
    """Positions of the outputs that the caller gets: no copies back into the model's state, no recorded selections."""
    copied = {i for _, i in signature.copies}
    return (i for i in range(signature.results) if i not in copied)


def _restore_constants(graph: fx.Graph, signature: Signature) -> None:
    """Placeholders for arguments that are no tensors, which capture took out: the caller still passes them."""
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    users = iter(placeholders[len(signature.state) :])
    constants = dict(signature.constants)
    after = placeholders[len(signature.state) - 1] if signature.state else None
    for position in range(len(signature.leaves) + len(constants)):
        if position not in constants:
            after = next(users)
            continue
        with graph.inserting_after(after) if after is not None else graph.inserting_before(next(iter(graph.nodes))):
            after = graph.placeholder(f"constant_{position}")
        after.meta["val"] = constants[position]


def _assemble(
    program: Program,
    signature: Signature,
    kept: list[int],
    specs: tuple[Any, Any],
    example: tuple[tuple[Any, ...], dict[str, Any]],
    arguments: list[str] | None = None,
) -> ExportedProgram:
    graph, returned = program.graph, outputs(program.graph)
    order = [i for _, i in signature.copies] + kept
    output_node(graph).args = (tuple(returned[i] for i in order),)
    drop_dead(graph)
    names = iter(program.inputs)
    inputs = [_input(n, names) for n in graph.nodes if n.op == "placeholder"]
    mutated = [OutputSpec(OutputKind.BUFFER_MUTATION, _argument(returned[i]), target) for target, i in signature.copies]
    results = [OutputSpec(OutputKind.USER_OUTPUT, _argument(returned[i]), None) for i in kept]
    call = ModuleCallSignature(
        [spec.arg for spec in inputs if spec.kind is InputKind.USER_INPUT], [spec.arg for spec in results], specs[0], specs[1], arguments
    )
    held = dict(zip([given.name for given in program.inputs], signature.state, strict=False))
    constants = {spec.target: held[spec.target] for spec in inputs if spec.kind is InputKind.CONSTANT_TENSOR or spec.persistent is False}
    exported = ExportedProgram(
        program.module,
        graph,
        ExportGraphSignature(inputs, [*mutated, *results]),
        {name: tensor for name, tensor in held.items() if name not in constants},
        _ranges(graph),
        [ModuleCallEntry("", call)],
        example,
        constants,
        verifiers=[TrainingIRVerifier],  # the graph may write in place, as torch.export's own may
    )
    exported._guards_code = []  # of other argument names, and most of strides alone; sizes and ranges are still checked
    return exported


def _input(node: fx.Node, given: Iterator[Any]) -> InputSpec:
    if not isinstance(node.meta["val"], torch.Tensor):
        return InputSpec(InputKind.USER_INPUT, ConstantArgument(node.name, node.meta["val"]), None)
    known = next(given)
    kind = KINDS[known.kind]
    persistent = True if kind is InputKind.BUFFER else None
    return InputSpec(kind, TensorArgument(node.name), None if kind is InputKind.USER_INPUT else known.name, persistent)


def _argument(value: Any) -> Any:
    if not isinstance(value, fx.Node):
        return ConstantArgument("", value)
    return TensorArgument(value.name) if isinstance(value.meta.get("val"), torch.Tensor) else SymIntArgument(value.name)


def _ranges(graph: fx.Graph) -> dict[Any, Any]:
    """The range of every size symbol of the graph's inputs."""
    sizes = [s for n in graph.nodes if n.op == "placeholder" and isinstance(n.meta["val"], torch.Tensor) for s in n.meta["val"].shape]
    symbolic = [s for s in sizes if isinstance(s, torch.SymInt)]
    return {x: s.node.shape_env.bound_sympy(x) for s in symbolic for x in s.node.expr.free_symbols}
