"""Engines outside of PyTorch return and write what the model would, or say why not; state, memory, threads and sizes are respected."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from test_state import Attending, Counts, DropsOut, Normalises, ReturnsAView, ReturnsItsInput, WritesAView, assert_same, reports_of
from tiny import Tiny, inputs
from torch import nn

import dyncc
from dyncc.backends.flat_call import FlatCall
from dyncc.backends.onnxruntime import lower, session_options
from dyncc.capture import from_model
from dyncc.errors import NotTaken

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "no_grad")

WITH_OPENVINO = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
ENGINES = ["onnxruntime", pytest.param("openvino", marks=WITH_OPENVINO)]
X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def seeded(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return kind().eval()


def compiled(model: Any, engine: str = "onnxruntime", **options: Any) -> Any:
    return torch.compile(model, backend="dyncc", options={"engine": engine, "passes": "", **options})


def lowered(model: nn.Module, *args: torch.Tensor) -> tuple[FlatCall, list[torch.Tensor]]:
    """The engine's own callable over the flat inputs, and these."""
    program, signature = from_model(model, args)
    flat = [*signature.state, *args]
    return lower(program, flat), flat


class KeepsKeys(Attending):
    """Keys written to their places in a preallocated buffer, as static caches do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(2, 9, 8))

    def forward(self, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        self.keys.index_copy_(1, place, self.mix(x))
        return nn.functional.scaled_dot_product_attention(x[:, None], self.keys[:, None], self.keys[:, None])


class Unknown(Attending):
    """Uses an op that has no ONNX form."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attend(x) + torch.special.bessel_j0(x)


# what comes out
@pytest.mark.parametrize("engine", ["onnxruntime", pytest.param("openvino", marks=[WITH_OPENVINO, pytest.mark.full])])
def test_both_doors_agree_with_eager(engine: str) -> None:
    tiny = Tiny(kind="decoder", returns="last", positions="rope", layers=2, keys=True, seed=2)
    model, values = tiny.build(), inputs(tiny, 2, 12, padded=True)
    expected = model(*values)
    offline = dyncc.optimize(model, values, engine=engine, evidence="numeric")
    found: list[Any] = []
    (report,) = reports_of(lambda: found.append(compiled(model, engine, passes=None)(*values)))
    assert report.engine == offline.report.engine == engine and report.engine_refused is None
    assert_same(expected, offline(*values))
    assert_same(expected, found[0])


@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        *((kind, "onnxruntime") for kind in (Counts, WritesAView, ReturnsItsInput, ReturnsAView)),
        pytest.param(Counts, "openvino", marks=WITH_OPENVINO),
    ],
    ids=lambda k: getattr(k, "__name__", k),
)
def test_outputs_inputs_and_buffers_after_two_calls_are_as_eager(kind: Any, engine: str) -> None:
    plain = seeded(kind)
    other, own, given = copy.deepcopy(plain), X.clone(), X.clone()
    run = compiled(other, engine)
    for _ in range(2):
        expected, found = plain(own), run(given)
        assert_same(expected, found)
        assert_same(own, given)
        assert_same(dict(plain.named_buffers()), dict(other.named_buffers()))
    assert dyncc.reports()[-1].engine == engine
    if kind is ReturnsItsInput:
        assert found[0] is given
    if kind is ReturnsAView:
        assert found[0].untyped_storage().data_ptr() == given.untyped_storage().data_ptr()


def test_a_static_cache_is_written_in_place() -> None:
    plain = seeded(KeepsKeys)
    other = copy.deepcopy(plain)
    held = other.keys
    run = dyncc.optimize(other, (X[:, :2], torch.tensor([0, 1])), engine="onnxruntime")
    assert run.report.engine == "onnxruntime" and not held.any()  # the comparison at the start left no trace
    for places in ([0, 1], [2, 3]):
        assert_same(plain(X[:, :2], torch.tensor(places)), run(X[:, :2], torch.tensor(places)))
        assert_same(plain.keys, held)


