"""An optimized model in the form that a file name asks for: ONNX, an AOTInductor package, torch.export's `.pt2`, or an artefact folder.

A file is written beside its place, run there on the example inputs, and takes its place only when its outputs are those of the model.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from dyncc.analysis.facts import analyse
from dyncc.artefact import is_artefact, load, write
from dyncc.backends.permuted_keys import spelled_safely
from dyncc.capture import CaptureError
from dyncc.dynamic import Call, one_is_a_size, varying_sizes, widened
from dyncc.errors import FileMismatch, InputMismatch, UnknownOutputKind
from dyncc.evidence import beyond_tolerance, own_random_numbers, run_isolated
from dyncc.exported import shaped
from dyncc.outputs import check_place, replaced_file, replaced_folder, writable_folder
from dyncc.runtime import Optimized, optimize
from dyncc.serialised import apart

KINDS = {".onnx": "onnx", ".aoti.pt2": "aotinductor", ".pt2": "pt2"}


def kind_of(path: Path) -> str:
    """What a file name asks for.

    >>> kind_of(Path("a/model.aoti.pt2")), kind_of(Path("model"))
    ('aotinductor', 'artefact')
    """
    for ending, kind in KINDS.items():
        if path.name.endswith(ending) and path.name != ending:
            return kind
    if path.suffix:
        raise UnknownOutputKind(path=path)
    return "artefact"


def check_output(path: Path) -> None:
    """Refuse early, before the model is loaded, what would fail at the end.

    Raises:
        UnknownOutputKind: the name says nothing about what to write.
        OutputNotWritable: the place cannot be written, or something else stands there.
    """
    check_place(path, is_artefact if kind_of(path) == "artefact" else None)
    writable_folder(path.expanduser().parent)


def convert(optimized: Optimized, path: Path, *, calls: Sequence[Call], verify: bool = True) -> dict[str, Any]:
    """Write a model and say what was written.

    Args:
        calls: example calls that the file must answer as the model does.
        verify: run the file before it takes its place.
    Raises:
        FileMismatch: it gives other outputs; nothing is left under the name.
        OutputNotWritable: the place cannot be written.
    """
    kind = kind_of(path)
    start = time.perf_counter()
    verified: Any
    if kind == "onnx":
        written = optimized.export_onnx(path, verify=verify)  # puts its file, or two, in place by itself
        verified = {"parity": [row.to_dict() for row in written.parity], "fused": written.fused, "undone": written.undone}
        size = sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}.data")) if file.is_file())
    else:
        with replaced_folder(path, is_artefact) if kind == "artefact" else replaced_file(path) as fresh:
            run = WRITERS[kind](optimized, fresh)
            verified = check(optimized, run, calls, path) if verify else None
            size = sum(file.stat().st_size for file in fresh.rglob("*")) if fresh.is_dir() else fresh.stat().st_size
    steps = {state: [r.text for r in optimized.report.rewrites if r.applied is (state == "applied")] for state in ("applied", "refused")}
    figures = {"path": str(path), "kind": kind, "bytes": size, "seconds": time.perf_counter() - start}
    return {**figures, **steps, "holds_for": optimized.report.lengths, "verified": verified if verify else None}


def convert_model(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    path: Path,
    *,
    verify: bool,
    dynamic: bool,
    tell: Callable[[str], None],
    **settings: Any,
) -> dict[str, Any]:
    """Optimize a model with sizes that vary, where `dynamic` and torch.export allow it, and write it; `tell` hears what it does not."""
    if dynamic:
        wide = widened(args, kwargs)
        found = _with_sizes(model, *(wide or (args, kwargs)), tell, settings)
        if found is not None and _accepts(found, args, kwargs):
            return convert(found, path, calls=[*([wide] if wide else []), (args, kwargs)], verify=verify)
    return convert(optimize(model, args, kwargs, **settings), path, calls=[(args, kwargs)], verify=verify)


def _with_sizes(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tell: Callable[[str], None], settings: dict[str, Any]
) -> Optimized | None:
    try:
        with one_is_a_size():
            found = optimize(model, args, kwargs, dynamic_shapes=varying_sizes(model, args, kwargs), **settings)
    except CaptureError as error:
        tell(f"the sizes stay as in the example: {error}")
        return None
    if not found._dynamic:
        tell("the sizes stay as in the example: the model allows no others")
    return found


def _accepts(optimized: Optimized, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        return bool(optimized._flat(args, kwargs))
    except InputMismatch:
        return False


def _pt2(optimized: Optimized, fresh: Path) -> Callable[[], Any]:
    from dyncc.loading import load_program

    assert optimized.example is not None
    torch.export.save(shaped(optimized._outcome.program, optimized._signature, *optimized.example), fresh)
    return lambda: load_program(fresh).module()


def _aotinductor(optimized: Optimized, fresh: Path) -> Callable[[], Any]:
    assert optimized.example is not None
    own, signature = apart(optimized._outcome.program, optimized._signature)
    program = shaped(spelled_safely(own), signature, *optimized.example)
    with torch.no_grad(), one_is_a_size(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch._inductor.aoti_compile_and_package(program, package_path=str(fresh))
    return lambda: torch._inductor.aoti_load_package(str(fresh))


def _artefact(optimized: Optimized, fresh: Path) -> Callable[[], Any]:
    write(optimized, fresh)
    return lambda: load(fresh, engine="reference")


WRITERS = {"pt2": _pt2, "aotinductor": _aotinductor, "artefact": _artefact}


def check(optimized: Optimized, run: Callable[[], Any], calls: Sequence[Call], path: Path) -> dict[str, Any]:
    """Run what was written on the example calls, each from the state that was saved; the worst error, or FileMismatch."""
    worst = 0.0
    for args, kwargs in calls:
        error, words = _compare(optimized, run(), args, kwargs)
        if words:
            raise FileMismatch(f"{path} was not written: reloaded, it gives other outputs than the model ({words})")
        worst = max(worst, error)
    return {"calls": len(calls), "error": worst}


def _compare(optimized: Optimized, written: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, str]:
    program = optimized._outcome.program
    results, _ = run_isolated(program.module, optimized._flat(args, kwargs), bool(analyse(program).mutated))
    wanted = pytree.tree_leaves(optimized._shaped(results))
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    try:
        with own_random_numbers(pytree.tree_leaves((args, kwargs))), torch.no_grad():
            given = pytree.tree_leaves(written(*args, **kwargs))
    except Exception as error:
        return float("inf"), f"it raises {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if len(given) != len(wanted):
        return float("inf"), f"{len(given)} values, not {len(wanted)}"
    return beyond_tolerance(wanted, given)
