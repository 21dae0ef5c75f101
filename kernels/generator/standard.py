"""The kernels that `dyncc kernels` shows: each kind as models have it, and epilogues where models have them."""

from __future__ import annotations

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
from dyncc.kernels.generator.spec import KernelSpec

GATED_NORM = ("norm", "gate-silu")
"""What gated linear attention ends with."""

STANDARD: tuple[KernelSpec, ...] = (
    Attend(64),
    Attend(64, causal=True),
    Attend(128, causal=True),
    Attend(128, causal=True, epilogues=("gate-sigmoid",)),
    Attend(128, causal=True, epilogues=("gate-silu", "residual")),
    Attend(64, causal=True, epilogues=("norm",)),
    Attend(128, causal=True, epilogues=("gate-sigmoid", "quantise")),
    Attend(128, causal=True, cap=50.0),
    Attend(128, causal=True, cap=50.0, window=4096),
    Attend(64, causal=True, sinks=True, window=128),
    Attend(64, mask="bool"),
    Attend(64, mask="added"),
    Attend(64, mask="blocks"),
    Attend(128, causal=True, mask="blocks", epilogues=("gate-sigmoid",)),
    Attend(64, causal=True, dtype="float32"),
    Attend(64, causal=True, packed=True),
    AttendChosen(128),
    AttendChosen(64, page=1, split=256, masked=True),
    JoinParts(128),
    JoinParts(128, epilogues=("gate-sigmoid",)),
    LinearChunk(128),
    LinearChunk(64, epilogues=GATED_NORM),
    LinearChunk(128, decay="head"),
    LinearChunk(64, decay="head", epilogues=GATED_NORM),
    LinearChunk(128, decay="head", rule="delta"),
    LinearChunk(64, decay="head", rule="delta", started=True, epilogues=("gate-silu",)),
    LinearStep(128, epilogues=GATED_NORM),
    LinearStep(128, decay="head", rule="delta", epilogues=GATED_NORM),
    Rows(4096, epilogues=GATED_NORM),
    Rows(2048, epilogues=("residual", "norm")),
    Rows(128, epilogues=("norm", "quantise", "page-index")),
    GatherRows(2048),
    GatherRows(128, epilogues=("quantise",)),
    GatherRows(128, epilogues=("page-index",)),
    ScatterRows(2048, epilogues=("gate-sigmoid", "residual")),
    MergeRows(768),
    MergeRows(128, epilogues=("page-index",)),
    ScorePages(128),
    SelectBest(masked=True, dtype="float32"),
    ExitConfidence(2048),
)
