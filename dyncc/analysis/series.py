"""What the steps of a loop take, put together for all tokens: one node for all, token t of one tensor, or nodes of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dyncc.analysis.decays import positive
from dyncc.ir import argument, op_name, operands, same_sizes, shape, val


class NotUnrolled(Exception):
    """Why outputs that are joined are no recurrence that is understood."""


@dataclass(frozen=True)
class Series:
    """One operand of all steps, to be put together along a new first dimension: `nodes` are stacked, or the one node has its dimension
    `dim` moved there, or it is the same for all of `tokens` steps (`dim` None). Then `ops` follow."""

    nodes: tuple[fx.Node, ...]
    dim: int | None
    tokens: int
    ops: tuple[Callable[[Tensor], Tensor], ...]

    def together(self, *values: Tensor) -> Tensor:
        """[T, ...] of the nodes' values."""
        x = torch.stack(values) if len(values) > 1 else values[0].unsqueeze(0) if self.dim is None else self._of_one(values[0])
        for op in self.ops:
            x = op(x)
        return x.expand(self.tokens, *x.shape[1:])

    def _of_one(self, source: Tensor) -> Tensor:
        """The first tokens of a tensor that holds them all."""
        x = source.movedim(self.dim or 0, 0)
        return x if x.shape[0] == self.tokens else x[: self.tokens]


def series(nodes: Sequence[fx.Node], *, logs: bool = False) -> Series:
    """What the steps' operands come from; with `logs` their logarithms, which need no exp that was just taken.

    Raises:
        NotUnrolled: with `logs`, where nothing says that they are positive.
    """
    chains = [_peeled(n) for n in nodes]
    same = all(len(c) == len(chains[0]) and all(alike(a, b) for a, b in zip(c[:-1], chains[0][:-1], strict=True)) for c in chains)
    bases = [c[-1] for c in chains] if same else list(nodes)
    links = list(reversed(chains[0][:-1])) if same else []
    first, tokens = bases[0], len(nodes)
    dim = _token_dim(bases)
    if len(set(bases)) == 1:
        found = Series((first,), None, tokens, ())
    else:
        found = Series((operands(first)[0],), dim, tokens, ()) if dim is not None else Series(tuple(bases), None, tokens, ())
    outer = [i for i, link in enumerate(links) if op_name(link) not in ("unsqueeze", "slice")]
    makers = [links[outer[-1]]] if outer else bases
    if logs and not all(positive(n) for n in makers):
        raise NotUnrolled("its decays are neither exp nor sigmoid of anything: whether they are positive is not known")
    taken = outer[-1] if logs and outer and op_name(links[outer[-1]]) == "exp" else None
    ops = [_op(link, len(shape(operands(link)[0]))) for i, link in enumerate(links) if i != taken]
    ops += [torch.log] if logs and taken is None else []
    return Series(found.nodes, found.dim, tokens, tuple(ops))


def _peeled(node: fx.Node) -> list[fx.Node]:
    """The node and what it only looks at, scales or activates, down to the token that was taken."""
    chain = [node]
    while chain[-1].op == "call_function" and op_name(chain[-1]) in ("unsqueeze", "exp", "sigmoid", "mul", "slice", "to", "_to_copy"):
        last = chain[-1]
        plain = len(operands(last)) == 1 and last.args[0] is operands(last)[0]
        if not plain or (op_name(last) == "slice" and not same_sizes(shape(last), shape(operands(last)[0]))):
            break
        chain.append(operands(last)[0])
    return chain


def alike(a: fx.Node, b: fx.Node) -> bool:
    """Whether two calls are of one operation, with the same arguments behind the first."""
    return a.target is b.target and str(a.args[1:]) == str(b.args[1:]) and str(a.kwargs) == str(b.kwargs)


def _token_dim(bases: Sequence[fx.Node]) -> int | None:
    """The dimension from which the bases take tokens 0, 1, ... of one tensor, maybe not all; None where they do not."""
    first = bases[0]
    if op_name(first) != "select" or not all(op_name(b) == "select" and operands(b)[0] is operands(first)[0] for b in bases):
        return None
    source = operands(first)[0]
    dim = argument(first, "dim") % len(shape(source))
    same = all(argument(b, "dim") % len(shape(source)) == dim for b in bases)
    held = shape(source)[dim]
    counted = [argument(b, "index") for b in bases] == list(range(len(bases))) and isinstance(held, int) and held >= len(bases)
    return dim if same and counted else None


def _op(link: fx.Node, rank: int) -> Callable[[Tensor], Tensor]:
    """What a link does to its operand of `rank` dimensions, with one more in front."""
    name = op_name(link)
    if name == "unsqueeze":
        dim = argument(link, "dim")
        return lambda x: x.unsqueeze(dim + 1 if dim >= 0 else dim)
    if name == "mul":
        factor = link.args[1]
        return lambda x: x * factor
    if name in ("to", "_to_copy"):
        dtype = val(link).dtype
        return lambda x: x.to(dtype)
    return {"exp": torch.exp, "sigmoid": torch.sigmoid}.get(name, lambda x: x)
