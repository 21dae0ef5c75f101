"""The OpenVINO engine, for inference on CPUs: the same ONNX model as ONNX Runtime gets, computed in the model's own precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dyncc.backends.flat_call import FlatCall
from dyncc.backends.onnx_flat import exported, with_state
from dyncc.backends.onnxruntime import device_of, refuse_gradients
from dyncc.errors import NotTaken, PackageMissing
from dyncc.ir import Program, is_tensor, val

if TYPE_CHECKING:
    import onnx

PRECISIONS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
LARGEST = 1 << 31
"""Bytes that a model may take as one message."""


def lower(program: Program, inputs: list[Any], *, dynamic: bool = False) -> FlatCall:
    """A compiled model for a program; `inputs` are real flat inputs.

    Raises:
        NotTaken: gradients are asked for, or the program has no ONNX form, or OpenVINO does not take it.
        PackageMissing: openvino is not installed.
    """
    _openvino()
    refuse_gradients(program)
    if device_of(program).type != "cpu":
        raise NotTaken(f"OpenVINO runs on CPUs here, the graph is on {device_of(program)}")
    precision = _precision(program)
    form, model = exported(program)
    return FlatCall("openvino", program, form, lambda state: OpenVinoSession(model, state, precision), inputs)


def _precision(program: Program) -> str:
    """The one floating type of a program, which OpenVINO is held to."""
    kinds = {val(n).dtype for n in program.graph.nodes if is_tensor(n) and val(n).is_floating_point()}
    if len(kinds) > 1 or not kinds <= set(PRECISIONS):
        raise NotTaken(f"OpenVINO computes in one precision, the graph uses {', '.join(sorted(map(str, kinds)))}")
    return PRECISIONS[next(iter(kinds), torch.float32)]


class OpenVinoSession:
    """A model with its state, compiled."""

    def __init__(self, model: onnx.ModelProto, state: Mapping[str, torch.Tensor], precision: str) -> None:
        ov = _openvino()
        made = with_state(model, state, inline=True)
        if made.ByteSize() >= LARGEST:
            raise NotTaken("the model is larger than 2 GB, which OpenVINO cannot read from memory")
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        try:
            core = ov.Core()
            self.compiled = core.compile_model(core.read_model(made.SerializeToString()), "CPU", settings)
        except Exception as error:
            raise NotTaken(f"OpenVINO does not take the model: {' '.join(str(error).split())[:300]}") from error
        self.ov = ov

    def run(self, inputs: Sequence[torch.Tensor], room: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """Inputs and outputs of known sizes are shared; a request a call, so that no result is overwritten by the next."""
        request = self.compiled.create_infer_request()
        for number, tensor in enumerate(inputs):
            request.set_input_tensor(number, self._shared(tensor))
        for number, own in enumerate(room):
            if own is not None and own.numel():
                request.set_output_tensor(number, self._shared(own))
        request.infer()
        return [self._made(request, number) if own is None else own for number, own in enumerate(room)]

    def _made(self, request: Any, number: int) -> torch.Tensor:
        return torch.from_numpy(request.get_output_tensor(number).data.copy())

    def _shared(self, tensor: torch.Tensor) -> Any:
        if tensor.dtype is torch.bfloat16:
            return self.ov.Tensor(tensor.view(torch.int16).numpy(), tuple(tensor.shape), self.ov.Type.bf16)
        return self.ov.Tensor(tensor.numpy(), shared_memory=True)


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise PackageMissing(package="openvino", purpose='for engine "openvino"') from error
    return openvino
