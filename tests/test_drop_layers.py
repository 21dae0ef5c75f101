"""drop-layers and levels by position: equal to models with layers taken out by hand, and what caches hold of the layers left out."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fit import DECODER, data
from tiny import VOCABULARY, Tiny, inputs
from torch import Tensor, nn

import dyncc
from dyncc import capture
from dyncc.errors import BadOptionValue, BadParameterFile, InputMismatch, LayerOutOfRange, RefusedError
from dyncc.evidence import relative_error
from dyncc.passes.drop_layers import skipped_layers
from dyncc.position_levels import active_layers, plan_levels

REFERENCE = {"engine": "reference", "evidence": "off"}
STEPS = Tiny(kind="decoder", returns="all", layers=5, keys=True)


pytestmark = pytest.mark.usefixtures("no_grad")


def dropped(model: nn.Module, values: tuple[Any, ...], options: str, **more: Any) -> Any:
    made = dyncc.optimize(model, values, passes=f"drop-layers{{{options}}}", **{**REFERENCE, **more})
    assert made.report.rewrites[0].applied, made.report.rewrites[0].reason
    return made


def cut(tiny: Tiny, *layers: int) -> nn.Module:
    """The model without some of its layers."""
    model = tiny.build()
    model.blocks = nn.ModuleList(b for i, b in enumerate(model.blocks) if i not in layers)
    return model


KINDS = {
    "decoder": Tiny(kind="decoder", returns="last", layers=4, positions="rope"),
    "encoder": Tiny(layers=4, fused=False),
    "post-norm": Tiny(layers=4, norm="post", returns="all"),
}


@pytest.mark.parametrize("tiny", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("layers", [(1, 2), *(pytest.param(x, marks=pytest.mark.full) for x in ((0,), (0, 3), (2, 3)))], ids=str)
def test_it_is_the_model_without_the_layers(tiny: Tiny, layers: tuple[int, ...]) -> None:
    values = inputs(tiny, 3, 9, padded=True)
    made = dropped(tiny.build(), values, f"layers={','.join(map(str, layers))}")
    assert torch.equal(made(*values), cut(tiny, *layers)(*values))
    dense = dyncc.optimize(cut(tiny, *layers), values, passes="", **REFERENCE)
    assert made.flops == dense.flops < made.dense_flops
    assert made.report.rewrites[0].found == len(layers)
    left = capture.count(made._outcome.program.graph, "scaled_dot_product_attention", "softmax")
    assert left == tiny.layers - len(layers), "none is left idle"


def test_no_layers_and_all_layers_active_are_the_dense_model() -> None:
    tiny, values = KINDS["encoder"], inputs(KINDS["encoder"], 2, 7)
    for options in ("", "active=4", "active=9"):
        made = dropped(tiny.build(), values, options)
        assert torch.equal(made(*values), made.dense(*values)) and made.flops == made.dense_flops
        assert "nothing to leave out" in made.report.rewrites[0].reason


@pytest.mark.full
@pytest.mark.parametrize("engine", ["inductor", "onnxruntime"])
def test_engines_agree_and_rows_are_their_own(engine: str) -> None:
    tiny = KINDS["decoder"]
    values = inputs(tiny, 4, 9, padded=True)
    made = dropped(tiny.build(), values, "layers=1", engine=engine)
    assert made.report.engine == engine
    order = torch.tensor([2, 0, 3, 1])
    assert relative_error(cut(tiny, 1)(*values), made(*values)) < 1e-5
    assert relative_error(made(*values)[order], made(*(v[order] for v in values))) < 1e-5


@pytest.mark.full
def test_compiled_in_place() -> None:
    tiny, values = KINDS["decoder"], inputs(KINDS["decoder"], 2, 9)
    torch._dynamo.reset()
    options = {"passes": "drop-layers{layers=0,2}", "engine": "reference", "strict": True}
    fast = torch.compile(tiny.build(), backend="dyncc", options=options)
    assert relative_error(cut(tiny, 0, 2)(*values), fast(*values)) < 1e-6


def ranked(folder: Path, tiny: Tiny = DECODER) -> Path:
    return dyncc.fit(tiny.build(), data=data(tiny, padded=False), plan="drops", output=folder).path


def test_the_least_missed_layers_go_first(tmp_path: Path) -> None:
    file = ranked(tmp_path)
    missed = dyncc.fitted.load_fitted(file).take("drop.divergence").tolist()
    values = inputs(DECODER, 2, 9)
    order = sorted(range(3), key=missed.__getitem__)
    for count in (1, 2):
        made = dropped(DECODER.build(), values, f"count={count} file={tmp_path}")
        assert torch.equal(made(*values), cut(DECODER, *order[:count])(*values))


def test_a_ranking_of_another_model_is_refused(tmp_path: Path) -> None:
    file, values = ranked(tmp_path), inputs(DECODER, 2, 9)
    with pytest.raises(BadParameterFile, match="it belongs to another model, or to other weights: 5. of 5. parameters differ"):
        dropped(DECODER.with_(seed=8).build(), values, f"count=1 file={file}")
    with pytest.raises(BadParameterFile, match="there is no such file"):
        dropped(DECODER.build(), values, "count=1 file=nowhere")
    with pytest.raises(BadOptionValue, match="the model has 3 layers, and one must stay"):
        dropped(DECODER.build(), values, f"count=3 file={file}")
    other = dyncc.save_parameters(DECODER.build(), {"drop.divergence": torch.zeros(7)}, tmp_path / "seven")
    with pytest.raises(BadParameterFile, match="it ranks 7 layers, the model has 3"):
        dropped(DECODER.build(), values, f"count=1 file={other}")


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ("layers=7", LayerOutOfRange, "layer 7 is out of range"),
        ("layers=1 active=2", BadOptionValue, "give one of layers, count"),
        ("count=2", BadOptionValue, "count and file go together"),
        ("active=1 warm=2", BadOptionValue, "the warm=2 first layers are among the active ones"),
        ("active=-1", BadOptionValue, "0 is the least"),
        ("layers=0,1,2", RefusedError, "all 3 layers would be left out; keep one"),
    ],
)
def test_what_does_not_fit_is_told(options: str, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        dropped(DECODER.build(), inputs(DECODER, 2, 9), options, strict=True)


def test_a_last_layer_that_was_cut_down_is_not_counted() -> None:
    tiny = KINDS["decoder"]
    values = inputs(tiny, 2, 9)
    with pytest.raises(RefusedError, match="put this pass in front of slice-last-token"):
        dyncc.optimize(tiny.build(), values, passes="slice-last-token drop-layers{layers=1}", strict=True, **REFERENCE)
    made = dyncc.optimize(tiny.build(), values, passes="drop-layers{layers=1} slice-last-token", strict=True, **REFERENCE)
    assert relative_error(cut(tiny, 1)(*values), made(*values)) < 1e-5


class ByHand:
    """Steps of a decoder with a set of layers each, and a cache that is written where a layer does not run, too."""

    def __init__(self, tiny: Tiny) -> None:
        self.model, self.runs = tiny.build(), 0

    def __call__(self, ids: Tensor, past: tuple[Tensor, ...], skipped: tuple[int, ...], done: int) -> tuple[Tensor, ...]:
        model, cache = self.model, list[Tensor]()
        x = model.tokens(ids) + model.places(torch.arange(done, done + ids.shape[1])[None])
        for i, block in enumerate(model.blocks):
            changed, k, v = block(x, None, model.mask(ids, None, done), past[2 * i : 2 * i + 2])
            cache += [k, v]
            self.runs += i not in skipped
            x = x if i in skipped else changed
        return model.head(model.norm(x)), *cache


@pytest.mark.full
def test_steps_by_position_are_those_by_hand() -> None:
    """SkipDecode: nested sets, and the length that each layer's cache has."""
    model, ids = STEPS.build(), torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))
    _, *past = model(ids[:, :4])
    hand, expected = ByHand(STEPS), list(past)
    levels: dict[int, Any] = {}
    plan = plan_levels(5, 2, 10, 3)
    assert [level.active for level in plan] == [5, 4, 2]
    total = 0
    for position in range(4, 12):
        active = next(level.active for level in reversed(plan) if level.first <= position)
        skipped, total = skipped_layers(5, active), total + active
        token = ids[:, position : position + 1]
        made = dropped(model, (token, None, *past), f"active={active}")
        levels[active] = made
        logits, *past = made(token, None, *past)
        wanted, *expected = hand(token, tuple(expected), skipped, position)
        assert relative_error(wanted, logits) < 1e-5
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(expected, past, strict=True))
    assert hand.runs == total
    assert [k.shape[2] for k in past[::2]] == [12] * 5, "every layer holds every token"
    assert levels[2].flops < levels[4].flops < levels[4].dense_flops


