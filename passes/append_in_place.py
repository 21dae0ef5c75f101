"""append-in-place: a graph that owns its cache writes new keys and values behind its past instead of copying the past.

    cat(past, new)  ->  dyncc::append(past, new)

Where past [B, G, N, D] is an input, the result an output, and an attention reads it: transformers' DynamicCache in torch.compile, or a step
that takes and returns its keys. The result is the start of a buffer with room to grow; a mark says how far the buffer is written. A past
that ends there goes on in place, any other moves to a buffer of its own, so that two continuations of one past never see each other
(kernels/append_rows). Exact. Not on by default, as two promises of a concatenation fall: the keys that come back are not contiguous (code
that reshapes them with `view` must use `reshape`), and who writes into a past by himself writes into what was made from it. Programs that
are exported or saved concatenate, as do engines outside of PyTorch. dyncc.KVCache does the same where Python owns the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from dyncc.analysis.attention import kv_sources
from dyncc.analysis.facts import Facts
from dyncc.ir import argument, emit, is_mutating, is_tensor, op_name, operands, outputs, shape, val
from dyncc.kernels.append_rows import APPEND
from dyncc.restrict import Refusal, where
from dyncc.rewrite import VIEWS, Context, Pass, PassResult


@dataclass(frozen=True)
class AppendInPlace(Pass):
    """Append to the caches that a graph takes and returns."""

    name: ClassVar[str] = "append-in-place"
    summary: ClassVar[str] = "keys and values that a graph takes and returns grow in place instead of being copied in every step"
    exact: ClassVar[bool] = True

    def run(self, program: Any, facts: Facts, context: Context) -> PassResult:
        """Rewrite every concatenation of a past that is an input and an output."""
        returned = outputs(program.graph)
        sites = [n for n in program.graph.nodes if n in _held(facts, returned) and op_name(n) == "cat"]
        misses, moved = [], set()
        for node in sites:
            try:
                past, new = _parts(node)
            except Refusal as refusal:
                misses.append(str(refusal))
                continue
            moved |= {i for i, n in enumerate(returned) if n is node}
            made = emit(node, APPEND, past, new)
            made.meta = {**node.meta, "val": made.meta["val"]}
            node.replace_all_uses_with(made)
            program.graph.erase_node(node)
        if not moved:
            none = "no attention reads a concatenation of a past that the graph takes and returns; for other caches use dyncc.KVCache"
            raise Refusal(misses[0] if misses else none)
        return PassResult(len(sites) - len(misses), len(sites), misses=tuple(misses), strided_outputs=frozenset(moved))


def _held(facts: Facts, returned: list[Any]) -> set[fx.Node]:
    """Outputs that an attention reads as keys or values."""
    sources = set().union(*(kv_sources(r) for r in facts.attention))
    return {n for n in returned if is_tensor(n) and n in sources}


def _parts(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The past and the rows behind it.

    Raises:
        Refusal: it is no past that may be appended to in place.
    """
    slots = operands(node)
    if len(slots) != 2 or len(shape(node)) != 4 or argument(node, "dim", 0) not in (2, -2):
        raise Refusal(f"{where(node)} does not join two parts [batch, heads, rows, width] by their rows")
    past, new = slots
    if past.op != "placeholder" or past.meta.get("role") != "input":
        raise Refusal(f"{where(node)} does not begin with a past that the graph takes")
    if len(shape(past)) != 4 or len({(val(n).dtype, val(n).device) for n in (past, new)}) > 1:
        raise Refusal(f"{where(node)} joins keys of two kinds ({val(past).dtype} and {val(new).dtype}); give both one dtype and device")
    for view in _views(past) | _views(node):
        if any(is_mutating(user) and user.args[0] is view for user in view.users):
            raise Refusal(f"{where(node)} joins or gives rows into which the graph writes")
    return past, new


def _views(node: fx.Node) -> set[fx.Node]:
    """A node and what may be a view of it."""
    found, stack = {node}, [node]
    while stack:
        more = [u for u in stack.pop().users if op_name(u) in VIEWS and u not in found]
        found.update(more)
        stack += more
    return found
