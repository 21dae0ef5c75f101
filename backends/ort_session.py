"""ONNX Runtime sessions, set for latency, with the threads that torch uses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dyncc.errors import PackageMissing


def runtime() -> Any:
    """The onnxruntime module.

    Raises:
        PackageMissing: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise PackageMissing(package="onnxruntime", purpose="to run ONNX models") from error
    return onnxruntime


def open_session(model: Path | bytes) -> Any:
    """A session on a file or serialised model, on the GPU where ONNX Runtime finds one, else on the CPU."""
    ort = runtime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE":
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider") if torch.cuda.is_available() else ("CPUExecutionProvider",)
    providers = [name for name in wanted if name in ort.get_available_providers()]
    return ort.InferenceSession(str(model) if isinstance(model, Path) else model, options, providers=providers)


def run_session(session: Any, names: Any, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """One call by name; an input that the exported graph has no use for is left out."""
    known = {given.name for given in session.get_inputs()}
    feed = {name: t.detach().cpu().contiguous().numpy() for name, t in zip(names.inputs, tensors, strict=True) if name in known}
    return [torch.from_numpy(array) for array in session.run(list(names.outputs), feed)]
