"""What capture would not see is refused by name, with what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import dyncc
from dyncc.errors import UnsupportedModel
from dyncc.surface import check_surface


class DTensor(torch.Tensor):
    """Stands for a sharded weight: known by the name of its type."""


class Packed(torch.Tensor):
    """Stands for the weight type of a quantiser."""


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))


def offloaded() -> nn.Module:
    made = model()
    made[1][0]._hf_hook = object()
    return made


def adapted() -> nn.Module:
    made = model()
    made[0].lora_A = nn.ModuleDict({"default": nn.Linear(4, 2)})
    return made


def adapted_embedding() -> nn.Module:
    made = adapted()
    made[0].lora_embedding_A = made[0].__dict__["_modules"].pop("lora_A")
    return made


def weight(value: torch.Tensor) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made = model()
        made[1][0].weight = nn.Parameter(value, requires_grad=False)
        return made

    return make


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "hook": (offloaded, "1.0 has a device_map (offloading) hook"),
    "adapter": (adapted, "0 is an adapter that is not merged"),
    "embedding adapter": (adapted_embedding, "0 is an adapter that is not merged"),
    "int8": (weight(torch.ones(4, 4, dtype=torch.int8)), "1.0.weight is a quantised weight"),
    "uint8": (weight(torch.ones(4, 4, dtype=torch.uint8)), "torch.uint8"),
    "sharded": (weight(torch.ones(4, 4).as_subclass(DTensor)), "1.0.weight is sharded over devices (tensor parallel)"),
    "weight type": (weight(torch.ones(4, 4).as_subclass(Packed)), "1.0.weight is a quantised weight (Packed, torch.float32)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    make, words = REFUSED[name]
    with pytest.raises(UnsupportedModel) as raised:
        check_surface(make())
    assert words in str(raised.value)
    assert "; " in str(raised.value) or "load" in str(raised.value)


def test_optimize_checks_first() -> None:
    with pytest.raises(UnsupportedModel, match="device_map"):
        dyncc.optimize(offloaded(), (torch.randn(1, 4),))


def test_the_top_module_goes_by_its_type() -> None:
    made = nn.Linear(4, 4)
    made._hf_hook = object()
    with pytest.raises(UnsupportedModel, match="Linear has a device_map"):
        check_surface(made)


def test_plain_and_merged_models_pass() -> None:
    made = adapted()
    made[0].merged = True
    check_surface(made)
    check_surface(model().to(torch.bfloat16))
