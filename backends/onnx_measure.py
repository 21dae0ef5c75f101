"""Whether ONNX Runtime's fused ops help a model here: the fused file and the one of standard ops timed in turns on the example."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dyncc.backends.onnx_names import Names
from dyncc.backends.ort_session import open_session, run_session
from dyncc.timing import Timings, paired

SHORT = 2e-3
"""Seconds; a shorter call is not measured: fused ops never cost so little a call that it could be told."""
PAIRS = 5
SECONDS = 2.0
"""A look holds so many pairs of calls, fewer where they would take longer than this."""
SLOWER = 1.03
LOOKS = 3
"""Fused ops are undone where they are slower by more than this, so many times in a row."""


def call_seconds(path: Path, names: Names, example: Sequence[torch.Tensor]) -> float:
    """Seconds of a call of a file, warmed up."""
    return _timed([path], names, example, pairs=3).median(path.as_posix())


def slowdown(fused: Path, plain: Path, names: Names, example: Sequence[torch.Tensor], seconds: float) -> str:
    """Words about how much slower the fused file, a call of which takes `seconds`, is; '' where it is not, clearly."""
    pairs, words = max(1, min(PAIRS, round(SECONDS / (2 * seconds)))), ""
    for _ in range(LOOKS):
        timings = _timed([fused, plain], names, example, pairs)
        ours, standard = (timings.median(path.as_posix()) for path in (fused, plain))
        if ours <= standard * SLOWER:
            return ""
        words = f"they are slower here: {1000 * ours:.3g} ms a call, standard ops {1000 * standard:.3g} ms"
    return words


def _timed(paths: Sequence[Path], names: Names, example: Sequence[torch.Tensor], pairs: int) -> Timings:
    def call(session: Any) -> Any:
        return lambda: run_session(session, names, example)

    return paired({path.as_posix(): call(open_session(path)) for path in paths}, pairs=pairs, warmup=0)
