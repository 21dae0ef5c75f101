"""A program as a function of tensors: what engines outside of PyTorch take.

One retrace: sizes among the inputs become sizes of tensors, mutations become further outputs that are copied back, inputs and outputs
that lie permuted in memory are given in memory order, and outputs that are views stay views. The rest of the program is as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dyncc.backends.layout import Order, inverse, memory_order, moved
from dyncc.canonical import canonicalise
from dyncc.errors import NotTaken
from dyncc.ir import Input, Program, argument, fake_mode_of, is_mutating, op_name, same_size


@dataclass(frozen=True)
class Given:
    """One tensor input: its place among the flat inputs, its fake value, and the order of its dimensions in memory."""

    place: int
    like: torch.Tensor
    order: Order


@dataclass(frozen=True)
class Result:
    """One flat output. `kind` is "computed" (number `at` of what the functional program returns), "input" (flat input `at` itself),
    "view" (of flat input `at`), "size" or "constant" (`value`); `value` is the fake value of the first three."""

    kind: str
    value: Any
    at: int = -1


@dataclass(frozen=True)
class Functional:
    """`program` takes the tensors of `given`, in memory order, and returns tensors in the memory order of `computed`, their fake values;
    the last of them are the new values of the flat inputs `mutated`."""

    program: Program
    given: tuple[Given, ...]
    results: tuple[Result, ...]
    computed: tuple[torch.Tensor, ...]
    mutated: tuple[int, ...]


def functional(program: Program) -> Functional:
    """The functional form of a program.

    Raises:
        NotTaken: the program draws random numbers, or its sizes or mutations cannot be expressed.
    """
    _refuse_hidden_state(program.module)
    fakes = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"]
    mode = fake_mode_of(program.graph)
    if mode is None:
        raise NotTaken("the graph takes no tensor")
    given = tuple(Given(i, f, memory_order(f)) for i, f in enumerate(fakes) if isinstance(f, torch.Tensor))
    with mode, torch.no_grad():
        held = [f.detach() if isinstance(f, torch.Tensor) else f for f in fakes]
        returned = list(program.module(*held))
        results, computed = _results(returned, held)
        first = {r.at: i for i, r in reversed(list(enumerate(results))) if r.kind == "computed"}
        run = _Rerun(program, fakes, given, [(first[n], memory_order(c)) for n, c in enumerate(computed)])
        examples = [g.like.detach().permute(g.order).contiguous() for g in given]
        traced = make_fx(run, tracing_mode="real", pre_dispatch=True)(*examples)
    canonicalise(traced, inference=True)
    names = distinct([program.inputs[g.place].name for g in given])
    made = replace(program, module=traced, inputs=tuple(Input("input", n) for n in names), needs_grad=False, extra_outputs=0)
    changed = [fakes[i] for i in run.mutated]
    return Functional(made, given, tuple(results), (*computed, *changed), tuple(run.mutated))


def distinct(names: Sequence[str]) -> list[str]:
    """The names, later ones changed where one was there before."""
    found: list[str] = []
    for name in names:
        candidate, number = name, 1
        while candidate in found:
            candidate, number = f"{name}_{number}", number + 1
        found.append(candidate)
    return found


def _refuse_hidden_state(module: fx.GraphModule) -> None:
    for graph in [m.graph for m in module.modules() if isinstance(m, fx.GraphModule)]:
        for node in graph.nodes:
            tags = node.target.tags if isinstance(node.target, torch._ops.OpOverload) else ()
            if torch.Tag.nondeterministic_seeded in tags and argument(node, "dropout_p", 1.0) != 0.0:
                raise NotTaken(f"the graph draws random numbers ({op_name(node)})")
            training = argument(node, "training", False) or argument(node, "use_input_stats", False)
            if op_name(node) in ("batch_norm", "instance_norm") and training and argument(node, "running_mean") is not None:
                raise NotTaken(f"{op_name(node)} in training mode writes its statistics")


def _results(returned: Sequence[Any], held: Sequence[Any]) -> tuple[list[Result], list[torch.Tensor]]:
    """How each output is made, and the fake values of those that are computed."""
    homes = {t.untyped_storage()._cdata: i for i, t in reversed(list(enumerate(held))) if isinstance(t, torch.Tensor)}
    results: list[Result] = []
    computed: list[torch.Tensor] = []
    for value in returned:
        if isinstance(value, torch.SymInt):
            results.append(Result("size", value))
        elif not isinstance(value, torch.Tensor):
            results.append(Result("constant", value))
        elif (home := homes.get(value.untyped_storage()._cdata)) is not None:
            results.append(Result("input" if _same_place(value, held[home]) else "view", value, home))
        else:
            same = next((i for i, c in enumerate(computed) if c is value), len(computed))
            results.append(Result("computed", value, same))
            computed += [value] if same == len(computed) else []
    return results, computed


def _same_place(a: torch.Tensor, b: torch.Tensor) -> bool:
    sizes = zip((*a.shape, *a.stride(), a.storage_offset()), (*b.shape, *b.stride(), b.storage_offset()), strict=False)
    return a.dim() == b.dim() and a.dtype == b.dtype and all(same_size(x, y) for x, y in sizes)


def _sizes(program: Program, fakes: Sequence[Any], given: Sequence[Given]) -> dict[int, tuple[int, int]]:
    """Where the value of each input that is a size can be read: its place -> a tensor's number and dimension."""
    found: dict[int, tuple[int, int]] = {}
    for place, fake in enumerate(fakes):
        if isinstance(fake, torch.Tensor):
            continue
        spots = ((n, d) for n, g in enumerate(given) for d, size in enumerate(g.like.shape) if same_size(size, fake))
        spot = next(spots, None) if isinstance(fake, torch.SymInt) else None
        if spot is None and isinstance(fake, torch.SymInt):
            raise NotTaken(f"the number {program.inputs[place].name} varies and is no tensor's size")
        if spot is not None:
            found[place] = spot
    return found


