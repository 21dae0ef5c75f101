"""The values of one call, in a captured program's order and checked against what was captured."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from dyncc.capture import Signature
from dyncc.errors import InputMismatch
from dyncc.ir import Program, is_tensor


def flat_example(program: Program, signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """A call's tensors in the program's order, behind the model's state.

    Raises:
        InputMismatch: they do not fit what was captured.
    """
    leaves, spec = pytree.tree_flatten((args, ordered(kwargs, signature.in_spec)))
    if spec != signature.in_spec:
        raise InputMismatch(problem="the call's arguments are arranged in another way than at capture", hint="pass the same ones")
    flat = [*signature.state, *(leaves[i] for i in signature.leaves)]
    check_inputs(expected_inputs(program), flat)
    return flat


def ordered(kwargs: dict[str, Any], spec: pytree.TreeSpec) -> dict[str, Any]:
    """Keywords in the captured order."""
    names = spec.child(1).context
    return {n: kwargs[n] for n in names if n in kwargs} | {n: v for n, v in kwargs.items() if n not in names}


def expected_inputs(program: Program) -> list[tuple[int, str, Any]]:
    """The place, name and fake tensor of each input that a call brings along."""
    nodes = (n for n in program.graph.nodes if n.op == "placeholder")
    pairs = enumerate(zip(nodes, program.inputs, strict=True))
    return [(place, given.name, node.meta["val"]) for place, (node, given) in pairs if given.kind == "input"]


def check_inputs(expected: list[tuple[int, str, Any]], flat: list[Any]) -> None:
    """Sizes, dtypes and devices must be those captured; symbolic sizes must agree with each other and with their range.

    Raises:
        InputMismatch: one does not; the message names the input and dimension.
    """
    bound: dict[Any, int] = {}
    for place, name, like in expected:
        value = flat[place]
        if not isinstance(value, torch.Tensor):
            raise InputMismatch(problem=f"{name} is a {type(value).__name__}, not a tensor", hint="pass a tensor, as in the example")
        if value.dtype != like.dtype or value.dim() != like.dim():
            problem = f"{name} is {value.dtype} with {value.dim()} dimensions; captured were {like.dtype} with {like.dim()}"
            raise InputMismatch(problem=problem, hint="convert it")
        for dim, (size, actual) in enumerate(zip(like.shape, value.shape, strict=True)):
            _check_size(name, dim, size, actual, bound)


def _check_size(name: str, dim: int, size: Any, actual: int, bound: dict[Any, int]) -> None:
    if isinstance(size, torch.SymInt) and size.node.expr.is_number:
        size = int(size.node.expr)
    if isinstance(size, int):
        if actual != size:
            hint = "pass dynamic_shapes to optimize() for sizes that vary"
            raise InputMismatch(problem=f"{name}[{dim}] is {actual}, captured was {size}", hint=hint)
        return
    expr = size.node.expr
    if not expr.is_symbol:
        return
    if bound.setdefault(expr, actual) != actual:
        raise InputMismatch(problem=f"{name}[{dim}] is {actual}, but another input has {bound[expr]} there", hint="make them agree")
    bounds = size.node.shape_env.bound_sympy(expr)
    if actual < bounds.lower or actual > bounds.upper:
        problem = f"{name}[{dim}] is {actual}, outside of {bounds.lower}..{bounds.upper}"
        raise InputMismatch(problem=problem, hint="capture again with an example of that size")


def check_conditions(signature: Signature, bound: dict[Any, int]) -> None:
    """Raise InputMismatch where the sizes of a call break what capture had to assume of them."""
    for condition in signature.conditions:
        if condition.xreplace(bound) == False:  # noqa: E712  a sympy truth value
            hint = "capture again with an example of these sizes"
            raise InputMismatch(problem=f"the sizes {sorted(bound.values())} break {condition}, which capture assumed", hint=hint)


def symbols(program: Program) -> set[Any]:
    """The symbols of sizes that may vary."""
    found: set[Any] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder" and is_tensor(node):
            for size in node.meta["val"].shape:
                if isinstance(size, torch.SymInt):
                    found |= size.node.expr.free_symbols
    return found


def bindings(program: Program, flat: list[Any]) -> dict[Any, int]:
    """The value of each size symbol in a call."""
    bound: dict[Any, int] = {}
    for node, value in zip((n for n in program.graph.nodes if n.op == "placeholder"), flat, strict=True):
        if is_tensor(node):
            for size, actual in zip(node.meta["val"].shape, value.shape, strict=True):
                if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                    bound.setdefault(size.node.expr, actual)
    return bound
