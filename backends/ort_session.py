"""ONNX files opened in ONNX Runtime, set as the engine's own sessions are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dyncc.backends.onnx_names import Names
from dyncc.backends.onnxruntime import runtime, session_options


def open_session(model: Path) -> Any:
    """A session on a file, on the GPU where ONNX Runtime finds one, else on the CPU.

    Raises:
        PackageMissing: onnxruntime is not installed.
    """
    ort = runtime()
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider") if torch.cuda.is_available() else ("CPUExecutionProvider",)
    providers = [name for name in wanted if name in ort.get_available_providers()]
    return ort.InferenceSession(str(model), session_options(), providers=providers)


def run_session(session: Any, names: Names, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """One call by name; an input that the exported graph has no use for is left out."""
    known = {given.name for given in session.get_inputs()}
    feed = {name: t.detach().cpu().contiguous().numpy() for name, t in zip(names.inputs, tensors, strict=True) if name in known}
    return [torch.from_numpy(array) for array in session.run(list(names.outputs), feed)]
