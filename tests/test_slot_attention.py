"""Attention to learned slots: `dyncc::attend_slots` against float64, and the pass that puts it in place of what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import program
from torch import Tensor
from torch.nn import functional as F

import dyncc
from dyncc.evidence import relative_error
from dyncc.ir import op_name, shape
from dyncc.kernels.slot_attention import ATTEND_SLOTS, TRUTHS, attend_slots, op
from dyncc.layers.pattention import Pattention
from dyncc.own_ops import EXPORTED, spelled_out
from dyncc.passes import slots_by_rows
from dyncc.passes.fuse_linear_attention import FuseLinearAttention
from dyncc.rewrite import Applied, Context, apply_pass, fingerprint

B, T, D, S, WIDE = 2, 35, 6, 40, 5


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones are rewritten too, and four rows at a time."""
    monkeypatch.setattr(slots_by_rows, "MANY", 1)
    monkeypatch.setattr(op, "SCORES", 4 * S)
    monkeypatch.setattr(op, "LEAST_ROWS", 1)


def given() -> list[Tensor]:
    """x [B, T, D], keys [S, D], values [S, WIDE]."""
    torch.manual_seed(0)
    return [torch.randn(B, T, D), torch.randn(S, D), torch.randn(S, WIDE)]


def judged(x: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """In float64, with the error function written out."""
    scores = torch.einsum("btd,sd->bts", x.double(), keys.double())
    unit = scores / scores.square().sum(-1, keepdim=True).sqrt() * scale
    return torch.einsum("bts,sv->btv", unit * (1 + torch.erf(unit / 2**0.5)) / 2, values.double())


def layer(x: Any, k: Any, v: Any) -> Any:
    return F.gelu(F.normalize(x @ k.T, dim=-1) * S**0.5) @ v


def as_published(x: Any, k: Any, v: Any) -> Any:
    scores = F.linear(x, k)
    return F.gelu(scores / torch.norm(scores, p=2, dim=-1, keepdim=True) * S**0.5) @ v


def scaled_first(x: Any, k: Any, v: Any) -> Any:
    """A scale in front of the length counts for nothing; one behind it does."""
    scores = torch.matmul(x, k.t()) / D**0.5
    return F.linear(F.gelu(S**0.5 * scores / torch.linalg.vector_norm(scores, dim=2, keepdim=True)), v.T)


FORMS = (layer, as_published, scaled_first)


def fused(function: Any, *values: Tensor, **more: Any) -> tuple[Any, Applied]:
    captured = program(function, *(values or given()), **more)
    return captured, apply_pass(captured, FuseLinearAttention(), Context())


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("function", FORMS)
def test_what_is_written_becomes_one_node_that_holds_few_scores(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, applied = fused(function)
    assert applied.applied and (applied.result.found, applied.result.expected) == (1, 1), applied.reason
    assert not any(shape(n)[-2:] == (T, S) for n in applied.program.graph.nodes)
    assert [op_name(n) for n in applied.program.graph.nodes].count("attend_slots") == 1
    held = []
    real = op._weights
    monkeypatch.setattr(op, "_weights", lambda scores, *more: held.append(scores.numel()) or real(scores, *more))
    want = judged(*given(), S**0.5).float()
    assert relative_error(want, function(*given())) < 1e-5
    assert relative_error(want, applied.program.module(*given())[0]) < 1e-5
    assert max(held) <= op.SCORES < sum(held) == B * T * S
    assert relative_error(want, spelled_out(applied.program).module(*given())[0]) < 1e-5


def gelu_first(x: Any, k: Any, v: Any) -> Any:
    return F.normalize(F.gelu(x @ k.T), dim=-1) @ v


def of_relu(x: Any, k: Any, v: Any) -> Any:
    return F.relu(F.normalize(x @ k.T, dim=-1)) @ v


def of_sums(x: Any, k: Any, v: Any) -> Any:
    return F.gelu(F.normalize(x @ k.T, p=1, dim=-1)) @ v


def along_rows(x: Any, k: Any, v: Any) -> Any:
    return F.gelu(F.normalize(x @ k.T, dim=1)) @ v


def by_another(x: Any, k: Any, v: Any) -> Any:
    return F.gelu((x @ k.T) / torch.linalg.vector_norm(x, dim=-1, keepdim=True)) @ v


def with_bias(x: Any, k: Any, v: Any) -> Any:
    return F.gelu(F.normalize(F.linear(x, k, k[:, 0]), dim=-1)) @ v


def of_rows(x: Any, k: Any, v: Any) -> Any:
    return F.gelu(F.normalize(x @ x.mT, dim=-1)) @ x


def read_again(x: Any, k: Any, v: Any) -> Any:
    weights = F.gelu(F.normalize(x @ k.T, dim=-1))
    return weights @ v, weights.mean()


def times_a_tensor(x: Any, k: Any, v: Any) -> Any:
    return F.gelu(F.normalize(x @ k.T, dim=-1) * x[..., :1]) @ v


NEAR = (
    (gelu_first, "by their length behind the activation"),
    (of_relu, "its weights are made by relu"),
    (of_sums, "a norm of order 1"),
    (along_rows, "a length along another dimension"),
    (by_another, "the length of something else"),
    (with_bias, "a bias is added to its scores"),
    (of_rows, "gelu stands between its products"),
    (read_again, "are read elsewhere"),
    (times_a_tensor, "multiplied by a tensor"),
)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize(("function", "reason"), NEAR)
def test_near_misses_stay_with_the_reason(function: Any, reason: str) -> None:
    captured, applied = fused(function)
    assert not applied.applied and reason in applied.reason, applied.reason
    assert fingerprint(applied.program.graph) == fingerprint(captured.graph)


def test_few_scores_stay_with_their_number() -> None:
    assert f"{B * T} rows x {S} slots are {B * T * S} scores, which may stand at once" in fused(layer)[1].reason


@pytest.mark.full
@pytest.mark.usefixtures("any_size")
def test_lengths_that_vary_are_told() -> None:
    dims = {1: torch.export.Dim("length", min=2, max=512)}
    _, applied = fused(layer, *given(), dynamic=[dims, None, None])
    assert "rows on; the graph serves any number" in applied.reason
    x, k, v = given()
    assert relative_error(layer(x[:, :9], k, v), applied.program.module(x[:, :9], k, v)[0]) < 1e-5


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("sizes", [(D,), (0, D), (1, D), (2, 3, 7, D)], ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_op_is_its_truth_for_any_rows(sizes: tuple[int, ...], approximate: str) -> None:
    _, k, v = given()
    x = torch.randn(sizes)
    made = ATTEND_SLOTS(x, k, v, -3.0, 0.5, approximate)
    torch.testing.assert_close(made, attend_slots(x, k, v, -3.0, 0.5, approximate))
    assert made.shape == (*sizes[:-1], WIDE) and TRUTHS[ATTEND_SLOTS] is attend_slots


def test_rows_of_zeros_and_sizes_that_do_not_fit() -> None:
    x, k, v = given()
    assert torch.equal(ATTEND_SLOTS(x * 0, k, v, 1.0, 1e-12), torch.zeros(B, T, WIDE))
    assert ATTEND_SLOTS(x * 0, k, v).isnan().all()
    torch.library.opcheck(ATTEND_SLOTS, (x, k, v), test_utils=("test_schema", "test_faketensor"))
    for form in (ATTEND_SLOTS, attend_slots):
        with pytest.raises(ValueError, match=r"got \[\[2, 35, 6\], \[40, 5\], \[40, 5\]\]"):
            form(x, v, v)


def test_gradients_are_those_of_the_truth() -> None:
    values = [x.double().requires_grad_() for x in given()]
    grads = [torch.autograd.grad(form(*values, 2.0, 1e-9).sin().sum(), values) for form in (ATTEND_SLOTS, attend_slots)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("any_size")
def test_exported_programs_hold_its_truth() -> None:
    _, applied = fused(layer)
    names = {op_name(n) for n in spelled_out(applied.program, EXPORTED).graph.nodes}
    assert ATTEND_SLOTS in EXPORTED and "attend_slots" not in names and "gelu" in names


@pytest.mark.full
@pytest.mark.usefixtures("any_size")
def test_the_layer_and_its_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Pattention(D, WIDE, S).eval(), torch.randn(B, T, D)
    with torch.no_grad():
        made = dyncc.optimize(module, (x,), passes="fuse-linear-attention", engine="reference", evidence="numeric")
        assert made.report.rewrites[0].applied, made.report.rewrites[0].reason
        assert relative_error(module(x), made(x)) < 1e-5
        made.export_onnx(tmp_path / "slots.onnx")
        made.save(tmp_path / "slots")
        assert relative_error(module(x), dyncc.load(tmp_path / "slots")(x)) < 1e-5
    session = pytest.importorskip("onnxruntime").InferenceSession(tmp_path / "slots.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative_error(module(x), torch.from_numpy(got)) < 1e-5