def test_a_growing_length_compiles_once() -> None:
    tiny = Tiny(kind="decoder", returns="last", layers=1)
    model = tiny.build()
    run = compiled(model)

    def calls() -> None:
        for length in (9, 12, 15, 20, 33):
            assert_same(model(*inputs(tiny, 2, length)), run(*inputs(tiny, 2, length)))

    made = reports_of(calls)
    assert [report.engine for report in made] == ["onnxruntime"] * 2  # the first length, then any


# state
@pytest.mark.parametrize("engine", ENGINES)
def test_weights_that_change_are_seen(engine: str) -> None:
    model = seeded(Attending)
    model.forward = model.attend  # type: ignore[method-assign]
    run = compiled(model, engine)
    run(X)
    report = dyncc.reports()[-1]
    model.load_state_dict({name: value + 0.5 for name, value in model.state_dict().items()})
    assert_same(model(X), run(X))
    model.mix.weight.mul_(-1)
    assert_same(model(X), run(X))
    model.mix.bias.data = torch.ones(8)
    assert_same(model(X), run(X))
    told = [note for note in report.engine_notes if note.startswith("session")]
    assert told == ["session 2: 2 parameters changed", "session 3: 1 parameter changed", "session 4: 1 parameter changed"]


def test_a_buffer_that_changes_is_handed_over_from_then_on() -> None:
    class Scaled(Attending):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attend(x) * self.scale

    model = seeded(Scaled)
    run, flat = lowered(model, X)
    for _ in range(3):
        model.scale.add_(1.0)
        assert_same(model(X), run(*flat)[0])
    assert run.builds == 2


def test_outputs_are_written_by_the_engine_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    run, flat = lowered(seeded(lambda: Tiny(layers=1).build()), *inputs(Tiny(layers=1)))
    bound: list[int] = []
    real = run.session.run

    def noted(given: Any, room: Any) -> Any:
        bound.extend(own.data_ptr() for own in room)
        return real(given, room)

    monkeypatch.setattr(run.session, "run", noted)
    (out,) = run(*flat)
    assert [out.data_ptr()] == bound


def test_threads_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(ReturnsItsInput)
    run, flat = lowered(model, X)
    assert session_options().intra_op_num_threads == torch.get_num_threads()
    assert session_options().inter_op_num_threads == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert_same(model(X), tuple(run(*flat)))
    assert run.session.session.get_session_options().intra_op_num_threads == 1
    assert "1 threads instead of" in run.notes[-1] or run.threads == 1


# what is not taken
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (DropsOut, "the graph draws random numbers (dropout)"),
        (Normalises, "batch_norm in training mode writes its statistics"),
        (Unknown, "bessel_j0"),
        (lambda: ReturnsItsInput().bfloat16(), "half precision"),
    ],
    ids=["random", "statistics", "unknown op", "bfloat16"],
)
def test_what_it_cannot_take_runs_in_inductor_with_the_reason(kind: Any, words: str) -> None:
    torch.manual_seed(3)
    model = kind()
    x = X.to(model.mix.weight.dtype)
    found: list[Any] = []
    (report,) = reports_of(lambda: found.append(compiled(model)(x)))
    assert report.engine == "inductor" and report.fallback is None
    assert words in report.engine_refused and words in str(report)
    assert found[0] is not None


def test_gradients_are_refused_with_what_to_do() -> None:
    model = seeded(Attending)
    model.forward = model.attend  # type: ignore[method-assign]
    with torch.enable_grad():
        (report,) = reports_of(lambda: compiled(model)(X).sum().backward())
    assert report.engine_refused == "onnxruntime: inference only; wrap the call in torch.inference_mode()"
    assert model.mix.weight.grad is not None


def test_strict_raises_what_is_not_taken() -> None:
    model = seeded(Unknown)
    with pytest.raises(dyncc.RefusedError, match="engine onnxruntime does not take graph"):
        compiled(model, strict=True)(X)
    with pytest.raises(dyncc.RefusedError, match="bessel_j0"):
        dyncc.optimize(model, (X,), passes="", engine="onnxruntime", strict=True)


