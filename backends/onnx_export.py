"""ONNX export: a program as an ONNX model, opset 23, with the sizes that vary kept symbolic.

torch.export's form goes through torch's own exporter (onnxscript): attention becomes `Attention`, torch.cond `If`, choosing rows `TopK`
and gathers. What comes out uses standard ops only; `ort_fuse` may put ONNX Runtime's own in afterwards.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dyncc import exported
from dyncc.backends.onnx_names import Names
from dyncc.capture import Signature
from dyncc.errors import DynccError, PackageMissing
from dyncc.ir import Program

if TYPE_CHECKING:
    import onnx_ir

OPSET = 23


class OnnxExportError(DynccError):
    """The program has no ONNX form; the message says what stands in the way."""


def to_onnx(program: Program, signature: Signature, example: Sequence[torch.Tensor], names: Names) -> onnx_ir.Model:
    """The model of a program; `example` holds one tensor for each input (sizes as captured).

    Raises:
        OnnxExportError: an op has no ONNX form; it is named.
        PackageMissing: onnx or onnxscript is not installed.
    """
    try:
        from dyncc.backends.onnx_ops import TRANSLATIONS
    except ImportError as error:
        raise PackageMissing(package="onnxscript", purpose="to export to ONNX") from error
    taken = exported.flat(program, signature, example)
    try:
        with quiet(), torch.no_grad():
            made = torch.onnx.export(
                taken,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=TRANSLATIONS,
                input_names=list(names.inputs),
                output_names=list(names.outputs),
                optimize=True,
                verbose=False,
            )
    except Exception as error:
        raise OnnxExportError(f"no ONNX form: {_cause(error)}") from error
    model = made.model
    _widen_rotary_caches(model)
    _name_sizes(model, names.sizes)
    return model


def _cause(error: BaseException) -> str:
    """The innermost reason in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _widen_rotary_caches(model: onnx_ir.Model) -> None:
    """Give `RotaryEmbedding` a cosine and sine for every row of the batch: the exporter leaves one for all, which the op forbids."""
    import onnx_ir as ir

    for node in [n for n in model.graph.all_nodes() if n.op_type == "RotaryEmbedding" and n.domain == "" and len(n.inputs) == 3]:
        for slot in (1, 2):
            cache = node.inputs[slot]
            if cache is None or _same_batch(cache, node.inputs[0]):
                continue
            batch = ir.node("Shape", [node.inputs[0]], attributes={"start": 0, "end": 1})
            rest = ir.node("Shape", [cache], attributes={"start": 1, "end": 3})
            size = ir.node("Concat", [batch.outputs[0], rest.outputs[0]], attributes={"axis": 0})
            wide = ir.node("Expand", [cache, size.outputs[0]])
            assert node.graph is not None
            node.graph.insert_before(node, [batch, rest, size, wide])
            node.replace_input_with(slot, wide.outputs[0])


def _same_batch(a: Any, b: Any) -> bool:
    return a.shape is not None and b.shape is not None and bool(a.shape[0] == b.shape[0])


def _name_sizes(model: onnx_ir.Model, sizes: dict[str, str]) -> None:
    """Readable names for symbolic sizes of inputs and outputs."""
    import onnx_ir as ir
    import sympy

    symbols = {sympy.Symbol(old): sympy.Symbol(new) for old, new in sizes.items()}
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.shape is None:
            continue
        dims = [_renamed(dim, symbols) for dim in value.shape]
        value.shape = ir.Shape(dims)


def _renamed(dim: Any, symbols: dict[Any, Any]) -> Any:
    import sympy

    text = getattr(dim, "value", dim)
    if not isinstance(text, str):
        return dim
    try:
        return str(sympy.sympify(text, locals={str(s): s for s in symbols}).subs(symbols))
    except (sympy.SympifyError, SyntaxError, TypeError):
        return text


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings inside: torch's exporter warns of packages that have nothing to do with the model."""
    names = ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir", "onnx_ir.serde")
    loggers = [logging.getLogger(name) for name in names]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)
