"""The one IR: a pre-dispatch ATen FX graph whose placeholders are the parameters, buffers, constants and inputs of a model.

Both doors end here. The graph is flat: it takes the tensors (and symbolic sizes) listed in `Program.inputs`, in order, and returns one
tuple. Every node carries its fake value in `meta["val"]`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten
ATTENTION = ("scaled_dot_product_attention", "attend")
"""Fused attention by op name."""


@dataclass(frozen=True)
class Input:
    """One placeholder: `kind` is "parameter", "buffer", "constant", "input" or "size"; `name` is what the user calls it."""

    kind: str
    name: str


@dataclass(frozen=True, eq=False)
class Program:
    """A captured model. `door` is 1 (torch.compile) or 2 (offline); `needs_grad` says that gradients will be asked for;
    `extra_outputs` is how many trailing outputs are not the caller's."""

    module: fx.GraphModule
    inputs: tuple[Input, ...]
    door: int
    needs_grad: bool = False
    extra_outputs: int = 0

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def copy(self) -> Program:
        """A program whose graph can be edited without touching this one; fake values are shared."""
        graph = fx.Graph()
        val_map: dict[fx.Node, fx.Node] = {}
        copied = graph.graph_copy(self.graph, val_map)
        if not any(n.op == "output" for n in graph.nodes):
            graph.output(copied)
        old, new = output_node(self.graph), output_node(graph)
        new.meta = dict(old.meta)
        for a, b in val_map.items():
            b.meta = dict(a.meta)
        return replace(self, module=fx.GraphModule(self.module, graph))


def output_node(graph: fx.Graph) -> fx.Node:
    return next(n for n in reversed(graph.nodes) if n.op == "output")


def outputs(graph: fx.Graph) -> list[Any]:
    """The values that the graph returns, in order (nodes or constants)."""
    returned = output_node(graph).args[0]
    return list(returned) if isinstance(returned, (tuple, list)) else [returned]


def val(node: Any) -> Any:
    """The fake value of a node; anything else is returned as it is."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def shape(node: fx.Node) -> tuple[Any, ...]:
    """The sizes of a tensor node, or of the first tensor that a tuple-valued node holds; () for anything else."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)) and value and isinstance(value[0], torch.Tensor):
        value = value[0]
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def op_name(node: fx.Node) -> str:
    """The op's bare name: "linear", "scaled_dot_product_attention", "getitem"."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return getattr(target, "__name__", str(target))


def is_attention(node: fx.Node) -> bool:
    """Whether the node is fused attention: SDPA, or `dyncc::attend`, which takes SDPA's arguments and more."""
    return op_name(node) in ATTENTION


def is_mutating(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def is_effect(node: fx.Node) -> bool:
    """Whether dropping the node could change what a caller sees."""
    if node.op in ("placeholder", "output"):
        return True
    if is_mutating(node):
        return True
    if is_attention(node) and argument(node, "dropout_p", 0.0) == 0.0:
        return False
    if op_name(node) == "dropout" and not argument(node, "train", False):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded in node.target.tags or node.target._schema.name == "aten::_assert_async"
    return node.is_impure()


def drop_dead(graph: fx.Graph) -> None:
    graph.eliminate_dead_code(is_impure_node=is_effect)


def operands(node: fx.Node) -> list[fx.Node]:
    """The node's node arguments in order of appearance, repeats kept: a position in this list is a *slot*."""
    found: list[fx.Node] = []

    def note(operand: fx.Node) -> fx.Node:
        found.append(operand)
        return operand

    fx.node.map_arg((node.args, node.kwargs), note)
    return found


def replace_operands(node: fx.Node, by_slot: dict[int, fx.Node]) -> None:
    """Put other nodes into some slots of a node."""
    counter = iter(range(1 << 30))
    node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: by_slot.get(next(counter), n))


def plain_arguments(node: fx.Node) -> str:
    """What a call is told besides its operands: its arguments as text, with a mark where each operand stands."""
    return str(fx.node.map_arg((node.args, node.kwargs), lambda n: "%"))


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of an ATen call by its schema name, wherever it stands; the schema's default otherwise."""
    if name in node.kwargs:
        return node.kwargs[name]
    if isinstance(node.target, torch._ops.OpOverload):
        for i, arg in enumerate(node.target._schema.arguments):
            if arg.name == name:
                return node.args[i] if i < len(node.args) else arg.default_value if arg.has_default_value() else default
    return default


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode | None:
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


@contextmanager
def on_fakes(mode: FakeTensorMode | None) -> Iterator[None]:
    """Compute on fake values: without gradients, composite ops by their Python rules, so that no symbolic size is read as a number."""
    with mode if mode is not None else nullcontext(), torch.no_grad(), enable_python_dispatcher():
        yield


def refresh(node: fx.Node) -> None:
    """Recompute a node's fake value from its arguments' fake values."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    with on_fakes(fake_mode_of(node.graph)):
        node.meta["val"] = node.target(*args, **kwargs)


def take_place(old: fx.Node, new: fx.Node) -> fx.Node:
    """Give a node's readers, and what else is noted of it, to another one, which is returned; the old one is erased."""
    new.meta = {**old.meta, "val": new.meta["val"]}
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
    return new


