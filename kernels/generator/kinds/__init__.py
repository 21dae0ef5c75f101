"""The kinds of kernels: one file each, with what it is asked, its operands, its lines, its launch and its truth; `row_base` and `head_base`
have what several share.
"""

from __future__ import annotations

from dyncc.kernels.generator.kinds.attend import Attend
from dyncc.kernels.generator.kinds.attend_chosen import AttendChosen
from dyncc.kernels.generator.kinds.exit_confidence import ExitConfidence
from dyncc.kernels.generator.kinds.gather_rows import GatherRows
from dyncc.kernels.generator.kinds.join_parts import JoinParts
from dyncc.kernels.generator.kinds.linear_chunk import LinearChunk
from dyncc.kernels.generator.kinds.linear_step import LinearStep
from dyncc.kernels.generator.kinds.merge_rows import MergeRows
from dyncc.kernels.generator.kinds.rows import Rows
from dyncc.kernels.generator.kinds.scatter_rows import ScatterRows
from dyncc.kernels.generator.kinds.score_pages import ScorePages
from dyncc.kernels.generator.kinds.select_best import SelectBest
from dyncc.kernels.generator.spec import KernelSpec

_ALL: tuple[type[KernelSpec], ...] = (
    Attend, AttendChosen, JoinParts, LinearChunk, LinearStep, Rows, GatherRows, ScatterRows, MergeRows, ScorePages, SelectBest,
    ExitConfidence,
)  # fmt: skip

KINDS: dict[str, type[KernelSpec]] = {kind.entry: kind for kind in _ALL}
"""Every kind by the name that its kernels have."""

__all__ = [
    "KINDS", "Attend", "AttendChosen", "ExitConfidence", "GatherRows", "JoinParts", "LinearChunk", "LinearStep", "MergeRows", "Rows",
    "ScatterRows", "ScorePages", "SelectBest",
]  # fmt: skip
