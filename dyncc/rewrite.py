"""The rewrite framework: what a pass is, and the contract that the framework (not the pass) enforces.

A pass matches, checks, replaces. It edits the copy it is given, or raises `Refusal` with words a user can act on. A call that is not
rewritten keeps its node: where an exact pass gives such a node another operand of the same size, evidence compares the two operands
(beside.py). Afterwards the framework lints the graph, compares outputs' shapes, strides, dtypes and aliasing with what the caller was
promised, and finds out by itself whether anything was modified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from dyncc.analysis.facts import Facts, analyse
from dyncc.ir import (
    Program,
    aten,
    drop_dead,
    emit,
    fake_mode_of,
    is_tensor,
    on_fakes,
    op_name,
    operands,
    output_node,
    outputs,
    plain_arguments,
    same_size,
    shape,
    val,
)
from dyncc.restrict import Refusal

VIEWS = {
    "view", "reshape", "transpose", "permute", "slice", "select", "unsqueeze", "squeeze", "expand", "t", "alias", "detach", "unbind",
    "split",
}


@dataclass(frozen=True)
class Context:
    """What a pass may ask about its surroundings. `trace` asks lossy passes to return their selections as extra outputs; `values` are the
    example's inputs, one a placeholder, parameters among them."""

    trace: bool = False
    values: Sequence[Any] | None = None


@dataclass(frozen=True)
class PassResult:
    """What a pass did. `found` of `expected` sites were rewritten; `misses` says why the others were not; `cuts` is for the masked form;
    `strided_outputs` lie otherwise in memory than was promised; `pays_from` says from which size on it saves work, where the graph serves
    sizes that grow beyond the captured ones."""

    found: int
    expected: int
    reason: str = ""
    misses: tuple[str, ...] = ()
    cuts: tuple[Any, ...] = ()
    shortened_outputs: frozenset[int] = frozenset()
    strided_outputs: frozenset[int] = frozenset()
    pays_from: str = ""