class _Rerun:
    """What is traced: the program over tensors in memory order; notes in `mutated` which of its inputs it changed."""

    def __init__(self, program: Program, fakes: Sequence[Any], given: Sequence[Given], taken: Sequence[tuple[int, Order]]) -> None:
        self.program, self.given, self.taken = program, given, taken
        self.flat = list(fakes)
        self.sizes = _sizes(program, fakes, given)
        self.mutates = any(is_mutating(n) for n in program.graph.nodes)
        self.mutated: list[int] = []

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        usual = [t.permute(inverse(g.order)) if moved(g.order) else t for g, t in zip(self.given, tensors, strict=True)]
        flat = list(self.flat)
        for place, (number, dim) in self.sizes.items():
            flat[place] = usual[number].shape[dim]
        for g, t in zip(self.given, usual, strict=True):
            flat[g.place] = t
        returned, changed = self._functional(flat) if self.mutates else (list(self.program.module(*flat)), [])
        orders = {g.place: g.order for g in self.given}
        kept = [(returned[i], order) for i, order in self.taken] + [(t, orders[i]) for i, t in zip(self.mutated, changed, strict=True)]
        return [t.permute(order) if moved(order) else t for t, order in kept]

    def _functional(self, flat: list[Any]) -> tuple[list[Any], list[torch.Tensor]]:
        """Outputs and the new values of the inputs that were written to, every mutation spelled as a computation."""
        excluded = torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)
        with torch._C._ExcludeDispatchKeyGuard(excluded), FunctionalTensorMode(pre_dispatch=True, export=True):
            held = [FunctionalTensor.to_functional(f) if isinstance(f, torch.Tensor) else f for f in flat]
            returned = [_plain(r) for r in self.program.module(*held)]
            wrapped = [g.place for g in self.given if torch._functionalize_has_data_mutation(held[g.place].elem)]
            self.mutated[:] = wrapped
            return returned, [_plain(held[i]) for i in wrapped]


def _plain(value: Any) -> Any:
    if not isinstance(value, FunctionalTensor):
        return value
    torch._sync(value)
    return torch._from_functional_tensor(value.elem)
