"""Attention to the best pages of a cache, on a CPU: where scores, choice and attention follow each other alone, one kernel for the three.

A step has them in every layer, and each call wakes the threads once; together they take a third of the calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from dyncc.ir import Program, argument, emit, is_mutating, operands, take_place
from dyncc.kernels.one_row import ATTEND_BEST_PAGES, ATTEND_ROW, SCORE_PAGES, SELECT_BEST


def sites(program: Program) -> list[fx.Node]:
    """Attentions whose pages are chosen for them alone."""
    return [n for n in program.graph.nodes if n.target is ATTEND_ROW and _scores(n) is not None]


def _scores(node: fx.Node) -> fx.Node | None:
    """The scores of pages behind an attention's choice, where nothing else reads either of them."""
    index = argument(node, "index")
    if not isinstance(index, fx.Node) or index.target is not SELECT_BEST or len(index.users) != 1:
        return None
    score = operands(index)[0]
    alone = score.target is SCORE_PAGES and len(score.users) == 1 and score.args[0] is node.args[0]
    seen, scale = (None, argument(index, "visible")), (None, argument(node, "scale"))
    plain = alone and argument(score, "skip") is None and argument(score, "shown") in seen and argument(score, "scale") in scale
    return score if plain and not any(is_mutating(n) for n in _between(score, node)) else None


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    while (first := first.next) is not last:
        yield first


def replace(node: fx.Node) -> None:
    """Put the kernel in the place of an attention, of its choice and of the scores."""
    index = argument(node, "index")
    score = operands(index)[0]
    q, k, v = operands(node)[:3]
    low, high = operands(score)[1:3]
    mask, shown, share = argument(node, "mask"), argument(index, "visible"), argument(score, "share")
    count, sinks, recents = (argument(index, name) for name in ("budget", "sinks", "recents"))
    page, scale = argument(node, "page"), argument(node, "scale")

    def attend(*tensors: Any) -> Any:
        return ATTEND_BEST_PAGES(*tensors, share, count, sinks, recents, page, scale)

    new = emit(node, attend, q, k, v, low, high, mask, shown)
    take_place(node, new)
    for old in (index, score):
        old.graph.erase_node(old)
