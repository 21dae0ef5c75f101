"""What a model may carry that capture would not see or not understand; each is refused by name, with what to do."""

from __future__ import annotations

import torch

from dyncc.errors import UnsupportedModel


def check_surface(model: torch.nn.Module) -> None:
    """Raise UnsupportedModel for hooks that move weights, sharded or quantised weights, and adapters that are not merged."""
    for name, module in model.named_modules():
        where = name or type(model).__name__
        if hasattr(module, "_hf_hook"):
            raise UnsupportedModel(what=f"{where} has a device_map (offloading) hook", hint="load the model without device_map")
        if any(hasattr(module, a) for a in ("lora_A", "lora_embedding_A")) and not getattr(module, "merged", False):
            raise UnsupportedModel(what=f"{where} is an adapter that is not merged", hint="call merge_and_unload() first")
    for name, weight in model.named_parameters():
        kind = type(weight.data)
        if kind.__name__ == "DTensor":
            raise UnsupportedModel(what=f"{name} is sharded over devices (tensor parallel)", hint="load the model on one device")
        if kind not in (torch.Tensor, torch.nn.Parameter) or weight.is_quantized or weight.dtype in (torch.int8, torch.uint8):
            what = f"{name} is a quantised weight ({kind.__name__}, {weight.dtype})"
            raise UnsupportedModel(what=what, hint="load the model unquantised")
