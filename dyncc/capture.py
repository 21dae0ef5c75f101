"""Capture by two doors to one IR.

Door 1 (`from_dynamo`) retraces the graph that torch.compile hands to a backend, on the fake values of its placeholders under their own fake
mode, so that the user's step is never run. Door 2 (`from_model`) is torch.export. Both give a `Program` in canonical form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from dyncc.canonical import canonicalise
from dyncc.errors import DynccError
from dyncc.ir import Input, Program, is_tensor, op_name, output_node


class CaptureError(DynccError):
    """The model cannot be brought into the IR; the message says what stands in the way."""


ALLOWED_HIGHER_ORDER = {"cond", "wrap_with_set_grad_enabled", "wrap_with_autocast"}


def higher_order_op(graph: fx.Graph) -> str | None:
    """The name of a higher-order op that the IR does not hold (FlexAttention, checkpoint, ...), or None."""
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() not in ALLOWED_HIGHER_ORDER:
            return node.target.name()
    return None


def from_dynamo(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Program:
    """Door 1: Dynamo's graph as a Program, without running it.

    Raises:
        CaptureError: the graph holds what a retrace cannot follow; the message names it.
    """
    if (name := higher_order_op(gm.graph)) is not None:
        raise CaptureError(f"higher-order op {name}")
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    fakes = [n.meta.get("example_value", n.meta.get("val")) for n in placeholders]
    mode = next((f.fake_mode for f in fakes if isinstance(f, FakeTensor)), None)
    if mode is None:
        raise CaptureError("a graph with no tensor input")
    try:
        with mode:
            traced = make_fx(lambda *a: fx.Interpreter(gm).run(*a), tracing_mode="real", pre_dispatch=True)(*fakes)
    except Exception as error:
        raise CaptureError(f"retrace failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    inputs = tuple(Input(_kind(n, f), n.name) for n, f in zip(placeholders, fakes, strict=True))
    needs_grad = torch.is_grad_enabled() and any(isinstance(f, torch.Tensor) and f.requires_grad for f in fakes)
    if not needs_grad:
        _drop_grad_mode(traced.graph)
    _flatten_output(traced.graph)
    canonicalise(traced, inference=not needs_grad)
    return Program(traced, inputs, door=1, needs_grad=needs_grad)


def _kind(node: fx.Node, fake: Any) -> str:
    if not isinstance(fake, torch.Tensor):
        return "size"
    if isinstance(fake, torch.nn.Parameter) or "_parameters_" in node.name:
        return "parameter"
    return "buffer" if "_buffers_" in node.name else "input"


def _drop_grad_mode(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op == "call_function" and getattr(node.target, "__name__", "") == "_set_grad_enabled":
            graph.erase_node(node)


def _flatten_output(graph: fx.Graph) -> None:
    out = output_node(graph)
    if not isinstance(out.args[0], (tuple, list)):
        out.args = ((out.args[0],),)


@dataclass(frozen=True)
class Signature:
    """How a door 2 program is called: the call's pytree, which leaves are tensors, what to copy back, what the result looks like, the
    names of the model's arguments, and what must hold of the sizes of a call (sympy conditions over size symbols)."""

    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    state: tuple[torch.Tensor, ...]
    leaves: tuple[int, ...]
    constants: tuple[tuple[int, Any], ...]
    names: tuple[str, ...]
    copies: tuple[tuple[str, int], ...]
    results: int
    arguments: tuple[str, ...] = ()
    conditions: tuple[Any, ...] = ()


def from_model(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, dynamic_shapes: Any = None
) -> tuple[Program, Signature]:
    """Door 2: a model as a Program and the signature to call it by.

    Args:
        dynamic_shapes: as for torch.export.export.
    Raises:
        CaptureError: torch.export cannot capture the model; the message carries its first line.
    """
    try:
        exported = _export(model, args, kwargs or {}, dynamic_shapes)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise CaptureError(f"torch.export failed: {type(error).__name__}: {first}") from error
    return from_exported(exported)