@dataclass(frozen=True)
class Pass:
    """A rewrite. Subclasses are frozen dataclasses whose fields are their options; `exact`: results differ by rounding only."""

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    exact: ClassVar[bool] = True
    keeps_gradients: ClassVar[bool] = False

    @property
    def counts_layers(self) -> bool:
        """Whether the options name layers by number: such a pass cannot run on a part of a model."""
        return hasattr(self, "layers")

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What the pass brings into the graph, by names of its own: inputs of the program that `run` gets (pass_tensors.py)."""
        return {}

    def run(self, program: Program, facts: Facts, context: Context) -> PassResult:
        """Edit `program.graph` in place, or raise `Refusal`."""
        raise NotImplementedError(type(self).__name__)


@dataclass(frozen=True)
class Draft:
    """A copy of a program for a pass to edit, with its facts."""

    program: Program
    facts: Facts

    @classmethod
    def of(cls, program: Program) -> Draft:
        copy = program.copy()
        return cls(copy, analyse(copy))


@dataclass(frozen=True)
class Applied:
    """The outcome of one pass: the program after it (the one before it when refused) and what to tell the user; `left` is the draft of that
    program when the pass did not touch it."""

    program: Program
    applied: bool
    modified: bool
    reason: str
    result: PassResult = field(default_factory=lambda: PassResult(0, 0))
    left: Draft | None = None


def apply_pass(program: Program, passed: Pass, context: Context, draft: Draft | None = None) -> Applied:
    """Run one pass under the contract; a refusal or a broken contract leaves the program as it was. `draft` spares making one."""
    if program.needs_grad and not passed.keeps_gradients:
        reason = "gradients are on for this graph; wrap the call in torch.inference_mode() or torch.no_grad()"
        return Applied(program, False, False, reason, left=draft)
    draft = draft or Draft.of(program)
    candidate = draft.program
    try:
        result = passed.run(candidate, draft.facts, context)
        candidate = replace(candidate, extra_outputs=len(outputs(candidate.graph)) - promised_outputs(program))
        modified = _finish(program, candidate, result)
    except Refusal as refusal:
        return Applied(program, False, False, str(refusal), left=draft if _same_nodes(program.graph, draft.program.graph) else None)
    return Applied(candidate if modified else program, True, modified, result.reason or result.pays_from, result)


def promised_outputs(program: Program) -> int:
    return len(outputs(program.graph)) - program.extra_outputs


def callers_outputs(program: Program) -> list[Any]:
    """What the graph returns, less what was added for the masked form."""
    return outputs(program.graph)[: promised_outputs(program)]


def _finish(before: Program, after: Program, result: PassResult) -> bool:
    _keep_strides(before, after, result.shortened_outputs | result.strided_outputs)
    drop_dead(after.graph)
    after.graph.lint()
    after.module.recompile()
    check_outputs(before, after, result.shortened_outputs, result.strided_outputs)
    check_shapes(before.graph, after.graph)
    return fingerprint(before.graph) != fingerprint(after.graph)


def _keep_strides(before: Program, after: Program, but: frozenset[int]) -> None:
    """Lay rewritten outputs out in memory as torch.compile was promised (sizes must be known for that)."""
    if before.door != 1:
        return
    out, olds = output_node(after.graph), callers_outputs(before)
    news = outputs(after.graph)
    for i, old in enumerate(olds):
        if i in but or not is_tensor(old) or not is_tensor(news[i]):
            continue
        size, stride = val(old).shape, val(old).stride()
        if stride != val(news[i]).stride() and all(isinstance(s, int) for s in (*size, *stride)) and size == val(news[i]).shape:
            news[i] = emit(out, lambda x, stride=stride: aten.copy.default(x.new_empty_strided(x.shape, stride), x), news[i])
    out.args = (tuple(news),)


def check_shapes(before: fx.Graph, graph: fx.Graph) -> None:
    """Propagate fake values again wherever a pass edited: every node must hold what its operands give.

    Raises:
        RuntimeError: a node's recorded shape or dtype is not what its operands give (a bug in a pass, never the user's fault).
    """
    mode = fake_mode_of(graph)
    olds = {n.name: n for n in before.nodes}
    for node in graph.nodes:
        if mode is None or not is_tensor(node) or not isinstance(node.target, torch._ops.OpOverload) or _untouched(node, olds):
            continue
        if any(isinstance(val(n), FakeTensor) and val(n).fake_mode is not mode for n in node.all_input_nodes):
            continue  # a constant that capture lifted under a mode of its own
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), val)
        with on_fakes(mode):
            value = node.target(*args, **kwargs)
        told = val(node)
        if value.dtype != told.dtype or not all(same_size(a, b) for a, b in zip(value.shape, told.shape, strict=True)):
            found = f"{value.dtype}{list(value.shape)}"
            raise RuntimeError(f"{node.name} is recorded as {told.dtype}{list(told.shape)} but its operands give {found}")


def _untouched(node: fx.Node, olds: dict[str, fx.Node]) -> bool:
    """Whether a node is the copy of one that was there before, with the same arguments and the very same fake values."""
    old = olds.get(node.name)
    if old is None or old.target is not node.target or val(old) is not val(node):
        return False
    olds_in, news_in = operands(old), operands(node)
    if len(olds_in) != len(news_in) or any(val(a) is not val(b) or a.name != b.name for a, b in zip(olds_in, news_in, strict=True)):
        return False
    return plain_arguments(old) == plain_arguments(node)


def _same_nodes(before: fx.Graph, after: fx.Graph) -> bool:
    olds = {n.name: n for n in before.nodes}
    return list(olds) == [n.name for n in after.nodes] and all(_untouched(n, olds) for n in after.nodes)


def check_outputs(
    before: Program, after: Program, shortened: frozenset[int] = frozenset(), strided: frozenset[int] = frozenset()
) -> None:
    """Outputs keep shape, stride, dtype and aliasing; those in `shortened` may be shorter, those in `strided` have other strides.

    Raises:
        Refusal: one does not; it is named by its position.
    """
    olds, news = callers_outputs(before), outputs(after.graph)
    for i, (old, new) in enumerate(zip(olds, news, strict=False)):
        if not is_tensor(old):
            continue
        a, b = val(old), val(new)
        if a.dtype != b.dtype:
            raise Refusal(f"output {i} would change from {a.dtype} to {b.dtype}")
        if i in shortened:
            continue
        if len(a.shape) != len(b.shape) or not all(same_size(x, y) for x, y in zip(a.shape, b.shape, strict=True)):
            raise Refusal(f"output {i} would change its shape from {list(a.shape)} to {list(b.shape)}")
        promised = before.door == 1 and i not in strided
        if promised and not all(statically_known_true(x == y) for x, y in zip(a.stride(), b.stride(), strict=True)):
            raise Refusal(f"output {i} would change its strides from {a.stride()} to {b.stride()}")
        if _alias_root(old) != _alias_root(new):
            raise Refusal(f"output {i} would no longer alias the same input")


def _alias_root(node: fx.Node) -> str:
    """The name of the input that an output may be a view of, or ''."""
    while node.op == "call_function" and op_name(node) in VIEWS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.name if node.op == "placeholder" else ""


def fingerprint(graph: fx.Graph) -> str:
    """The graph as text that does not depend on node names."""
    number = {n: i for i, n in enumerate(graph.nodes)}
    return "\n".join(f"{n.op} {n.target} {fx.node.map_arg((n.args, n.kwargs), lambda a: f'%{number[a]}')}" for n in graph.nodes)


def graph_text(graph: fx.Graph) -> str:
    """The graph as readable text, a node a line with its dtype, its shape, and its device where that is not the CPU."""
    lines = []
    for n in graph.nodes:
        sizes = f"  # {str(val(n).dtype).removeprefix('torch.')}{list(shape(n))}" if is_tensor(n) else ""
        sizes += f" {val(n).device}" if is_tensor(n) and val(n).device.type != "cpu" else ""
        arguments = ", ".join([str(a) for a in n.args] + [f"{k}={v}" for k, v in n.kwargs.items()])
        name = op_name(n) if n.op == "call_function" else n.op
        lines.append(f"{n.name} = {name}({'' if n.op == 'placeholder' else arguments}){sizes}")
    return "\n".join(lines) + "\n"


