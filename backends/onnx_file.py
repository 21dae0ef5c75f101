"""An ONNX file of an optimized program: exported, fused for ONNX Runtime, checked, and only then put under its name."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import torch

from dyncc.analysis.facts import analyse
from dyncc.backends.onnx_export import OnnxExportError, quiet, to_onnx
from dyncc.backends.onnx_names import Names, names_of
from dyncc.backends.onnx_verify import Parity, parity, points
from dyncc.backends.ort_fuse import fuse_attention
from dyncc.backends.ort_session import open_session, run_session
from dyncc.capture import Signature
from dyncc.errors import OutputNotWritable
from dyncc.ir import Program

if TYPE_CHECKING:
    import onnx_ir

INLINE = 1 << 30
"""Weights of more bytes go into a file beside the model's (protobuf ends at 2 GiB)."""


class ParityError(OnnxExportError):
    """The exported file does not compute what the optimized model computes; nothing was left under its name."""


@dataclass(frozen=True)
class OnnxFile:
    """What was written: the path, names of inputs and outputs, fused ops with what was expected, the parity table, and, where ONNX
    Runtime fails on its own fused ops or is slower with them, why the file has standard ones instead."""

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    fused: dict[str, int]
    parity: tuple[Parity, ...]
    undone: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path), "inputs": list(self.inputs), "outputs": list(self.outputs), "fused": self.fused,
            "parity": [row.to_dict() for row in self.parity], "undone": self.undone,
        }  # fmt: skip

    def __str__(self) -> str:
        fused = ", ".join(f"{n} {name}" for name, n in self.fused.items() if n) or "nothing"
        undone = [f"  fusions undone: {self.undone}"] if self.undone else []
        return "\n".join([f"{self.path}", f"  fused: {fused}", *undone, *(f"  {row}" for row in self.parity)])


def build(
    program: Program, signature: Signature, example: Sequence[torch.Tensor], portable: bool
) -> tuple[onnx_ir.Model, Names, Counter[str]]:
    """The model, its names, and counts of fused ops; `portable` uses standard ONNX ops only."""
    from dyncc.backends.ort_graph import optimise

    names = names_of(program, signature, analyse(program))
    if portable:
        return to_onnx(program, signature, example, names), names, Counter()
    fused, counts = fuse_attention(program)
    model = to_onnx(fused, signature, example, names)
    with quiet():
        found = optimise(model)
    return model, names, counts + found


def write(
    path: Path,
    programs: tuple[Program, Program],
    signature: Signature,
    example: Sequence[torch.Tensor],
    *,
    metadata: Mapping[str, str],
    verify: bool = True,
    portable: bool = False,
) -> OnnxFile:
    """Export the first of `programs` (rewritten, dense) to `path`; fused ops that fail or do not help here are undone, with the reason.

    Raises:
        OnnxExportError: an op has no ONNX form.
        ParityError: ONNX Runtime computes something else; nothing is left under the name.
        OutputNotWritable: the folder cannot be written.
    """
    if portable or not verify:
        return _write(path, programs, signature, example, metadata, verify, portable)
    try:
        made = _write(path, programs, signature, example, metadata, verify, False)
    except ParityError as error:
        plain = _write(path, programs, signature, example, metadata, verify, True)
        return replace(plain, undone=" ".join(str(error).split())[:300])
    return _unless_slower(made, programs, signature, example, metadata)


def _unless_slower(
    made: OnnxFile,
    programs: tuple[Program, Program],
    signature: Signature,
    example: Sequence[torch.Tensor],
    metadata: Mapping[str, str],
) -> OnnxFile:
    """The fused file, or in its place one of standard ops where that is faster on the example. Large models are not measured."""
    from dyncc.backends.onnx_measure import SHORT, call_seconds, slowdown

    path, names = made.path, Names(made.inputs, made.outputs, {})
    if sum(tensor.nbytes for tensor in signature.state) > INLINE or (seconds := call_seconds(path, names, example)) < SHORT:
        return made
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        try:
            plain = _write(Path(folder) / path.name, programs, signature, example, metadata, True, True)
        except OnnxExportError:
            return made
        words = slowdown(path, plain.path, names, example, seconds)
        if not words:
            return made
        os.replace(plain.path, path)
    return replace(plain, path=path, undone=words)


def _write(
    path: Path,
    programs: tuple[Program, Program],
    signature: Signature,
    example: Sequence[torch.Tensor],
    metadata: Mapping[str, str],
    verify: bool,
    portable: bool,
) -> OnnxFile:
    model, names, fused = build(programs[0], signature, example, portable)
    model.metadata_props.update(metadata)
    model.producer_name = "dyncc"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise OutputNotWritable(path=path.parent, problem=error.strerror or str(error)) from error
    try:
        _save(model, aside / path.name)
        rows = _verify(aside / path.name, programs, signature, example, names) if verify else []
        if rows:
            model.metadata_props["dyncc.parity"] = json.dumps([row.to_dict() for row in rows])
            _save(model, aside / path.name)
        for file in sorted(aside.iterdir(), key=lambda f: f.name == path.name):  # the model last: it names the other
            os.replace(file, path.parent / file.name)
    except OSError as error:
        raise OutputNotWritable(path=path, problem=error.strerror or str(error)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return OnnxFile(path, names.inputs, names.outputs, dict(fused), tuple(rows))


def _save(model: onnx_ir.Model, path: Path) -> None:
    import onnx_ir as ir

    for value in _values(model.graph):
        if value.dtype is None:
            value.shape = None  # a shape of unknown type cannot be written, nor can notes on it
            value.metadata_props.clear()
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    with quiet():
        ir.save(model, path, external_data=f"{path.name}.data" if weights > INLINE else None)
    onnx.checker.check_model(path)
    for file in path.parent.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())


def _values(graph: onnx_ir.Graph) -> list[onnx_ir.Value]:
    return [value for node in graph.all_nodes() for value in node.outputs]


def _verify(
    path: Path, programs: tuple[Program, Program], signature: Signature, example: Sequence[torch.Tensor], names: Names
) -> list[Parity]:
    def model(program: Program) -> Any:
        copied = {i for _, i in signature.copies}

        def run(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            with torch.no_grad():
                results = program.module(*(t.clone() for t in signature.state) if signature.copies else signature.state, *tensors)
            return [r for i, r in enumerate(results[: signature.results]) if i not in copied and isinstance(r, torch.Tensor)]

        return run

    where = points(programs[1], len(signature.state), example)
    rewritten, dense = map(model, programs)
    try:
        session = open_session(path)
        rows = parity(lambda tensors: run_session(session, names, tensors), rewritten, dense, where, names.outputs)
    except Exception as error:
        raise ParityError(f"ONNX Runtime fails on the file: {' '.join(str(error).split())[:400]}") from error
    if failed := [row for row in rows if not row.holds]:
        raise ParityError("ONNX Runtime disagrees with the optimized model:\n" + "\n".join(f"  {row}" for row in failed))
    return rows
