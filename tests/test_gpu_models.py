"""`benchmarks/gpu_models.py` on a machine without a GPU: what it says, and that its models are rewritten."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.fixture
def gpu_models(benchmarks: None) -> Any:
    import gpu_models

    return gpu_models


def test_without_a_gpu_models_are_not_timed(gpu_models: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_models.main([]) == 2
    assert capsys.readouterr().err == gpu_models.NO_GPU + "\n"


@pytest.mark.full
@pytest.mark.parametrize("name", ["soft cap", "prompt", "encoder", "vision"])
def test_models_for_a_gpu_are_rewritten(gpu_models: Any, name: str) -> None:
    with torch.no_grad():
        row = gpu_models.measured(name, 2, "cpu", 1)
    assert any("fuse-attention" in x or "prune-tokens" in x for x in row["applied"])
    assert row["error"] < 3e-2 or not gpu_models.CASES[name](2, "cpu").exact