def emit(before: fx.Node, function: Callable[..., Any], *args: Any, pre_dispatch: bool = True) -> Any:
    """Trace `function` on the fake values of `args` and insert its ops before a node; returns the node(s) of its result.

    `args` may be nodes or plain values; plain values reach the function as they are. Without `pre_dispatch`, composite ops are written out.
    Tensors that the function makes live on the device of those that it gets, where it names none.
    """
    graph = before.graph
    nodes = [a for a in args if isinstance(a, fx.Node)]
    device = device_beside(nodes, graph)

    def on_values(*values: Any) -> Any:
        stream = iter(values)
        with nullcontext() if device is None else device:  # the CPU is where PyTorch makes tensors anyway
            return function(*[next(stream) if isinstance(a, fx.Node) else a for a in args])

    with on_fakes(fake_mode_of(graph)):
        values = _apart([n.meta["val"] for n in nodes])
        traced = make_fx(on_values, tracing_mode="real", pre_dispatch=pre_dispatch)(*values)
    env: dict[fx.Node, Any] = {}
    stream = iter(nodes)
    result: Any = None
    with graph.inserting_before(before):
        for n in traced.graph.nodes:
            if n.op == "placeholder":
                env[n] = next(stream)
            elif n.op == "output":
                result = fx.node.map_arg(n.args[0], lambda a: env[a])
            elif n.op == "get_attr":
                env[n] = constant(before, getattr(traced, str(n.target)))
            elif n.target is aten.detach.default:
                env[n] = env[n.args[0]]
            elif n.target is not aten.promote_types.default:  # torch 2.11 records what it already carried out
                env[n] = graph.node_copy(n, lambda a: env[a])
    return result


def device_beside(nodes: Sequence[fx.Node], graph: fx.Graph) -> torch.device | None:
    """Where tensors that are made beside these nodes belong, or beside the graph's inputs where these are sizes and scalars.

    None for the CPU; scalars on the CPU go along with tensors on any device.
    """
    beside = [n for n in nodes if shape(n)] or graph.find_nodes(op="placeholder")
    devices = (val(n).device for n in beside if is_tensor(n))
    return next((device for device in devices if device.type != "cpu"), None)


def _apart(values: list[Any]) -> list[Any]:
    """The values, each an object of its own: tracing tells tensors apart by identity, and copies of a node share their fake value."""
    seen: set[int] = set()
    made = []
    for value in values:
        again = isinstance(value, torch.Tensor) and id(value) in seen
        made.append(value.detach() if again else value)
        seen.add(id(value))
    return made


def constant(before: fx.Node, tensor: torch.Tensor) -> fx.Node:
    """A small constant tensor, spelled as `aten.full` when it is a scalar (constants are never hidden in attributes)."""
    if tensor.numel() != 1:
        raise ValueError("emitted code may hold scalar constants only")
    with before.graph.inserting_before(before):
        options = {"dtype": tensor.dtype, "device": tensor.device}
        node = before.graph.call_function(aten.full.default, (list(tensor.shape), tensor.item()), options)
    refresh(node)
    return node


def hoist(node: fx.Node, before: fx.Node, order: dict[fx.Node, int]) -> None:
    """Move a node and whatever it needs in front of `before` (the caller has checked that it does not depend on it)."""
    if order[node] < order[before] or node.op == "placeholder":
        return
    for n in node.all_input_nodes:
        hoist(n, before, order)
    before.prepend(node)
    order[node] = order[before] - 1


def descendants(node: fx.Node) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        for user in stack.pop().users:
            if user not in seen:
                seen.add(user)
                stack.append(user)
    return seen


def ancestors(nodes: Iterable[fx.Node], but: Container[fx.Node] = ()) -> set[fx.Node]:
    """The nodes that these depend on, themselves included; not `but` these, nor what stands behind them alone."""
    seen: set[fx.Node] = set()
    stack = [n for n in nodes if n not in but]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += [n for n in node.all_input_nodes if n not in but and n not in seen]
    return seen


def source_line(node: fx.Node) -> str:
    """Where in the user's code the node comes from, as `file:line`; empty when unknown."""
    lines = [x.strip() for x in (node.meta.get("stack_trace") or "").splitlines() if x.strip().startswith("File ")]
    if not lines:
        return ""
    parts = lines[-1].split(", ")
    return f"{parts[0][6:-1].rsplit('/', 1)[-1]}:{parts[1].removeprefix('line ')}"


def is_symbolic(size: Any) -> bool:
    return isinstance(size, torch.SymInt)


def size_expr(size: Any) -> Any:
    """A size as a number or an expression over sizes."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are provably equal; adds no guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(size_expr(a) == size_expr(b))


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are provably equal; adds no guard."""
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def hint(size: Any) -> int:
    """The size in the example inputs."""
    return size if isinstance(size, int) else int(size.node.hint)


GETITEM = operator.getitem
