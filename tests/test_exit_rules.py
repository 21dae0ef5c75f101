"""Rules of exit-early beyond one score, each against NumPy: conditional exit probabilities, stop or exit, steps of diffusion models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_exit_early import DECODER, ENCODER, hand_cut, mostly_full, optimized
from tiny import VOCABULARY, Tiny, inputs
from torch import Tensor, nn

import dyncc
from dyncc.errors import DynccUsageError
from dyncc.passes.exit_gates import conditional, gate_features
from dyncc.passes.exit_stop import controlled

REALISE = ("select", "cond", "compact")
LAYERS = (0, 1, 2)
END = 4


def given(model: nn.Module, path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A file of gates and a controller as someone's training would write them."""
    draw = torch.Generator().manual_seed(31)
    width = model.norm.weight.shape[0]
    tensors = {"exit.controller.weight": 0.4 * torch.randn(3, width, generator=draw)}
    for layer in LAYERS:
        tensors[f"exit.{layer}.gate.weight"] = torch.randn(1, 4, generator=draw)
        tensors[f"exit.{layer}.gate.bias"] = torch.randn(1, generator=draw) - 1
    return dyncc.save_parameters(model, tensors, path), tensors


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def answers(tiny: Tiny, values: Any) -> list[Tensor]:
    return [hand_cut(tiny, layer + 1)(*values) for layer in (*LAYERS, 3)]


def chances(gates: np.ndarray) -> np.ndarray:
    """The conditional exit probabilities of gates [S, N], row by row as the paper has them."""
    found = np.zeros_like(gates)
    for i, row in enumerate(gates.T):
        used, left = 0.0, 1.0
        for site, g in enumerate(row):
            p = min(max(max(0.0, min(g, 1 - used)) / max(left, 1e-12), 0.0), 1.0)
            found[site, i], used, left = p, used + g, left * (1 - p)
    return found


def numpy_gates(outputs: list[Tensor], tensors: dict[str, Tensor]) -> np.ndarray:
    rows = []
    for layer, logits in zip(LAYERS, outputs, strict=False):
        p = softmax(logits.double().numpy())
        sharp = p**2 / (p**2).sum(-1, keepdims=True)
        best = np.sort(p, -1)
        features = np.stack([best[:, -1], -(p * np.log(p)).sum(-1), best[:, -1] - best[:, -2], -(sharp * np.log(sharp)).sum(-1)], -1)
        at = features @ tensors[f"exit.{layer}.gate.weight"].numpy()[0] + tensors[f"exit.{layer}.gate.bias"].numpy()
        rows.append(1 / (1 + np.exp(-at)))
    return np.stack(rows)


@pytest.mark.parametrize("realise", mostly_full(REALISE, ("compact",)))
@torch.no_grad()
def test_gates_leave_where_the_conditional_probability_says(realise: str, tmp_path: Path) -> None:
    model, values = ENCODER.build(), inputs(ENCODER, 16)
    outputs, tensors = answers(ENCODER, values), {}
    for layer, logits in zip(LAYERS, outputs, strict=False):
        weight = torch.tensor([[20.0, 0.1, 20.0, -0.1]])
        middle = gate_features(logits).median(0).values
        tensors |= {f"exit.{layer}.gate.weight": weight, f"exit.{layer}.gate.bias": -weight @ middle - 1}
    file = dyncc.save_parameters(model, tensors, tmp_path / "gates.safetensors")
    p = chances(numpy_gates(outputs, tensors))
    ranked = np.sort(p.flatten())
    threshold = float(ranked[20:22].mean())
    at = [next((s for s in range(3) if p[s, i] >= threshold), 3) for i in range(16)]
    assert len(set(at)) >= 3, "rows leave at several places"
    made = optimized(model, values, f"layers=0,1,2 score=gate threshold={threshold} realise={realise} buckets=2,8 file={file}")
    torch.testing.assert_close(made(*values), torch.stack([outputs[s][i] for i, s in enumerate(at)]), rtol=1e-5, atol=1e-6)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(made(values[0][order]), made(*values)[order], rtol=1e-5, atol=1e-6)


def test_shares_of_all_exits_are_at_most_one() -> None:
    gates = torch.rand(5, 100, generator=torch.Generator().manual_seed(1))
    used, left, total = torch.zeros(100), torch.ones(100), torch.zeros(100)
    for g in gates:
        before = left
        p, used, left = conditional(g, used, left)
        total = total + before * p
    assert bool((total <= 1 + 1e-6).all()) and bool((left >= 0).all())
    torch.testing.assert_close(total + left, torch.ones(100))
    assert bool((total > 0.9).any())


