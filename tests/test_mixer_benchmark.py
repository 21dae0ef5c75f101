"""`benchmarks/mixers.py`: it has a row for every layer and form that a pass applies to, and its rows run at tiny sizes."""

from __future__ import annotations

from typing import Any

import make_mixer_table
import pytest
import torch

ROWS = {
    ("MoVE", "softmax written out"): ["MoVE, softmax written out"],
    ("linear attention", "pairs, earlier tokens alone"): ["linear attention, earlier pairs"],
    ("linear attention", "pairs, normalised"): ["linear attention, normalised pairs"],
    ("RetNet", "pairs and powers"): ["RetNet, powers"],
    ("SymbolicLight", "loop"): [f"SymbolicLight, loop, {n} numbers" for n in (64, 512, 2048)],
    ("Sessa", "loop"): ["Sessa, loop", "Sessa, long loop"],
    ("GAM", "as published"): ["GAM, memory read"],
}
"""Names where they are not "layer, form"."""


@pytest.fixture
def mixers(benchmarks: None) -> Any:
    import mixers

    return mixers


def test_every_form_that_is_applied_has_a_row(mixers: Any) -> None:
    forms = [(row["layer"], row["form"]) for row in make_mixer_table.checked_in() if row["applied"]]
    wanted = {name for form in forms for name in ROWS.get(form, [", ".join(form)])}
    beyond = {name for name in mixers.CASES if name not in wanted}
    assert wanted <= set(mixers.CASES)
    assert beyond == {"Sessa, triangular solve", "Pattention, 2048 slots", "Pattention, 8192 slots"}  # refused where they are small


def test_rows_give_finite_tokens_at_tiny_sizes_as_they_do_at_large_ones(mixers: Any) -> None:
    torch.manual_seed(0)
    for name, case in mixers.CASES.items():
        module, inputs = case.make(16)
        with torch.no_grad():
            out = mixers.first(module.eval()(*inputs))
        assert 16 in out.shape and out.isfinite().all(), name
    loops = [name for name, case in mixers.CASES.items() if case.tokens(4096) != 4096]
    assert all("loop" in name for name in loops) and len(loops) == sum("loop" in name for name in mixers.CASES)
    assert mixers.CASES["GLA, loop"].tokens(16) == 16


@pytest.mark.full
def test_a_row_tells_ratio_error_and_what_was_applied(mixers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = {"inductor": "eager", "dyncc": "dyncc"}
    options = {"passes": mixers.PASSES, "engine": "reference"}
    monkeypatch.setattr(
        mixers, "compiled", lambda m, way: torch.compile(m, backend=reference[way], options=options if way == "dyncc" else None)
    )
    with torch.no_grad():
        row = mixers.measured("linear attention, earlier pairs", 24, 1)
    assert row["applied"] == ["fuse-linear-attention"] and 0 < row["error"] < 1e-5 and row["tokens"] == 24
    assert set(row["ms"]) == {"inductor", "dyncc"} and {"median", "low", "high"} <= set(row["times_inductor"])


def test_a_way_that_fails_is_told(mixers: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def failing(module: Any, way: str) -> Any:
        def call(*_: Any) -> Any:
            raise RuntimeError(f"{way} is not here")

        return call

    monkeypatch.setattr(mixers, "compiled", failing)
    row = mixers.measured("GAM, memory read", 8, 1)
    assert row["failures"]["dyncc"] == "RuntimeError: dyncc is not here" and "failed" in capsys.readouterr().out


def test_names_that_begin_no_row_are_told(mixers: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        mixers.main(["--only", "mamba"])
    assert "no row begins with mamba; there are: linear attention, pairs" in capsys.readouterr().err
