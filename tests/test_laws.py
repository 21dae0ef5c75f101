"""The laws that every policy must keep, as properties over small random transformers (numbers as in the design).

Law 11, the selection, is in test_kernels_truth.py: it needs no model."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tiny import Tiny, dynamic, inputs, repeated_heads, tinies
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dyncc
from dyncc.evidence import relative_error

pytestmark = pytest.mark.usefixtures("no_grad")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
"""max|a-b| / max|a|: another order of summation, nothing else."""
CLASS_SCORES = ("cls-attention", "received-attention", "hidden-norm", "key-norm", "random", "last-window-attention")
LAST_SCORES = ("last-attention", "last-logits", "last-window-attention", "received-attention", "hidden-norm", "key-norm")
LENGTH = 14


def examples(count: int) -> Any:
    """So many drawn cases, half of them in the quick tests, the same in every run; a failing one is shown as drawn (to shrink it would
    compile hundreds of models)."""
    count = -(-count // 2) if "DYNCC_TEST_QUICK" in os.environ else count
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, phases=[Phase.generate], suppress_health_check=slow)


def optimized(model: Any, values: tuple[Any, ...], passes: str | None, **more: Any) -> Any:
    return dyncc.optimize(model, values, passes=passes, **{"engine": "reference", "evidence": "off", **more})


def pruned(model: Any, values: tuple[Any, ...], options: str, **more: Any) -> Any:
    """A pruned model; the pass must have been applied, or the law would hold for nothing."""
    made = optimized(model, values, f"prune-tokens{{{options}}}", **more)
    assert made.report.rewrites[0].applied, made.report.rewrites[0].reason
    return made


def same(tiny: Tiny, a: Any, b: Any) -> bool:
    pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
    return all(relative_error(x, y) <= TOLERANCE[tiny.dtype] for x, y in pairs)


def score_of(draw: Any, tiny: Tiny) -> str:
    return draw(st.sampled_from(CLASS_SCORES if tiny.kind == "encoder" else LAST_SCORES))


@st.composite
def policies(draw: st.DrawFn, **limits: Any) -> tuple[Tiny, str, bool]:
    """A model, options of prune-tokens that fit it, and whether its inputs are padded."""
    tiny = draw(tinies(**limits))
    layers = draw(st.sampled_from(("0",) if tiny.layers == 2 else ("0", "1", "0,1")))
    keep = draw(st.sampled_from(("0.5", "0.3", "0.6", "5")))
    fill = draw(st.sampled_from(("auto", "carry", "zero") + (("drop",) if tiny.returns != "all" else ())))
    site = draw(st.sampled_from(("layer", "attention")))
    return tiny, f"keep={keep} layers={layers} score={score_of(draw, tiny)} fill={fill} site={site}", draw(st.booleans())


# law 1: identity
@examples(8)
@given(tinies(), st.booleans())
def test_keeping_the_ratio_of_one_is_the_dense_model_bit_for_bit(tiny: Tiny, padded: bool) -> None:
    model, values = tiny.build(), inputs(tiny, 2, LENGTH, padded)
    made = pruned(model, values, "keep=1.0 layers=0")
    assert torch.equal(made(*values), made.dense(*values))
    assert same(tiny, model(*values), made(*values))


@examples(5)
@given(tinies(), st.booleans(), st.data())
def test_a_count_of_at_least_all_tokens_is_the_dense_model(tiny: Tiny, padded: bool, data: st.DataObject) -> None:
    model, values = tiny.build(), inputs(tiny, 2, 24, padded)
    made = pruned(model, values, f"keep=10 layers=0 score={score_of(data.draw, tiny)}", dynamic_shapes=dynamic(values))
    for length in (10, 7):
        short = inputs(tiny, 3, length, padded, seed=2)
        assert same(tiny, model(*short), made(*short))


# law 2: every realisation is the masked form
@examples(15)
@given(policies())
def test_running_fewer_rows_is_masking_them(policy: tuple[Tiny, str, bool]) -> None:
    tiny, options, padded = policy
    model, values = tiny.build(), inputs(tiny, 3, LENGTH, padded)
    made = pruned(model, values, options, masked=True)
    assert same(tiny, made.masked(*values), made(*values))


@pytest.mark.full
@examples(4)
@given(policies())
def test_running_fewer_rows_is_masking_them_at_any_length(policy: tuple[Tiny, str, bool]) -> None:
    tiny, options, padded = policy
    values = inputs(tiny, 2, LENGTH, padded)
    made = pruned(tiny.build(), values, options, masked=True, dynamic_shapes=dynamic(values))
    for batch, length in ((3, 9), (2, 21)):
        values = inputs(tiny, batch, length, padded, seed=3)
        assert same(tiny, made.masked(*values), made(*values))


def test_pruning_does_change_the_result() -> None:
    tiny = Tiny(seed=3)
    model, values = tiny.build(), inputs(tiny, 2, LENGTH)
    assert relative_error(model(*values), pruned(model, values, "keep=0.3 layers=0")(*values)) > 1e-3


# law 4: rows of a batch are independent, padding changes nothing
@examples(8)
@given(policies(), st.permutations(range(4)))
def test_permuting_the_batch_permutes_the_outputs(policy: tuple[Tiny, str, bool], order: list[int]) -> None:
    tiny, options, padded = policy
    values = inputs(tiny, 4, LENGTH, padded)
    made = pruned(tiny.build(), values, options)
    assert same(tiny, made(*values)[order], made(*(v[order] for v in values)))


@examples(6)
@given(policies(returns=("first", "last")))
def test_padding_and_other_rows_change_nothing(policy: tuple[Tiny, str, bool]) -> None:
    tiny, options, _ = policy
    tiny = tiny.with_(returns="first" if tiny.kind == "encoder" else "last")
    values = inputs(tiny, 3, LENGTH, padded=True)
    made = pruned(tiny.build(), values, options, dynamic_shapes=dynamic(values))
    assert same(tiny, made(*values), made(*_padded_more(tiny, values))[:3])


def _padded_more(tiny: Tiny, values: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Five more columns of padding, on the model's own side, and one more row that is nearly all padding."""
    ids, real = values
    extra = torch.full((ids.shape[0], 5), 7), torch.zeros(ids.shape[0], 5, dtype=torch.long)
    pairs = [(v, e) if tiny.kind == "encoder" else (e, v) for v, e in zip((ids, real), extra, strict=True)]
    wide = [torch.cat(pair, 1) for pair in pairs]
    row = torch.zeros(1, wide[1].shape[1], dtype=torch.long)
    row[0, 0 if tiny.kind == "encoder" else -1] = 1
    return torch.cat([wide[0], wide[0][:1]]), torch.cat([wide[1], row])


