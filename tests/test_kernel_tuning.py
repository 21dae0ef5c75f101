"""Forms of kernels that a device ran fastest: what is tried, what is remembered, and which launches use it; the device is played."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dyncc import cli
from dyncc.kernels.generator import Attend, KernelSpec, tune
from dyncc.kernels.generator.kinds import AttendChosen, LinearChunk, Rows
from dyncc.kernels.generator.standard import STANDARD
from dyncc.kernels.generator.targets import TARGETS

GPU = torch.device("cuda")
FAST = {"rows": 64, "keys": 64, "warps": 4, "stages": 3}


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[KernelSpec]:
    """A machine with a GPU on which three stages beat two, and of which forms that spill are told; it lists what was timed."""
    timed: list[KernelSpec] = []

    def bench(run: Any, return_mode: str) -> float:
        spec = run.func.__self__
        timed.append(spec)
        return 3.0 if spec == spec.formless() else 4.0 - spec.depth + spec.tile[0] / 1000

    monkeypatch.setenv("DYNCC_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tune, "at_hand", lambda: "cuda:90")
    monkeypatch.setattr(tune, "known", dict)
    monkeypatch.setattr(tune, "fits", lambda spec, where: spec.tile[1] < 128)
    monkeypatch.setattr(tune, "sample", lambda spec, device, **sizes: ((), {}))
    monkeypatch.setattr("triton.testing.do_bench", bench)
    tune._formed.cache_clear()
    return timed


@pytest.mark.parametrize("spec", STANDARD, ids=lambda s: s.name)
def test_forms_compute_the_same_kernel(spec: KernelSpec) -> None:
    tried = tune.forms(spec)
    assert tried[0] == {} and len(tried) > 1
    assert {replace(spec, **form).formless() for form in tried} == {spec.formless()}
    assert spec.alike().alike() == spec.alike() and spec.alike().formless() == spec.alike()


def test_the_fastest_form_that_fits_is_remembered_and_used(hopper: list[KernelSpec]) -> None:
    spec = Attend(128, causal=True)
    assert tune.preferred(spec, GPU) == spec
    found = tune.tune(spec)
    assert found.form == {"rows": 64, "keys": 32, "warps": 4, "stages": 3} and tune.ROUNDS * found.tried == len(hopper)
    assert found.seconds < found.before and "times as fast as before" in str(found)
    assert all(x.tile[1] < 128 for x in hopper)
    assert tune.preferred(spec, GPU) == replace(spec, **found.form)
    assert tune.preferred(spec, torch.device("cpu")) == spec
    assert tune.preferred(replace(spec, stages=1), GPU) == replace(spec, stages=1)
    assert tune.preferred(Attend(64, causal=True), GPU) == Attend(64, causal=True)


def test_windows_of_any_width_share_their_form(hopper: list[KernelSpec]) -> None:
    form = tune.tune(Attend(128, causal=True, window=4096, cap=50.0)).form
    other = Attend(128, causal=True, window=1024, cap=30.0)
    assert tune.preferred(other, GPU) == replace(other, **form)
    assert tune.preferred(replace(other, window=0), GPU) == replace(other, window=0)


def test_what_is_remembered_comes_before_what_is_known(hopper: list[KernelSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Attend(128, causal=True)
    monkeypatch.setattr(tune, "known", lambda: {"cuda:90": {spec.name: FAST}})
    tune._formed.cache_clear()
    assert tune.preferred(spec, GPU) == replace(spec, **FAST)
    found = tune.tune(spec)
    assert found.form != FAST and tune.preferred(spec, GPU) == replace(spec, **found.form)


def test_a_form_that_is_no_longer_valid_is_left(hopper: list[KernelSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "known", lambda: {"cuda:90": {Attend(128, causal=True).name: {"rows": 3}}})
    assert tune.preferred(Attend(128, causal=True), GPU) == Attend(128, causal=True)


def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "at_hand", lambda: None)
    assert cli.main(["kernels", "--tune"]) == 2
    assert "no GPU that kernels are compiled for is seen here" in capsys.readouterr().err


def test_what_is_known_names_kernels_of_this_version() -> None:
    shown = {spec.alike().name: spec for spec in STANDARD}
    for where, forms in tune.known().items():
        assert where in TARGETS
        for name, form in forms.items():
            assert form and tune.valid(shown[name], form) is not None


KNOWN = [(where, name) for where, forms in tune.known().items() for name in forms]


@pytest.mark.full
@pytest.mark.parametrize(("where", "name"), KNOWN)
def test_known_forms_do_not_spill_where_they_are_used(where: str, name: str) -> None:
    spec = next(x for x in STANDARD if x.alike().name == name)
    assert tune.fits(replace(spec, **tune.known()[where][name]), where)


def test_kinds_say_what_may_be_tried() -> None:
    assert len(tune.forms(Attend(128, causal=True))) == 25
    assert {"columns": 16, "rows": 32} in tune.forms(LinearChunk(64))
    assert all("warps" in form for form in tune.forms(AttendChosen(64))[1:] + tune.forms(Rows(64, epilogues=("residual",)))[1:])
