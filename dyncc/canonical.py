"""Canonical form: one spelling for what capture spells in several ways, so that rules and matchers see few forms.

Exact and local: assertions, no-op conversions, whole slices and evaluation-time dropout go; `addmm` becomes `linear`; einsum and
repeat_interleave are written out; in-place arithmetic that nobody can see becomes ordinary; inlined grad-mode regions of an inference
export lose their wrapper.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from dyncc.ir import (
    argument,
    aten,
    drop_dead,
    emit,
    is_mutating,
    is_tensor,
    op_name,
    operands,
    outputs,
    refresh,
    same_size,
    shape,
    take_place,
)

HIGHER_ORDER = torch.ops.higher_order
ASSERTIONS = {"_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size"}
FRESH = {"add", "sub", "mul", "div", "masked_fill", "matmul", "bmm", "linear"}
"""Ops whose result shares memory with nothing."""
IN_PLACE = {"add_", "sub_", "mul_", "div_", "masked_fill_"}


def canonicalise(module: fx.GraphModule, *, inference: bool) -> None:
    """Rewrite a freshly captured graph in place. `inference` allows grad-mode regions to be inlined."""
    graph = module.graph
    if inference:
        _inline_grad_regions(module)
        _drop_assertions(graph)
    _write_out_of_place(graph)
    mutated = any(is_mutating(n) and n.target is not aten.detach_.default for n in graph.nodes)
    returned = {n for n in outputs(graph) if isinstance(n, fx.Node)}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if inference and node.target is aten.detach_.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node not in returned and (source := _same_as(node, mutated)) is not None:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
        elif node.target is aten.addmm.default and argument(node, "beta", 1) == 1 and argument(node, "alpha", 1) == 1:
            _replace(node, lambda b, x, w: aten.linear.default(x, w.t(), b))
        elif node.target is aten.einsum.default:
            _replace(node, _einsum(node))
        elif node.target is aten.repeat_interleave.self_int and isinstance(argument(node, "dim"), int) and argument(node, "repeats") != 1:
            _replace(node, _side_by_side(node))
    drop_dead(graph)
    graph.lint()
    module.recompile()


def _drop_assertions(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if op_name(node) in ASSERTIONS:
            graph.erase_node(node)


def _write_out_of_place(graph: fx.Graph) -> None:
    """`x.add_(y)` becomes `x + y` where nobody else can see x: it is a fresh result with this one user."""
    for node in graph.nodes:
        source = node.args[0] if op_name(node) in IN_PLACE else None
        if not isinstance(source, fx.Node) or op_name(source) not in FRESH or len(source.users) > 1:
            continue
        in_place, before = node.target, node.meta["val"]
        node.target = getattr(getattr(aten, op_name(node).removesuffix("_")), in_place._overloadname)
        refresh(node)
        after = node.meta["val"]
        if after.dtype != before.dtype or not all(same_size(a, b) for a, b in zip(after.shape, before.shape, strict=True)):
            node.target, node.meta["val"] = in_place, before


def _replace(node: fx.Node, function: Callable[..., Any]) -> None:
    tensors = operands(node)
    if node.target is aten.addmm.default and len(shape(tensors[0])) != 1:
        return
    composite = node.target is not aten.einsum.default or _matrix_orders(str(node.args[0])) is not None
    new = emit(node, function, *tensors, pre_dispatch=composite)
    take_place(node, new)


def _einsum(node: fx.Node) -> Callable[..., Any]:
    """One product of matrices where the equation is one (what einsum does by itself merges and moves dimensions); else what einsum does."""
    equation = node.args[0]
    orders = _matrix_orders(str(equation))
    if orders is None:
        return lambda *tensors: aten.einsum.default.decompose(equation, list(tensors))

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        left, right, order = orders
        return _permuted(torch.matmul(_permuted(a, left), _permuted(b[(..., *[None] * (len(right) - b.dim()))], right)), order)

    return product


def _permuted(x: torch.Tensor, order: list[int]) -> torch.Tensor:
    return x if order == sorted(order) else x.permute(order)


def _matrix_orders(equation: str) -> tuple[list[int], list[int], list[int]] | None:
    """How the operands of a two-operand einsum are permuted for one matmul, and its result back.

    Dimensions that both have are its batch; so are those of the left one beyond the last, which the right one gets at its end.

    >>> _matrix_orders("bqhd,bkhd->bhqk")
    ([0, 2, 1, 3], [0, 2, 3, 1], [0, 1, 2, 3])
    >>> _matrix_orders("bqhd,hdk->bqk") is None
    True
    """
    given, arrow, result = equation.replace(" ", "").partition("->")
    a, comma, b = given.partition(",")
    if not arrow or not comma or "," in b or any(len(set(x)) != len(x) or not x.isalpha() for x in (a, b, result)):
        return None
    summed = [c for c in a if c in b and c not in result]
    left, right = ([c for c in x if c not in y] for x, y in ((a, b), (b, a)))
    shared = [c for c in result if c in a and c in b]
    if len(summed) != 1 or len(right) != 1 or not left or not shared or set(result) != {*left, *right, *shared}:
        return None
    *repeated, row = sorted(left, key=result.index)
    batch = [c for c in result if c in shared or c in repeated]
    wide, made = b + "".join(repeated), [*batch, row, *right]
    return (
        [a.index(c) for c in (*batch, row, *summed)],
        [wide.index(c) for c in (*batch, *summed, *right)],
        [made.index(c) for c in result],
    )


def _side_by_side(node: fx.Node) -> Callable[..., Any]:
    """repeat_interleave along a dimension: expand a new dimension behind it, then merge the two."""
    rank, times = len(shape(node)), argument(node, "repeats")
    dim = argument(node, "dim") % rank

    def repeated(x: torch.Tensor) -> torch.Tensor:
        wide = x.unsqueeze(dim + 1).expand(*[-1] * (dim + 1), times, *[-1] * (rank - dim - 1))
        return wide.reshape(*x.shape[:dim], x.shape[dim] * times, *x.shape[dim + 1 :])

    return repeated


def _same_as(node: fx.Node, mutated: bool) -> fx.Node | None:
    """The operand that the node returns unchanged, or None."""
    name = op_name(node)
    source = node.args[0] if node.args else None
    if not is_tensor(node) or not isinstance(source, fx.Node) or not is_tensor(source):
        return None
    before, after = source.meta["val"], node.meta["val"]
    if name == "dropout" and not argument(node, "train", False):
        return source
    if name in ("to", "_to_copy", "type_as"):
        same = before.dtype == after.dtype and before.device == after.device
        return source if same and name != "_to_copy" and not argument(node, "copy", False) else None
    if name in ("alias", "detach") and not mutated and not before.requires_grad:
        return source
    if name == "slice" and argument(node, "step", 1) == 1:
        dim = argument(node, "dim", 0)
        return source if same_size(before.shape[dim], after.shape[dim]) and not mutated else None
    if name in ("view", "reshape", "expand") and not mutated and len(shape(source)) == len(shape(node)):
        return source if all(same_size(a, b) for a, b in zip(shape(source), shape(node), strict=True)) else None
    if name == "contiguous" and before.is_contiguous() and not mutated:
        return source
    return None


def _inline_grad_regions(module: fx.GraphModule) -> None:
    """Replace wrap_with_set_grad_enabled / disabled-autocast calls by their bodies: under inference they change nothing."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is HIGHER_ORDER.wrap_with_set_grad_enabled:
            body, args = node.args[1], node.args[2:]
        elif node.target is HIGHER_ORDER.wrap_with_autocast and node.args[2] is False:
            body, args = node.args[4], node.args[5:]
        else:
            continue
        sub = getattr(module, str(body.target))
        _inline_grad_regions(sub)
        result = _inline(node, sub, args)
        for user in list(node.users):
            if user.target is operator.getitem:
                user.replace_all_uses_with(result[user.args[1]])
                graph.erase_node(user)
        graph.erase_node(node)


def _inline(node: fx.Node, sub: fx.GraphModule, args) -> list:  # type: ignore[no-untyped-def,type-arg]
    env = dict(zip([n for n in sub.graph.nodes if n.op == "placeholder"], args, strict=True))
    with node.graph.inserting_before(node):
        for n in sub.graph.nodes:
            if n.op == "output":
                return list(fx.node.map_arg(n.args[0], lambda a: env[a]))
            if n.op != "placeholder":
                env[n] = node.graph.node_copy(n, lambda a: env[a])
    raise AssertionError("a graph without an output node")
