"""C++ kernels in programs for Inductor: few rows times weights, attention of one row; where they go, and where they do not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_kv_cache import prompt, tiny_llama
from test_select_kv import LAYERS, Decode, decoder
from test_select_kv import step as select_step
from torch import nn

import dyncc
from dyncc.backends import native, native_attention, native_linears, reference
from dyncc.capture import from_model
from dyncc.ir import Program, op_name
from dyncc.kernels.fused_attention import ATTEND
from dyncc.kernels.native import problem
from dyncc.kernels.one_row import ATTEND_ROW
from dyncc.kernels.row_linears import ROW_LINEARS, cpu, row_linears

needs_compiler = pytest.mark.skipif(bool(problem()), reason="needs a C++ compiler")


class Step(nn.Module):
    """Rows through three projections, grouped attention over keys that are given, and an output projection."""

    def __init__(self, heads: int = 4, groups: int = 2, width: int = 16) -> None:
        super().__init__()
        self.heads, self.groups, self.width = heads, groups, width
        self.q, self.k = nn.Linear(32, heads * width), nn.Linear(32, groups * width, bias=False)
        self.o = nn.Linear(heads * width, 32)

    def forward(self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        batch, rows, _ = x.shape
        q = self.q(x).view(batch, rows, self.heads, self.width).transpose(1, 2)
        k = self.k(x).view(batch, rows, self.groups, self.width).transpose(1, 2)
        keys = torch.cat([keys[:, :, rows:], k], dim=2)
        out = F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)
        return self.o(out.transpose(1, 2).reshape(batch, rows, -1))


def inputs(rows: int = 1, keys: int = 40) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(size, generator=generator) for size in ((1, rows, 32), (1, 2, keys, 16), (1, 2, keys, 16)))


def captured(module: nn.Module, *args: Any) -> Program:
    with torch.no_grad():
        return from_model(module.eval(), args, {}, None)[0]


@pytest.fixture
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels pay wherever they fit."""
    monkeypatch.setattr(native_attention, "pays", lambda node: True)
    monkeypatch.setattr(native_linears, "threads", lambda group: 2)


