"""Door 1: the model's state, gradients and errors are as they would be without dyncc."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import Tiny, inputs
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dyncc
from dyncc.evidence import relative_error

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

TOLERANCE = 1e-5


def compiled(model: Any, engine: str = "reference", **options: Any) -> Any:
    return torch.compile(model, backend="dyncc", options={"engine": engine, **options})


def reports_of(call: Callable[[], Any]) -> list[Any]:
    """The reports of the graphs that a call compiles."""
    before = len(dyncc.reports())
    call()
    return dyncc.reports()[before:]


class Attending(nn.Module):
    """Something with an attention in it, so that dyncc takes the graph; subclasses add the state."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        q = self.mix(x).view(*x.shape[:2], 2, 4).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(x.shape)


class AddsToItsInput(Attending):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.add_(1.0)
        return self.attend(x)


class Normalises(Attending):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attend(self.norm(x.transpose(1, 2)).transpose(1, 2))


class Counts(Attending):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen.mul_(0.9).add_(x.mean((0, 1)))
        return self.attend(x) * self.calls


class ReturnsItsInput(Attending):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, self.attend(x)


class ReturnsAView(Attending):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x[:, 1:].transpose(1, 2), self.attend(x)


class WritesAView(Attending):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x[:, 0].zero_()
        return self.attend(x) + x


class DropsOut(Attending):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.attend(x), 0.5) + torch.rand_like(x)


STATEFUL = (AddsToItsInput, Normalises, Counts, ReturnsItsInput, ReturnsAView, WritesAView, DropsOut)


