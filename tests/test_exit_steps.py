"""exit-early in decoding steps over a past: every layer's cache grows by one row whoever leaves, and decay goes by the keys held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_exit_early import REALISE, hand_cut, mostly_full, optimized
from tiny import Tiny, inputs
from torch import Tensor, nn

from dyncc.passes.exit_scores import decayed, max_prob

STEP = Tiny(kind="decoder", returns="last", layers=4, keys=True, positions="rope")


def step(tiny: Tiny = STEP, batch: int = 6, length: int = 8) -> tuple[Tensor, None, *tuple[Tensor, ...]]:
    """One token behind a prompt that the dense model read."""
    (ids,) = inputs(tiny, batch, length + 1)
    with torch.no_grad():
        _, *past = tiny.build()(ids[:, :-1])
    return ids[:, -1:], None, *past


def idle(tiny: Tiny, layers: int) -> nn.Module:
    """The model whose later layers add nothing: their keys are those of the state behind layer `layers` - 1."""
    model = tiny.build()
    for block in model.blocks[layers:]:
        for part in (block.o, block.down):
            nn.init.zeros_(part.weight), nn.init.zeros_(part.bias)
    return model


def by_hand(tiny: Tiny, values: Any, layers: tuple[int, ...], threshold: float) -> list[Tensor]:
    """Row by row: logits and cache of the first exit that is sure enough, else of the whole model."""
    result = list(tiny.build()(*values))
    for layer in reversed(layers):
        early = idle(tiny, layer + 1)(*values)
        sure = max_prob(early[0]) >= threshold
        result = [torch.where(sure.view([-1] + [1] * (now.dim() - 1)), now, rest) for now, rest in zip(early, result, strict=True)]
    return result


def between(values: Any, layer: int, tiny: Tiny = STEP) -> float:
    """A threshold between two rows' scores behind a layer."""
    found = max_prob(idle(tiny, layer + 1)(*values)[0]).sort().values
    return float(found[2:4].mean())


@pytest.mark.parametrize("realise", mostly_full(REALISE, ("compact",)))
@pytest.mark.parametrize("positions", mostly_full(["rope", "learned"], ("rope",)))
@torch.no_grad()
def test_rows_leave_a_step_and_caches_grow_alike(realise: str, positions: str) -> None:
    tiny = STEP.with_(positions=positions)
    values = step(tiny)
    threshold = between(values, 1, tiny)
    made = optimized(tiny.build(), values, f"layers=1,2 threshold={threshold} realise={realise} buckets=2,4")
    found = made(*values)
    assert all(keys.shape[2] == values[2].shape[2] + 1 for keys in found[1:])
    for now, then in zip(found[1:], values[2:], strict=True):
        assert torch.equal(now[:, :, :-1], then), "what was held stays as it was"
    for now, expected in zip(found, by_hand(tiny, values, (1, 2), threshold), strict=True):
        torch.testing.assert_close(now, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("realise", mostly_full([*REALISE, "static"], ("cond", "static")))
@torch.no_grad()
def test_thresholds_that_none_or_all_reach(realise: str) -> None:
    values = step()
    if realise != "static":
        dense = optimized(STEP.build(), values, f"layers=0,2 threshold=1.5 realise={realise}")(*values)
        assert all(torch.equal(a, b) for a, b in zip(dense, STEP.build()(*values), strict=True))
    found = optimized(STEP.build(), values, f"layers=1 threshold=0.0 realise={realise}")(*values)
    torch.testing.assert_close(found[0], hand_cut(STEP, 2)(*values[:6])[0], rtol=1e-5, atol=1e-6)
    for now, expected in zip(found, idle(STEP, 2)(*values), strict=True):
        torch.testing.assert_close(now, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.full
@torch.no_grad()
def test_steps_go_on_over_what_early_rows_left_and_the_threshold_decays() -> None:
    values, length = step(), torch.export.Dim("length", min=2, max=60)
    threshold = between(values, 1)
    shapes = {"ids": None, "attention_mask": None, "past": tuple({2: length} for _ in values[2:])}
    text = f"layers=1,2 threshold={threshold} decay=4.0 steps=16 realise=compact buckets=2,4"
    made = optimized(STEP.build(), values, text, dynamic_shapes=shapes)
    for count in range(9, 14):
        limit = decayed(threshold, 4.0, 16, count)
        logits, *past = made(*values)
        expected = by_hand(STEP, values, (1, 2), limit)
        for now, hand in zip((logits, *past), expected, strict=True):
            torch.testing.assert_close(now, hand, rtol=1e-5, atol=1e-6)
        assert all(keys.shape[2] == count for keys in past)
        values = (logits.argmax(-1).view(-1, 1), None, *past)


class Writing(nn.Module):
    """A step whose result is also written into a buffer of the caller's, as caches that are kept do."""

    def __init__(self) -> None:
        super().__init__()
        self.model = STEP.with_(keys=False).build()

    def forward(self, ids: Tensor, buffer: Tensor) -> Tensor:
        logits: Tensor = self.model(ids)
        buffer.copy_(logits)
        return logits


@torch.no_grad()
def test_what_is_written_in_place_is_refused_with_the_way_out() -> None:
    values = (inputs(STEP)[0], torch.zeros(2, 31))
    made = optimized(Writing(), values, "layers=1", strict=False)
    (rewrite,) = made.report.rewrites
    assert not rewrite.applied and "take the past as inputs and return it, as dyncc.decoding.Decode does" in rewrite.reason
    assert torch.equal(made(*values), STEP.with_(keys=False).build()(values[0]))
