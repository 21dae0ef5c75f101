"""Offline models under Inductor: Dynamo has no guard on each parameter, and what it would have seen is seen all the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import dyncc
from dyncc.backends.state_guard import StateGuard
from dyncc.capture import from_model


class Scaled(nn.Module):
    """[B, 4] -> [B, 3], with a buffer that is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scale


@pytest.mark.full
def test_values_are_read_anew_and_nothing_is_compiled_again() -> None:
    model, x = Scaled().eval(), torch.randn(2, 4)
    run = dyncc.optimize(model, (x,), passes="", engine="inductor", evidence="off")
    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: model.linear.weight.add_(1),
            lambda: model.load_state_dict(Scaled().state_dict()),
            lambda: model.scale.mul_(3),
            lambda: setattr(model.linear.weight, "data", torch.randn(3, 4)),
        ):
            change()
            torch.testing.assert_close(run(x), model(x))
    (compiled,) = run._lowered.values()
    assert isinstance(compiled, StateGuard) and compiled.builds == 1


def test_another_dtype_of_a_parameter_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: asked.append(options) or module)
    guarded = StateGuard(from_model(Scaled().eval(), (torch.randn(2, 4),))[0], dynamic=False, options={})
    state = [torch.randn(3, 4), torch.randn(3), torch.ones(1)]
    x = torch.randn(2, 4)
    wanted = nn.functional.linear(x, state[0], state[1]) * state[2]
    with torch.no_grad():
        torch.testing.assert_close(guarded(*state, x)[0], wanted)
        doubles = [t.double() for t in state]
        assert guarded.builds == 1 and guarded(*doubles, x.double())[0].dtype == torch.float64 and guarded.builds == 2
        again = [t.clone() for t in doubles]
        assert guarded(*again, x.double())[0].dtype == torch.float64 and guarded.builds == len(asked) == 2, "memory alone is exchanged"
    guards = [SimpleNamespace(name=name) for name in ("p_linear_weight", "L['p_linear_bias']", "x", "")]
    assert asked[0]["options"]["guard_filter_fn"](guards) == [False, False, True, True]
