"""Artefacts: what is saved is what runs after loading, and what is damaged, foreign or newer never runs."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import LONGEST, Tiny, dynamic, inputs

import dyncc
from dyncc import artefact, errors, outputs, serialised, weights

PRUNE = "prune-tokens{keep=5 layers=1 score=hidden-norm}"
FILES = {"plan.json", "program.json", "dense.json", "weights.safetensors", "example.safetensors", "report.json", "report.txt"}


class Stateful(torch.nn.Module):
    """Tied weights, a buffer that counts calls, one that is not persistent, a constant, a keyword, and a dict of results."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.register_buffer("calls", torch.zeros(3))
        self.register_buffer("shift", torch.arange(3.0), persistent=False)

    def forward(self, x: Any, *, scale: int = 1) -> Any:
        self.calls.add_(1)
        return {"y": self.two(self.one(x)) * scale + self.shift + torch.tensor([1.0, 2.0, 4.0]), "calls": self.calls * 1, "none": None}


def optimized(tiny: Tiny, passes: str | None = None, padded: bool = True) -> Any:
    given = inputs(tiny, padded=padded)
    settings: dict[str, Any] = {"engine": "reference", "evidence": "off", "passes": passes}
    return dyncc.optimize(tiny.build(), given, dynamic_shapes=dynamic(given), **settings)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    pruned = optimized(Tiny(), PRUNE)
    return pruned, pruned.save(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def copy(saved: tuple[Any, Path], tmp_path: Path) -> Path:
    """A copy of the artefact to spoil."""
    import shutil

    return Path(shutil.copytree(saved[1], tmp_path / "copy"))


def test_outputs_are_equal_at_every_size(saved: tuple[Any, Path]) -> None:
    before, folder = saved
    after = dyncc.load(folder)
    assert {file.name for file in folder.iterdir()} == FILES | {"manifest.json"}
    for batch, length in ((2, 9), (3, 5), (2, 3), (4, 20)):
        call = inputs(Tiny(), batch=batch, length=length, padded=True, seed=length)
        for run in ("__call__", "reference", "dense"):
            assert torch.equal(getattr(before, run)(*call), getattr(after, run)(*call)), (run, length)
    assert str(after.report) == str(before.report)
    assert json.dumps(after.report.to_dict()) == json.dumps(before.report.to_dict())


def test_a_call_that_a_count_keeps_whole_runs_dense(saved: tuple[Any, Path]) -> None:
    before, folder = saved
    after = dyncc.load(folder)
    short, long = inputs(Tiny(), length=5, padded=True), inputs(Tiny(), length=12, padded=True)
    assert torch.equal(after(*short), before.dense(*short))
    assert not torch.equal(after(*long), before.dense(*long))


def test_calls_are_checked_after_loading_too(saved: tuple[Any, Path]) -> None:
    after = dyncc.load(saved[1])
    ids, mask = inputs(Tiny(), padded=True)
    with pytest.raises(errors.InputMismatch, match=f"is {LONGEST + 1}, outside of"):
        after(*inputs(Tiny(), length=LONGEST + 1, padded=True))
    with pytest.raises(errors.InputMismatch, match="another arrangement"):
        after(ids)
    with pytest.raises(errors.InputMismatch, match=r"captured were torch\.int64"):
        after(ids.int(), mask)


def test_state_ties_keywords_and_results(tmp_path: Path) -> None:
    model = Stateful().eval()
    x = torch.randn(2, 3)
    before = dyncc.optimize(model, (x,), {"scale": 2}, passes="", engine="reference", evidence="off")
    before.save(tmp_path / "model")
    after = dyncc.load(tmp_path / "model")
    for count in (1, 2):
        given, wanted = after(x, scale=2), before(x, scale=2)
        assert list(given) == ["y", "calls", "none"]
        assert given["none"] is None
        assert torch.equal(given["y"], wanted["y"])
        assert given["calls"].tolist() == wanted["calls"].tolist() == [count] * 3
    state = dict(zip((i.name for i in after._outcome.program.inputs), after._signature.state, strict=False))
    assert state["one.weight"] is state["two.weight"]
    assert dyncc.load(tmp_path / "model")(x, scale=2)["calls"].tolist() == [1, 1, 1]
    with pytest.raises(errors.InputMismatch, match="was 2 when captured and is 3 now"):
        after(x, scale=3)


def test_what_is_loaded_can_be_saved_again(saved: tuple[Any, Path], tmp_path: Path) -> None:
    again = dyncc.load(dyncc.load(saved[1]).save(tmp_path / "again"))
    call = inputs(Tiny(), length=11, padded=True)
    assert torch.equal(again(*call), saved[0](*call))
    assert (tmp_path / "again/plan.json").read_text() == (saved[1] / "plan.json").read_text()


def test_the_engine_can_be_chosen(saved: tuple[Any, Path]) -> None:
    assert dyncc.load(saved[1])._settings.engine == "reference"
    assert dyncc.load(saved[1], engine="inductor").report.engine == "inductor"
    with pytest.raises(errors.UnknownEngine):
        dyncc.load(saved[1], engine="inductr")


def test_nothing_in_it_is_a_pickle(saved: tuple[Any, Path]) -> None:
    for file in saved[1].iterdir():
        assert not zipfile.is_zipfile(file)
        if file.suffix in (".json", ".txt"):
            file.read_text(encoding="utf-8")
        else:
            size = int.from_bytes(file.read_bytes()[:8], "little")
            assert json.loads(file.read_bytes()[8 : 8 + size])["__metadata__"]
    assert "/" not in (saved[1] / "program.json").read_text().replace("\\/", "")


def test_tensors_come_back_with_strides_and_ties(tmp_path: Path) -> None:
    base = torch.nn.Parameter(torch.randn(4, 6))
    table = {
        "a": base,
        "b": base,
        "t": base.detach().t(),
        "row": base.detach()[1],
        "odd": torch.randn(3, 5)[:, 1:3],
        "none": torch.empty(0, 3),
    }
    weights.save_tensors(table, tmp_path / "w.safetensors")
    back = weights.load_tensors(tmp_path / "w.safetensors")
    assert list(back) == list(table)
    for name, tensor in table.items():
        assert torch.equal(back[name], tensor), name
        assert back[name].stride() == tensor.stride() and type(back[name]) is type(tensor), name
    assert back["a"] is back["b"]
    back["row"].fill_(7.0)
    assert back["a"][1].tolist() == back["t"][:, 1].tolist() == [7.0] * 6


def test_tensors_of_a_device_that_is_not_here(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    weights.save_tensors({"x": torch.ones(2)}, file)
    with safe_open(file, framework="pt") as opened:
        table = opened.metadata()["tensors"].replace('"cpu"', '"cuda:99"')
        stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  the handle is no mapping
    save_file(stored, file, metadata={"tensors": table})
    with pytest.raises(errors.ArtefactUnreadable, match="do not fit here .*; load it on a machine with the same device"):
        artefact._tensors(file)


def spoil_cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def spoil_flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("file", "spoil", "error", "words"),
    [
        ("weights.safetensors", spoil_cut, errors.ArtefactTruncated, r"weights.safetensors has [\d,]+ of [\d,]+ bytes"),
        ("weights.safetensors", spoil_flip, errors.ArtefactDamaged, r"weights.safetensors is not what was saved \(wrong checksum\)"),
        ("weights.safetensors", Path.unlink, errors.ArtefactTruncated, "weights.safetensors is missing"),
        ("program.json", spoil_cut, errors.ArtefactTruncated, "program.json has"),
        ("dense.json", spoil_flip, errors.ArtefactDamaged, "dense.json is not what was saved"),
        ("example.safetensors", spoil_flip, errors.ArtefactDamaged, "example.safetensors is not"),
        ("plan.json", lambda f: f.write_text(f.read_text().replace("keep=5", "keep=4")), errors.ArtefactEdited, "was edited: plan.json"),
        ("report.txt", spoil_cut, errors.ArtefactEdited, "was edited: report.txt"),
        ("manifest.json", spoil_cut, errors.ArtefactTruncated, "manifest.json is cut off"),
        (
            "manifest.json",
            lambda f: f.write_text(f.read_text().replace('"dyncc": "', '"dyncc": "9')),
            errors.ArtefactEdited,
            "manifest.json",
        ),
        ("manifest.json", Path.unlink, errors.NotAnArtefact, r"holds no manifest.json; write one with dyncc\.optimize"),
        ("manifest.json", lambda f: f.write_text('{"name": "web app"}'), errors.NotAnArtefact, "another program's"),
    ],
)
def test_what_is_damaged_is_not_loaded(copy: Path, file: str, spoil: Any, error: type[Exception], words: str) -> None:
    spoil(copy / file)
    with pytest.raises(error, match=words) as caught:
        dyncc.load(copy)
    assert len(str(caught.value).splitlines()) == 1


def rewrite(folder: Path, **changes: Any) -> None:
    """Change the manifest with a right checksum, as another version would write it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("sha256")
    manifest.update(changes)
    for name in manifest["files"]:
        file = folder / name
        manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": artefact._digest(file)}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": artefact._seal(manifest)}))


def test_a_newer_format(copy: Path) -> None:
    rewrite(copy, version=2, dyncc="3.0")
    with pytest.raises(errors.ArtefactTooNew, match=r"has artefact format 2, .* up to 1; upgrade dyncc .*written by dyncc 3\.0"):
        dyncc.load(copy)


def test_another_torch(copy: Path) -> None:
    tree = json.loads((copy / "program.json").read_text())
    tree["schema_version"]["major"], tree["torch_version"] = 99, "4.0.0"
    (copy / "program.json").write_text(json.dumps(tree))
    rewrite(copy)
    with pytest.raises(errors.ArtefactUnreadable, match=r"saved with torch 4\.0\.0, this is .*: load it there, or save it again here"):
        dyncc.load(copy)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("torch.ops.aten.linear.default", "torch.os.system", r"it calls 'torch\.os\.system', which is no op"),
        ("torch.ops.aten.linear.default", "torch.ops.aten.linear.default.__class__", "which is no op"),
        ("Symbol('s", "__import__('s", "which is no size"),
        ("Integer(5)", "open('x').read()", "which is no size"),
        ('"guards_code": []', '"guards_code": ["exit()"]', "code of its own"),
    ],
)
def test_programs_that_ask_for_more_than_ops(copy: Path, old: str, new: str, words: str) -> None:
    text = (copy / "program.json").read_text()
    assert old in text
    (copy / "program.json").write_text(text.replace(old, new))
    rewrite(copy)
    with pytest.raises(errors.ArtefactUnreadable, match=words):
        dyncc.load(copy)


def test_types_that_are_not_known_here() -> None:
    def tree(kind: str) -> dict[str, str]:
        return {"out_spec": json.dumps([1, {"type": kind, "context": "null", "children_spec": []}])}

    serialised.register_types(tree("builtins.dict"))
    serialised.register_types(tree("transformers.modeling_outputs.BaseModelOutput"))
    with pytest.raises(errors.ArtefactUnreadable, match="returns my_models.Output, which is not known here; import my_models first"):
        serialised.register_types(tree("my_models.Output"))


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(errors.NotAnArtefact, match="there is no such folder"):
        dyncc.load(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.NotAnArtefact):
        dyncc.load(tmp_path / "file")


def test_nothing_else_is_overwritten(saved: tuple[Any, Path], tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work/thesis.txt").write_text("years")
    (tmp_path / "file").write_text("years")
    for name in ("work", "file", "file/below"):
        with pytest.raises(errors.OutputNotWritable, match=r"something else stands there|Not a directory"):
            saved[0].save(tmp_path / name)
    assert (tmp_path / "work/thesis.txt").read_text() == (tmp_path / "file").read_text() == "years"
    (tmp_path / "empty").mkdir()
    assert artefact.is_artefact(saved[0].save(tmp_path / "empty"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_place_that_cannot_be_written(saved: tuple[Any, Path], copy: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(artefact, "save_tensors" if code == errno.ENOSPC else "_write_json", fail)
    with pytest.raises(errors.OutputNotWritable, match=os.strerror(code)):
        saved[0].save(copy)
    monkeypatch.undo()
    monkeypatch.setattr(outputs.tempfile, "mkdtemp", fail)
    with pytest.raises(errors.OutputNotWritable, match=os.strerror(code)):
        saved[0].save(copy)
    assert [entry.name for entry in copy.parent.iterdir()] == ["copy"]
    assert artefact.check(copy)


def test_a_failing_rename_brings_the_old_one_back(saved: tuple[Any, Path], copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, calls = os.rename, []

    def second_fails(old: Any, new: Any) -> None:
        calls.append(new)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(old, new)

    monkeypatch.setattr(outputs.os, "rename", second_fails)
    with pytest.raises(errors.OutputNotWritable, match="Input/output error"):
        saved[0].save(copy)
    assert len(calls) == 3
    assert [entry.name for entry in copy.parent.iterdir()] == ["copy"]
    assert artefact.check(copy)


KILLED = """
    import os, resource, signal, sys
    import torch, dyncc
    from dyncc import artefact, outputs
    folder, where = sys.argv[1:]
    optimized = dyncc.load(folder, engine="reference")
    if where == "full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            optimized.save(folder)
        except dyncc.DynccUsageError as error:
            print(error)
        sys.exit()
    rename, count = os.rename, 0
    def die(*args):
        os._exit(9)
    def die_between(old, new):
        global count
        count += 1
        os._exit(9) if count == 2 else rename(old, new)
    if where == "weights":
        artefact.save_tensors = die
    elif where == "manifest":
        artefact._seal = die
    elif where == "sync":
        os.fsync = die
    else:
        os.rename = die_between
    optimized.save(folder)
"""


def ended(folder: Path, where: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", textwrap.dedent(KILLED), str(folder), where]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("where", [*(pytest.param(w, marks=pytest.mark.full) for w in ("weights", "manifest", "sync")), "renames"])
def test_killed_while_saving_the_old_artefact_is_whole(saved: tuple[Any, Path], copy: Path, where: str) -> None:
    assert ended(copy, where).returncode == 9
    call = inputs(Tiny(), length=11, padded=True)
    assert torch.equal(dyncc.load(copy)(*call), saved[0](*call))
    saved[0].save(copy)
    assert artefact.check(copy)
    assert not outputs.set_aside(copy).exists()


@pytest.mark.full
def test_a_limit_on_file_sizes_is_told(copy: Path) -> None:
    ran = ended(copy, "full")
    assert f"cannot write to {copy}: " in ran.stdout and "File too large" in ran.stdout, ran
    assert [entry.name for entry in copy.parent.iterdir()] == ["copy"]
    assert artefact.check(copy)
