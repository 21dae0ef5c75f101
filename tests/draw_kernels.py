"""Draws specs of every kind, most of which nobody wrote down, and compares each with its truth in Triton's interpreter.

`TRITON_INTERPRET=1 python tests/draw_kernels.py COUNT` prints them, one a line. The interpreter multiplies bfloat16 by its bits: such a
spec is compared in float32.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, reject, seed, settings
from hypothesis import strategies as st
from interpret_kernels import compare

from dyncc.errors import BadKernelSpec
from dyncc.kernels.generator.epilogues import EPILOGUES
from dyncc.kernels.generator.kinds import KINDS
from dyncc.kernels.generator.kinds.linear_step import DECAYS, RULES
from dyncc.kernels.generator.spec import DTYPES, KernelSpec

Draw = Callable[[Any], Any]


def _attend(draw: Draw) -> dict[str, Any]:
    causal, packed = draw(st.booleans()), draw(st.sampled_from([False, False, True]))
    more = {"causal": causal, "window": draw(st.sampled_from([0, 9])) if causal else 0, "cap": draw(st.sampled_from([0.0, 3.0]))}
    mask = draw(st.sampled_from(["none", "bool", "added", "blocks"])) if not packed else "none"
    return _widths(draw) | more | {"mask": mask, "sinks": draw(st.booleans()), "packed": packed}


def _widths(draw: Draw) -> dict[str, Any]:
    return {"width": draw(st.integers(1, 80)), "wide": draw(st.sampled_from([0, 0, 24, 72]))}


def _chosen(draw: Draw) -> dict[str, Any]:
    return _widths(draw) | {"page": draw(st.integers(1, 20)), "split": draw(st.integers(1, 9)), "masked": draw(st.booleans())}


def _chunk(draw: Draw) -> dict[str, Any]:
    """Keys of which every type and rule has a kernel, and values of which each can hold whole rows beside them."""
    rule, width = draw(st.sampled_from(RULES)), draw(st.integers(1, 64))
    decay = draw(st.sampled_from([x for x in DECAYS if rule == "add" or x != "channel"]))
    wide = draw(st.integers(1, 16)) if width > 32 else draw(st.integers(1, 32))
    return {"width": width, "wide": wide, "decay": decay, "rule": rule, "started": draw(st.booleans())}


def _step(draw: Draw) -> dict[str, Any]:
    return _widths(draw) | {"decay": draw(st.sampled_from(DECAYS)), "rule": draw(st.sampled_from(RULES))}


def _rows(draw: Draw) -> dict[str, Any]:
    return {"width": draw(st.integers(1, 500))}


def _best(draw: Draw) -> dict[str, Any]:
    return {"masked": draw(st.booleans()), "keys": draw(st.sampled_from([0, 16, 64]))}


def _confidence(draw: Draw) -> dict[str, Any]:
    return {"width": draw(st.integers(1, 200)), "split": draw(st.sampled_from([20, 64])), "words": draw(st.sampled_from([0, 16, 32]))}


FIELDS: dict[str, Callable[[Draw], dict[str, Any]]] = {
    "attend": _attend, "linear_chunk": _chunk, "select_best": _best, "attend_chosen": _chosen, "join_parts": _rows, "linear_step": _step,
    "rows": _rows, "gather_rows": _rows, "scatter_rows": _rows, "merge_rows": _rows, "score_pages": _rows, "exit_confidence": _confidence,
}  # fmt: skip
"""What is drawn of each kind's own fields."""


@st.composite
def specs(draw: Any, kind: str) -> KernelSpec:
    """Of a kind, with any type and pair of epilogues."""
    every = [pair for n in (0, 1, 2) for pair in itertools.permutations(EPILOGUES, n)]
    pairs = [pair for pair in every if sum("gate" in e for e in pair) < 2 and (pair or kind != "rows")]
    more = {"epilogues": draw(st.sampled_from(pairs))} if KINDS[kind].ends else {}
    fields = FIELDS[kind](draw)
    try:
        return KINDS[kind](**fields, dtype=draw(st.sampled_from(list(DTYPES))), **more)
    except BadKernelSpec as error:  # not every pair of epilogues can end every kernel
        if not any(words in str(error) for words in ("what is stored", "places of its own", "go to no pages")):
            raise
        reject()


def main(count: int) -> None:
    """A seed for each spec, of one kind after the other: one long run would mostly change a little of what it drew before."""
    torch.manual_seed(0)
    done: set[KernelSpec] = set()

    def drawn(spec: KernelSpec, sizes: dict[str, int]) -> None:
        if spec not in done:
            less = {"rows": min(sizes["rows"], sizes["keys"])} if spec.entry in ("gather_rows", "scatter_rows") else {}
            compare(replace(spec, dtype="float32") if spec.dtype == "bfloat16" else spec, sizes | less)
            print(repr(spec))
        done.add(spec)

    sizes = st.fixed_dictionaries({"rows": st.integers(1, 40), "keys": st.integers(1, 40), "batch": st.integers(1, 2)})
    for number, kind in zip(range(count), itertools.cycle(FIELDS), strict=False):  # the first of each run is the least that there is
        few = settings(max_examples=2, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        seed(number)(few(given(spec=specs(kind), sizes=sizes)(drawn)))()


if __name__ == "__main__":
    main(int(sys.argv[1]))
