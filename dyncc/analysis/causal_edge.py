"""Masks of pairs of tokens that hide all later ones, and maybe a token's own: read as mask_values.py reads masks of attention."""

from __future__ import annotations

from typing import Any

from torch import fx

from dyncc.analysis.mask_values import Abstract, Causal, Const, evaluate
from dyncc.analysis.spelled import number
from dyncc.ir import ancestors, argument, op_name, operands, same_size, same_sizes, shape

FILLED = {"masked_fill", "where"}


def nearest_seen(mask: fx.Node, *, shows: bool = True) -> int | None:
    """How far behind its row the nearest key stands that a mask [..., T, T] of zeros and ones shows: 0 for a row's own, n where the n
    nearest are hidden; None for what is no such mask. With `shows` False the mask is 1 at what it hides."""
    value = evaluate(mask, _diagonals(mask))
    if not isinstance(value, Causal) or value.prefix or not same_size(*shape(mask)[-2:]):
        return None
    zones = (value.upto, value.later, value.behind if value.window else value.upto)
    if any(zone not in (0, 1) for zone in zones):
        return None
    upto, later, behind = (bool(zone) is shows for zone in zones)
    return None if later or not behind else 0 if upto else value.window


def _diagonals(mask: fx.Node) -> dict[fx.Node, Abstract]:
    """What tril and triu of constants are along other diagonals than a row's own."""
    known: dict[fx.Node, Abstract] = {}
    behind = ancestors([mask])
    for node in (n for n in mask.graph.nodes if n in behind and op_name(n) in ("tril", "triu")):
        told, diagonal = evaluate(operands(node)[0], known), argument(node, "diagonal", 0)
        back = -diagonal if op_name(node) == "tril" else 1 - diagonal
        if isinstance(told, Const) and back > 0:
            kept, gone = (0, told.value) if op_name(node) == "tril" else (told.value, 0)
            known[node] = Causal(kept, kept, back, gone)
    return known


def filled(node: fx.Node) -> tuple[fx.Node, float, int] | None:
    """(what is kept, the number that is put in behind it, how far the nearest key that stays stands behind its row) of a masked_fill or
    where over pairs of tokens; None where its mask is another."""
    if len(node.args) != 3:
        return None
    first, second, third = node.args
    kept, mask, value, shows = (first, second, third, False) if op_name(node) == "masked_fill" else (second, first, third, True)
    if op_name(node) == "where" and number(second) is not None:
        kept, value, shows = third, second, False
    put = number(value)
    if put is None or not isinstance(kept, fx.Node) or not isinstance(mask, fx.Node) or number(kept) is not None:
        return None
    nearest = nearest_seen(mask, shows=shows) if same_sizes(shape(mask)[-2:], shape(node)[-2:]) else None
    return None if nearest is None or not same_sizes(shape(kept)[-2:], shape(node)[-2:]) else (kept, put, nearest)


def lower(node: fx.Node) -> int | None:
    """How far the nearest key that a tril keeps stands behind its row; None where it keeps later ones."""
    diagonal: Any = argument(node, "diagonal", 0)
    return -diagonal if isinstance(diagonal, int) and diagonal <= 0 else None
