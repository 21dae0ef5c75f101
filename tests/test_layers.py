"""dyncc.layers: what the papers promise of each, and that all of them can be captured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dyncc.kernels.gated_linear_attention import GATED_LINEAR_ATTENTION
from dyncc.layers.decay_mixer import DecayMixer
from dyncc.layers.feedback_attention import FeedbackAttention
from dyncc.layers.gated_delta_rule import GatedDeltaRule
from dyncc.layers.gated_image_attention import GatedImageAttention
from dyncc.layers.gated_linear_attention import GatedLinearAttention
from dyncc.layers.memory_read import MemoryRead
from dyncc.layers.pattention import Pattention
from dyncc.layers.two_way_linear_attention import TwoWayLinearAttention

WIDTH, T = 16, 7
RECURRENT = (GatedLinearAttention, GatedDeltaRule, DecayMixer)


def tokens() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, T, WIDTH)


@pytest.mark.parametrize("kind", RECURRENT)
def test_steps_with_the_state_are_the_whole_sequence(kind: Any) -> None:
    x, layer, state, outs = tokens(), kind(WIDTH), None, []
    whole, last = layer(x)
    for part in x.split(3, 1):
        out, state = layer(part, state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), whole)
    torch.testing.assert_close(state, last)


def test_gated_linear_attention_is_the_op() -> None:
    x, layer = tokens(), GatedLinearAttention(WIDTH)
    q, k, v, a = (layer.split(f(x)) for f in (layer.q, layer.k, layer.v, layer.decay))
    out, state = GATED_LINEAR_ATTENTION(q, k, v, nn.functional.logsigmoid(a) / 16, None, q.shape[3] ** -0.5)
    mixed = layer.norm(out.transpose(1, 2)).flatten(2) * nn.functional.silu(layer.gate(x))
    whole, last = layer(x)
    torch.testing.assert_close(layer.out(mixed), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last)


def test_the_delta_rule_replaces_what_a_key_held() -> None:
    """Nothing decays, every token is written whole, and all have one key: the state holds the last value alone."""
    layer, x = GatedDeltaRule(WIDTH, heads=1), tokens()
    for gate, bias in ((layer.decay, -40.0), (layer.beta, 40.0)):
        nn.init.zeros_(gate.weight)
        nn.init.constant_(gate.bias, bias)
    key = torch.randn(WIDTH)
    layer.k = nn.Linear(WIDTH, WIDTH)
    nn.init.zeros_(layer.k.weight)
    layer.k.bias.data.copy_(key)
    _, state = layer(x)
    torch.testing.assert_close(nn.functional.normalize(key, dim=0) @ state[:, 0], layer.v(x)[:, -1])


def test_pattention_grows_without_a_change_and_does_not_see_the_length_of_its_scores() -> None:
    x, layer = tokens(), Pattention(WIDTH, 5, 12)
    before = layer(x)
    torch.testing.assert_close(layer(3 * x), before)
    layer.grow(4)
    assert layer.keys.shape[0] == 16
    torch.testing.assert_close(layer(x), before)


def test_a_memory_read_sees_two_tokens_back_and_none_ahead() -> None:
    x, layer = tokens(), MemoryRead(WIDTH, 8)
    changed = x.clone()
    changed[:, 3] += 1
    moved = (layer(changed) - layer(x)).abs().amax((0, 2)) > 1e-7
    assert moved.tolist() == [False, False, False, True, True, True, False]


def test_feedback_is_the_loop_it_stands_for() -> None:
    x, layer, s = tokens(), FeedbackAttention(WIDTH), []
    f, a, g = x.sin(), layer.weights(x), layer.gains(x)
    for t in range(T):
        s.append(f[:, t] + g[:, t] * sum((a[:, t, j, None] * s[j] for j in range(t)), torch.zeros(2, WIDTH)))
    torch.testing.assert_close(layer(x, f), torch.stack(s, 1))
    nn.init.zeros_(layer.gain.weight)
    nn.init.zeros_(layer.gain.bias)
    torch.testing.assert_close(layer(x, f), f)


def test_both_ways_turn_with_the_sequence_and_its_gates() -> None:
    x, layer = tokens(), TwoWayLinearAttention(WIDTH)
    there = layer.both(x)
    last = layer.decay[1]
    for p in (last.weight, last.bias):
        p.data = torch.cat(p.data.chunk(2)[::-1])
    torch.testing.assert_close(layer.both(x.flip(1)).flip(1), there)


def test_gates_on_values_scale_the_result_and_gates_on_keys_cancel() -> None:
    """Up to the normaliser's least: with one head each query has some channel above it."""
    x, layer = tokens(), GatedImageAttention(WIDTH, T, heads=1)
    before = layer.mixed(x)
    layer.value_gate.data *= 3
    torch.testing.assert_close(layer.mixed(x), 3 * before)
    layer.key_gate.data *= 2
    torch.testing.assert_close(layer.mixed(x), 3 * before, rtol=1e-3, atol=1e-4)
    order = torch.randperm(T)
    torch.testing.assert_close(layer.mixed(x[:, order]), layer.mixed(x)[:, order])


def made(kind: Any) -> Any:
    more = {Pattention: (5, 12), GatedImageAttention: (T,)}
    return kind(WIDTH, *more.get(kind, ()))


@pytest.mark.parametrize("kind", [*RECURRENT, FeedbackAttention, GatedImageAttention, MemoryRead, Pattention, TwoWayLinearAttention])
def test_each_can_be_compiled(kind: Any) -> None:
    x, layer = tokens(), made(kind)
    values = (x, x.sin()) if kind is FeedbackAttention else (x,)
    with torch.no_grad():
        found = torch.compile(layer, backend="dyncc", options={"engine": "reference"})(*values)
        torch.testing.assert_close(found, layer(*values))