@examples(8)
@given(policies())
def test_padding_never_stays_before_a_real_token(policy: tuple[Tiny, str, bool]) -> None:
    tiny, options, _ = policy
    values = inputs(tiny, 4, LENGTH, padded=True)
    made = pruned(tiny.build(), values, options, masked=True)
    alive = values[1].bool()
    for kept, counts in selections(made, values):
        for row, real in enumerate(alive):
            places = kept[row].tolist()
            assert places == sorted(set(places))
            assert all(real[p] for p, c in zip(places, counts[row].tolist(), strict=True) if c)
            wanted = {p for p in places if real[p]}
            assert len(wanted) >= min(int(real.sum()), len(places) - 1)
        alive = torch.zeros_like(alive).scatter(1, kept, counts)


def selections(made: Any, values: tuple[torch.Tensor, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(original positions, which of them count) of each cut."""
    program = made._outcome.program
    returned = program.module(*made._signature.state, *values)
    extra = list(returned[len(returned) - program.extra_outputs :])
    return list(zip(extra[::2], extra[1::2], strict=True))


# law 5: causality
@examples(6)
@given(tinies("decoder", returns=("all",)), st.booleans())
def test_a_model_that_answers_at_every_position_is_not_pruned(tiny: Tiny, padded: bool) -> None:
    model, values = tiny.build(), inputs(tiny, 2, LENGTH, padded)
    made = optimized(model, values, "prune-tokens{keep=0.5 layers=0}")
    (rewrite,) = made.report.rewrites
    assert not rewrite.applied
    assert "output 0 of this autoregressive model covers all positions" in rewrite.reason
    assert made.flops == made.dense_flops


@examples(6)
@given(tinies("decoder", returns=("all",)))
def test_exact_passes_keep_causality(tiny: Tiny) -> None:
    model, (ids,) = tiny.build(), inputs(tiny, 2, LENGTH)
    made = optimized(model, (ids,), None)
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 31
    before, after = made(ids), made(other)
    assert relative_error(before[:, :-1], after[:, :-1]) == 0.0
    assert not torch.equal(before[:, -1], after[:, -1])


# law 6: the prefill of T tokens is T steps with a cache
@examples(3)
@given(tinies("decoder", fixed={"keys": True, "dtype": torch.float32}))
def test_prefill_equals_step_by_step_with_the_cache(tiny: Tiny) -> None:
    model, (ids,) = tiny.build(), inputs(tiny, 2, 7)
    prefill = optimized(model, (ids,), None)
    logits, *past = model(ids[:, :3])
    for position in range(3, 7):
        call = (ids[:, position : position + 1], None, *past)
        logits, *past = optimized(model, call, None)(*call)
    assert same(tiny, prefill(ids), (logits, *past))


# law 7: cost
@examples(4)
@given(tinies(fixed={"layers": 3, "dtype": torch.float32}), st.booleans(), st.data())
def test_cost_falls_with_the_budget(tiny: Tiny, padded: bool, data: st.DataObject) -> None:
    model, values, score = tiny.build(), inputs(tiny, 2, 24, padded), score_of(data.draw, tiny)
    costs = [pruned(model, values, f"keep={keep} layers=0 score={score}").flops for keep in ("0.2", "0.5", "0.7")]
    assert costs == sorted(set(costs))
    assert costs[-1] < optimized(model, values, "").flops


@examples(8)
@given(policies())
def test_predicted_cost_is_what_a_run_counts(policy: tuple[Tiny, str, bool]) -> None:
    tiny, options, padded = policy
    values = inputs(tiny, 2, LENGTH, padded)
    made = pruned(tiny.build(), values, options)
    for predicted, call in ((made.flops, made.reference), (made.dense_flops, made.dense)):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call(*values)
        assert predicted == counter.get_total_flops()


# law 9: disjoint passes commute
@examples(5)
@given(tinies("decoder", fixed={"heads": 4, "groups": 2, "fused": True}))
def test_passes_at_different_places_commute(tiny: Tiny) -> None:
    model, values = tiny.build(), inputs(tiny, 2, LENGTH)
    orders = ["slice-last-token drop-repeat-kv", "drop-repeat-kv slice-last-token"]
    first, second = (optimized(model, values, order) for order in orders)
    assert all(r.applied for made in (first, second) for r in made.report.rewrites)
    assert same(tiny, first(*values), second(*values)) and same(tiny, model(*values), first(*values))
    assert first.flops == second.flops < first.dense_flops


# law 12: grouped heads are repeated heads
@examples(6)
@given(tinies(fixed={"heads": 4, "groups": 2, "dtype": torch.float32}), st.booleans(), st.data())
def test_grouped_heads_are_repeated_heads(tiny: Tiny, padded: bool, data: st.DataObject) -> None:
    values, score = inputs(tiny, 2, LENGTH, padded), score_of(data.draw, tiny)
    options = f"keep=0.5 layers=0 score={score}"
    grouped, wide = (pruned(m, values, options)(*values) for m in (tiny.build(), repeated_heads(tiny)))
    assert same(tiny, grouped, wide)


@examples(4)
@given(tinies(fixed={"heads": 6, "groups": 2, "dtype": torch.float32}), st.booleans())
def test_dropping_the_copies_of_keys_changes_nothing(tiny: Tiny, padded: bool) -> None:
    values = inputs(tiny, 2, LENGTH, padded)
    made = optimized(tiny.build(), values, "drop-repeat-kv")
    assert made.report.rewrites[0].found == tiny.layers
    assert same(tiny, repeated_heads(tiny)(*values), made(*values))


# law 13: every engine gives what eager gives (tests/test_zoo_inductor.py does so in every run, an architecture at a time)
@pytest.mark.full
@examples(2)
@given(policies(fixed={"layers": 2, "dtype": torch.float32}))
def test_inductor_agrees_with_the_reference_engine(policy: tuple[Tiny, str, bool]) -> None:
    tiny, options, padded = policy
    model, values = tiny.build(), inputs(tiny, 2, LENGTH, padded)
    exact = optimized(model, values, None, engine="inductor")
    assert same(tiny, model(*values), exact(*values)) and same(tiny, model(*values), exact.reference(*values))
    lossy = pruned(model, values, options, engine="inductor")
    assert same(tiny, lossy.reference(*values), lossy(*values))


# law 14: state
class Counting(torch.nn.Module):
    """A model that keeps state and draws random numbers."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, ids: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        history.add_(ids)
        logits = self.inner(ids)
        self.mean.lerp_(logits.float().square().mean(), 0.1)
        return torch.nn.functional.dropout(logits, 0.2) + self.calls


@examples(5)
@given(tinies(fixed={"dtype": torch.float32}), st.integers(1, 2))
def test_state_after_calls_is_as_eager(tiny: Tiny, calls: int) -> None:
    (ids,) = inputs(tiny, 2, LENGTH)
    results = []
    for backend in (None, "dyncc"):
        torch._dynamo.reset()
        torch.manual_seed(5)
        model, history = Counting(tiny.build()), torch.zeros_like(ids)
        call = model if backend is None else torch.compile(model, backend=backend, options={"engine": "reference"})
        outputs = [call(ids, history) for _ in range(calls)]
        results.append((*outputs, model.calls, model.mean, history, torch.rand(1)))
    assert dyncc.reports()[-1].fallback is None
    assert same(tiny, *results)
