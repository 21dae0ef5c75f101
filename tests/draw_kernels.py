"""Draws specs, most of which nobody wrote down, and compares each with its truth in Triton's interpreter.

`TRITON_INTERPRET=1 python tests/draw_kernels.py COUNT` prints them, one a line. The interpreter multiplies bfloat16 by its bits: such a
spec is compared in float32.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from interpret_kernels import compare

from dyncc.kernels.generator.epilogues import EPILOGUES
from dyncc.kernels.generator.kinds import Attend, AttendChosen, JoinParts, LinearChunk, LinearStep, Rows
from dyncc.kernels.generator.kinds.linear_step import DECAYS, RULES
from dyncc.kernels.generator.spec import DTYPES, KernelSpec


@st.composite
def specs(draw: Any) -> KernelSpec:
    """Of six kinds, with any width, mask, pair of epilogues and type."""
    every = [pair for n in (0, 1, 2) for pair in itertools.permutations(EPILOGUES, n)]
    pairs = st.sampled_from([pair for pair in every if sum("gate" in e for e in pair) < 2])
    more: dict[str, Any] = {"dtype": draw(st.sampled_from(list(DTYPES))), "epilogues": draw(pairs)}
    width, wide = draw(st.integers(1, 80)), draw(st.sampled_from([0, 0, 24, 72]))
    kind = draw(st.sampled_from([Attend, Attend, AttendChosen, JoinParts, LinearChunk, LinearStep, Rows]))
    if kind is Attend:
        causal = draw(st.booleans())
        more |= {"causal": causal, "window": draw(st.sampled_from([0, 9])) if causal else 0, "cap": draw(st.sampled_from([0.0, 3.0]))}
        more |= {"mask": draw(st.sampled_from(["none", "bool", "added"])), "sinks": draw(st.booleans())}
        return Attend(width, wide, **more)
    if kind is AttendChosen:
        chosen = {"page": draw(st.integers(1, 20)), "split": draw(st.integers(1, 9)), "masked": draw(st.booleans())}
        return AttendChosen(width, wide, dtype=more["dtype"], **chosen)
    if kind is LinearChunk:
        return LinearChunk(width, wide, draw(st.sampled_from(DECAYS)), draw(st.booleans()), **more)
    if kind is LinearStep:
        return LinearStep(width, wide, draw(st.sampled_from(DECAYS)), draw(st.sampled_from(RULES)), **more)
    if kind is Rows:
        return Rows(width * 7, **{**more, "epilogues": more["epilogues"] or ("norm",)})
    return JoinParts(width, **more)


def main(count: int) -> None:
    """A seed for each spec: one long run would mostly change a little of what it drew before."""
    torch.manual_seed(0)
    sizes = st.fixed_dictionaries({"rows": st.integers(1, 40), "keys": st.integers(1, 40), "batch": st.integers(1, 2)})
    done: set[KernelSpec] = set()

    def drawn(spec: KernelSpec, sizes: dict[str, int]) -> None:
        if spec not in done:
            compare(replace(spec, dtype="float32") if spec.dtype == "bfloat16" else spec, sizes)
            print(repr(spec))
        done.add(spec)

    for number in range(count):  # the first of each run is the least that there is, the second is drawn
        few = settings(max_examples=2, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        seed(number)(few(given(spec=specs(), sizes=sizes)(drawn)))()


if __name__ == "__main__":
    main(int(sys.argv[1]))
