"""slice-last-token: compute only the rows whose results are used.

When a slice or select takes rows of the token axis (the last position of a language model, the class token of an encoder), everything
row-wise in front of it is computed for those rows only: head, final norm, the last layer's MLP, output projection and queries. Keys and
values stay whole. Equation: f(x)[rows] = f(x[rows]) for every row-wise f; for attention softmax(q k')v [rows] = softmax(q[rows] k')v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from dyncc.analysis.axes import Axes
from dyncc.analysis.facts import Facts
from dyncc.ir import ATTENTION, argument, aten, emit, is_attention, is_symbolic, is_tensor, op_name, outputs, refresh, same_size, shape, val
from dyncc.restrict import Plan, Refusal, plan_backward, shorten
from dyncc.rewrite import Context, Pass, PassResult

WORTH = {"linear", "addmm", "mm", "matmul", *ATTENTION}


@dataclass(frozen=True)
class SliceLastToken(Pass):
    """Run the last layer's row-wise work, the final norm and the head on the rows that are used."""

    name: ClassVar[str] = "slice-last-token"
    summary: ClassVar[str] = "compute only the rows that the output reads (last position, class token)"
    exact: ClassVar[bool] = True
    keeps_gradients: ClassVar[bool] = True

    def run(self, program: Any, facts: Facts, context: Context) -> PassResult:
        """Edit the graph; refuse when no output reads fixed rows, or when nothing costly stands in front of the read."""
        sites = [n for n in program.graph.nodes for s in facts.stacks if _reads_fixed_rows(n, facts.axes, s.axis)]
        if not sites:
            raise Refusal(_why_none(program, facts))
        done, misses = 0, []
        for node in sites:
            axes = Axes(program.graph)
            axis = axes.dims(node.all_input_nodes[0])[_dim(node)]
            plan = plan_backward(axes, axis, node, _dim(node))
            problem = _problem(plan)
            if problem:
                misses.append(f"{node.name}: {problem}")
                continue
            _slice_up(axes, plan, node)
            done += 1
        if not done:
            raise Refusal("; ".join(misses))
        return PassResult(done, len(sites), misses=tuple(misses))


def _problem(plan: Plan) -> str:
    """Why it is not worth it, or does not fit; ''."""
    if not any(op_name(n) in WORTH for n in plan.short):
        return "nothing row-wise stands in front of it"
    sloped = [n for n in plan.short if is_attention(n) and argument(n, "slopes") is not None]
    if any(argument(n, "attn_mask") is not None for n in sloped):
        return "an attention in front of it has slopes and a mask"
    causal = [n for n in plan.short if is_attention(n) and argument(n, "is_causal", False)] + sloped
    if not all(same_size(shape(n.args[0])[-2], shape(n.args[1])[-2]) for n in causal):  # type: ignore[arg-type]
        return "the causal flag of an attention in front of it counts other rows than keys"
    return ""


def _dim(node: fx.Node) -> int:
    return argument(node, "dim", 0) % len(shape(node.all_input_nodes[0]))


def _reads_fixed_rows(node: fx.Node, axes: Axes, axis: Any) -> bool:
    """A select or slice of few rows along the token axis, of a node that carries it once."""
    if op_name(node) not in ("select", "slice") or not is_tensor(node) or not val(node).is_floating_point():
        return False
    source = node.all_input_nodes[0]
    if axes.places(source, axis) != [_dim(node)] or len(axes.dims(source)[_dim(node)]) != len(axis):
        return False
    if op_name(node) == "select":
        return isinstance(argument(node, "index"), int)
    kept = shape(node)[_dim(node)]
    if not isinstance(kept, int) or same_size(kept, shape(source)[_dim(node)]):
        return False
    return argument(node, "step", 1) == 1 and isinstance(argument(node, "start", 0), int)