def ops(program: Program) -> list[str]:
    return [op_name(n) for n in program.graph.nodes if n.op == "call_function"]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_times_weights(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, width in itertools.product((1, 3), (8, 40, 67)):
        x = torch.randn(1, rows, width, generator=generator).to(dtype)
        weights = [(torch.randn(n, width, generator=generator) / width**0.5).to(dtype) for n in (1, 5, 64)]
        biases = [None, torch.randn(5, generator=generator).to(dtype), None]
        for threads in (0, 1, 2):
            close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
            for found, wanted in zip(ROW_LINEARS(x, weights, biases, threads), row_linears(x, weights, biases), strict=True):
                torch.testing.assert_close(found, wanted, **close)


def test_what_the_kernel_does_not_read_is_computed_by_the_truth() -> None:
    w = torch.randn(8, 4)
    for x, weight in (
        (torch.randn(cpu.MOST_ROWS + 1, 4), w),
        (torch.randn(1, 4).half(), w.half()),
        (torch.randn(1, 8), w.T),
        (torch.randn(0, 4), w),
    ):
        assert not cpu.takes(x, [weight], [None])
        torch.testing.assert_close(ROW_LINEARS(x, [weight], [None], 0), row_linears(x, [weight], [None]))


def test_shapes_on_fakes_are_those_of_the_op() -> None:
    args = (torch.randn(1, 2, 16), [torch.randn(8, 16), torch.randn(3, 16)], [None, torch.randn(3)], 0)
    torch.library.opcheck(ROW_LINEARS, args, test_utils=("test_schema", "test_faketensor"))


@needs_compiler
@pytest.mark.usefixtures("_always")
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_runs_as_kernels_and_gives_the_same(masked: bool) -> None:
    module, args = Step(), inputs()
    args = (*args, torch.rand(1, 1, 1, 40) > 0.3) if masked else args
    program = captured(module, *args)
    lowered, notes = native.with_native_kernels(program)
    assert ops(lowered).count("attend_row") == 1 and ops(lowered).count("row_linears") == 2
    assert "linear" not in ops(lowered) and "scaled_dot_product_attention" not in ops(lowered)
    assert notes == [
        "1 of 1 attentions of one row run as a generated C++ kernel, measured to be faster",
        "3 of 3 linear layers of few rows run as one in 2 calls, measured to be faster",
    ]
    assert "linear" in ops(program), "the program itself is not changed"
    made = dyncc.optimize(module, args, passes="", evidence="off")
    torch.testing.assert_close(made(*args), module(*args), rtol=1e-4, atol=1e-5)
    assert made.report.engine_notes == notes
    with torch.no_grad():
        module.o.weight.mul_(2.0)
    torch.testing.assert_close(made(*args), module(*args), rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("share", ["head", "any"])
def test_pages_chosen_for_one_attention_run_as_one_kernel_with_it(share: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice that serves the next layer too stays apart."""
    call, text = select_step(24), f"select-kv{{budget=12 score=bound share={share} page=4 sinks=1 recents=1MORE}}"
    for more, kernels in (("", LAYERS), (" reuse=1", 0)):
        passes = text.replace("MORE", more)
        wanted = dyncc.optimize(Decode(decoder()), call, passes=passes, engine="reference", evidence="off")
        lowered, notes = native.with_native_kernels(wanted._outcome.program)
        told = f"{LAYERS} attentions score, choose and read their pages in one generated C++ kernel"
        assert (told in notes) is bool(kernels)
        assert ops(lowered).count("attend_best_pages") == kernels and ops(lowered).count("attend_row") == LAYERS - kernels
        assert ops(lowered).count("score_pages") == ops(lowered).count("select_best") == (0 if kernels else LAYERS // 2)
        with monkeypatch.context() as patched:
            patched.setattr(reference, "spelled_out", lambda program: native.with_native_kernels(program)[0])
            found = dyncc.optimize(Decode(decoder()), call, passes=passes, engine="reference", evidence="off")
            torch.testing.assert_close(found(*call), wanted(*call), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_always")
def test_what_is_not_on_a_cpu_is_left_alone() -> None:
    program = captured(Step().to("meta"), *(x.to("meta") for x in inputs()))
    lowered, notes = native.with_native_kernels(program)
    assert ops(lowered) == ops(program) and "linear" in ops(lowered) and notes == []
    chosen = captured(OwnOp(), *(x.to("meta") for x in inputs()[1:]))
    lowered, notes = native.with_native_kernels(chosen)
    assert "attend_row" in ops(chosen) and "attend_row" not in ops(lowered) and notes == []


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_ops_that_have_kernels_elsewhere_stay_where_these_cannot_run(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "problem", lambda: "no C++ kernel can be built (no compiler)")
    program = captured(Capped().to(device), torch.randn(1, 4, 8, 16, device=device))
    lowered, notes = native.with_native_kernels(program)
    assert ops(lowered) == ops(program) and "attend" in ops(lowered) and "linear" in ops(lowered)
    assert notes == ([native.problem()] if device == "cpu" else [])


class Capped(nn.Module):
    """A fused attention, and a linear layer of its last row alone."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.out(ATTEND(x, x, x, cap=5.0)[:, :1, -1:])
        return rows


class OwnOp(nn.Module):
    """Attention of one row as dyncc's own op, on keys [B, G, T, D]."""

    def forward(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return ATTEND_ROW(keys[:, :, :1], keys, values, None, None, 1, None)


@pytest.mark.usefixtures("_always")
def test_many_rows_and_gradients_stay_with_inductor() -> None:
    many = captured(Step(), *inputs(rows=20))
    assert native.with_native_kernels(many) == (many, [])
    training = replace(captured(Step(), *inputs()), needs_grad=True)
    assert native.with_native_kernels(training) == (training, [])


class Flagged(nn.Module):
    def __init__(self, causal: bool, heads: int) -> None:
        super().__init__()
        self.causal, self.heads = causal, heads

    def forward(self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, k, mask, is_causal=self.causal)


@pytest.mark.usefixtures("_always")
@pytest.mark.parametrize(
    ("causal", "rows", "mask", "fits"),
    [
        (False, 1, None, True), (True, 1, None, False), (False, 17, None, False), (False, 3, None, True), (False, 3, (1, 1, 1, 9), True),
        (False, 3, (1, 1, 3, 9), False), (False, 1, (1, 4, 1, 9), True), (False, 3, (1, 4, 1, 9), False),
    ],
)  # fmt: skip
def test_only_rows_that_see_the_same_keys_fit(causal: bool, rows: int, mask: tuple[int, ...] | None, fits: bool) -> None:
    q, k = torch.randn(1, 4, rows, 8), torch.randn(1, 4, 9, 8)
    args = (q, k) if mask is None else (q, k, torch.rand(mask) > 0.2)
    module = Flagged(causal, 4)
    program = captured(module, *args)
    lowered, _ = native.with_native_kernels(program)
    assert ("attend_row" in ops(lowered)) is (fits and not problem())
    torch.testing.assert_close(lowered.module(*args)[0], module(*args), rtol=1e-5, atol=1e-6)


def test_without_a_compiler_own_ops_are_written_out_and_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "problem", lambda: "no C++ kernel can be built (no compiler)")
    chosen = dyncc.optimize(Step(), inputs(), passes="select-kv{budget=8 sinks=1 recents=1}", engine="reference")._outcome.program
    lowered, notes = native.with_native_kernels(chosen)
    assert "attend_row" in ops(chosen) and not {"attend_row", "score_keys", "select_best"} & set(ops(lowered))
    assert notes == ["no C++ kernel can be built (no compiler)"]


@needs_compiler
def test_the_faster_one_is_taken_with_as_many_threads_as_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds: dict[str, float] = {}

    def timed(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
        return {name: (call(), seconds.get(name, 2.0))[1] for name, call in calls.items()}

    monkeypatch.setattr(native_linears, "least_seconds", timed)
    monkeypatch.setattr(native_linears, "COLD", 0)
    for found, wanted in (({"linear": 1.0}, None), ({"1": 1.0}, 1), ({"linear": 1.0, "1": 0.99}, None)):
        seconds = found
        assert native_linears._measure(1, 16, [8, 8], torch.float32) == wanted
    monkeypatch.setattr(native_attention, "least_seconds", timed)
    for found, pays in (({"sdpa": 1.0}, False), ({"kernel": 1.0}, True), ({"sdpa": 1.0, "kernel": 0.95}, False)):
        seconds = found
        sizes = ((1, 4, 1, 8), (1, 2, 40, 8), (1, 2, 40, 8))
        assert native_attention._measure(*sizes, torch.float32, torch.bool) is pays
        assert native_attention._measure(*sizes, torch.float32, torch.float32) is pays


@needs_compiler
@pytest.mark.usefixtures("_always")
@pytest.mark.full
@pytest.mark.parametrize(
    "passes",
    [
        None, "tokenselect{budget=12 sinks=2 recents=4}", "quest{budget=16 page=4 dense=0}",
        "quest{budget=16 page=4 dense=0 share=any slack=0.4}", "snapkv{budget=12 window=4 recents=4}",
    ],
)  # fmt: skip
def test_generation_gives_the_reference_engines_tokens(passes: str | None) -> None:
    model, found = tiny_llama(), []
    with torch.no_grad():
        for engine in ("reference", "inductor"):
            torch._dynamo.reset()
            model.compile(backend="dyncc", options={"engine": engine})
            known = len(dyncc.reports())
            call = {**prompt(2, 20, pads=3), "max_new_tokens": 24, "do_sample": False, "past_key_values": dyncc.KVCache(passes)}
            found.append(model.generate(**call))
            assert not any(r.fallback for r in dyncc.reports()[known:])
    assert torch.equal(*found)
