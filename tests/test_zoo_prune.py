"""`prune-tokens` over the zoo: it applies, equals its masked form, costs less, and changes nothing when it keeps everything."""

from __future__ import annotations

import pytest
import torch
import zoo_runs
from zoo import CASE_NAMES, CASES, ZOO, by_name
from zoo_model import Attn, ZooModel, relative_error

TOLERANCE = 1e-5
HALF = "keep=0.5 layers=1 score={score}"
ARCHITECTURES_THAT_MUST_APPLY = 16
REFUSED: dict[tuple[str, str], str] = {}
"""(model, score) -> words of the refusal, for the pairs that dyncc rightly refuses."""

SCORES: tuple[tuple[ZooModel, Attn, str], ...] = tuple(
    (model, attn, score)
    for model, attn in CASES
    for score, applies in (
        ("cls-attention", model.has_cls),
        ("last-window-attention", model.causal),
        ("received-attention", model.family in ("encoder", "vision", "audio") and not model.causal),
    )
    if applies
)
SCORE_NAMES = tuple(f"{model.name}-{attn}-{score}" for model, attn, score in SCORES)


def _check(model: ZooModel, attn: str, score: str, padding: bool = False) -> None:
    run = zoo_runs.prune(model.name, attn, HALF.format(score=score), padding)
    refusal = REFUSED.get((model.name, score))
    if refusal is not None:
        assert not run.applied and refusal in run.reason
        return
    assert run.applied, run.reason
    assert run.same_shapes
    assert run.error_to_masked <= TOLERANCE
    assert run.flops < run.dense_flops


@pytest.mark.parametrize(("model", "attn"), CASES, ids=CASE_NAMES)
def test_keeping_every_token_agrees_with_dense(model: ZooModel, attn: Attn) -> None:
    run = zoo_runs.prune(model.name, attn, "keep=1.0 layers=1 score=hidden-norm")
    if (model.name, "hidden-norm") not in REFUSED:
        assert run.applied, run.reason
    assert run.error_to_dense <= TOLERANCE


@pytest.mark.parametrize(("model", "attn"), CASES, ids=CASE_NAMES)
def test_half_by_hidden_norm_equals_its_masked_form_and_costs_less(model: ZooModel, attn: Attn) -> None:
    _check(model, attn, "hidden-norm")


@pytest.mark.parametrize(("model", "attn"), [c for c in CASES if c[0].has_mask], ids=[f"{m.name}-{a}" for m, a in CASES if m.has_mask])
def test_half_of_padded_rows_equals_its_masked_form(model: ZooModel, attn: Attn) -> None:
    _check(model, attn, "hidden-norm", padding=True)


@pytest.mark.parametrize(("model", "attn", "score"), SCORES, ids=SCORE_NAMES)
def test_half_by_attention_equals_its_masked_form_and_costs_less(model: ZooModel, attn: Attn, score: str) -> None:
    _check(model, attn, score)


def test_enough_architectures_are_pruned() -> None:
    applied = {model.name for model in ZOO if (model.name, "hidden-norm") not in REFUSED}
    assert len(applied) >= ARCHITECTURES_THAT_MUST_APPLY


@pytest.mark.parametrize("name", ["bert", "vit", "clip-text", "llama-last", "t5-encoder", "gpt2"])
def test_half_follows_a_dynamic_batch_and_length(name: str) -> None:
    model = by_name(name)
    if (name, "hidden-norm") in REFUSED:
        pytest.fail(f"{name} is refused: take another model here")
    with torch.no_grad():
        text = "prune-tokens{keep=0.5 layers=1 score=hidden-norm}"
        optimized, _, _ = zoo_runs.optimize(model, "sdpa", text, padding=model.has_mask, dynamic=True, masked=True)
        other = model.inputs(batch=4, length=17, seed=5, padding=model.has_mask)
        assert optimized.report.rewrites[0].applied, optimized.report.rewrites[0].reason
        assert relative_error(optimized(*other), optimized.masked(*other)) <= TOLERANCE


def test_several_layers_cost_less_than_one() -> None:
    one = zoo_runs.prune("bert", "sdpa", HALF.format(score="hidden-norm"))
    two = zoo_runs.prune("bert", "sdpa", "keep=0.5 layers=1,2 score=hidden-norm")
    assert two.applied and two.flops < one.flops and two.error_to_masked <= TOLERANCE


def test_keeping_fewer_costs_less() -> None:
    costs = [zoo_runs.prune("vit", "sdpa", f"keep={keep} layers=1 score=cls-attention").flops for keep in (0.9, 0.5, 0.25, 3)]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == 4