def _why_none(program: Any, facts: Facts) -> str:
    if not facts.stacks:
        if any(same_size(shape(r.q)[-2], 1) for r in facts.attention):
            return "every attention has one query row: there is no other row to leave out"
        return "no attention layers were found" if not facts.misses else facts.misses[0]
    whole = [n for n in outputs(program.graph) if isinstance(n, fx.Node) and any(facts.axes.places(n, s.axis) for s in facts.stacks)]
    if whole:
        return "the output uses every position (ask the model for its last position only, such as logits_to_keep=1)"
    return "no slice or select of fixed rows stands behind the layers"


def _slice_up(axes: Axes, plan: Plan, node: fx.Node) -> None:
    """Move the read in front of the plan: operands are sliced where they meet it, then the read itself has nothing left to do."""
    dim, source = _dim(node), node.all_input_nodes[0]
    rows = _rows(node)
    made: dict[tuple[fx.Node, tuple[int, ...]], fx.Node] = {}

    def take(before: fx.Node, operand: fx.Node, dims: set[int], user: fx.Node, slot: int) -> fx.Node:
        key = (operand, tuple(sorted(dims)))
        if key not in made:
            made[key] = emit(before, lambda x: _sliced(x, key[1], rows), operand)
        return made[key]

    attention = [n for n in plan.short if is_attention(n)]
    for sdpa in attention:
        _uncausal(sdpa, rows)
    full = shape(source)[dim]
    count = rows[1] - rows[0]
    shorten(axes, plan, None, None, count, None, take, None if is_symbolic(full) else full)
    node.args = (source, dim, 0) if op_name(node) == "select" else (source, dim, 0, count)
    node.kwargs = {}
    refresh(node)


def _rows(node: fx.Node) -> tuple[int, int]:
    """(start, stop) with negative numbers counted from the end; stop 0 means the end."""
    if op_name(node) == "select":
        index = argument(node, "index")
        return index, index + 1
    start = argument(node, "start", 0) or 0
    return start, start + shape(node)[_dim(node)]


def _sliced(x: Any, dims: tuple[int, ...], rows: tuple[int, int]) -> Any:
    for dim in dims:
        stop = rows[1] if rows[1] != 0 else 9223372036854775807
        x = aten.slice.Tensor(x, dim, rows[0], stop)
    return x


def _written_out(
    k: torch.Tensor, slopes: torch.Tensor | None, rows: tuple[int, int], causal: bool, window: int, prefix: int
) -> torch.Tensor:
    """The mask of these rows, of as many rows as keys [B, H, T, D]: keys up to each row, with a window only the last ones, with a prefix
    it too; and what slopes add."""
    keys = torch.arange(k.shape[-2], device=k.device)
    row = _sliced(keys.unsqueeze(1), (0,), rows)
    seen = keys <= row
    seen = seen & (keys > row - window) if window else seen | (keys < prefix) if prefix else seen
    if slopes is None:
        return seen
    sloped = (slopes * (keys - row)).to(k.dtype)
    return torch.where(seen, sloped, float("-inf")) if causal else sloped


def _uncausal(sdpa: fx.Node, rows: tuple[int, int]) -> None:
    """A causal SDPA of fewer rows: the last row sees every key, so the flag goes; other rows, and slopes, get their mask written out."""
    causal, slopes = bool(argument(sdpa, "is_causal", False)), argument(sdpa, "slopes")
    if not causal and slopes is None:
        return
    k = sdpa.args[1]
    args, kwargs = list(sdpa.args[:3]), {x: y for x, y in sdpa.kwargs.items() if x not in ("attn_mask", "dropout_p", "is_causal")}
    window, prefix, _ = kwargs.pop("window", 0), kwargs.pop("prefix", 0), kwargs.pop("slopes", None)
    if rows != (-1, 0) or window or slopes is not None:
        kwargs["attn_mask"] = emit(sdpa, lambda k, s: _written_out(k, s, rows, causal, window, prefix), k, slopes)
    sdpa.args, sdpa.kwargs = tuple(args), kwargs

