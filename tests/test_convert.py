"""`dyncc convert`: what each name asks for, what is written, and that nothing wrong or half-written gets the name."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Tiny, inputs

import dyncc
from dyncc import cli, convert, dynamic, errors, loading
from dyncc.backends import onnx_file

FACTORY = """
    import torch
    from tiny import Tiny, inputs

    def decoder():
        tiny = Tiny(kind="decoder", returns="last", positions="rope", layers=2)
        return tiny.build(), inputs(tiny, batch=1, padded=True)

    class Fixed(torch.nn.Module):
        def forward(self, x):
            return x.view(2, 3, 4).sum(1)

    def fixed():
        return Fixed(), (torch.ones(2, 12),)

    def single():
        return Single(), (torch.ones(1, 12),)

    class Single(torch.nn.Module):
        def forward(self, x):
            return x.view(12) * 2

    class Counts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, input_ids):
            self.calls.add_(1)
            return {"sum": input_ids.sum(1) + self.calls}

    def counts():
        return Counts(), {"input_ids": torch.arange(6).view(2, 3)}
"""
MODEL = "factory_of_convert:decoder"
QUICK = ("--engine", "reference", "--evidence", "off")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    (tmp_path / "factory_of_convert.py").write_text(textwrap.dedent(FACTORY))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DYNCC_CACHE_DIR", str(tmp_path / "cache"))

    def call(*words: str) -> tuple[int, str, str]:
        code = cli.main(["convert", *words, *QUICK])
        return code, *capsys.readouterr()

    yield call
    sys.modules.pop("factory_of_convert", None)


def left() -> set[str]:
    return {path.name for path in Path().iterdir()} - {"factory_of_convert.py", "__pycache__", "cache"}


TINY = Tiny(kind="decoder", returns="last", positions="rope", layers=2)
SIZES = ((1, 9), (2, 9), (3, 14))


def agree(written: Any) -> None:
    model = TINY.build()
    for batch, length in SIZES:
        call = inputs(TINY, batch=batch, length=length, padded=True, seed=length)
        with torch.no_grad():
            torch.testing.assert_close(written(*call), model(*call), atol=1e-5, rtol=1e-4)


def test_a_pt2_that_loads_again(run: Any) -> None:
    code, out, err = run(MODEL, "-o", "made/model.pt2", "--json")
    result = json.loads(out)
    assert code == 0, err
    assert (result["path"], result["kind"], result["bytes"]) == ("made/model.pt2", "pt2", Path("made/model.pt2").stat().st_size)
    assert result["applied"] == ["slice-last-token", "drop-repeat-kv"]
    assert result["verified"]["calls"] == 2
    assert [path.name for path in Path("made").iterdir()] == ["model.pt2"]
    agree(loading.load("made/model.pt2").model)
    assert cli.main(["explain", "made/model.pt2", *QUICK]) == 0


def test_an_artefact(run: Any) -> None:
    code, out, err = run(MODEL, "-o", "model", "--passes", "drop-repeat-kv")
    assert code == 0, err
    assert "model: artefact, " in out and "drop-repeat-kv: applied" in out and "verified: " in out
    agree(dyncc.load("model"))
    assert run(MODEL, "-o", "model", "--no-verify")[0] == 0
    assert left() == {"model"}


@pytest.mark.full
def test_an_aotinductor_package(run: Any) -> None:
    code, out, err = run(MODEL, "-o", "model.aoti.pt2", "--json")
    assert code == 0, err
    assert json.loads(out)["kind"] == "aotinductor"
    agree(torch._inductor.aoti_load_package("model.aoti.pt2"))
    assert left() == {"model.aoti.pt2"}


def test_onnx_is_checked_at_three_points_and_the_table_printed(run: Any) -> None:
    code, out, err = run(MODEL, "-o", "model.onnx")
    assert code == 0, err
    assert left() == {"model.onnx"}
    rows = [line for line in out.splitlines() if " at [" in line]
    assert len(rows) == 3 and all("error" in row and "FAILED" not in row for row in rows)


@pytest.mark.full
def test_onnx_that_disagrees_is_a_failed_check(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "run_session", lambda session, names, tensors: [torch.zeros(2, 31)])
    code, _, err = run(MODEL, "-o", "model.onnx")
    assert code == 1 and "disagrees with the optimized model" in err and left() == set()


def test_state_is_saved_and_not_used_up(run: Any) -> None:
    for name in ("counts.pt2", "counts"):
        code, _, err = run("factory_of_convert:counts", "-o", name)
        assert code == 0, err
    ids = torch.arange(8).view(2, 4)
    for loaded in (loading.load("counts.pt2").model, dyncc.load("counts")):
        for calls in (1.0, 2.0):
            assert loaded(input_ids=ids)["sum"].tolist() == [6.0 + calls, 22.0 + calls]


def test_sizes_that_cannot_vary(run: Any) -> None:
    code, out, err = run("factory_of_convert:fixed", "-o", "fixed.pt2", "--json")
    assert code == 0, err
    assert "the sizes stay as in the example" in err
    assert json.loads(out)["holds_for"] == "the captured sizes only"
    code, out, err = run("factory_of_convert:single", "-o", "single")
    assert (code, "the sizes stay as in the example" in err) == (0, True)
    with pytest.raises(errors.InputMismatch, match=r"x\[0\] is 2, captured was 1"):
        dyncc.load("single")(torch.ones(2, 12))
    code, out, err = run(MODEL, "-o", "still.pt2", "--json", "--no-dynamic")
    assert (code, json.loads(out)["holds_for"]) == (0, "the captured sizes only")
    assert "sizes stay" not in err


@pytest.mark.parametrize("name", [pytest.param("model.pt2", marks=pytest.mark.full), "model"])
def test_a_mismatch_leaves_nothing(run: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(convert, "_compare", lambda *given: (0.5, "output 0 differs"))
    code, out, err = run(MODEL, "-o", name)
    assert (code, out, left()) == (1, "", set())
    assert err.splitlines()[-1] == f"error: {name} was not written: reloaded, it gives other outputs than the model (output 0 differs)"


def test_what_the_check_finds() -> None:
    given = inputs(TINY, padded=True)
    optimized = dyncc.optimize(TINY.build(), given, engine="reference", evidence="off", passes="")
    for written, words in (
        (lambda *call: TINY.build()(*call) * 1.01, "output 0 differs by"),
        (lambda *call: (call[0], call[1]), "2 values, not 1"),
        (lambda *call: 1 / 0, "it raises ZeroDivisionError: division by zero"),
    ):
        with pytest.raises(errors.FileMismatch, match=words):
            convert.check(optimized, lambda: written, [(given, {})], Path("model.pt2"))  # noqa: B023


def test_a_full_disk(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(program: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    Path("model.pt2").write_text("the old one")
    code, _, err = run(MODEL, "-o", "model.pt2")
    assert (code, err.splitlines()[-1]) == (2, "error: cannot write to model.pt2: No space left on device")
    assert Path("model.pt2").read_text() == "the old one"
    assert left() == {"model.pt2"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.tflite", "cannot tell what to write to model.tflite: end it in .onnx, .pt2 or .aoti.pt2, or in nothing"),
        ("factory_of_convert.py/model.pt2", "cannot write to factory_of_convert.py: Not a directory"),
        ("folder.pt2", "cannot write to folder.pt2: a folder stands there"),
        ("folder", "cannot write to folder: something else stands there"),
    ],
)
def test_names_that_are_refused_before_anything_is_loaded(run: Any, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    for folder in ("folder.pt2", "folder"):
        Path(folder).mkdir()
        Path(folder, "kept.txt").write_text("")
    monkeypatch.setattr(loading, "load", lambda name: pytest.fail("the model was loaded"))
    code, out, err = run(MODEL, "-o", name)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_a_refusal_under_strict(run: Any) -> None:
    assert run(MODEL, "-o", "model.pt2", "--strict")[0] == 1
    assert left() == set()


def test_which_sizes_vary() -> None:
    class Model(torch.nn.Module):
        def forward(self, ids: Any, mask: Any, pixels: Any, scale: int, past: Any) -> Any: ...

    ids = torch.ones(2, 5, dtype=torch.long)
    args = (ids, ids.bool(), torch.ones(2, 3, 4), 2)
    sizes = dynamic.varying_sizes(Model(), args, {"past": [torch.ones(2, 7)]})
    assert [sorted(sizes[name] or ()) for name in ("ids", "mask", "pixels", "scale")] == [[0, 1], [0, 1], [0], []]
    assert [sorted(entry) for entry in sizes["past"]] == [[0]]


def test_a_single_row_becomes_two() -> None:
    ids = torch.arange(3).view(1, 3)
    (wide, number), kwargs = dynamic.widened((ids, 5), {"mask": ids}) or ((None, None), {})
    assert wide.tolist() == kwargs["mask"].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert number == 5
    assert dynamic.widened((torch.ones(2, 3),), {}) is None
    assert dynamic.widened((ids, torch.ones(1)), {}) is None
