"""The checked-in table of passes that skip layers is complete, and no row of it turned from applied to refused."""

from __future__ import annotations

import make_depth_table as depth
import pytest
import torch
import zoo_runs
from make_coverage import DOCS, key
from zoo import by_name
from zoo_model import relative_error

QUICK = ("bert", "llama-last")
REST = [m.name for m in depth.MODELS if m.name not in QUICK]


def models(names: list[str]) -> list[object]:
    """Those of QUICK in the quick run, the others in the full one."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in names]


@pytest.mark.parametrize("name", models([*QUICK, *REST]))
def test_no_row_turned_from_applied_to_refused(name: str) -> None:
    recorded = {key(row): row for row in depth.checked_in()}
    for row in depth.rows_of(by_name(name)):
        assert row["applied"] >= recorded[key(row)]["applied"], f"{key(row)}: {row['reason']}"
        assert depth.row(name, row["pass"])[2], f"{key(row)}: outputs of another shape, or not finite"


@pytest.mark.parametrize("name", models([row["model"] for row in depth.checked_in() if row["applied"] and row["pass"] == depth.PASSES[1]]))
@torch.no_grad()
def test_rows_that_all_leave_are_the_model_without_its_last_layers_and_rows_that_stay_are_dense(name: str) -> None:
    def run(passes: str) -> object:
        optimized, module, inputs = zoo_runs.optimize(by_name(name), "sdpa", passes)
        return optimized(*inputs), module(*inputs)

    left, _ = run("exit-early{layers=1 score=saturation threshold=0}")
    cut, dense = run("drop-layers{layers=2,3}")
    stayed, _ = run("exit-early{layers=1 score=saturation threshold=2}")
    assert relative_error(left, cut) <= 1e-5
    assert relative_error(stayed, dense) <= 1e-5
    assert relative_error(left, dense) > 1e-3


def test_the_table_names_every_model_and_pass_once() -> None:
    keys = [key(row) for row in depth.checked_in()]
    assert keys == [(model.name, "sdpa", name) for model in depth.MODELS for name in depth.PASSES]


def test_the_readable_table_is_that_of_the_rows() -> None:
    assert (DOCS / "depth.md").read_text() == depth.markdown(depth.checked_in())


def test_what_is_missing_has_a_reason() -> None:
    for row in depth.checked_in():
        assert row["applied"] == row["expected"] or row["reason"], key(row)
