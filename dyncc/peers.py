"""What a benchmark compares with: the same model, dense, run by others in the same process, precision and number of threads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dyncc.errors import DynccError, DynccUsageError


class PeerFailed(DynccError):
    """A peer does not run the model; the message says why. The benchmark reports it and goes on."""


def build(
    name: str, model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic_shapes: Any = None
) -> Callable[..., Any]:
    """The model as a peer runs it.

    Args:
        name: one of `dyncc.options.PEERS`, or any backend of torch.compile.
    Raises:
        PeerFailed: the peer does not take the model.
    """
    if name == "eager":
        return model
    if name in ("onnxruntime", "openvino"):
        return _engine(name, model, args, kwargs, dynamic_shapes)
    if name == "transformers-onnx":
        return _transformers(model, args, kwargs)
    compiled: Callable[..., Any] = torch.compile(model, backend=name, dynamic=dynamic_shapes is not None)
    return compiled


def _engine(name: str, model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic_shapes: Any) -> Callable[..., Any]:
    """The dense model through dyncc's export; under strict, so that Inductor does not stand in for the peer."""
    from dyncc.runtime import optimize

    options: dict[str, Any] = {"passes": "", "evidence": "off", "strict": True, "dynamic_shapes": dynamic_shapes}
    try:
        return optimize(model, tuple(args), dict(kwargs), engine=name, **options)
    except DynccUsageError as error:
        raise PeerFailed(str(error)) from error


def _transformers(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """transformers' own ONNX export with its fusions for ONNX Runtime on CPUs, in its own runner."""
    try:
        from transformers import PreTrainedModel
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

        from dyncc.backends.onnxruntime import session_options
    except ImportError as error:
        raise PeerFailed(f"transformers with exporters is needed ({error})") from error
    if not isinstance(model, PreTrainedModel):
        raise PeerFailed(f"it exports models of transformers only, not a {type(model).__name__}")
    names = inspect.signature(model.forward)
    given = _named(names, args, kwargs)
    exported = OnnxExporter().export(model, given, config=OnnxConfig(ort_fusions="cpu"))
    exported.to(device="cpu", session_options=session_options())
    return lambda *args, **kwargs: exported(**_named(names, args, kwargs))


def _named(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    found: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        found |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return {name: value for name, value in found.items() if value is not None}
