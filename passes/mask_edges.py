"""What a mask hides, as a window of keys or a prefix that all rows see: the two that `dyncc::attend` can count without reading a mask."""

from __future__ import annotations

from typing import Any

from torch import fx

from dyncc.analysis.mask_values import Abstract, Causal
from dyncc.analysis.spelled import HIDING
from dyncc.ir import same_size, shape, val


def edge_of(value: Abstract, mask: fx.Node, rows: Any, keys: Any) -> tuple[int, int] | None:
    """(window, prefix) of a mask of these `rows` and `keys` that hides later keys, keys behind a window that is not 0, and no key of the
    prefix; None of others. `value` is what the mask evaluates to; a number of keys that differs from that of rows has no edge."""
    sizes = shape(mask)
    if not (same_size(sizes[-2], rows) and same_size(sizes[-1], keys) and same_size(rows, keys)):
        return None
    if not isinstance(value, Causal) or (value.window and value.prefix):
        return None
    additive = val(mask).is_floating_point()
    seen = [x - value.upto > HIDING if additive else bool(x) for x in value.zones]
    same = not additive or all(not told or x == value.upto for told, x in zip(seen, value.zones, strict=True))
    inside = (True, True, True) if value.prefix else (True, False, not value.window)
    return (value.window, value.prefix) if same and seen == [True, False, not value.window, *inside] else None