def run_twice(model: Any, call: Any, x: torch.Tensor) -> tuple[list[Any], dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Outputs of two calls on one input, then the buffers, the input and the next random number."""
    torch.manual_seed(7)
    results = [copy.deepcopy(call(x)) for _ in range(2)]
    return results, dict(model.named_buffers()), x, torch.rand(1)


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        assert_same(list(a.values()), list(b.values()))
    else:
        assert a.stride() == b.stride() and relative_error(a, b) <= TOLERANCE


def check_state(kind: type[Attending], engine: str) -> None:
    torch.manual_seed(3)
    plain, x = kind().train(), torch.randn(2, 5, 8)
    other = copy.deepcopy(plain)
    with torch.no_grad():
        expected = run_twice(plain, plain, x.clone())
        torch._inductor.config.fallback_random = True
        found: list[Any] = []
        made = reports_of(lambda: found.append(run_twice(other, compiled(other, engine), x.clone())))
    assert_same(expected, found[0])
    assert len(made) == 1 and made[0].fallback is None and made[0].found_attention == 1


@pytest.mark.parametrize("kind", STATEFUL, ids=lambda k: k.__name__)
def test_state_after_one_and_two_calls_is_as_eager(kind: type[Attending]) -> None:
    check_state(kind, "reference")


@pytest.mark.parametrize("kind", [pytest.param(Counts, marks=pytest.mark.full), WritesAView], ids=lambda k: k.__name__)
def test_state_under_inductor_is_as_eager(kind: type[Attending]) -> None:
    check_state(kind, "inductor")


def test_an_output_that_is_the_input_stays_it() -> None:
    model, x = ReturnsItsInput(), torch.randn(2, 5, 8)
    view, own = ReturnsAView(), torch.randn(2, 5, 8)
    with torch.no_grad():
        assert compiled(model)(x)[0].data_ptr() == x.data_ptr()
        assert compiled(view)(own)[0].untyped_storage().data_ptr() == own.untyped_storage().data_ptr()


def test_inputs_that_share_memory() -> None:
    model = Attending()

    def step(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a.add_(1.0)
        return model.attend(a) + b

    bases = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    with torch.no_grad():
        for base in bases:
            other = base.clone()
            made = compiled(step)(other[:2], other[1:])
            assert_same(step(base[:2], base[1:]), made)
            assert_same(base, other)


def decoder(**changes: Any) -> tuple[Any, tuple[torch.Tensor, ...]]:
    tiny = Tiny(kind="decoder", returns="last", positions="rope", seed=2).with_(**changes)
    return tiny.build(), inputs(tiny, 2, 12)


# gradients
def test_gradients_of_exact_passes_are_those_of_eager() -> None:
    model, values = decoder()
    model(*values).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    made = reports_of(lambda: compiled(model)(*values).square().sum().backward())
    assert {r.name for r in made[0].rewrites if r.applied} >= {"slice-last-token", "drop-repeat-kv"}
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found) == len(expected)
    assert all(relative_error(a, b) <= 1e-4 for a, b in zip(expected, found, strict=True))


def test_pruning_is_refused_where_gradients_are_on() -> None:
    model, values = decoder()
    (report,) = reports_of(lambda: compiled(model, passes="prune-tokens{keep=0.5 layers=0}")(*values))
    assert not report.rewrites[0].applied and "wrap the call in torch.inference_mode()" in report.rewrites[0].reason


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_pruning_applies_where_they_are_off(mode: Any) -> None:
    model, values = decoder()
    with mode():
        (report,) = reports_of(lambda: compiled(model, passes="prune-tokens{keep=0.5 layers=0}")(*values))
    assert report.rewrites[0].applied, report.rewrites[0].reason


def test_keys_that_the_graph_returns_are_not_shortened() -> None:
    model, values = decoder(keys=True)
    with torch.no_grad():
        (report,) = reports_of(lambda: compiled(model, passes="prune-tokens{keep=0.5 layers=0}")(*values))
    assert "dyncc.KVCache(" in report.rewrites[0].reason and "or dyncc.optimize" in report.rewrites[0].reason


# what dyncc does not take
def test_a_higher_order_op_falls_back_and_is_named() -> None:
    model, x = Attending(), torch.randn(2, 5, 8, requires_grad=True)

    def step(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(model.attend, x, use_reentrant=False)

    results: list[torch.Tensor] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (report,) = reports_of(lambda: results.append(compiled(step)(x)))
    assert "checkpoint" in report.fallback
    assert_same(step(x), results[0])


def test_a_graph_without_attention_passes_through_silently() -> None:
    results: list[torch.Tensor] = []
    x = torch.randn(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (report,) = reports_of(lambda: results.append(compiled(lambda x: x.sin() + 1)(x)))
    assert report.fallback is None and report.expected_attention == 0
    assert_same(x.sin() + 1, results[0])


def test_a_failing_pass_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from dyncc.passes.slice_last_token import SliceLastToken

    def fails(*args: Any) -> Any:
        raise KeyError("a bug of ours")

    monkeypatch.setattr(SliceLastToken, "run", fails)
    model, values = decoder()
    results: list[torch.Tensor] = []
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (report,) = reports_of(lambda: results.append(compiled(model)(*values)))
        assert_same(model(*values), results[0])
    ours = [str(w.message) for w in caught if "dyncc" in str(w.message)]
    assert len(ours) == 1 and "see dyncc.reports()" in ours[0]
    assert "KeyError" in report.fallback and "a bug of ours" in report.fallback


# errors reach the user as they are
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"passes": "prune-token"}, "did you mean 'prune-tokens'"),
        ({"passes": "prune-tokens{kep=0.5}"}, "did you mean 'keep'"),
        ({"passes": "prune-tokens{keep=1.5}"}, "keep=1.5 is out of range"),
        ({"passes": "prune-tokens{keep"}, "pipeline syntax"),
        ({"passes": "prune-tokens{layers=9}"}, "layer 9 is out of range"),
        ({"engine": "tensorrt"}, "unknown engine"),
        ({"pases": ""}, "did you mean 'passes'"),
        ({"evidence": "none"}, "unknown evidence"),
    ],
    ids=lambda o: str(o)[:30],
)
def test_a_mistake_raises_our_message_first(options: dict[str, Any], words: str) -> None:
    model, values = decoder()
    with torch.no_grad(), pytest.raises(dyncc.DynccUsageError) as caught:
        torch.compile(model, backend="dyncc", options={"engine": "reference", **options})(*values)
    assert words in str(caught.value)
    assert "backend=" not in str(caught.value)


def test_strict_raises_what_was_refused() -> None:
    model, values = decoder(returns="all")
    with torch.no_grad(), pytest.raises(dyncc.RefusedError, match="slice-last-token was refused: the output uses every position"):
        compiled(model, passes="slice-last-token", strict=True)(*values)


# graphs
class Breaks(nn.Module):
    """Two graphs: the first layers, and what follows a break."""

    def __init__(self, inner: Any):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner.attend(x)
        torch._dynamo.graph_break()
        return self.inner.attend(x)


def test_a_graph_break_refuses_layer_passes_and_names_the_line() -> None:
    model = Breaks(Attending())
    with torch.no_grad():
        made = reports_of(lambda: compiled(model, passes="prune-tokens{keep=0.5 layers=0}")(torch.randn(2, 5, 8)))
    assert len(made) == 2
    reason = made[0].rewrites[0].reason
    assert "a graph break splits the model" in reason and "test_state.py:" in reason
    assert not any(r.applied for report in made for r in report.rewrites)
    assert "a graph break splits the model" in made[1].rewrites[0].reason


@pytest.mark.parametrize(("passes", "refused"), [("select-kv{dense=1}", True), ("select-kv", False)])
def test_a_graph_break_refuses_passes_that_count_layers_from_the_start(passes: str, refused: bool) -> None:
    with torch.no_grad():
        made = reports_of(lambda: compiled(Breaks(Attending()), passes=passes)(torch.randn(2, 5, 8)))
    assert all(("a graph break splits the model" in report.rewrites[0].reason) == refused for report in made)


def test_every_recompilation_is_reported() -> None:
    model, _ = decoder()
    call = compiled(model)
    with torch.no_grad():
        made = reports_of(lambda: [call(*inputs(model.tiny, 2, length)) for length in (9, 12, 15, 20)])
    assert len(made) == 2
    assert made[0].recompiled is None and made[1].recompiled
    assert made[1].lengths != "the captured sizes only"
