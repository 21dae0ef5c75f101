"""The zoo in ONNX Runtime: dense and pruned exports hold at three points, and the table in docs/ is what is found."""

from __future__ import annotations

import make_onnx_table as table
import pytest
import zoo_onnx
from zoo import ZOO

QUICK = ("vit", "llama-last")
NAMES = [pytest.param(model.name, marks=() if model.name in QUICK else pytest.mark.full) for model in ZOO]
TOLERANCE = 1e-4
PRUNED_EXPORTS_THAT_MUST_HOLD = 16


@pytest.mark.parametrize("passes", [pytest.param("", id="dense", marks=pytest.mark.full), pytest.param(zoo_onnx.PRUNE, id="pruned")])
@pytest.mark.parametrize("name", NAMES)
def test_exports_hold_at_every_point(name: str, passes: str) -> None:
    then = next(row for row in table.checked_in() if row["model"] == name)["pruned" if passes else "dense"]
    made = zoo_onnx.export(name, passes)
    assert made.state == then, made.reason
    if made.state == "exported":
        assert made.error <= TOLERANCE
        assert made.points == 3


def test_the_table_names_every_model_and_enough_are_pruned() -> None:
    rows = table.checked_in()
    assert [row["model"] for row in rows] == [model.name for model in ZOO]
    assert all(row["dense"] == "exported" for row in rows)
    assert sum(row["pruned"] == "exported" for row in rows) >= PRUNED_EXPORTS_THAT_MUST_HOLD


def test_the_readable_table_is_that_of_the_rows() -> None:
    assert (table.DOCS / "onnx.md").read_text() == table.markdown(table.checked_in())


def test_what_is_missing_has_a_reason() -> None:
    for row in table.checked_in():
        for kind in ("dense", "pruned"):
            assert row[kind] == "exported" or row[f"{kind}_reason"]