@pytest.mark.parametrize("realise", mostly_full(REALISE, ("compact",)))
@torch.no_grad()
def test_a_controller_stops_leaves_or_goes_on(realise: str, tmp_path: Path) -> None:
    model, values = DECODER.build(), inputs(DECODER, 16)
    file, tensors = given(model, tmp_path / "controller.safetensors")
    states: list[Tensor] = []
    hooks = [model.blocks[layer].register_forward_hook(lambda m, a, o: states.append(o[0][:, -1])) for layer in LAYERS]
    dense = model(*values)
    [hook.remove() for hook in hooks]
    outputs, expected, kinds = answers(DECODER, values), dense.clone(), []
    for i in range(16):
        kind = "stays"
        for site, state in enumerate(states):
            c = softmax(state[i].double().numpy() @ tensors["exit.controller.weight"].double().numpy().T)
            if c.argmax() == 0 and c[0] >= 0.6:
                kind, expected[i] = "stops", torch.where(torch.arange(VOCABULARY) == END, outputs[site][i], -torch.inf)
            elif c.argmax() == 1 and c[1] >= 0.6:
                kind, expected[i] = "leaves", outputs[site][i]
            if kind != "stays":
                break
        kinds.append(kind)
    assert set(kinds) == {"stops", "leaves", "stays"}
    text = f"layers=0,1,2 score=controller threshold=0.6 stop=0.6 end={END} realise={realise} buckets=2,8 file={file}"
    found = optimized(model, values, text)(*values)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert all(row.argmax() == END for row, kind in zip(found, kinds, strict=True) if kind == "stops")


def test_a_row_never_stops_and_leaves() -> None:
    draw = torch.Generator().manual_seed(2)
    score, stopped = controlled(torch.randn(200, 8, generator=draw), torch.randn(3, 8, generator=draw), 0.0)
    assert 0 < int(stopped.sum()) < 200 and not bool((stopped & (score > 0)).any())
    nan, stop = controlled(torch.full((1, 8), torch.nan), torch.ones(3, 8), 0.0)
    assert nan.isnan().all() and not stop.any(), "NaN stays until the end"


@pytest.mark.parametrize("realise", mostly_full(REALISE, ("compact",)))
@pytest.mark.parametrize("score", mostly_full(["max-prob", "entropy", "margin"], ("margin",)))
@torch.no_grad()
def test_a_denoising_step_leaves_where_its_surest_masked_position_is_sure(realise: str, score: str) -> None:
    from dyncc.passes.exit_scores import OF_LOGITS

    tiny, mask = ENCODER.with_(returns="all"), VOCABULARY - 1
    (ids,) = inputs(tiny, 16)
    ids[:, 3:7], ids[5] = mask, 0
    outputs = answers(tiny, (ids,))
    scores = [[OF_LOGITS[score](x[i])[ids[i] == mask] for i in range(16)] for x in outputs]
    surest = torch.tensor([[float(s.max()) if len(s) else 1.0 for s in row] for row in scores[:3]])
    ranked = surest.flatten().sort().values
    threshold = float((ranked[24] + ranked[25]) / 2)
    at = [next((s for s in range(3) if surest[s, i] >= threshold), 3) for i in range(16)]
    assert len(set(at)) > 1 and at[5] == 0
    made = optimized(tiny.build(), (ids,), f"layers=0,1,2 score={score} threshold={threshold} masked={mask} realise={realise} buckets=4,8")
    torch.testing.assert_close(made(ids), torch.stack([outputs[s][i] for i, s in enumerate(at)]), rtol=1e-5, atol=1e-6)


RULES = ("score=gate", "score=controller", f"score=controller end={END}", f"masked={VOCABULARY - 1}")


@pytest.mark.parametrize("rule", mostly_full(RULES, ("score=gate",)))
@pytest.mark.parametrize("realise", mostly_full(REALISE, ("compact",)))
@torch.no_grad()
def test_no_threshold_is_reached_or_every_one(rule: str, realise: str, tmp_path: Path) -> None:
    tiny = ENCODER.with_(returns="all") if "masked" in rule else ENCODER
    model, values = tiny.build(), inputs(tiny, 3)
    more = f"{rule} realise={realise}" + ("" if "masked" in rule else f" file={given(model, tmp_path / 'a.safetensors')[0]}")
    assert torch.equal(optimized(model, values, f"layers=0,2 threshold=1.5 {more}")(*values), model(*values))
    first = optimized(model, values, f"layers=1,2 threshold=0.0 {more}")(*values)
    torch.testing.assert_close(first, hand_cut(tiny, 2)(*values), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("score=gate", "needs file="), ("score=controller", r"exit\.controller\.weight"), ("stop=0.5", "needs score=controller and end="),
        ("score=saturation masked=3", "max-prob, margin, entropy"), ("masked=-2", "a token, or -1"), ("stop=-1.0", "above 1 no row stops"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_told(text: str, words: str) -> None:
    with pytest.raises(DynccUsageError, match=words):
        optimized(ENCODER.build(), inputs(ENCODER), text)


def test_what_a_rule_cannot_read_is_refused(tmp_path: Path) -> None:
    model, values = ENCODER.build(), inputs(ENCODER)
    file, _ = given(model, tmp_path / "a.safetensors")
    for text, words in (
        ("layers=1 masked=3", "needs logits at all positions"),
        (f"layers=1 score=controller stop=0.5 end={VOCABULARY} file={file}", "is no token"),
    ):
        made = optimized(model, values, text, strict=False)
        assert not made.report.rewrites[-1].applied and words in made.report.rewrites[-1].reason
        assert torch.equal(made(*values), model(*values))
    with pytest.raises(DynccUsageError, match=r"no exit\.3\.gate|no exit\.1\.probe"):
        optimized(model, values, f"layers=1 score=probe file={file}")
