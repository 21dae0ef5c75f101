"""Evidence: programs run beside each other; wrong rewrites are caught and undone; what is shared runs once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from graphs import node, program
from tiny import Tiny, inputs
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import dyncc
from dyncc import evidence, judge, runtime
from dyncc.analysis.facts import Facts
from dyncc.beside import joint
from dyncc.claims import SOME, attention_error
from dyncc.ir import Program, argument, emit, op_name, operands, replace_operands
from dyncc.options import Layers
from dyncc.passes.drop_repeat_kv import DropRepeatKV
from dyncc.passes.prune_tokens import PruneTokens
from dyncc.passes.slice_last_token import SliceLastToken
from dyncc.rewrite import Context, Pass, PassResult, apply_pass
from dyncc.shared_masks import look_at, share_masks

pytestmark = pytest.mark.usefixtures("no_grad")

EXACT = "simplify-mask slice-last-token drop-repeat-kv"


@dataclass(frozen=True)
class Replaces(Pass):
    """Puts `function` of the value behind the `nth` node of the name `at`: exact only in name."""

    name: ClassVar[str] = "replaces"
    exact: ClassVar[bool] = True

    at: str = "scaled_dot_product_attention"
    nth: int = 1
    by: float = 1.01

    def run(self, program: Program, facts: Facts, context: Context) -> PassResult:
        found = [n for n in program.graph.nodes if op_name(n) == self.at][self.nth]
        new = emit(found.next, lambda x: x * self.by, found)
        for user in [u for u in found.users if u is not new]:
            replace_operands(user, {i: new for i, s in enumerate(operands(user)) if s is found})
        return PassResult(1, 1)


@dataclass(frozen=True)
class Doubles(Replaces):
    """The same, of rewrites that are exact: times one."""

    name: ClassVar[str] = "doubles"
    by: float = 1.0


def decoder(**changes: Any) -> tuple[Any, tuple[torch.Tensor, ...]]:
    tiny = Tiny(kind="decoder", returns="last", positions="rope", layers=4, heads=4, groups=2, seed=2).with_(**changes)
    return tiny.build(), inputs(tiny, 2, 12)


def optimized(monkeypatch: pytest.MonkeyPatch, passes: tuple[Pass, ...], model: Any, values: Any) -> Any:
    """The model under passes that no text names, verdicts aside."""
    monkeypatch.setattr(runtime, "build", lambda text: passes)
    return dyncc.optimize(model, values, engine="reference", evidence="numeric")


class Counts(fx.Interpreter):
    """Counts the calls of a graph by op name."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.calls: Counter[str] = Counter()

    def run_node(self, n: fx.Node) -> Any:
        self.calls[op_name(n)] += n.op == "call_function"
        return super().run_node(n)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The calls of every run for evidence."""
    calls: Counter[str] = Counter()

    def run(module: fx.GraphModule, values: Any, mutates: bool) -> Any:
        counter = Counts(module)
        result = evidence.run_isolated(counter.run, values, mutates)
        calls.update(counter.calls)
        calls["runs"] += 1
        return result

    monkeypatch.setattr(judge, "run_isolated", run)
    return calls


def test_a_wrong_rewrite_deep_inside_is_undone_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model, values = decoder()
    made = optimized(monkeypatch, (Replaces(),), model, values)
    (rewrite,) = made.report.rewrites
    assert not rewrite.applied and made._outcome.program is made._outcome.dense
    assert rewrite.reason.startswith("undone: the value of node scaled_dot_product_attention_1 differs by 1.0e-02 of its largest value")
    assert "more than 1e-04 for torch.float32" in rewrite.reason


def test_only_the_wrong_pass_of_several_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, values = decoder()
    made = optimized(monkeypatch, (SliceLastToken(), Replaces(), DropRepeatKV()), model, values)
    assert [r.applied for r in made.report.rewrites] == [True, False, True]
    assert made.report.rewrites[1].reason.startswith("undone: ") and list(made.report.ops) == ["slice-last-token", "drop-repeat-kv"]
    assert torch.allclose(model(*values), made(*values), atol=1e-5)


def test_a_wrong_rewrite_in_front_of_a_lossy_pass_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, values = decoder()
    prune = PruneTokens(keep=0.5, layers=Layers("1"))
    alone = optimized(monkeypatch, (prune,), model, values).report.rewrites[0]
    made = optimized(monkeypatch, (Replaces(nth=0), prune), model, values)
    assert [r.applied for r in made.report.rewrites] == [False, True]
    assert made.report.rewrites[1].evidence == alone.evidence


def test_a_wrong_output_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, values = decoder()
    last = [n for n in dyncc.optimize(model, values, passes="", engine="reference")._outcome.dense.graph.nodes if op_name(n) == "linear"]
    made = optimized(monkeypatch, (Replaces(at="linear", nth=len(last) - 1),), model, values)
    assert made.report.rewrites[0].reason.startswith("undone: output 0 differs by 1.0e-02")


def test_a_rewrite_that_changes_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, values = decoder()
    made = optimized(monkeypatch, (Doubles(),), model, values)
    assert made.report.rewrites[0].applied and made.report.rewrites[0].evidence == {"error": 0.0, "regions": 1}


def test_what_is_shared_runs_once(counted: Counter[str]) -> None:
    model, values = decoder()
    made = dyncc.optimize(model, values, passes=EXACT, engine="reference", evidence="numeric")
    assert all(r.applied for r in made.report.rewrites), [r.reason for r in made.report.rewrites]
    dense = Counts(made._outcome.dense.module)
    dense.run(*made._signature.state, *values)
    sliced = 4  # the last layer's queries, output projection and MLP, on one row
    assert counted["runs"] == 1
    assert counted["linear"] == dense.calls["linear"] + sliced
    attended = counted["scaled_dot_product_attention"] + counted["attend"]
    assert attended == dense.calls["scaled_dot_product_attention"] + 1
    assert counted["attention_error"] + counted["relative_error"] == made.report.rewrites[0].evidence["regions"]


def test_a_pruned_program_runs_once_behind_its_cut(counted: Counter[str]) -> None:
    model, values = decoder()
    pipeline = "simplify-mask prune-tokens{keep=0.5 layers=2} slice-last-token drop-repeat-kv"
    made = dyncc.optimize(model, values, passes=pipeline, engine="reference", evidence="numeric")
    assert all(r.applied for r in made.report.rewrites), [r.reason for r in made.report.rewrites]
    dense = Counts(made._outcome.dense.module)
    dense.run(*made._signature.state, *values)
    assert counted["runs"] == 1 and counted["linear"] < dense.calls["linear"] * 1.5
    whole = dyncc.optimize(model, values, passes=pipeline, engine="reference", evidence="off")
    error = float((whole.dense(*values) - whole(*values)).abs().max() / whole.dense(*values).abs().max())
    assert made.report.rewrites[1].evidence["error"] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("form", ["in place", "random"])
def test_what_is_not_a_function_of_values_runs_as_a_whole(form: str, counted: Counter[str]) -> None:
    model, (ids,) = decoder()

    class Stateful(torch.nn.Module):
        def forward(self, ids: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
            logits = model(ids)
            if form == "in place":
                seen.add_(1.0)
                return logits + seen
            return F.dropout(logits, 0.5, training=True) + seen

    seen = torch.zeros(1)
    call = torch.compile(Stateful(), backend="dyncc", options={"engine": "reference", "passes": EXACT})
    call(ids, seen)
    report = dyncc.reports()[-1]
    assert report.fallback is None and all(r.applied for r in report.rewrites)
    assert counted["runs"] == 2 and not counted["attention_error"] and not counted["relative_error"]
    assert report.rewrites[0].evidence["outputs"] >= 1
    assert seen.item() == (1.0 if form == "in place" else 0.0)


def test_a_wrong_rewrite_of_a_graph_that_writes_in_place_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        x.add_(1.0)
        return F.scaled_dot_product_attention(x, x, x) + x

    captured = program(step, torch.randn(1, 2, 5, 4))
    wrong = apply_pass(captured, Replaces(nth=0), Context()).program
    assert joint([captured, wrong], [True, True], [False, False]) is None
    made = optimized(monkeypatch, (Replaces(nth=0),), _Step(step), (torch.randn(1, 2, 5, 4),))
    assert made.report.rewrites[0].reason.startswith("undone: output 0 differs by")


class _Step(torch.nn.Module):
    def __init__(self, function: Any):
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def test_values_of_another_size_are_computed_not_compared() -> None:
    captured = program(lambda x, w: (x @ w).sin()[:, -1].cos(), torch.randn(2, 5, 4), torch.randn(4, 4))
    edited = captured.copy()
    product, last = node(edited, "matmul"), node(edited, "select")
    short = emit(product, lambda x: x[:, -1:], product.args[0])
    replace_operands(product, {0: short})
    for n in (product, node(edited, "sin")):
        n.meta["val"] = n.meta["val"][:, -1:]
    last.args = (last.args[0], 1, 0)
    made = joint([captured, edited], [True, True], [True, True])
    assert made is not None and [c.what for c in made.claims] == ["the value of node select"]
    errors, (dense, now) = made.module(torch.randn(2, 5, 4), torch.randn(4, 4))
    assert errors[0] < 1e-6 and dense[0] is now[0]


def test_fresh_memory_is_not_compared() -> None:
    captured = program(lambda x: x.new_empty((2, 3)).copy_(x) * 1, torch.randn(2, 3))
    assert joint([captured, captured.copy()], [True, True], [False, False]) is None
    captured = program(lambda x: torch.ops.aten.copy.default(x.new_empty((2, 3)), x), torch.randn(2, 3))
    edited = captured.copy()
    fresh = node(edited, "new_empty")
    replace_operands(node(edited, "copy"), {0: emit(fresh.next, lambda x: x.new_empty((2, 3)), fresh.args[0])})
    made = joint([captured, edited], [True, True], [False, False])
    assert made is not None and [c.what for c in made.claims] == ["output 0"]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_an_attention_is_compared_on_some_rows(causal: bool, masked: bool) -> None:
    q, k = torch.randn(1, 4, 3 * SOME, 8), torch.randn(1, 2, 3 * SOME, 8)
    mask = torch.rand(1, 1, 3 * SOME, 3 * SOME) > 0.3 if masked and not causal else None
    right = F.scaled_dot_product_attention(q, k, k, mask, 0.0, causal, enable_gqa=True)
    assert attention_error(right, q, k, k, mask, 0.0, causal, enable_gqa=True) < 1e-5
    assert attention_error(right * 1.01, q, k, k, mask, 0.0, causal, enable_gqa=True) > 5e-3
    assert attention_error(right, q, k, k.flip(-2), mask, 0.0, causal, enable_gqa=True) > 1e-2


def test_a_dropped_mask_that_hid_something_is_noticed() -> None:
    def attend(x: torch.Tensor) -> torch.Tensor:
        seen = torch.ones(2 * SOME, 2 * SOME, dtype=torch.bool).tril(3)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=seen).sin()

    x = torch.randn(1, 2, 2 * SOME, 4)
    captured = program(attend, x)
    edited = captured.copy()
    sdpa = node(edited, "scaled_dot_product_attention")
    assert argument(sdpa, "attn_mask") is not None
    sdpa.args, sdpa.kwargs = sdpa.args[:3], {}
    made = joint([captured, edited], [True, True], [False, False])
    assert made is not None and made.module(x)[0][0] > 1e-2


def test_the_judge_of_nothing_accepts() -> None:
    captured = program(lambda x: x.sin(), torch.randn(3))
    assert judge.Judge(captured, runtime.Settings(()), [[torch.randn(3)]]).accepts([])


@pytest.mark.parametrize("kind", ["causal", "padded", "random", "wide"])
def test_a_mask_looked_at_once_means_what_it_meant(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 8, generator=generator) for n in ((5, 9, 9) if kind == "wide" else (9, 9, 9)))
    mask = torch.ones(2, 1, q.shape[2], 9, dtype=torch.bool).tril(9 - q.shape[2])
    if kind == "padded":
        mask[0, ..., :3] = False
        mask[0, :, :3] = True  # rows that see nothing would be NaN in both
    if kind == "random":
        mask = torch.rand(2, 1, 9, 9, generator=generator) > 0.3

    def twice(q: Any, k: Any, v: Any, mask: Any) -> Any:
        sdpa = torch.ops.aten.scaled_dot_product_attention.default
        return sdpa(sdpa(q, k, v, mask), k, v, mask, scale=0.5)

    module = make_fx(twice, tracing_mode="fake", pre_dispatch=True)(q, k, v, mask)
    share_masks(module.graph)
    module.recompile()
    names = [op_name(n) for n in module.graph.nodes if n.op == "call_function"]
    assert names.count("look_at") == 1 and names.count("attend") == 2
    torch.testing.assert_close(module(q, k, v, mask), twice(q, k, v, mask))
    assert look_at(mask, torch.float32).causal == (kind == "causal")