def _export(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> torch.export.ExportedProgram:
    """torch.export; where it cannot prove a guard for every size, once more with that guard left to each call (`Signature.conditions`)."""
    options = {"dynamic_shapes": dynamic_shapes, "strict": False}
    with torch.no_grad():
        try:
            return torch.export.export(model, args, kwargs, **options)
        except torch._dynamo.exc.UserError as error:
            if error.error_type is not torch._dynamo.exc.UserErrorType.CONSTRAINT_VIOLATION or not dynamic_shapes:
                raise
            return torch.export.export(model, args, kwargs, **options, prefer_deferred_runtime_asserts_over_guards=True)


def from_exported(exported: torch.export.ExportedProgram) -> tuple[Program, Signature]:
    """An exported program (pre-dispatch, as torch.export gives it) as a Program and its signature."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(exported.graph, values := {}))
    module = fx.GraphModule(exported.graph_module, graph)
    graph = module.graph
    values = dict(zip(exported.graph.nodes, graph.nodes, strict=True))
    for old, new in values.items():
        new.meta = dict(old.meta)
    sig = exported.graph_signature
    kinds = {"PARAMETER": "parameter", "BUFFER": "buffer", "CONSTANT_TENSOR": "constant", "USER_INPUT": "input"}
    named = {spec.arg.name: spec for spec in sig.input_specs}
    specs = {new: named[old.name] for old, new in values.items() if old.op == "placeholder"}
    inputs, state, leaves, constants, names = [], [], [], [], []
    position = 0
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        spec = specs[node]
        kind = kinds.get(spec.kind.name)
        if kind is None:
            raise CaptureError(f"the exported program takes a {spec.kind.name.lower().replace('_', ' ')}")
        if kind != "input":
            table = exported.constants if kind == "constant" or spec.persistent is False else exported.state_dict
            state.append(table[spec.target])
        else:
            position += 1
            if not is_tensor(node):
                constants.append((position - 1, None if node.meta.get("val") is None else node.meta["val"]))
                _bake(node)
                continue
            leaves.append(position - 1)
            names.append(node.name)
        inputs.append(Input(kind, spec.target or node.name))
    _flatten_output(graph)
    copies = tuple((s.target, i) for i, s in enumerate(sig.output_specs) if s.kind.name.endswith("MUTATION"))
    canonicalise(module, inference=True)
    signature = Signature(
        exported.call_spec.in_spec, exported.call_spec.out_spec, tuple(state), tuple(leaves), tuple(constants), tuple(names), copies,
        len(sig.output_specs), _argument_names(exported), _conditions(graph),
    )
    return Program(module, tuple(inputs), door=2), signature


def _argument_names(exported: torch.export.ExportedProgram) -> tuple[str, ...]:
    call = exported.module_call_graph[0].signature
    return tuple(getattr(call, "forward_arg_names", None) or ())


def _conditions(graph: fx.Graph) -> tuple[Any, ...]:
    """What torch.export could not prove of the input sizes and leaves to each call."""
    sizes = [s for n in graph.nodes if n.op == "placeholder" and is_tensor(n) for s in n.meta["val"].shape if isinstance(s, torch.SymInt)]
    if not sizes:
        return ()
    known = {symbol for size in sizes for symbol in size.node.expr.free_symbols}
    left = [a.expr for asserts in sizes[0].node.shape_env.deferred_runtime_asserts.values() for a in asserts]
    return tuple(expr for expr in left if expr.free_symbols <= known)


def _bake(node: fx.Node) -> None:
    """Put a constant argument's value where its placeholder stands."""
    value = node.meta.get("val")
    for user in list(node.users):
        user.args, user.kwargs = _without(user.args, node, value), _without(user.kwargs, node, value)
    node.graph.erase_node(node)


def _without(tree: Any, node: fx.Node, value: Any) -> Any:
    return fx.node.map_arg(tree, lambda n: value if n is node else n)


def count(graph: fx.Graph, *names: str) -> int:
    """How many nodes of a graph have one of these op names."""
    return sum(n.op == "call_function" and op_name(n) in names for n in graph.nodes)
