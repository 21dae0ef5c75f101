"""Every example runs, on the reference engine, and does what it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RUN_HERE = {"encoder_pruning", "generate_smollm2", "vit_random"}


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == RUN_HERE


def test_encoder_pruning() -> None:
    found = load_example("encoder_pruning").main(["--engine", "reference", "--tokens", "128"])
    assert found["flops_left"] < 0.9 and 0.5 < found["smallest_cosine"] <= found["mean_cosine"] < 1.0


def test_generate_smollm2() -> None:
    torch._dynamo.reset()
    found = load_example("generate_smollm2").main(["--engine", "reference", "--tokens", "8"])
    assert found["same"] and found["graphs"] in (2, 3)
    for report in found["reports"]:
        assert report.fallback is None and report.found_attention == report.expected_attention == 30


def test_vit_random() -> None:
    found = load_example("vit_random").main(["--engine", "reference"])
    assert found["flops"] < found["dense_flops"] and any(rewrite.applied for rewrite in found["report"].rewrites)
    assert found["pruned"].shape == found["dense"].shape and torch.isfinite(found["pruned"]).all()
