"""The ONNX Runtime engine, for inference: weights shared with the module where they can be, inputs and outputs bound without copies."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dyncc.backends.flat_call import FlatCall
from dyncc.backends.onnx_flat import ELEMENTS, exported, is_outside, used_names, with_state
from dyncc.errors import NotTaken, PackageMissing
from dyncc.ir import Program, is_tensor, val

if TYPE_CHECKING:
    import onnx

HALVES = (torch.float16, torch.bfloat16)


def lower(program: Program, inputs: list[Any], *, dynamic: bool = False) -> FlatCall:
    """A session for a program; `inputs` are real flat inputs.

    Raises:
        NotTaken: gradients are asked for, or the program has no ONNX form, or ONNX Runtime has no kernel for it.
        PackageMissing: onnxruntime is not installed.
    """
    runtime()
    from dyncc.backends.ort_graph import for_session

    refuse_gradients(program)
    device = device_of(program)
    if device.type == "cpu" and any(is_tensor(n) and val(n).dtype in HALVES for n in program.graph.nodes):
        raise NotTaken("ONNX Runtime computes half precision in float32 on CPUs, which is not the model's precision")
    form, model = exported(program)
    run = FlatCall("onnxruntime", program, form, lambda state: OrtSession(for_session(model, state), state, device), inputs)
    own = sum(tensor.numel() * tensor.element_size() for tensor in (held.tensor for held in run.held.values()))
    run.notes.append(f"{own / 1e6:.1f} MB of weights stay the module's own; the session adds a packed copy of those that it multiplies by")
    return run


def refuse_gradients(program: Program) -> None:
    """NotTaken where a graph's gradients will be asked for."""
    if program.needs_grad:
        raise NotTaken("inference only; wrap the call in torch.inference_mode()")


def device_of(program: Program) -> torch.device:
    """The one device that a program's tensors live on."""
    devices = {val(n).device for n in program.graph.nodes if n.op == "placeholder" and is_tensor(n)}
    if len(devices) > 1:
        raise NotTaken(f"the graph's inputs live on several devices ({', '.join(sorted(map(str, devices)))})")
    return next(iter(devices), torch.device("cpu"))


SLOW_ON_CPU = ["SkipLayerNormFusion"]
"""What a session would do by itself when it is made: a norm with its residual in one op, 4 to 5 times as slow as both apart."""


class OrtSession:
    """A model with its state in an InferenceSession."""

    def __init__(self, model: onnx.ModelProto, state: Mapping[str, torch.Tensor], device: torch.device) -> None:
        ort = runtime()
        self.device = device
        self.state = {name: tensor.cpu() for name, tensor in state.items()}
        used = used_names(model.graph)
        outside = {name: tensor for name, tensor in self.state.items() if is_outside(tensor) and name in used}
        options = session_options()
        values = [_value(tensor) for tensor in outside.values()]
        if outside:
            options.add_external_initializers(list(outside), values)
        made = with_state(model, self.state).SerializeToString()
        try:
            without = SLOW_ON_CPU if device.type == "cpu" else []
            self.session = ort.InferenceSession(made, options, providers=_providers(device), disabled_optimizers=without)
        except Exception as error:
            raise NotTaken(f"ONNX Runtime does not take the model: {' '.join(str(error).split())[:300]}") from error
        if device.type == "cuda" and self.session.get_providers()[0] != "CUDAExecutionProvider":
            raise NotTaken("ONNX Runtime finds no CUDA here (onnxruntime-gpu and its CUDA libraries are needed)")
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]
        del made, options
        _trim()

    def run(self, inputs: Sequence[torch.Tensor], room: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """Bound by address; outputs of unknown size are made by ONNX Runtime and shared."""
        binding = self.session.io_binding()
        kind, index = self.device.type, self.device.index or 0
        for name, tensor in zip(self.inputs, inputs, strict=True):
            address = tensor.data_ptr() or torch.empty(1, dtype=torch.float64, device=tensor.device).data_ptr()  # of an empty tensor: any
            binding.bind_input(name, kind, index, ELEMENTS[tensor.dtype], tuple(tensor.shape), address)
        for name, own in zip(self.outputs, room, strict=True):
            if own is None or own.numel() == 0:
                binding.bind_output(name, kind, index)
            else:
                binding.bind_output(name, kind, index, ELEMENTS[own.dtype], tuple(own.shape), own.data_ptr())
        self.session.run_with_iobinding(binding)
        if all(own is not None for own in room):
            return [own for own in room if own is not None]
        made = binding.get_outputs()
        return [torch.from_dlpack(value) if own is None else own for own, value in zip(room, made, strict=True)]


def session_options() -> Any:
    """As many threads as PyTorch uses, which wait busily in a call and never behind it, every graph optimisation, and no log lines."""
    ort = runtime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")  # PyTorch's threads need the cores then
    return options


def runtime() -> Any:
    """The onnxruntime module, or PackageMissing."""
    try:
        import onnxruntime
    except ImportError as error:
        name = "onnxruntime" if sys.platform == "darwin" else "onnxruntime-gpu"
        raise PackageMissing(package=name, purpose='for engine "onnxruntime"') from error
    return onnxruntime


def _providers(device: torch.device) -> list[Any]:
    if device.type == "cpu":
        return ["CPUExecutionProvider"]
    if device.type != "cuda" or "CUDAExecutionProvider" not in runtime().get_available_providers():
        raise NotTaken(f"ONNX Runtime has no provider for {device} here")
    stream = str(torch.cuda.current_stream(device).cuda_stream)
    return [("CUDAExecutionProvider", {"device_id": device.index or 0, "user_compute_stream": stream}), "CPUExecutionProvider"]


def _value(tensor: torch.Tensor) -> Any:
    """ONNX Runtime's view of a tensor's memory; the tensor must outlive it."""
    plain = tensor.view(torch.uint16).numpy() if tensor.dtype is torch.bfloat16 else tensor.numpy()
    return runtime().OrtValue.ortvalue_from_numpy_with_onnx_type(plain, ELEMENTS[tensor.dtype])


def _trim() -> None:
    """Give memory that making a session took back to the system, where the C library can."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
