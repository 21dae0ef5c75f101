"""Loops in which a token reads the results of all earlier ones become one triangular solve; near misses stay, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import program

import dyncc
from dyncc.backends.onnx_export import OnnxExportError
from dyncc.evidence import relative_error
from dyncc.ir import op_name
from dyncc.passes.fuse_linear_attention import FuseLinearAttention
from dyncc.rewrite import Applied, Context, apply_pass, fingerprint

B, T, D = 2, 13, 5


def given() -> list[torch.Tensor]:
    """Weights [B, T, T], of which all are set; gains [B, T, 1]; what tokens have by themselves [B, T, D]."""
    torch.manual_seed(0)
    return [torch.randn(B, T, T) / 3, torch.tanh(torch.randn(B, T, 1)), torch.randn(B, T, D)]


def by_sums(w: Any, g: Any, f: Any) -> Any:
    outs = [f[:, 0]]
    for t in range(1, f.shape[1]):
        outs.append(f[:, t] + (w[:, t, :t].unsqueeze(-1) * torch.stack(outs, 1)).sum(1))
    return torch.stack(outs, 1)


def by_sums_and_gains(w: Any, g: Any, f: Any) -> Any:
    outs = [f[:, 0]]
    for t in range(1, f.shape[1]):
        outs.append(g[:, t] * (torch.stack(outs, 1) * w[:, t, :t, None]).sum(1) + f[:, t])
    return torch.stack(outs, 1)


def by_products(w: Any, g: Any, f: Any) -> Any:
    outs = [f[:, :1]]
    for t in range(1, f.shape[1]):
        outs.append(f[:, t : t + 1] + w[:, t : t + 1, :t] @ torch.cat(outs, 1))
    return torch.cat(outs, 1)


def by_squeezed_products(w: Any, g: Any, f: Any) -> Any:
    """What a token has by itself is computed in the loop; one matrix for the batch."""
    outs, w = [torch.tanh(f[:, 0])], w[:1]
    for t in range(1, f.shape[1]):
        outs.append(torch.tanh(f[:, t]) + (w[:, t, :t].unsqueeze(1) @ torch.stack(outs, 1)).squeeze(1))
    return torch.stack(outs, 1)


def solved(w: Any, f: Any) -> Any:
    """The same in float64, row by row."""
    rows = [f[:, 0].double()]
    for t in range(1, f.shape[1]):
        rows.append(f[:, t].double() + sum(w[:, t, j, None].double() * rows[j] for j in range(t)))
    return torch.stack(rows, 1)


CASES = (
    (by_sums, lambda w, g, f: solved(w, f)),
    (by_sums_and_gains, lambda w, g, f: solved(w * g, f)),
    pytest.param(by_products, lambda w, g, f: solved(w, f), marks=pytest.mark.full),
    pytest.param(by_squeezed_products, lambda w, g, f: solved(w[:1].expand_as(w), torch.tanh(f)), marks=pytest.mark.full),
)


def fused(function: Any) -> tuple[Any, Applied]:
    captured = program(function, *given())
    return captured, apply_pass(captured, FuseLinearAttention(), Context())


@pytest.mark.parametrize(("function", "oracle"), CASES)
def test_a_loop_becomes_one_solve(function: Any, oracle: Any) -> None:
    _, applied = fused(function)
    assert applied.applied and (applied.result.found, applied.result.expected) == (1, 1), applied.reason
    names = [op_name(n) for n in applied.program.graph.nodes]
    assert names.count("linalg_solve_triangular") == 1 and not {"add", "sum", "matmul"} & set(names)
    want = oracle(*given())
    assert relative_error(want.float(), function(*given())) < 1e-5
    assert relative_error(want.float(), applied.program.module(*given())[0]) < 1e-5


def test_what_stands_above_the_diagonal_is_not_read() -> None:
    _, applied = fused(by_sums)
    w, g, f = given()
    hidden = torch.where(torch.ones(T, T, dtype=torch.bool).tril(-1), w, float("nan"))
    assert torch.equal(applied.program.module(hidden, g, f)[0], applied.program.module(w, g, f)[0])


def a_window(w: Any, g: Any, f: Any) -> Any:
    outs = [f[:, 0]]
    for t in range(1, f.shape[1]):
        first = max(0, t - 4)
        outs.append(f[:, t] + (w[:, t, first:t].unsqueeze(-1) * torch.stack(outs[first:], 1)).sum(1))
    return torch.stack(outs, 1)


def of_columns(w: Any, g: Any, f: Any) -> Any:
    outs = [f[:, 0]]
    for t in range(1, f.shape[1]):
        outs.append(f[:, t] + (w[:, :t, t].unsqueeze(-1) * torch.stack(outs, 1)).sum(1))
    return torch.stack(outs, 1)


def of_the_row_before(w: Any, g: Any, f: Any) -> Any:
    outs = [f[:, 0]]
    for t in range(1, f.shape[1]):
        outs.append(f[:, t] + (w[:, t - 1, :t].unsqueeze(-1) * torch.stack(outs, 1)).sum(1))
    return torch.stack(outs, 1)


def nonlinear(w: Any, g: Any, f: Any) -> Any:
    outs = [f[:, 0]]
    for t in range(1, f.shape[1]):
        outs.append(torch.tanh(f[:, t] + (w[:, t, :t].unsqueeze(-1) * torch.stack(outs, 1)).sum(1)))
    return torch.stack(outs, 1)


def read_in_the_middle(w: Any, g: Any, f: Any) -> Any:
    outs = [f[:, 0]]
    for t in range(1, f.shape[1]):
        outs.append(f[:, t] + (w[:, t, :t].unsqueeze(-1) * torch.stack(outs, 1)).sum(1))
    return torch.stack(outs, 1), outs[3] * 2


KEPT = (
    (a_window, "token 5 reads no weighted sum of all results before it"),
    (of_columns, "are not the first 1 numbers of row 1 of a matrix"),
    (of_the_row_before, "are not the first 1 numbers of row 1 of a matrix"),
    (nonlinear, "it stays token after token"),
    (read_in_the_middle, "results in the middle are read elsewhere"),
)


@pytest.mark.parametrize(("function", "reason"), KEPT)
def test_what_is_none_stays_with_the_reason(function: Any, reason: str) -> None:
    captured, applied = fused(function)
    assert not applied.applied and reason in applied.reason, applied.reason
    assert fingerprint(applied.program.graph) == fingerprint(captured.graph)


class Loop(torch.nn.Module):
    def forward(self, w: Any, f: Any) -> Any:
        return by_sums(w, None, f)


@pytest.fixture
def with_a_solve() -> Any:
    """What makes an optimized loop on an engine, and its inputs."""
    w, _, f = given()
    with torch.no_grad():
        yield lambda engine: dyncc.optimize(Loop(), (w, f), passes="fuse-linear-attention", engine=engine, evidence="numeric"), (w, f)


@pytest.mark.full
def test_a_solve_has_no_onnx_form_and_is_named(with_a_solve: Any, tmp_path: Path) -> None:
    make, _ = with_a_solve
    with pytest.raises(OnnxExportError, match="solve_triangular"):
        make("reference").export_onnx(tmp_path / "solve.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_onnxruntime_leaves_a_solve_to_inductor_with_the_reason(with_a_solve: Any) -> None:
    make, values = with_a_solve
    made = make("onnxruntime")
    assert made.report.rewrites[0].applied and made.report.engine == "inductor"
    assert "engine not taken: onnxruntime: no ONNX form" in str(made.report) and "linalg_solve_triangular" in str(made.report)
    assert relative_error(Loop()(*values), made(*values)) < 1e-5
