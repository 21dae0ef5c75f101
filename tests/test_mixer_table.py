"""The checked-in table of mixing layers is complete and true, and no row of it turned from applied to refused."""

from __future__ import annotations

import make_mixer_table as mixers
import pytest
from make_coverage import DOCS
from spelled_mixers import MIXERS

QUICK = (("LINA", "pairs"), ("linear attention", "pairs, earlier tokens alone"))
CASES = [pytest.param(*key, id="-".join(key), marks=[] if key in QUICK else [pytest.mark.full]) for key in MIXERS]


@pytest.mark.parametrize(("layer", "form"), CASES)
def test_no_row_turned_from_applied_to_refused_and_results_are_those_of_the_layer(layer: str, form: str) -> None:
    recorded = next(r for r in mixers.checked_in() if (r["layer"], r["form"]) == (layer, form))
    now, error = mixers.row(layer, form)
    assert now["applied"] >= recorded["applied"] and now["nodes"] >= recorded["nodes"], now["reason"]
    assert error <= 1e-5
    assert now["passes"] == recorded["passes"] and now["reason"] == recorded["reason"]


def test_the_table_names_every_layer_and_form_once() -> None:
    assert [(r["layer"], r["form"]) for r in mixers.checked_in()] == list(MIXERS)


def test_the_readable_table_is_that_of_the_rows() -> None:
    assert (DOCS / "mixers.md").read_text() == mixers.markdown(mixers.checked_in())


def test_what_is_refused_has_a_reason_of_its_own() -> None:
    refused = [r for r in mixers.checked_in() if not r["applied"]]
    assert refused and all(r["reason"] for r in refused)