def test_sets_are_nested_and_levels_cover_every_position() -> None:
    for most, least, horizon, count in ((30, 12, 64, 4), (12, 3, 100, 9), (8, 8, 5, 3), (6, 2, 3, 1)):
        plan = plan_levels(most, least, horizon, count)
        assert len(plan) <= max(count, 1) and plan[0].first == 0
        sets = [set(range(most)) - set(skipped_layers(most, level.active)) for level in plan]
        assert all(later < earlier for earlier, later in pairwise(sets))
        for position in range(2 * horizon):
            active = next(level.active for level in reversed(plan) if level.first <= position)
            assert active >= active_layers(position, most, least, horizon) or count == 1


class Step(nn.Module):
    """A decoding step with a past that may grow: ids [B, 1] and keys and values, stacked by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = STEPS.build()

    def forward(self, ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self.inner(ids, None, *past)
        return found


def by_position(**options: Any) -> tuple[Any, Step, list[Tensor], Tensor]:
    model, ids = Step(), torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(4))
    _, *past = model.inner(ids[:, :4])
    length = torch.export.Dim("past", min=2, max=60)
    sizes = (None, tuple({2: length} for _ in past))
    given = {"least": 2, "horizon": 8, "levels": 3, "dynamic_shapes": sizes, **REFERENCE, **options}
    return dyncc.optimize_by_position(model, (ids[:, 4:5], *past), **given), model, list(past), ids


@pytest.mark.full
def test_a_graph_a_level_serves_every_position() -> None:
    made, _, past, ids = by_position()
    hand, expected = ByHand(STEPS), list(past)
    assert [(level.first, level.active) for level in made.levels] == [(0, 5), (2, 4), (7, 2)]
    for position in range(4, 9):
        token = ids[:, position : position + 1]
        logits, *past = made(position, token, *past)
        skipped = skipped_layers(5, made.levels[made.level(position)].active)
        wanted, *expected = hand(token, tuple(expected), skipped, position)
        assert relative_error(wanted, logits) < 1e-5
    assert {k.shape[2] for k in past} == {9}
    with pytest.raises(InputMismatch, match="position -1 is negative"):
        made(-1, ids[:, :1], *past)


@pytest.mark.full
def test_levels_that_all_run_everything_are_the_dense_model_bit_for_bit() -> None:
    made, model, past, ids = by_position(least=5)
    assert len(made.levels) == 1
    for a, b in zip(made(99, ids[:, 4:5], *past), model(ids[:, 4:5], *past), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{"least": 0}, {"least": 6}, {"least": 3, "most": 2}, {"warm": 4}, {"horizon": 0}], ids=str)
@pytest.mark.full
def test_levels_that_do_not_fit_are_told(options: dict[str, Any]) -> None:
    with pytest.raises(BadOptionValue):
        by_position(**options)


@pytest.mark.full
def test_levels_export_a_file_each(tmp_path: Path) -> None:
    made, *_ = by_position()
    files = made.export_onnx(tmp_path)
    assert [file.path.name for file in files] == ["active_5.onnx", "active_4.onnx", "active_2.onnx"]
    assert all(row.error <= row.limit for file in files for row in file.parity)
    assert [len(file.outputs) for file in files] == [11, 11, 11]
