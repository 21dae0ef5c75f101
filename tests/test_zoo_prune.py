"""`prune-tokens` over the zoo: it applies, equals its masked form, costs less, and changes nothing when it keeps everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo_runs
from zoo import ZOO, alternating, by_name, every_case, skipped
from zoo_model import Attn, ZooModel, relative_error

import dyncc

TOLERANCE = 1e-5
NORM, HALF = "hidden-norm", "keep=0.5 layers=1 score={score}"
ARCHITECTURES_THAT_MUST_APPLY = 16
ALL_POSITIONS = (
    "output 0 of this autoregressive model covers all positions, and which tokens stay depends on later ones; "
    "ask for the last position only (such as logits_to_keep=1)"
)


def _fits(model: ZooModel, score: str) -> bool:
    if score == "cls-attention":
        return model.has_cls
    if score == "last-window-attention":
        return model.causal
    return model.family in ("encoder", "vision", "audio") and not model.causal


def _by_attention() -> list[Any]:
    """Each model with the attention scores that fit it."""
    scores = ("cls-attention", "last-window-attention", "received-attention")
    return [case for turn, score in enumerate(scores) for case in alternating(turn, score) if _fits(case.values[0], score)]


def _with_mask(cases: list[Any]) -> list[Any]:
    return [case for case in cases if case.values[0].has_mask]


def _dynamic() -> list[Any]:
    models = [by_name(name) for name in ("bert", "vit", "clip-text", "llama-last", "t5-encoder", "gpt2-classifier")]
    marks = [[] if model.name in ("bert", "vit", "llama-last") else [pytest.mark.full] for model in models]
    return [
        pytest.param(model, model.able[0], id=model.name, marks=[*more, *skipped(model, model.able[0], dynamic=True)])
        for model, more in zip(models, marks, strict=True)
    ]


def _check(model: ZooModel, attn: str, score: str, padding: bool = False) -> None:
    run = zoo_runs.prune(model.name, attn, HALF.format(score=score), padding)
    if model.all_positions:
        assert not run.applied and run.reason == ALL_POSITIONS and run.flops == run.dense_flops
        return
    assert run.applied, run.reason
    assert run.same_shapes
    assert run.error_to_masked <= TOLERANCE
    assert run.flops < run.dense_flops


@pytest.mark.parametrize(("model", "attn"), alternating(1))
def test_keeping_every_token_agrees_with_dense(model: ZooModel, attn: Attn) -> None:
    run = zoo_runs.prune(model.name, attn, f"keep=1.0 layers=1 score={NORM}")
    reason = ALL_POSITIONS if model.all_positions else "keep=1.0 keeps every token: nothing to remove"
    assert run.applied != model.all_positions and run.reason == reason
    assert run.error_to_dense <= TOLERANCE


@pytest.mark.parametrize(("model", "attn"), every_case())
def test_half_by_hidden_norm_equals_its_masked_form_and_costs_less(model: ZooModel, attn: Attn) -> None:
    _check(model, attn, NORM)


@pytest.mark.parametrize(("model", "attn"), _with_mask(alternating(0)))
def test_half_of_padded_rows_equals_its_masked_form(model: ZooModel, attn: Attn) -> None:
    _check(model, attn, NORM, padding=True)


@pytest.mark.parametrize(("model", "attn", "score"), _by_attention())
def test_half_by_attention_equals_its_masked_form_and_costs_less(model: ZooModel, attn: Attn, score: str) -> None:
    _check(model, attn, score)


def test_enough_architectures_are_pruned() -> None:
    applied = {model.architecture for model in ZOO if zoo_runs.prune(model.name, model.able[0], HALF.format(score=NORM)).applied}
    assert len(applied) >= ARCHITECTURES_THAT_MUST_APPLY, sorted(applied)


@pytest.mark.parametrize(("model", "attn"), _dynamic())
def test_half_follows_a_dynamic_batch_and_length(model: ZooModel, attn: Attn) -> None:
    with torch.no_grad():
        text = f"prune-tokens{{{HALF.format(score=NORM)}}}"
        optimized, _, _ = zoo_runs.optimize(model, attn, text, padding=model.has_mask, dynamic=True, masked=True)
        other = model.inputs(batch=4, length=17, seed=5, padding=model.has_mask)
        assert optimized.report.rewrites[0].applied, optimized.report.rewrites[0].reason
        assert relative_error(optimized(*other), optimized.masked(*other)) <= TOLERANCE


def test_several_layers_cost_less_than_one() -> None:
    one = zoo_runs.prune("bert", "sdpa", HALF.format(score=NORM))
    two = zoo_runs.prune("bert", "sdpa", f"keep=0.5 layers=1,2 score={NORM}")
    assert two.applied and two.flops < one.flops and two.error_to_masked <= TOLERANCE


def test_keeping_fewer_costs_less() -> None:
    costs = [zoo_runs.prune("vit", "sdpa", f"keep={keep} layers=1 score=cls-attention").flops for keep in (0.9, 0.5, 0.25, 3)]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == 4


def test_a_tower_that_refuses_is_left_as_it_was_beside_one_that_is_pruned() -> None:
    """A fused row has no position, which the text's mask asks for at every row: pruning the text began and was taken back."""
    model = by_name("clip")
    inputs = model.inputs()
    dense = model.build("eager")
    pruned = dyncc.optimize(dense, inputs, passes="evit{keep=0.5 layers=1}", engine="reference", evidence="numeric")
    assert [(r.found, r.expected) for r in pruned.report.rewrites] == [(1, 2)]
    with torch.no_grad():
        want, got = dense(*inputs), pruned(*inputs)
    changed = [not torch.equal(a, b) for a, b in zip(tuple(want), tuple(got), strict=True)]
    assert any(changed) and not all(changed)
