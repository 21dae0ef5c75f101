"""Axis classes: which dimension of which node is the same axis, found by union-find over atoms.

A dimension is an ordered product of atoms (a `view` of [B, T, C] to [B*T, C] gives a dimension of two atoms); size-1 dimensions hold none.
An op's rule (axis_rules.py) says which output dimension carries which operand dimension; only that unites atoms. Equality of sizes alone
never does. Query rows and key rows are two occurrences of one class: the links of a node, by operand slot, keep them apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import fx

from dyncc.ir import operands, shape, size_expr


class Atom:
    """One indivisible axis; `size` is an int or a sympy expression."""

    __slots__ = ("size",)

    def __init__(self, size: Any):
        self.size = size


Dim = tuple[Atom, ...]


@dataclass(frozen=True)
class Link:
    """Output dimension `out` carries dimension `dim` of the operand in `slot`."""

    out: int
    slot: int
    dim: int


@dataclass(frozen=True)
class Contract:
    """Two operand dimensions that run together and leave no output dimension (matmul's inner pair; keys with values)."""

    slot: int
    dim: int
    other: int
    other_dim: int


@dataclass(frozen=True)
class Read:
    """The op reads positions along (or reduces over, `why` says which) an operand's dimension. `counted` is the slot of an index that holds
    0, 1, 2, ... along it, so that row b of the result reads row b of the operand."""

    slot: int
    dim: int
    why: str
    counted: int | None = None


@dataclass
class OpAxes:
    """What one op does with the axes of its operands. `same` dimensions are one axis though the op does not run along both; `known` is
    False for an op without a rule."""

    links: list[Link] = field(default_factory=list)
    contracts: list[Contract] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    same: list[Contract] = field(default_factory=list)
    known: bool = True
    regroups: bool = False


def quotient(a: Any, b: Any) -> Any | None:
    """a / b when that is provably a whole number, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    if b == 1:
        return a
    ratio = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    if not sympy.denom(ratio).is_Integer or sympy.denom(ratio) != 1:
        return None
    return int(ratio) if ratio.is_Integer else ratio


class Axes:
    """The frozen result: `dims(node)`, per-op `ops[node]`, and questions about classes."""

    def __init__(self, graph: fx.Graph):
        from dyncc.analysis.axis_rules import rule_for

        self._parent: dict[Atom, Dim] = {}
        self._dims: dict[fx.Node, tuple[Dim, ...]] = {}
        self.ops: dict[fx.Node, OpAxes] = {}
        self.segments: dict[tuple[fx.Node, int], list[tuple[Dim, Any]]] = {}
        for node in graph.nodes:
            if node.op == "output" or not shape(node):
                continue
            if node.op in ("placeholder", "get_attr"):
                self._dims[node] = tuple(self.fresh(s) for s in shape(node))
                continue
            slots = operands(node)
            op = rule_for(node)(node, slots) if node.op == "call_function" else OpAxes(known=False)
            self.ops[node] = op
            self._build(node, slots, op)

    # building
    def fresh(self, size: Any) -> Dim:
        size = size_expr(size)
        return () if size == 1 else (Atom(size),)

    def _build(self, node: fx.Node, slots: Sequence[fx.Node], op: OpAxes) -> None:
        if op.regroups:
            self._dims[node] = self._regroup(self._dims[slots[0]], shape(node))
        else:
            dims: list[Dim | None] = [None] * len(shape(node))
            for link in op.links:
                carried = self._dims[slots[link.slot]][link.dim]
                if dims[link.out]:
                    self.unite(dims[link.out] or (), carried)
                elif carried or dims[link.out] is None:
                    dims[link.out] = carried
            self._dims[node] = tuple(self.fresh(s) if d is None else d for d, s in zip(dims, shape(node), strict=True))
        for c in (*op.contracts, *op.same):
            self.unite(self._dims[slots[c.slot]][c.dim], self._dims[slots[c.other]][c.other_dim])

    def _regroup(self, dims: Iterable[Dim], sizes: Sequence[Any]) -> tuple[Dim, ...]:
        """Dimensions of a view: atoms are split and merged in order; what cannot be followed becomes fresh."""
        queue = [atom for dim in dims for atom in self.resolve(dim)]
        result: list[Dim] = []
        broken = False
        for size in sizes:
            need, taken = size_expr(size), []
            while not broken and need != 1:
                if not queue:
                    broken = True
                    break
                atom = queue.pop(0)
                rest = quotient(need, atom.size)
                if rest is not None:
                    taken.append(atom)
                    need = rest
                    continue
                inner = quotient(atom.size, need)
                if inner is None:
                    broken = True
                    break
                left, right = Atom(need), Atom(inner)
                self._parent[atom] = (left, right)
                taken.append(left)
                queue.insert(0, right)
                need = 1
            result.append(tuple(taken) if not broken else self.fresh(size))
        return tuple(result)

    def unite(self, a: Dim, b: Dim) -> None:
        left, right = list(self.resolve(a)), list(self.resolve(b))
        if not left or not right or left == right:
            return
        if len(left) == 1:
            if left[0] not in right:
                self._parent[left[0]] = tuple(right)
            return
        if len(right) == 1:
            if right[0] not in left:
                self._parent[right[0]] = tuple(left)
            return
        for x, y in self._aligned(left, right):
            if x is not y:
                self._parent[x] = (y,)

    def _aligned(self, left: list[Atom], right: list[Atom]) -> list[tuple[Atom, Atom]]:
        """Split two atom lists of equal product into pairs of equal size; empty when they do not align."""
        pairs: list[tuple[Atom, Atom]] = []
        while left and right:
            x, y = left.pop(0), right.pop(0)
            if x.size == y.size:
                pairs.append((x, y))
                continue
            if (rest := quotient(x.size, y.size)) is not None:
                head, tail = Atom(y.size), Atom(rest)
                self._parent[x] = (head, tail)
                pairs.append((head, y))
                left.insert(0, tail)
            elif (rest := quotient(y.size, x.size)) is not None:
                head, tail = Atom(x.size), Atom(rest)
                self._parent[y] = (head, tail)
                pairs.append((x, head))
                right.insert(0, tail)
            else:
                return []
        return pairs

    # asking
    def resolve(self, dim: Dim) -> Dim:
        if not any(a in self._parent for a in dim):
            return dim
        out: list[Atom] = []
        for atom in dim:
            if atom in self._parent:
                root = self.resolve(self._parent[atom])
                self._parent[atom] = root
                out.extend(root)
            else:
                out.append(atom)
        return tuple(out)

    def dims(self, node: fx.Node) -> tuple[Dim, ...]:
        """The node's dimensions, each as its resolved atoms; () when the node is no tensor."""
        return tuple(self.resolve(d) for d in self._dims.get(node, ()))

    def has(self, node: fx.Node, axis: Dim) -> bool:
        return any(find(d, axis) >= 0 for d in self.dims(node))

    def places(self, node: fx.Node, axis: Dim) -> list[int]:
        """The dimensions of a node that hold the axis."""
        return [i for i, d in enumerate(self.dims(node)) if find(d, axis) >= 0]


def find(dim: Dim, axis: Dim) -> int:
    """Where the axis stands inside a dimension's atoms, or -1."""
    if not axis:
        return -1
    for i in range(len(dim) - len(axis) + 1):
        if dim[i : i + len(axis)] == axis:
            return i
    return -1
