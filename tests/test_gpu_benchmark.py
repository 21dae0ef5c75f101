"""`benchmarks/gpu.py` on a machine without a GPU: what it says, and that everything it times computes the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dyncc.kernels.generator.kinds import JoinParts, Rows
from dyncc.kernels.generator.samples import sample, tensor_pairs


@pytest.fixture
def gpu(benchmarks: None) -> Any:
    import gpu

    return gpu


def test_without_a_gpu_it_says_so(gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err == gpu.NO_GPU + "\n"


def test_a_kernel_that_differs_is_told_before_anything_is_timed(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Rows(64, epilogues=("norm",))
    monkeypatch.setattr(type(spec), "run", lambda self, *given, **more: self.truth(*given, **more))
    assert gpu.differences("cpu", (spec,)) == []
    monkeypatch.setattr(type(spec), "run", lambda self, *given, **more: self.truth(*given, **more) + 1)
    assert len(gpu.differences("cpu", (spec,))) == len(gpu.SIZES)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_rivals_compute_what_the_kernels_compute(gpu: Any) -> None:
    """On the CPU, not compiled; the library that has kernels alone is left to a GPU."""
    torch.manual_seed(0)
    compared = set()
    small = {"rows": 130, "keys": 70, "chosen": 3, "heads": 4, "groups": 2}
    for spec, _ in gpu.TIMED:
        narrow = {"width": 16} if spec.entry == "linear_chunk" else {}  # in float32 wide chunks are refused
        exact = replace(spec, dtype="float32", **narrow)
        given, more = sample(exact, **(small if spec.entry != "rows" else {**small, "rows": 3}))
        want = exact.truth(*given, **more)
        if spec.entry == "attend_chosen":
            want = JoinParts(spec.width, dtype="float32").truth(*want).view(given[0].shape)
        for name, (rival, _) in gpu.rivals(exact).items():
            if name == "flash-linear-attention":
                continue
            got = rival(exact, *given, **more)
            for one, other in tensor_pairs(got, want):
                torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4, msg=lambda m, n=name, s=spec: f"{n} of {s.name}: {m}")
            compared.add((spec.entry, name))
    assert {name for kind, name in compared if kind == "attend"} == {"compiled eager", "FlexAttention", "SDPA"}
    assert {kind for kind, _ in compared} == {spec.entry for spec, _ in gpu.TIMED}
