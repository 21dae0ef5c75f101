"""A program as JSON text and back: torch.export's own form of it, without the archive that holds weights and pickled inputs beside it.

torch looks up every op that a text names and evaluates every size it spells, so a text is screened before torch sees it.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from dyncc.capture import Signature, from_exported
from dyncc.errors import ArtefactUnreadable, UnsupportedModel
from dyncc.exported import shaped
from dyncc.ir import Program

TARGET = re.compile(r"torch\.ops\.\w+\.\w+(\.\w+)?|_operator\.[a-z]\w*|math\.\w+|torch\.(sym|_sym)_\w+")
SIZE = re.compile(
    r"""(\s | [()+\-*/,<>=&|~^] | (?<![.\w])\d+(\.\d*)?
      | '[suz][a-z]*\d+' | \b(positive|integer|nonnegative|real)=(True|False)\b
      | \b([suz][a-z]*\d+|[A-Z]\w*|oo|int_oo|floor|ceiling|sqrt|log|exp)\b)*""",
    re.VERBOSE,
)


def to_text(program: Program, signature: Signature) -> bytes:
    """The program that is called like the model, as JSON. It holds no weights, no example and no lines of the user's code.

    Raises:
        UnsupportedModel: the model takes or returns a type that torch cannot write down.
    """
    from torch._export.serde.serialize import serialize

    exported = shaped(program, replace(signature, state=tuple(_hollow(t) for t in signature.state)), (), {})
    for node in exported.graph.nodes:
        node.meta.pop("stack_trace", None)
    try:
        return bytes(serialize(exported).exported_program)
    except Exception as error:
        hint = "register the types that the model takes and returns with torch.utils._pytree, with a serialized_type_name"
        raise UnsupportedModel(what=f"The program cannot be written down ({_told(error)})", hint=hint) from error


def _hollow(tensor: torch.Tensor) -> torch.Tensor:
    """The same kind of tensor without data."""
    empty = torch.empty_like(tensor, device="meta")
    return torch.nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else empty


def from_text(text: bytes, tensors: Mapping[str, torch.Tensor]) -> tuple[Program, Signature]:
    """The program of a text, over tensors that go by the names of its state. Nothing of it is run.

    Raises:
        ArtefactUnreadable: this torch cannot read it, or it asks for what no model's program asks for.
    """
    from torch._export.serde.serialize import SerializedArtifact, deserialize

    tree = json.loads(text)
    screen(tree)
    register_types(tree)
    try:
        specs = tree["graph_module"]["signature"]["input_specs"]
        constants = {s["tensor_constant"]["tensor_constant_name"] for s in specs if "tensor_constant" in s}
        state = {name: tensor for name, tensor in tensors.items() if name not in constants}
        exported = deserialize(SerializedArtifact(text, state, {name: tensors[name] for name in constants}, b""))  # type: ignore[arg-type]
        return from_exported(exported)
    except Exception as error:
        hint = f"it was saved with torch {tree.get('torch_version')}, this is {torch.__version__}: load it there, or save it again here"
        raise ArtefactUnreadable(problem=f"torch cannot read the program in it ({_told(error)})", hint=hint) from error


def apart(program: Program, signature: Signature) -> tuple[Program, Signature]:
    """The same program, over the same tensors, with sizes of its own: what a compiler finds out about them stays there."""
    names = [given.name for given in program.inputs]
    return from_text(to_text(program, signature), dict(zip(names, signature.state, strict=False)))


def screen(tree: Any) -> None:
    """Refuse a text that names anything but ops, or spells anything but sizes.

    >>> screen({"target": "torch.ops.aten.add.Tensor", "sizes": [{"as_expr": {"expr_str": "Min(Integer(5), Symbol('s1', integer=True))"}}]})
    >>> screen({"target": "torch.os.system"})
    Traceback (most recent call last):
    dyncc.errors.ArtefactUnreadable: not loaded: it calls 'torch.os.system', which is no op of a model; save it again from the model
    """
    if isinstance(tree, dict) and tree.get("guards_code"):
        raise ArtefactUnreadable(problem="it brings code of its own", hint="save it again from the model")
    for entry in _objects(tree):
        target, size = entry.get("target"), entry.get("expr_str")
        if isinstance(target, str) and not TARGET.fullmatch(target):
            raise ArtefactUnreadable(problem=f"it calls {target!r}, which is no op of a model", hint="save it again from the model")
        if isinstance(size, str) and not SIZE.fullmatch(size):
            raise ArtefactUnreadable(problem=f"it holds {size[:60]!r}, which is no size", hint="save it again from the model")


def register_types(tree: Any) -> None:
    """See that the types that a program takes and returns are known here; those of transformers are imported."""
    for entry in _objects(tree):
        for name in ("in_spec", "out_spec"):
            if isinstance(entry.get(name), str):
                _register(json.loads(entry[name]))


def _register(spec: Any) -> None:
    for entry in _objects(spec):
        kind = entry.get("type")
        if not isinstance(kind, str) or kind in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
            continue
        module = kind.rpartition(".")[0]
        if module.partition(".")[0] == "transformers":
            _import(module)
        if kind not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
            raise ArtefactUnreadable(problem=f"it takes or returns {kind}, which is not known here", hint=f"import {module} first")


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ArtefactUnreadable(problem=f"it needs {module} ({error})", hint="pip install transformers") from error


def _objects(tree: Any) -> Iterator[dict[str, Any]]:
    """Every object of a JSON value, at any depth."""
    if isinstance(tree, dict):
        yield tree
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _objects(child)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
