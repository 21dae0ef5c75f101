"""One graph that runs programs beside each other, so that what they have in common is computed once.

A pass edits a copy whose nodes keep their names. A node of the later program is *shared* with the node of that name in the earlier one
when both make the same call on the same values. Where only an operand differs, an exact rewrite *claims* that the new operand has the old
one's value: the joint graph compares the two, and everything behind goes on with the old one. So a chain of programs costs one run of the
first and the regions that were rewritten. Names only suggest what to compare: what is not shared by equal calls on equal values, or by
a claim that was compared, is computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dyncc.claims import Claim, comparable, compare
from dyncc.evidence import relative_error
from dyncc.ir import Program, argument, is_mutating, is_tensor, op_name, operands, plain_arguments, val
from dyncc.rewrite import callers_outputs
from dyncc.shared_masks import share_masks


@dataclass(frozen=True)
class Joint:
    """`module` takes the programs' inputs; it returns the relative error of each claim and, for the programs asked for, their outputs."""

    module: fx.GraphModule
    claims: tuple[Claim, ...]


class _Unclear(Exception):
    """The programs hold something that cannot be told from names and arguments."""


def joint(programs: Sequence[Program], exact: Sequence[bool], wanted: Sequence[bool]) -> Joint | None:
    """The programs beside each other, or None where each must be run as a whole.

    Args:
        exact: for each program whether it must give what the one before it gives (the first entry does not count).
        wanted: for each program whether its outputs are returned.
    """
    if not all(_depends_on_values_only(p) for p in programs):
        return None
    try:
        return _Builder(programs, exact).build(wanted)
    except _Unclear:
        return None


def _depends_on_values_only(program: Program) -> bool:
    """Whether every node's value follows from its operands' values, and nothing is changed in place."""
    nodes = [n for n in program.graph.nodes if n.op not in ("placeholder", "output", "get_attr")]
    return all(n.op == "call_function" and _is_function(n) for n in nodes)


def _is_function(node: fx.Node) -> bool:
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        module, name = getattr(target, "__module__", ""), getattr(target, "__name__", "")
        return module == "_operator" or (module == "torch" and name.startswith("sym_"))
    if is_mutating(node):
        return False
    still = op_name(node) == "scaled_dot_product_attention" and argument(node, "dropout_p", 0.0) == 0.0
    return still or torch.Tag.nondeterministic_seeded not in target.tags


class _Builder:
    """Places the programs' nodes in step, so that a value is freed as early as in a run of its own."""

    def __init__(self, programs: Sequence[Program], exact: Sequence[bool]):
        self.programs, self.exact = programs, exact
        self.graph = fx.Graph()
        self.names = [{n.name: n for n in p.graph.nodes} for p in programs]
        self.placed: list[dict[fx.Node, fx.Node]] = [{} for _ in programs]
        self.alike: dict[fx.Node, fx.Node] = {}
        self.claims: list[Claim] = []
        self.errors: list[fx.Node] = []

    def build(self, wanted: Sequence[bool]) -> Joint:
        self._inputs()
        queues = [deque(n for n in p.graph.nodes if n.op in ("call_function", "get_attr")) for p in self.programs]
        while queues[0]:
            node = queues[0].popleft()
            self.placed[0][node] = self.graph.node_copy(node, self.placed[0].__getitem__)
            for i in range(1, len(queues)):
                self._advance(i, queues[i])
        for i in range(1, len(self.programs)):
            self._claim_outputs(i)
        returned = [tuple(self._returned(i)) if w else None for i, w in enumerate(wanted)]
        self.graph.output((tuple(self.errors), tuple(returned)))
        share_masks(self.graph)
        return Joint(fx.GraphModule(self.programs[0].module, self.graph), tuple(self.claims))

    def _inputs(self) -> None:
        columns = [[n for n in p.graph.nodes if n.op == "placeholder"] for p in self.programs]
        if len({len(c) for c in columns}) != 1:
            raise _Unclear
        for row in zip(*columns, strict=True):
            made = self.graph.node_copy(row[0])
            for placed, node in zip(self.placed, row, strict=True):
                placed[node] = made

    def _advance(self, i: int, queue: deque[fx.Node]) -> None:
        """Place what can be placed: a node waits for the earlier program's node of its name."""
        while queue:
            old = self.names[i - 1].get(queue[0].name)
            if old is not None and (old.op, old.target) != (queue[0].op, queue[0].target):
                old = None
            if old is not None and old not in self.placed[i - 1]:
                return
            node = queue.popleft()
            self.placed[i][node] = self._shared(i, old, node) or self._own(i, node)

    def _own(self, i: int, node: fx.Node) -> fx.Node:
        if node.op == "get_attr":
            raise _Unclear
        return self.graph.node_copy(node, lambda n: self._at(i, n))

    def _shared(self, i: int, old: fx.Node | None, node: fx.Node) -> fx.Node | None:
        """The old node's place, where both are the same call on values that are the same or claimed to be."""
        if old is None or plain_arguments(old) != plain_arguments(node):
            return None
        pairs = list(zip(operands(old), operands(node), strict=True))
        differing = [(a, b) for a, b in pairs if self._at(i - 1, a) is not self._at(i, b)]
        if differing and not (self.exact[i] and all(comparable(a, b) for a, b in differing)):
            return None
        for a, b in differing:
            before, now = self._at(i - 1, a), self._at(i, b)
            if before is not now:
                self.claims.append(Claim(i, f"the value of node {a.name}", val(a).dtype))
                self.errors.append(compare(self.graph, before, now))
                self.alike[now] = before
        return self._at(i - 1, old)

    def _at(self, i: int, node: Any) -> Any:
        """Where a program's node is in the joint graph; of values that were compared, the earlier program's."""
        if not isinstance(node, fx.Node):
            return node
        place = self.placed[i][node]
        while place in self.alike:
            place = self.alike[place]
        return place

    def _returned(self, i: int) -> list[Any]:
        """A program's outputs; those of the first are all its own, whatever was found to be like them."""
        found = callers_outputs(self.programs[i])
        return [self._at(i, n) for n in found] if i else [self.placed[0][n] if isinstance(n, fx.Node) else n for n in found]

    def _claim_outputs(self, i: int) -> None:
        pairs = zip(callers_outputs(self.programs[i - 1]), callers_outputs(self.programs[i]), strict=True)
        for position, (old, new) in enumerate(pairs if self.exact[i] else ()):
            a, b = self._at(i - 1, old), self._at(i, new)
            if a is b:
                continue
            if not is_tensor(a) or not is_tensor(b):
                raise _Unclear
            self.claims.append(Claim(i, f"output {position}", val(a).dtype))
            self.errors.append(self.graph.call_function(relative_error, (a, b)))
