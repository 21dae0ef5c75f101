"""exit-early: laws over scores and realisations, hand-cut models as oracles, refusals with their reasons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Tiny, dynamic, inputs
from torch import nn

import dyncc
from dyncc.errors import BadParameterFile, BadParameters, DynccUsageError, LayerOutOfRange

ENCODER = Tiny(layers=4)
DECODER = Tiny(kind="decoder", returns="last", layers=4)
PICKED = ENCODER.with_(returns="picked")
SCORES = ("max-prob", "margin", "entropy", "saturation")
REALISE = ("select", "cond", "compact")


def mostly_full(values: Any, quick: Any) -> list[Any]:
    """Parameters of which the quick run takes `quick` alone."""
    return [pytest.param(v, marks=[] if v in quick else [pytest.mark.full]) for v in values]


def optimized(model: nn.Module, values: Any, text: str, **more: Any) -> Any:
    more = {"engine": "reference", "evidence": "off", "strict": True, **more}
    return dyncc.optimize(model, values, passes=f"exit-early{{{text}}}", **more)


def hand_cut(tiny: Tiny, layers: int) -> nn.Module:
    """The model with its first layers alone."""
    model = tiny.build()
    model.blocks = model.blocks[:layers]
    return model


def spread(model: nn.Module, values: Any, score: str = "max-prob") -> float:
    """A threshold that lets some rows leave and not others, between the scores of two rows behind layer 1: no rounding moves a row."""
    from dyncc.passes.exit_scores import OF_LOGITS

    model.blocks, kept = model.blocks[:2], model.blocks
    with torch.no_grad():
        found = OF_LOGITS[score](model(*values))
    model.blocks = kept
    found = found.sort().values
    middle = len(found) // 2
    return float((found[middle] + found[max(middle - 1, 0)]) / 2) if len(found) > 1 else float(found[0]) * 0.9


@pytest.mark.parametrize("realise", mostly_full(REALISE, ("compact",)))
@pytest.mark.parametrize("score", mostly_full(SCORES, ("saturation",)))
def test_above_one_is_dense_bitwise(realise: str, score: str) -> None:
    for tiny, batch in ((ENCODER, 3), (DECODER, 1)):
        model, values = tiny.build(), inputs(tiny, batch)
        made = optimized(model, values, f"layers=0,2 score={score} threshold=1.5 realise={realise}")
        with torch.no_grad():
            assert torch.equal(made(*values), model(*values))


@pytest.mark.parametrize("realise", mostly_full([*REALISE, "static"], ("static",)))
@pytest.mark.parametrize(
    "tiny", mostly_full([ENCODER, DECODER, ENCODER.with_(norm="post"), ENCODER.with_(fused=False, positions="rope")], (DECODER,))
)
def test_at_zero_it_is_the_hand_cut_model(realise: str, tiny: Tiny) -> None:
    values = inputs(tiny, 3)
    layers = "1" if realise == "static" else "1,2"
    made = optimized(tiny.build(), values, f"layers={layers} threshold=0.0 realise={realise}")
    with torch.no_grad():
        torch.testing.assert_close(made(*values), hand_cut(tiny, 2)(*values), rtol=1e-5, atol=1e-6)


def by_hand(tiny: Tiny, values: Any, layers: tuple[int, ...], score: str, threshold: float) -> torch.Tensor:
    """Row by row: the first site's answer that is sure enough, else the whole model's."""
    from dyncc.passes.exit_scores import OF_LOGITS

    answers = [hand_cut(tiny, layer + 1)(*values) for layer in layers]
    result = tiny.build()(*values)
    for answer in reversed(answers):
        sure = OF_LOGITS[score](answer) >= threshold
        result = torch.where(sure[:, None], answer, result)
    return result


@pytest.mark.parametrize("realise", mostly_full(REALISE, ("compact",)))
@pytest.mark.parametrize("batch", mostly_full([1, 3, 16], (16,)))
@pytest.mark.parametrize("score", mostly_full(["max-prob", "margin", "entropy"], ("margin",)))
def test_each_row_decides_for_itself(realise: str, batch: int, score: str) -> None:
    with torch.no_grad():
        for tiny, padded in ((ENCODER, True), (DECODER, False), (PICKED, True)):
            values = inputs(tiny, batch, padded=padded)
            threshold = spread(tiny.build(), values, score)
            made = optimized(tiny.build(), values, f"layers=1,2 score={score} threshold={threshold} realise={realise} buckets=1,2,5")
            expected = by_hand(tiny, values, (1, 2), score, threshold)
            torch.testing.assert_close(made(*values), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.full
def test_permuted_rows_give_permuted_results() -> None:
    values = inputs(ENCODER, 16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    made = optimized(ENCODER.build(), values, f"layers=0,1,2 threshold={spread(ENCODER.build(), values)} realise=compact")
    with torch.no_grad():
        torch.testing.assert_close(made(values[0][order]), made(*values)[order], rtol=1e-5, atol=1e-6)


def test_the_batch_may_vary() -> None:
    values = inputs(ENCODER, 8)
    threshold = spread(ENCODER.build(), values)
    made = optimized(ENCODER.build(), values, f"layers=1,2 threshold={threshold}", dynamic_shapes=(dynamic(values)[0],))
    for batch in (2, 5, 16):
        other = inputs(ENCODER, batch, length=7, seed=batch)
        with torch.no_grad():
            torch.testing.assert_close(made(*other), by_hand(ENCODER, other, (1, 2), "max-prob", threshold), rtol=1e-5, atol=1e-6)


@pytest.mark.full
def test_a_saturated_model_leaves_where_its_layers_do_nothing() -> None:
    model = ENCODER.build()
    for block in model.blocks[1:]:
        for part in (block.o, block.down):
            nn.init.zeros_(part.weight), nn.init.zeros_(part.bias)
    values = inputs(ENCODER, 3)
    made = optimized(model, values, "layers=0,1,2 score=saturation threshold=0.9999 realise=cond")
    with torch.no_grad():
        torch.testing.assert_close(made(*values), hand_cut(ENCODER, 1)(*values), rtol=1e-5, atol=1e-6)


def test_nan_stays_until_the_end() -> None:
    model = ENCODER.build()
    values = inputs(ENCODER, 3)
    with torch.no_grad():
        model.tokens.weight[values[0][1, 0]] = float("nan")
        made = optimized(model, values, "layers=0,1 threshold=0.0 realise=compact")
        assert made(*values)[1].isnan().all()


def reason(model: nn.Module, values: Any, text: str, **more: Any) -> str:
    made = optimized(model, values, text, strict=False, **more)
    assert not made.report.rewrites[-1].applied
    with torch.no_grad():
        found, dense = made(*values), model(*values)
    assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))
    return str(made.report.rewrites[-1].reason)


def test_refusals_say_what_to_do() -> None:
    values = inputs(ENCODER)
    assert "choose an earlier layer" in reason(ENCODER.build(), values, "layers=3")
    assert "ask for the last position only" in reason(ENCODER.with_(returns="all").build(), values, "layers=1")
    assert "give one in layers" in reason(ENCODER.build(), values, "layers=1,2 realise=static")


@pytest.mark.parametrize("text", ["layers=4", "threshold=-0.5", "score=softest", "steps=0", "decay=-1.0", "buckets=0"])
def test_bad_options_are_errors(text: str) -> None:
    with pytest.raises(DynccUsageError):
        optimized(ENCODER.build(), inputs(ENCODER), text)


@pytest.mark.full
def test_decay_lowers_the_threshold_with_the_tokens_read() -> None:
    from dyncc.passes.exit_scores import decayed

    assert [round(decayed(0.5, 4.0, 10, t), 4) for t in (0, 5, 10)] == [0.55, 0.4635, 0.4518]
    values = inputs(DECODER, 8)
    threshold = spread(DECODER.build(), values)
    made = optimized(DECODER.build(), values, f"layers=1,2 threshold={threshold} decay=4.0 steps=16")
    with torch.no_grad():
        limit = decayed(threshold, 4.0, 16, values[0].shape[1])
        torch.testing.assert_close(made(*values), by_hand(DECODER, values, (1, 2), "max-prob", limit), rtol=1e-5, atol=1e-6)


def fitted(model: nn.Module, path: Any, layers: tuple[int, ...], **more: torch.Tensor) -> Any:
    """A file of maps and probes as `dyncc fit` writes them, with random numbers."""
    draw = torch.Generator().manual_seed(5)
    width = model.norm.weight.shape[0]
    tensors = {}
    for layer in layers:
        for name, sizes in (("map.weight", (width, width)), ("map.bias", (width,)), ("probe.weight", (1, width)), ("probe.bias", (1,))):
            tensors[f"exit.{layer}.{name}"] = 0.3 * torch.randn(sizes, generator=draw)
    return dyncc.save_parameters(model, {**tensors, **more}, path), tensors


@pytest.mark.parametrize("engine", ["reference", pytest.param("onnxruntime", marks=pytest.mark.full)])
def test_maps_and_probes_come_from_a_file(tmp_path: Path, engine: str) -> None:
    for tiny in (ENCODER, DECODER, PICKED):
        model, values = tiny.build(), inputs(tiny, 8)
        file, given = fitted(model, tmp_path / f"{tiny.returns}.safetensors", (1,))
        states = []
        hook = model.blocks[1].register_forward_hook(lambda module, args, result, states=states: states.append(result[0]))
        with torch.no_grad():
            dense = model(*values)
            hook.remove()
            read = {"first": 0, "last": -1, "picked": values[0].argmax(1)}[tiny.returns]
            row = states[0][torch.arange(8), read]
            early = model.head(model.norm(row @ given["exit.1.map.weight"].T + given["exit.1.map.bias"]))
            sure = torch.sigmoid(row @ given["exit.1.probe.weight"][0] + given["exit.1.probe.bias"])
            threshold = float(sure.sort().values[3:5].mean())
            made = optimized(model, values, f"layers=1 score=probe threshold={threshold} file={file}", engine=engine)
            torch.testing.assert_close(made(*values), torch.where(sure[:, None] >= threshold, early, dense), rtol=1e-4, atol=1e-5)
            cut = optimized(model, values, f"layers=1 realise=static file={file}", engine=engine)
            torch.testing.assert_close(cut(*values), early, rtol=1e-4, atol=1e-5)


def test_parameters_must_belong_to_the_model(tmp_path: Path) -> None:
    model, values = ENCODER.build(), inputs(ENCODER)
    file, _ = fitted(model, tmp_path / "a.safetensors", (1,))
    with pytest.raises(DynccUsageError, match="another model"):
        optimized(ENCODER.with_(seed=1).build(), values, f"layers=1 file={file}")
    with pytest.raises(DynccUsageError, match=r"no exit\.2\.map\.weight"):
        optimized(model, values, f"layers=2 file={file}")
    with pytest.raises(DynccUsageError, match="there is no such file"):
        optimized(model, values, f"layers=1 file={tmp_path / 'none.safetensors'}")
    with pytest.raises(DynccUsageError, match="needs file="):
        optimized(model, values, "layers=1 score=probe")


def test_layers_and_heads_that_do_not_fit_the_model_are_told(tmp_path: Path) -> None:
    model, values = ENCODER.build(), inputs(ENCODER)
    with pytest.raises(LayerOutOfRange, match="layer 4 is out of range: the model's 4 layers are numbered 0 to 3"):
        optimized(model, values, "layers=1,4")
    for name, tensor, words in (
        ("exit.controller.weight", torch.zeros(2, 16), r"exit.controller.weight is float32\[2, 16\]; floating point \[3, "),
        ("exit.1.map.weight", torch.zeros(16), r"exit.1.map.weight is float32\[16\]"),
        ("exit.1.probe.weight", torch.full((1, 16), torch.nan), "exit.1.probe.weight holds NaN or infinite numbers"),
    ):
        with pytest.raises(BadParameters, match=words):
            dyncc.save_parameters(model, {name: tensor}, tmp_path / "wrong")
    file = dyncc.save_parameters(model, {"exit.1.map.weight": torch.zeros(8, 8), "exit.1.map.bias": torch.zeros(8)}, tmp_path / "narrow")
    with pytest.raises(BadParameterFile, match=r"exit.1.map.\w+ is \[8.*\], the residual stream is 16 wide"):
        optimized(model, values, f"layers=1 file={file}")


@pytest.mark.parametrize("realise", mostly_full([*REALISE, "static"], ("compact",)))
@pytest.mark.parametrize("positions", mostly_full(["learned", "rope"], ("rope",)))
def test_skipped_layers_get_keys_from_the_state_that_a_row_left_with(realise: str, positions: str) -> None:
    tiny = DECODER.with_(keys=True, positions=positions)
    model, values = tiny.build(), inputs(tiny, 6)
    alike = hand_cut(tiny, 4)
    with torch.no_grad():
        threshold = 0.0 if realise == "static" else spread(DECODER.with_(positions=positions).build(), values)
        made = optimized(model, values, f"layers=1 threshold={threshold} realise={realise} buckets=2,4")
        logits, *cache = made(*values)
        dense, *full = model(*values)
        for block in alike.blocks[2:]:  # layers that add nothing see the state behind layer 1
            for part in (block.o, block.down):
                nn.init.zeros_(part.weight), nn.init.zeros_(part.bias)
        early, *short = alike(*values)
    sure = torch.softmax(early, -1).amax(-1) >= threshold
    torch.testing.assert_close(logits, torch.where(sure[:, None], early, dense), rtol=1e-5, atol=1e-6)
    for now, left, whole in zip(cache, short, full, strict=True):
        assert now.shape == whole.shape
        torch.testing.assert_close(now, torch.where(sure[:, None, None, None], left, whole), rtol=1e-5, atol=1e-6)
