"""An optimized model on disk: `Optimized.save(folder)` and `dyncc.load(folder)`.

    manifest.json         format, versions, and size and SHA-256 of every other file; closed by a checksum of its own
    plan.json             the pipeline that was applied, the cuts it made, the sizes it holds for, engine and evidence
    program.json          the rewritten program, in torch.export's own JSON form
    dense.json            the program as captured: what runs where a count keeps every row, and what `dense()` runs
    weights.safetensors   parameters, buffers and constants, tied ones once
    example.safetensors   the example inputs
    report.json, .txt     what was found, done, refused, measured

Nothing in it is a pickle. Checksums find damage and edits; they are no signature: load only what you would run.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from dyncc.errors import ArtefactDamaged, ArtefactEdited, ArtefactTooNew, ArtefactTruncated, ArtefactUnreadable, NotAnArtefact
from dyncc.outputs import replaced_folder, restore
from dyncc.report import Region, Report, Rewrite
from dyncc.verdicts import version
from dyncc.weights import load_tensors, save_tensors

if TYPE_CHECKING:
    from dyncc.runtime import Optimized

FORMAT, VERSION = "dyncc-artefact", 1
TEXTS = ("plan.json", "report.json", "report.txt")


def save(optimized: Optimized, path: str | Path) -> Path:
    """Write an artefact; the folder appears whole or not at all, and an older artefact of that name is replaced.

    Raises:
        OutputNotWritable: the place cannot be written, or something else stands there.
        UnsupportedModel: the model takes, returns or holds what cannot be written down.
    """
    with replaced_folder(path, is_artefact) as folder:
        write(optimized, folder)
    return Path(path)


def write(optimized: Optimized, folder: Path) -> None:
    """Fill an empty folder."""
    _write_files(optimized, folder)
    files = {file.name: {"bytes": file.stat().st_size, "sha256": _digest(file)} for file in sorted(folder.iterdir())}
    manifest = {"format": FORMAT, "version": VERSION, "dyncc": version("dyncc"), "torch": torch.__version__, "files": files}
    _write_json(folder / "manifest.json", {**manifest, "sha256": _seal(manifest)})


def _write_files(optimized: Optimized, folder: Path) -> None:
    from dyncc.serialised import to_text

    outcome, signature, report = optimized._outcome, optimized._signature, optimized.report
    (folder / "program.json").write_bytes(to_text(outcome.program, signature))
    (folder / "dense.json").write_bytes(to_text(outcome.dense, signature))
    names = [given.name for given in outcome.dense.inputs]
    save_tensors(dict(zip(names, signature.state, strict=False)), folder / "weights.safetensors")
    leaves = pytree.tree_leaves(optimized.example) if optimized.example else []
    save_tensors({str(i): leaves[i] for i in signature.leaves if leaves}, folder / "example.safetensors")
    plan = {
        "pipeline": " ".join(step.text for step in report.rewrites),
        "cuts": [asdict(cut.plain()) for cut in outcome.cuts],
        "holds_for": report.lengths,
        "engine": optimized._settings.engine,
        "evidence": optimized._settings.evidence,
    }
    _write_json(folder / "plan.json", plan)
    _write_json(folder / "report.json", report.to_dict())
    (folder / "report.txt").write_text(f"{report}\n", encoding="utf-8")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")


def load(path: str | Path, *, engine: str | None = None) -> Optimized:
    """The optimized model of an artefact folder: call it like the model that was optimized.

    Args:
        engine: as for `optimize`; None takes the one it was saved with.
    Raises:
        NotAnArtefact: the folder is none.
        ArtefactTooNew, ArtefactTruncated, ArtefactDamaged, ArtefactEdited: it is not whole, or a newer dyncc wrote it; nothing is loaded.
        ArtefactUnreadable: this torch, device or environment cannot take it.
    """
    from dyncc.driver import Outcome
    from dyncc.options import check_engine
    from dyncc.runtime import Optimized
    from dyncc.serialised import from_text
    from dyncc.settings import Settings

    folder = Path(path).expanduser()
    if engine is not None:
        check_engine(engine)
    restore(folder.resolve())
    check(folder)
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    report = _report(json.loads((folder / "report.json").read_text(encoding="utf-8")))
    report.engine = engine or check_engine(plan["engine"])
    tensors = _tensors(folder / "weights.safetensors")
    program, signature = from_text((folder / "program.json").read_bytes(), tensors)
    dense, _ = from_text((folder / "dense.json").read_bytes(), tensors)
    settings = Settings((), report.engine, evidence=plan["evidence"])
    example = _example(signature, _tensors(folder / "example.safetensors"))
    return Optimized(Outcome(program, dense, tuple(_cut(c) for c in plan["cuts"])), signature, settings, report, example)


def is_artefact(folder: Path) -> bool:
    """Whether a folder holds an artefact, whole or not, of any version."""
    try:
        return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["format"] == FORMAT
    except (OSError, ValueError, TypeError, KeyError):
        return False


def check(folder: Path) -> dict[str, Any]:
    """The manifest of an artefact that is whole; else the error that says what is wrong with it."""
    if not folder.is_dir():
        raise NotAnArtefact(path=folder, problem="there is no such folder")
    if not (folder / "manifest.json").is_file():
        raise NotAnArtefact(path=folder, problem="it holds no manifest.json")
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtefactTruncated(path=folder, file="manifest.json", problem=f"is cut off or no JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise NotAnArtefact(path=folder, problem="its manifest.json is another program's")
    if not isinstance(manifest.get("version"), int) or manifest["version"] > VERSION:
        raise ArtefactTooNew(path=folder, found=manifest.get("version"), known=VERSION, writer=manifest.get("dyncc"))
    seal = manifest.pop("sha256", None)
    if seal != _seal(manifest):
        raise ArtefactEdited(path=folder, file="manifest.json")
    for name, entry in manifest["files"].items():
        _check_file(folder, name, entry)
    return manifest


def _check_file(folder: Path, name: str, entry: dict[str, Any]) -> None:
    file = folder / name
    if not file.is_file():
        raise ArtefactTruncated(path=folder, file=name, problem="is missing")
    size = file.stat().st_size
    if size < entry["bytes"] and name not in TEXTS:
        raise ArtefactTruncated(path=folder, file=name, problem=f"has {size:,} of {entry['bytes']:,} bytes")
    if _digest(file) != entry["sha256"]:
        raise (ArtefactEdited if name in TEXTS else ArtefactDamaged)(path=folder, file=name)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_tensors(file)
    except (RuntimeError, AssertionError) as error:
        problem = f"its tensors do not fit here ({' '.join(str(error).split())[:200]})"
        raise ArtefactUnreadable(problem=problem, hint="load it on a machine with the same device") from error


def _example(signature: Any, leaves: dict[str, torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if len(leaves) != len(signature.leaves):
        return None
    values = dict(signature.constants) | {int(i): tensor for i, tensor in leaves.items()}
    args, kwargs = pytree.tree_unflatten([values[i] for i in sorted(values)], signature.in_spec)
    return args, kwargs


def _report(plain: dict[str, Any]) -> Report:
    known = {f.name for f in fields(Report)}
    report = Report(**{k: v for k, v in plain.items() if k in known})
    rewrites: list[Rewrite] = []
    report.regions = [Region(**r) for r in plain["regions"]]
    for step in plain["rewrites"]:
        facts: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in step.items()}
        rewrites.append(Rewrite(**facts))
    report.rewrites = rewrites
    return report


def _cut(plain: dict[str, Any]) -> Any:
    from dyncc.passes.cut import Cut
    from dyncc.passes.kept_rows import Kept

    return Cut(**{**plain, "hidden_from": tuple(plain["hidden_from"]), "after": Kept(**plain["after"])})
