"""The checked-in coverage table is complete, and no number in it has fallen."""

from __future__ import annotations

import make_coverage as coverage
import pytest
import zoo_runs
from zoo import CASES, every_case
from zoo_model import Attn, ZooModel


@pytest.mark.parametrize(("model", "attn"), every_case())
def test_no_row_turned_from_applied_to_refused(model: ZooModel, attn: Attn) -> None:
    recorded = {coverage.key(row): row for row in coverage.checked_in()}
    for row in coverage.rows_of(model, attn):
        then = recorded[coverage.key(row)]
        assert row["applied"] >= then["applied"], f"{coverage.key(row)}: {row['reason']}"
        assert row["expected"] == then["expected"]


@pytest.mark.parametrize(("model", "attn"), every_case())
def test_exact_passes_agree_with_eager_and_fire_no_more_than_expected(model: ZooModel, attn: Attn) -> None:
    for name, run in zoo_runs.exact(model.name, attn).items():
        assert run.applied <= zoo_runs.expected_exact(model, attn, name)
        assert run.error <= 1e-5


def test_the_table_names_every_model_and_pass_once() -> None:
    keys = [coverage.key(row) for row in coverage.checked_in()]
    passes = {name for _, _, name in keys}
    assert len(keys) == len(set(keys)) == len(CASES) * len(passes)
    assert {(model, attn) for model, attn, _ in keys} == {(model.name, attn) for model, attn in CASES}


def test_the_readable_table_is_that_of_the_rows() -> None:
    assert (coverage.DOCS / "coverage.md").read_text() == coverage.markdown(coverage.checked_in())


def test_what_is_missing_has_a_reason() -> None:
    for row in coverage.checked_in():
        assert row["applied"] == row["expected"] or row["reason"], coverage.key(row)