def test_wrong_results_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlatCall, "__call__", lambda self, *flat: [r + 1 for r in self.program.module(*flat)])
    offline = dyncc.optimize(seeded(ReturnsItsInput), (X,), engine="onnxruntime")
    assert offline.report.engine == "inductor"
    assert "its results are not the graph's: output 0 differs by" in offline.report.engine_refused


def test_memory_that_is_written_and_read_twice_is_left_to_pytorch() -> None:
    class Adds(Attending):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            a.add_(1.0)
            return self.attend(a) + b

    model = seeded(Adds)
    program, signature = from_model(model, (X[:1].clone(), X[1:].clone()))
    one, two = X[:1].clone(), X[1:].clone()
    run = lower(program, [*signature.state, one, two])
    assert_same(model(one.clone(), two), run(*signature.state, one.clone(), two)[0])
    both, other = X[:1].clone(), X[:1].clone()
    assert_same(model(both, both), run(*signature.state, other, other)[0])
    with pytest.raises(NotTaken, match="shares memory"):
        lower(program, [*signature.state, other, other])


@pytest.mark.parametrize(("engine", "package"), [("onnxruntime", "onnxruntime"), ("openvino", "openvino")])
def test_a_missing_package_is_named(engine: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(dyncc.DynccUsageError, match=f'is needed for engine "{engine}" and is not installed; pip install {package}'):
        compiled(seeded(ReturnsItsInput), engine)(X)


# memory and the choice of an engine, in processes of their own
def in_a_process(code: str, **environment: str) -> Any:
    import os

    path = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
    done = subprocess.run(
        [sys.executable, "-c", path + code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


MEMORY = """
import gc, json, psutil, torch, dyncc
from torch import nn
torch.set_grad_enabled(False)
model = nn.Sequential(nn.Embedding(8000, 1024), *[nn.Linear(1024, 1024) for _ in range(40)]).eval()
ids = torch.zeros(1, 8, dtype=torch.long)
rss = lambda: (gc.collect(), psutil.Process().memory_info().rss)[1]
small = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8)).eval()
dyncc.optimize(small, (ids,), engine="onnxruntime", evidence="off")(ids)
model(ids)
before = rss()
made = dyncc.optimize(model, (ids,), engine="onnxruntime", evidence="off")
made(ids)
weights = sum(p.numel() * 4 for p in model.parameters())
print(json.dumps([made.report.engine, (rss() - before) / weights, weights]))
"""


@pytest.mark.full
@pytest.mark.skipif(find_spec("psutil") is None, reason="psutil is not installed")
def test_the_session_takes_little_more_memory_than_the_weights() -> None:
    engine, share, weights = in_a_process(MEMORY)
    assert engine == "onnxruntime" and weights > 200e6
    assert share <= 1.15, f"{share:.2f} times the weights"


CHOICE = """
import json, torch, dyncc
from test_state import ReturnsItsInput
import dyncc.backends.auto as auto
calls = []
for name in ("parity", "_times"):
    real = getattr(auto, name)
    setattr(auto, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))[1])
torch.manual_seed(0)
model, x = ReturnsItsInput().eval(), torch.ones(2, 5, 8)
with torch.no_grad():
    made = torch.compile(model, backend="dyncc", options={"engine": "auto", "passes": ""})(x)
    same = torch.allclose(made[1], model(x)[1], atol=1e-5)
report = dyncc.reports()[-1]
print(json.dumps([calls, report.engine, report.engine_notes[0], same]))
"""


@pytest.mark.full
def test_auto_measures_once_and_remembers(tmp_path: Path) -> None:
    first = in_a_process(CHOICE, DYNCC_CACHE_DIR=str(tmp_path))
    again = in_a_process(CHOICE, DYNCC_CACHE_DIR=str(tmp_path))
    assert first[0].count("_times") == 1 and first[0].count("parity") >= 2
    assert "inductor" in first[2] and "onnxruntime" in first[2]
    assert again[0] == [] and again[1] == first[1] and again[3]
    assert again[2] == f"{first[2]} (measured earlier)"
