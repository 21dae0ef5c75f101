"""What the ops of linear attention run on a GPU, in Triton's interpreter, beside the recurrence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "interpret_linear_attention.py"


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has wheels for Linux only")
@pytest.mark.parametrize(("part", "count"), [("some", 3), pytest.param("ops", 85, marks=pytest.mark.full)])
def test_ops_on_a_gpu_compute_the_recurrence_in_the_interpreter(part: str, count: int) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT), part], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == f"compared {count}"
