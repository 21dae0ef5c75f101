"""The checked-in table of passes that skip layers is complete, and no row of it turned from applied to refused."""

from __future__ import annotations

import make_depth_table as depth
import pytest
from make_coverage import DOCS, key
from zoo import by_name

QUICK = ("vit", "llama-last")
REST = [m.name for m in depth.MODELS if m.name not in QUICK]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.full) for name in REST)])
def test_no_row_turned_from_applied_to_refused(name: str) -> None:
    recorded = {key(row): row for row in depth.checked_in()}
    for row in depth.rows_of(by_name(name)):
        assert row["applied"] >= recorded[key(row)]["applied"], f"{key(row)}: {row['reason']}"
        assert depth.row(name, row["pass"])[2], f"{key(row)}: outputs of another shape, or not finite"


def test_the_table_names_every_model_and_pass_once() -> None:
    keys = [key(row) for row in depth.checked_in()]
    assert keys == [(model.name, "sdpa", name) for model in depth.MODELS for name in depth.PASSES]


def test_the_readable_table_is_that_of_the_rows() -> None:
    assert (DOCS / "depth.md").read_text() == depth.markdown(depth.checked_in())


def test_what_is_missing_has_a_reason() -> None:
    for row in depth.checked_in():
        assert row["applied"] == row["expected"] or row["reason"], key(row)
