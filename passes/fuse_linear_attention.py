"""fuse-linear-attention: causal linear attention that pairs all tokens becomes one node that does not.

    (scale q k' * decays * causal) v        decays_ij = exp(a_{j+1} + ... + a_i)

written as products, a causal mask (tril, or filled in) and no softmax, is the recurrence S_t = exp(a_t) S_{t-1} + k_t' v_t with
o_t = scale q_t S_t (Katharopoulos et al. 2020; Yang et al. 2023 for decays): `dyncc::gated_linear_attention` computes it in time and
memory that grow with the tokens alone. Decays are read where they are exp of a difference of one running sum. Loops over tokens that a
capture wrote out are read too (passes/unrolled_recurrence.py), and the gated delta rule among them. Which of the equal forms runs is one
rule: token after token up to 4 tokens, chunks beyond. Exact up to rounding, with one exception: decays of hidden pairs that overflow
before they are hidden give NaN when written out, and nothing when fused. Weights somebody reads stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx

from dyncc.analysis.facts import Facts
from dyncc.analysis.unrolled import NotUnrolled, joins, read_steps
from dyncc.ir import argument, emit, is_mutating, is_tensor, op_name, operands, same_size, shape, val
from dyncc.kernels.gated_linear_attention import GATED_LINEAR_ATTENTION
from dyncc.passes.unrolled_recurrence import fuse_unrolled
from dyncc.restrict import Refusal
from dyncc.rewrite import Context, Pass, PassResult

PRODUCTS = {"matmul", "bmm"}
PASSING = {"clone", "contiguous", "alias", "detach", "expand", "_unsafe_view", "view", "reshape"}
LAID_OUT = {"unsqueeze", "expand", "to", "_to_copy", "alias", "view", "reshape", "contiguous", "clone", "lift_fresh_copy"}
FILLED = {"masked_fill", "where"}
STEPS = 20


class _NotRead(Exception):
    """Why a product is no linear attention that is understood."""


@dataclass(frozen=True)
class FuseLinearAttention(Pass):
    """Make one node of every causal linear attention that pairs all tokens."""

    name: ClassVar[str] = "fuse-linear-attention"
    summary: ClassVar[str] = "causal linear attention, with decays or without, in chunks instead of a matrix of tokens x tokens"
    exact: ClassVar[bool] = True

    def run(self, program: Any, facts: Facts, context: Context) -> PassResult:
        """Rewrite every linear attention that can be read; refuse when there is none."""
        found = [n for n in program.graph.nodes if n.op == "call_function" and op_name(n) in PRODUCTS and _pairs(n)]
        loops = joins(program.graph)
        done, misses = 0, []
        for out, fuse in [*((n, _fuse) for n in found), *((n, _fuse_loop) for n in loops)]:
            try:
                fuse(out)
                done += 1
            except (_NotRead, NotUnrolled) as why:
                misses.append(f"{out.name}: {why}")
        if not done:
            raise Refusal(misses[0] if misses else "no product of queries and keys meets values without a softmax, and no loop over tokens")
        return PassResult(done, len(found) + len(loops), misses=tuple(misses))


def _fuse_loop(joined: fx.Node) -> None:
    fuse_unrolled(read_steps(joined))


def _pairs(out: fx.Node) -> bool:
    """Whether the left operand of a product is [..., T, T] and comes from another product, with no softmax between."""
    node = operands(out)[0]
    for _ in range(STEPS):
        sizes = shape(node)
        if node.op != "call_function" or len(sizes) not in (3, 4) or not same_size(sizes[-1], sizes[-2]) or "softmax" in op_name(node):
            return False
        if op_name(node) in PRODUCTS:
            return True
        wide = _towards(node)
        if wide is None:
            return False
        node = wide
    return False


def _towards(node: fx.Node) -> fx.Node | None:
    """The operand that holds the weights: the one as large as the node that comes from a product."""
    alike = [n for n in operands(node) if is_tensor(n) and _same(shape(n), shape(node)) and val(n).is_floating_point()]
    return next((n for n in alike if _from_product(n)), None)


def _from_product(node: fx.Node, depth: int = 0) -> bool:
    if node.op != "call_function" or depth > STEPS:
        return False
    return op_name(node) in PRODUCTS or any(_from_product(n, depth + 1) for n in operands(node) if _same(shape(n), shape(node)))


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


@dataclass
class _Read:
    """What stands between the two products of `tokens`: a number, whether later tokens are hidden, and log decays [..., T]."""

    tokens: Any
    scale: float = 1.0
    causal: bool = False
    log_decay: fx.Node | None = None


def _fuse(out: fx.Node) -> None:
    weights, v = operands(out)
    found, node = _Read(shape(out)[-2]), weights
    while op_name(node) not in PRODUCTS:
        _alone(node)
        inner = _towards(node)
        assert inner is not None
        _step(found, node, inner)
        node = inner
    _alone(node)
    q, kt = operands(node)
    if not found.causal:
        raise _NotRead("its weights hide no later tokens")
    if not (_same(shape(q)[:-1], shape(out)[:-1]) and _same(shape(v)[:-1], shape(q)[:-1]) and _same(shape(kt)[:-2], shape(q)[:-2])):
        raise _NotRead("queries, keys and values are not one batch of heads with one number of tokens")
    if len({val(n).dtype for n in (q, kt, v, out)}) > 1:
        raise _NotRead("queries, keys and values have different types")
    parts = [q, kt, v, *([] if found.log_decay is None else [found.log_decay])]
    order = {n: i for i, n in enumerate(out.graph.nodes)}
    if any(is_mutating(n) and min(order[p] for p in parts) < i < order[out] for n, i in order.items()):
        raise _NotRead("something is written in place between its products")
    rank, scale = len(shape(q)), found.scale

    def attend(q: Tensor, kt: Tensor, v: Tensor, *decay: Tensor) -> Tensor:
        k, logs = kt.transpose(-1, -2), decay[0].unsqueeze(-1) if decay else None
        if rank == 3:
            q, k, v, logs = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), None if logs is None else logs.unsqueeze(-3)
        made: Tensor = GATED_LINEAR_ATTENTION(q, k, v, logs, None, scale)[0]
        return made.squeeze(1) if rank == 3 else made

    new = emit(out, attend, *parts)
    new.meta = {**out.meta, "val": new.meta["val"]}
    out.replace_all_uses_with(new)
    out.graph.erase_node(out)


def _alone(node: fx.Node) -> None:
    if len(node.users) != 1:
        raise _NotRead("its weights are read elsewhere too")


def _step(found: _Read, node: fx.Node, inner: fx.Node) -> None:
    """What one node between the products says."""
    name = op_name(node)
    if name in PASSING or (name in ("to", "_to_copy") and val(node).dtype == val(inner).dtype):
        return
    if name == "tril":
        if argument(node, "diagonal", 0) != 0:
            raise _NotRead(f"tril keeps the diagonals up to {argument(node, 'diagonal')}, not up to a token's own")
        found.causal = True
    elif name in FILLED:
        if _fill(node) != 0.0 or not _hides(node, inner):
            raise _NotRead(f"{name} fills in something else than 0 for later tokens")
        found.causal = True
    elif name in ("mul", "div"):
        other = next((a for a in node.args if a is not inner), inner)
        if isinstance(other, (int, float)):
            if node.args[0] is not inner and name == "div":
                raise _NotRead("a number is divided by its weights")
            found.scale *= other if name == "mul" else 1 / other
        elif name == "div" or not isinstance(other, fx.Node):
            raise _NotRead("its weights are divided by a tensor")
        else:
            _factor(found, other)
    else:
        raise _NotRead(f"{name} stands between its products")


def _factor(found: _Read, node: fx.Node) -> None:
    """What multiplies the weights: a causal mask of ones, decays, or a product of such."""
    name, inner = op_name(node), operands(node)[:1]
    known = _all_pairs(found, node)
    if known and _causal(node) is True:
        found.causal = True
    elif known and name in LAID_OUT and inner and _in_front(node, inner[0]):
        _factor(found, inner[0])
    elif known and name == "mul" and len(operands(node)) == 2:
        for part in operands(node):
            _factor(found, part)
    elif known and name == "tril" and argument(node, "diagonal", 0) == 0:
        found.causal = True
        _factor(found, inner[0])
    elif known and name in FILLED and _fill(node) == 0.0 and _hides(node, kept := _kept(node)):
        found.causal = True
        _factor(found, kept)
    elif known and name == "exp" and found.log_decay is None:
        _exponent(found, inner[0])
    else:
        told = name if node.op == "call_function" else "an input"
        raise _NotRead(f"{told} multiplies its weights, no decay or causal mask that is known")


def _all_pairs(found: _Read, node: fx.Node) -> bool:
    """Whether a node is [..., T, T]: one that is broadcast means something else."""
    return len(shape(node)) > 1 and all(same_size(size, found.tokens) for size in shape(node)[-2:])


def _in_front(node: fx.Node, inner: fx.Node) -> bool:
    """Whether a node only adds dimensions in front of what it looks at, as broadcasting does."""
    if op_name(node) == "unsqueeze":
        return argument(node, "dim") in (0, -len(shape(node)))
    return op_name(node) == "expand" or _same(shape(inner), shape(node))


def _exponent(found: _Read, node: fx.Node) -> None:
    """Log decays of all pairs: what row i has summed up less what row j has."""
    name = op_name(node)
    if name == "tril" and argument(node, "diagonal", 0) == 0:
        _exponent(found, operands(node)[0])
        return
    if name in FILLED and _fill(node) == float("-inf") and _hides(node, kept := _kept(node)):
        found.causal = True
        _exponent(found, kept)
        return
    if name != "sub" or len(operands(node)) != 2 or argument(node, "alpha", 1) != 1:
        raise _NotRead(f"its decays are exp of {name}, not of a difference of sums")
    late, early = operands(node)
    rows, columns = _summed(late, -1), _summed(early, -2)
    if rows is None or rows is not columns or not same_size(shape(rows)[-1], found.tokens):
        raise _NotRead("its decays are no differences of one running sum")
    found.log_decay = operands(rows)[0]


def _summed(node: fx.Node, dim: int) -> fx.Node | None:
    """The running sum [..., T] that a node [..., T, T] has along all but `dim`."""
    rank = len(shape(node))
    if op_name(node) in ("transpose", "mT") and dim == -2:
        swapped = op_name(node) == "mT" or {d % rank for d in node.args[1:3]} == {rank - 1, rank - 2}  # type: ignore[operator]
        return _summed(operands(node)[0], -1) if swapped else None
    if op_name(node) != "unsqueeze" or argument(node, "dim") % rank != rank + dim:
        return None
    inner = operands(node)[0]
    summed = op_name(inner) == "cumsum" and argument(inner, "dim") % len(shape(inner)) == len(shape(inner)) - 1
    return inner if summed and val(inner).dtype == val(operands(inner)[0]).dtype else None


def _fill(node: fx.Node) -> Any:
    """The number that a masked_fill or where puts in; None for anything else."""
    value = argument(node, "value") if op_name(node) == "masked_fill" else node.args[2] if len(node.args) > 2 else None
    if isinstance(value, fx.Node) and op_name(value) in ("scalar_tensor", "full", "zeros", "zeros_like"):
        value = 0.0 if "zeros" in op_name(value) else value.args[-1]
    return float(value) if isinstance(value, (int, float)) else None


def _kept(node: fx.Node) -> fx.Node:
    kept = node.args[0] if op_name(node) == "masked_fill" else node.args[1]
    if not isinstance(kept, fx.Node):
        raise _NotRead("a mask fills in numbers on both sides")
    return kept


def _hides(node: fx.Node, kept: fx.Node) -> bool:
    """Whether a masked_fill or where keeps `kept` where a token reads itself or an earlier one, and nowhere else."""
    mask = node.args[1] if op_name(node) == "masked_fill" else node.args[0]
    if not isinstance(mask, fx.Node) or not _same(shape(mask)[-2:], shape(node)[-2:]):
        return False
    return _kept(node) is kept and _causal(mask) is (op_name(node) == "where")


def _causal(node: fx.Node, depth: int = 0) -> bool | None:
    """True for what is 1 at tokens up to a row's own and 0 behind, False for the opposite, None for anything else."""
    name, inner = op_name(node), operands(node)
    if node.op != "call_function" or depth > STEPS:
        return None
    if name in ("tril", "triu") and _ones(inner[0]):
        sizes, diagonal = shape(node), argument(node, "diagonal", 0)
        return (name == "tril" if diagonal == (name == "triu") else None) if same_size(sizes[-1], sizes[-2]) else None
    if name in LAID_OUT and inner and _same(shape(inner[0])[-2:], shape(node)[-2:]):
        return _causal(inner[0], depth + 1)
    if name in ("bitwise_not", "logical_not") or (name == "eq" and node.args[1] == 0):
        told = _causal(inner[0], depth + 1)
        return None if told is None else not told
    if name in ("ge", "le", "gt", "lt") and len(inner) == 2:
        rows, columns = _numbers(inner[0]), _numbers(inner[1])
        if {rows, columns} == {-1, -2}:
            return {"ge": True, "lt": False}.get(name) if rows == -1 else {"le": True, "gt": False}.get(name)
    return None


def _ones(node: fx.Node) -> bool:
    if op_name(node) in ("to", "_to_copy"):
        return _ones(operands(node)[0])
    return op_name(node) in ("ones", "ones_like") or (op_name(node) == "full" and node.args[1] in (1, True))


def _numbers(node: fx.Node) -> int | None:
    """-1 for row numbers [T, 1] from 0 on, -2 for column numbers [1, T] or [T]."""
    if op_name(node) == "unsqueeze" and _numbers(operands(node)[0]) == -2 and len(shape(node)) == 2:
        return -1 if argument(node, "dim") % 2 == 1 else -2
    plain = op_name(node) == "arange" and node.target._overloadname == "default"  # type: ignore[union-attr]
    return -2 if plain and len(shape(node)) == 1 else None
