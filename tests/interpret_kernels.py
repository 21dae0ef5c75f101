"""Compares generated kernels with their truths in Triton's interpreter, which has to be asked for before Triton is imported.

`TRITON_INTERPRET=1 python tests/interpret_kernels.py KIND...` prints how many were compared. The interpreter multiplies bfloat16 by its
bits: that type is left to the compilers.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch

from dyncc.kernels.generator.epilogues import EPILOGUES
from dyncc.kernels.generator.kinds import (
    Attend,
    AttendChosen,
    ExitConfidence,
    GatherRows,
    JoinParts,
    LinearChunk,
    LinearStep,
    MergeRows,
    Rows,
    ScatterRows,
    ScorePages,
    SelectBest,
)
from dyncc.kernels.generator.samples import beside_truth, closeness
from dyncc.kernels.generator.spec import KernelSpec
from dyncc.kernels.generator.standard import GATED_NORM

CLOSE = {"float32": 2e-5, "float16": 4e-3}
SMALL: dict[str, Any] = {"rows": 16, "keys": 16, "dtype": "float32"}
F32: dict[str, Any] = {"dtype": "float32"}
F16: dict[str, Any] = {"dtype": "float16"}
ATTEND_FORMS: tuple[dict[str, Any], ...] = (
    {}, {"causal": True}, {"cap": 2.0}, {"mask": "bool"}, {"mask": "added", "cap": 3.0}, {"sinks": True, "causal": True, "window": 3},
    {"causal": True, "window": 5, "cap": 2.0, "sinks": True, "epilogues": ("gate-sigmoid", "residual")},
    {"mask": "bool", "epilogues": ("norm", "gate-silu")}, {"causal": True, "epilogues": ("gate-sigmoid",)},
    {"epilogues": ("gate-silu", "residual")}, {"epilogues": ("norm",)}, {"epilogues": ("norm", "gate-sigmoid", "residual"), "mask": "bool"},
)  # fmt: skip
Case = tuple[KernelSpec, dict[str, Any]]
CASES: dict[str, list[Case]] = {
    "attend": [
        *((Attend(24, **SMALL, **form), {}) for form in ATTEND_FORMS),
        *((Attend(8, wide=20, **SMALL), {"rows": rows, "keys": keys}) for rows, keys in ((1, 1), (1, 33), (17, 3))),
        (Attend(16, rows=16, keys=16, causal=True, epilogues=("gate-sigmoid",), **F16), {}),
        (Attend(16, causal=True, cap=50.0, **SMALL), {"rows": 33, "stretch": 1e3}),
        (Attend(16, causal=True, **SMALL), {"rows": 33, "stretch": 1e2}),
        (Attend(40, causal=True, **F32), {"rows": 37}),
        (Attend(24, packed=True, **SMALL), {}),
        (Attend(24, causal=True, epilogues=("gate-sigmoid", "quantise"), **SMALL), {"rows": 37}),
        (Attend(24, epilogues=("quantise", "page-index"), **SMALL), {"rows": 37}),
        *((Attend(24, mask="blocks", **SMALL), {"rows": rows, "keys": keys}) for rows, keys in ((1, 1), (33, 70), (47, 17))),
        (Attend(16, mask="blocks", causal=True, window=9, cap=3.0, sinks=True, epilogues=("norm", "gate-silu"), **SMALL), {"rows": 70}),
        (Attend(16, mask="blocks", rows=32, keys=16, epilogues=("residual",), **F16), {"rows": 50, "keys": 65}),
        (Attend(16, wide=24, packed=True, causal=True, window=5, sinks=True, epilogues=("norm", "gate-silu", "residual"), **SMALL), {}),
    ],
    "attend_chosen": [
        (AttendChosen(24, page=4, split=3, keys=16, **F32), {}),
        (AttendChosen(24, wide=40, page=4, split=3, masked=True, keys=16, **F32), {}),
        (AttendChosen(16, page=1, split=7, masked=True, keys=16, **F32), {"chosen": 19, "choices": 1}),
        (AttendChosen(16, page=5, split=2, keys=16, **F32), {"choices": 4, "batch": 1, "keys": 33}),
        (AttendChosen(16, page=16, keys=16, **F16), {"groups": 1, "heads": 18}),
        (AttendChosen(16, page=3, split=1, **F32), {"keys": 1, "chosen": 1}),
        (AttendChosen(16, page=4, **F32), {"stretch": 1e3}),
    ],
    "join_parts": [
        (JoinParts(24, **F32), {"rows": 3}),
        (JoinParts(20, epilogues=("gate-sigmoid",), **F32), {"rows": 17, "chosen": 1}),
        (JoinParts(16, epilogues=("gate-silu", "residual"), **F16), {"rows": 1}),
        (JoinParts(16, **F32), {"rows": 2, "stretch": 1e3}),
        (JoinParts(20, epilogues=("norm", "page-index"), **F32), {"rows": 17}),
    ],
    "linear_chunk": [
        *((LinearChunk(24, wide=20, decay=decay, rows=16, started=s, **F32), {}) for decay, s in
          itertools.product(("none", "head", "channel"), (False, True))),
        (LinearChunk(16, rows=32, epilogues=GATED_NORM, **F32), {"rows": 65}),
        (LinearChunk(16, decay="head", rows=16, epilogues=("norm", "gate-sigmoid", "residual"), **F32), {"rows": 1}),
        (LinearChunk(16, rows=16, **F32), {"rows": 47, "stretch": 100.0}),
        (LinearChunk(16, decay="head", rows=16, **F32), {"rows": 47, "stretch": 100.0}),
        (LinearChunk(16, rows=16, **F16), {"rows": 33}),
        *((LinearChunk(24, wide=20, decay=decay, rule="delta", rows=16, started=s, **F32), {}) for decay, s in
          itertools.product(("none", "head"), (False, True))),
        (LinearChunk(16, decay="head", rule="delta", rows=32, started=True, epilogues=GATED_NORM, **F32), {"rows": 65}),
        (LinearChunk(16, decay="head", rule="delta", rows=16, epilogues=("gate-sigmoid", "residual"), **F32), {"rows": 1}),
        (LinearChunk(16, decay="head", rule="delta", rows=16, **F32), {"rows": 47, "stretch": 100.0}),
        (LinearChunk(20, wide=37, columns=16, decay="none", rule="delta", **F16), {"rows": 33}),
        (LinearChunk(20, wide=37, columns=16, started=True, epilogues=("gate-silu", "residual"), **F32), {}),
    ],
    "linear_step": [
        *((LinearStep(24, wide=20, decay=decay, rule=rule, **F32), {"rows": 5}) for decay, rule in
          itertools.product(("none", "head", "channel"), ("add", "delta"))),
        (LinearStep(16, started=False, epilogues=GATED_NORM, **F32), {"rows": 3}),
        (LinearStep(16, rule="delta", epilogues=("norm", "gate-silu", "residual"), **F16), {"rows": 1}),
    ],
    "rows": [
        (Rows(100, epilogues=("norm",), **F32), {}),
        (Rows(100, epilogues=GATED_NORM, **F16), {"heads": 1}),
        (Rows(1030, epilogues=("residual", "norm"), **F32), {"rows": 5, "stretch": 1e4}),
        (Rows(8, epilogues=("gate-sigmoid", "residual"), **F32), {"rows": 1}),
        (Rows(100, epilogues=("norm", "quantise", "page-index"), **F32), {"rows": 17}),
        (Rows(20, epilogues=("quantise",), **F16), {"stretch": 1e3}),
    ],
    "gather_rows": [(GatherRows(100, **F32), {}), (GatherRows(20, epilogues=("norm",), **F16), {"rows": 1, "keys": 1}),
                    (GatherRows(20, epilogues=("page-index",), **F16), {})],
    "scatter_rows": [
        (ScatterRows(100, **F32), {}),
        (ScatterRows(20, epilogues=("gate-sigmoid", "residual"), **F16), {"rows": 3}),
        (ScatterRows(1030, epilogues=("residual",), **F32), {"rows": 37}),
        (ScatterRows(20, epilogues=("quantise",), **F32), {"rows": 3}),
    ],
    "merge_rows": [
        (MergeRows(100, **F32), {}),
        (MergeRows(20, epilogues=("residual",), **F16), {"rows": 5}),
        (MergeRows(20, **F32), {"rows": 1}),
        (MergeRows(20, epilogues=("quantise", "page-index"), **F32), {"rows": 5}),
    ],
    "score_pages": [(ScorePages(24, **F32), {}), (ScorePages(64, **F16), {"keys": 70}), (ScorePages(20, **F32), {"keys": 1})],
    "select_best": [
        (SelectBest(keys=16, **F32), {"keys": 70, "chosen": 9}),
        (SelectBest(masked=True, keys=32, **F32), {"keys": 70, "chosen": 60}),
        (SelectBest(keys=16, **F16), {"keys": 5, "chosen": 9}),
        (SelectBest(keys=16, **F32), {"keys": 33, "chosen": 1, "stretch": 1e37}),
        (SelectBest(masked=True, keys=16, **F32), {"keys": 33, "chosen": 16, "stretch": 0.0}),
    ],
    "exit_confidence": [
        (ExitConfidence(24, split=20, words=16, **F32), {"keys": 70}),
        (ExitConfidence(100, **F32), {"rows": 3, "keys": 130}),
        (ExitConfidence(16, split=16, words=16, **F32), {"keys": 70, "stretch": 100.0}),
        (ExitConfidence(16, words=16, **F32), {"rows": 1, "keys": 1}),
        (ExitConfidence(64, words=32, **F16), {"keys": 50}),
    ],
}  # fmt: skip
"""Odd lengths, one row, one key, wide values, hidden rows, extreme values, each type, each epilogue."""


def compare(spec: KernelSpec, sizes: dict[str, Any]) -> None:
    close, stretch = CLOSE[spec.dtype], sizes.get("stretch", 1.0)
    least = close * (stretch if 1 < stretch < 1e6 else 1.0)
    for one, other in beside_truth(spec, **sizes):
        assert not one.isnan().any() and one.dtype == other.dtype, spec
        near = closeness(one, close) | ({"atol": least} if one.is_floating_point() else {})
        torch.testing.assert_close(one, other, **near, msg=lambda m: f"{spec.name} {sizes}: {m}")


def poison() -> None:
    """Fresh memory holds NaN, so that what is not written shows."""
    fresh = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *size: Any, **more: Any) -> torch.Tensor:
        made = fresh(self, *size, **more)
        return made.fill_(float("nan")) if made.is_floating_point() else made.fill_(-1)

    torch.Tensor.new_empty = poisoned  # type: ignore[method-assign]


def main(kinds: list[str]) -> None:
    poison()
    torch.manual_seed(0)
    count = 0
    for spec, sizes in (case for kind in kinds for case in CASES[kind]):
        compare(spec, sizes)
        count += 1
    assert {e for kind in CASES for spec, _ in CASES[kind] for e in spec.epilogues} == set(EPILOGUES)
    print("compared", count)


if __name__ == "__main__":
    main(sys.argv[1:])
