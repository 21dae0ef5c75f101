"""Choosing keys for `select-kv` by the rotary pairs that tell most about each head: the checks of their file.

FASA (Wang et al., ICLR 2026) scores a key by the channels of a few pairs alone, which `dyncc.calibrate_pairs` found for each head of the
very model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dyncc.analysis.attention import AttentionRegion
from dyncc.errors import BadOptionValue, BadPairFile
from dyncc.ir import Program, shape
from dyncc.pair_order import PairOrder, load_pairs


def read_pairs(file: str, count: int, regions: Sequence[AttentionRegion], program: Program, values: Sequence[Any] | None) -> PairOrder:
    """The order of pairs in a file, for the attentions of a program whose inputs have these `values` (None: they are not known).

    Raises:
        BadPairFile: there is none, it is damaged, or it is that of another model.
        BadOptionValue: a head has fewer pairs than `count`.
    """
    order = load_pairs(Path(file))
    layers, heads, width = order.sizes
    found = [(shape(r.q)[1], shape(r.q)[3]) for r in regions]
    if found != [(heads, width)] * layers:
        there = f"{len(found)} of " + " and ".join(f"{h} heads of width {w}" for h, w in dict.fromkeys(found))
        raise BadPairFile(path=file, problem=f"it is for {layers} attentions of {heads} heads of width {width}, the graph has {there}")
    if count > width // 2:
        raise BadOptionValue(option="pairs", value=str(count), problem=f"a head has {width // 2} pairs")
    given = zip(values or (), program.inputs, strict=values is not None)
    parameters = [v for v, told in given if told.kind == "parameter" and isinstance(v, Tensor)]
    if strangers := order.strangers(parameters):
        problem = f"it belongs to another model, or to other weights: {strangers} of {len(parameters)} parameters differ"
        raise BadPairFile(path=file, problem=problem)
    return order
