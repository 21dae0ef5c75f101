"""ALiBi (Press et al. 2022) read from how it was built: slopes times how far a key stands behind its row, maybe in a sum with masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from dyncc.analysis.mask_values import Distance, evaluate
from dyncc.analysis.spelled import HIDING, Mask, number
from dyncc.ir import argument, op_name, same_size, shape, val

LAID_OUT = {"to", "_to_copy", "alias", "expand", "clone", "contiguous", "unsqueeze"}


@dataclass(frozen=True)
class Slopes:
    """`node` ([..., 1, 1], or a number) times `factor` times (key - row) is added to logits; `rest` are the other masks."""

    node: Any
    factor: float
    at: fx.Node
    rest: tuple[Mask, ...]


def read_slopes(masks: list[Mask]) -> Slopes | None:
    """The first mask that holds slopes, taken apart; None where no mask does."""
    for i, mask in enumerate(masks):
        found = _sloped(mask.node) if mask.kind == "added" else None
        if found is not None:
            slope, sign, parts = found
            told = [Mask(p.node, p.kind, mask.at, p.factor * mask.factor, p.value) for p in parts]
            return Slopes(slope, sign * mask.factor, mask.at, (*masks[:i], *told, *masks[i + 1 :]))
    return None


def _sloped(node: Any) -> tuple[Any, int, list[Mask]] | None:
    """(slopes, sign of the distance, masks beside them) of what is added to logits."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or not val(node).is_floating_point():
        return None
    name = op_name(node)
    if name == "mul":
        return _product(*node.args[:2])
    if name in LAID_OUT and (name != "unsqueeze" or argument(node, "dim") in (0, -len(shape(node)))):
        return _sloped(node.args[0])
    if name == "add" and argument(node, "alpha", 1) == 1:
        for inner, other in (node.args[:2], node.args[1::-1]):
            if isinstance(other, fx.Node) and (found := _sloped(inner)) is not None:
                return *found[:2], [*found[2], Mask(other, "added", node)]
    if name in ("masked_fill", "where") and len(node.args) == 3:
        inner, condition, value = node.args if name == "masked_fill" else (node.args[1], node.args[0], node.args[2])
        hidden = number(value)
        if hidden is not None and hidden <= HIDING and (found := _sloped(inner)) is not None:
            kind = "seen" if name == "where" else "hidden"
            return *found[:2], [*found[2], Mask(condition, kind, node, 1.0, hidden)]  # type: ignore[arg-type]
    return None


def _product(a: Any, b: Any) -> tuple[Any, int, list[Mask]] | None:
    for slope, distance in ((a, b), (b, a)):
        value = evaluate(distance, {})
        if not isinstance(value, Distance) or value.offset != 0:
            continue
        if number(slope) is not None:
            return number(slope), value.sign, []
        if isinstance(slope, fx.Node) and len(shape(slope)) > 1 and all(same_size(s, 1) for s in shape(slope)[-2:]):
            return slope, value.sign, []
    return None
