"""What the page of the matrix is made of: cases left out for a stated reason, and rows that are rerun alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import run_matrix
import summary
from zoo import ZOO, by_name, skipped
from zoo_model import Needs

FUTURE = Needs("torch", "999", "no sdpa", attn="sdpa")


def test_what_a_library_cannot_do_is_left_out_for_its_reason() -> None:
    model = replace(by_name("bert"), needs=(FUTURE,))
    assert model.left_out("sdpa") == "no sdpa before torch 999" and not model.left_out("eager")
    assert model.able == ("eager",) and not skipped(model, "eager")
    assert skipped(model, "sdpa")[0].kwargs == {"reason": "no sdpa before torch 999"}


def test_a_need_of_dynamic_sizes_leaves_the_others() -> None:
    model = replace(by_name("bert"), needs=(replace(FUTURE, dynamic=True),))
    assert not model.left_out("sdpa") and model.left_out("sdpa", dynamic=True)


def test_a_met_need_leaves_nothing_out() -> None:
    assert replace(FUTURE, release="2.11").met()
    assert all(model.able for model in ZOO)


def test_skipped_tests_are_grouped_by_their_reason(tmp_path: Path) -> None:
    junit = tmp_path / "result.xml"
    cases = "".join(f'<testcase name="{name}"><skipped message="why"/></testcase>' for name in ("a", "b"))
    junit.write_text(f'<testsuite>{cases}<testcase name="c"/></testsuite>')
    assert summary.skips(junit) == {"why": ["a", "b"]}


def test_a_row_that_is_rerun_alone_keeps_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_matrix, "PAGE", tmp_path / "matrix.md")
    lines = {"oldest": ["| oldest | 1 |", "- oldest: why: `a`"], "newest": ["| newest | 2 |"]}
    run_matrix.write([*lines["oldest"], *lines["newest"]])
    page = run_matrix.PAGE.read_text()
    assert {name: run_matrix.written(name) for name in run_matrix.ROWS} == lines
    monkeypatch.setattr(run_matrix, "run", lambda name: (lines[name], True))
    assert run_matrix.main(["newest"]) == 0 and run_matrix.PAGE.read_text() == page
