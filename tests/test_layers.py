"""dyncc.layers: what the papers promise of each, and that all of them can be captured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dyncc
from dyncc.kernels.gated_delta_rule import GATED_DELTA_RULE
from dyncc.kernels.gated_linear_attention import GATED_LINEAR_ATTENTION
from dyncc.layers.decay_mixer import DecayMixer
from dyncc.layers.differential_linear_attention import DifferentialLinearAttention
from dyncc.layers.feedback_attention import FeedbackAttention
from dyncc.layers.gated_delta_rule import GatedDeltaRule
from dyncc.layers.gated_image_attention import GatedImageAttention
from dyncc.layers.gated_linear_attention import GatedLinearAttention
from dyncc.layers.hybrid_memory import HybridMemory
from dyncc.layers.memory_read import MemoryRead
from dyncc.layers.pattention import Pattention
from dyncc.layers.two_way_linear_attention import TwoWayLinearAttention
from dyncc.layers.value_bank import ValueBank, ValueBankAttention

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


def test_what_is_common_is_taken_off_and_tokens_are_a_set() -> None:
    x, layer = tokens(), DifferentialLinearAttention(WIDTH)
    order = torch.randperm(T)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])
    best = layer.q_route(x).argmax(-1)
    whole = layer.q_common(x).unflatten(2, (2, -1))
    by_hand = torch.stack([whole[b, t, best[b, t]] for b in range(2) for t in range(T)]).view(2, T, WIDTH)
    torch.testing.assert_close(layer.chosen(x, layer.q_common, layer.q_route), layer.split(by_hand))
    layer.raw.data.fill_(-1e9)
    q, k, v = (layer.split(p) for p in layer.qkv(x).chunk(3, -1))
    plain = (nn.functional.elu(q) + 1) @ ((nn.functional.elu(k) + 1).mT @ v) / T
    torch.testing.assert_close(layer(x), layer.out(plain.transpose(1, 2).flatten(2)))


def test_a_bank_is_read_once_and_a_closed_gate_forgets_it() -> None:
    x, bank, layer = tokens(), ValueBank(11, 3, WIDTH), ValueBankAttention(WIDTH, 3)
    ids = torch.randint(11, (2, T))
    held = bank(ids)
    torch.testing.assert_close(held[1, 4], bank.table.weight[ids[1, 4]].view(3, WIDTH))
    share = torch.sigmoid(layer.gate(x)).view(2, T, 4, 3)
    added = sum(share[..., m, None] * held[:, :, m].view(2, T, 4, -1) for m in range(3))
    torch.testing.assert_close(layer.recalled(x, held), added)
    one = held[0, 0]
    torch.testing.assert_close(layer(x, one), layer(x, one.expand(2, T, 3, WIDTH)))
    changed = held.clone()
    changed[:, 4] += 1
    assert ((layer(x, changed) - layer(x, held)).abs().amax((0, 2)) > 1e-7).tolist() == [False] * 4 + [True] * 3
    nn.init.zeros_(layer.gate.weight)
    nn.init.constant_(layer.gate.bias, -1e4)
    torch.testing.assert_close(layer(x, held), layer(x, torch.zeros_like(held)))


def where(layer: HybridMemory, memory: int) -> HybridMemory:
    """The layer with all chunks in one memory."""
    nn.init.zeros_(layer.score.weight)
    layer.score.bias.data = torch.tensor([1.0 - memory, float(memory)])
    return layer


def test_each_past_token_is_in_one_of_two_memories() -> None:
    torch.manual_seed(0)
    x, layer = torch.randn(2, 12, WIDTH), where(HybridMemory(WIDTH, chunk=4), 0)
    q, k, v = (f(x).unflatten(2, (4, -1)).transpose(1, 2) for f in (layer.q, layer.k, layer.v))
    alone = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    kept, absorbed = torch.zeros(2, 12, dtype=torch.long), torch.ones(2, 12, dtype=torch.long)
    torch.testing.assert_close(layer.kept(q, k, v, kept), alone)
    assert not layer.state(x, q, k, v, kept).any()
    near = [nn.functional.scaled_dot_product_attention(*(p[:, :, n : n + 4] for p in (q, k, v)), is_causal=True) for n in (0, 4, 8)]
    torch.testing.assert_close(layer.kept(q, k, v, absorbed), torch.cat(near, 2))
    keys, beta = nn.functional.normalize(k, dim=-1), torch.sigmoid(layer.beta(x)).mT
    logs = -nn.functional.softplus(layer.decay(x)).mT
    for n in (4, 8):
        _, state = GATED_DELTA_RULE(*(p[:, :, :n] for p in (keys, keys, v, beta, logs)))
        want = nn.functional.normalize(q[:, :, n : n + 4], dim=-1) @ state
        torch.testing.assert_close(layer.state(x, q, k, v, absorbed)[:, :, n : n + 4], want, rtol=1e-4, atol=1e-5)


def test_a_hybrid_memory_is_causal_from_chunk_to_chunk() -> None:
    torch.manual_seed(0)
    x, layer = torch.randn(1, 12, WIDTH), HybridMemory(WIDTH, chunk=4)
    changed = x.clone()
    changed[:, 6:] += 1
    torch.testing.assert_close(layer(changed)[:, :4], layer(x)[:, :4])
    torch.testing.assert_close(where(layer, 1)(changed)[:, :6], layer(x)[:, :6])
    with pytest.raises(ValueError, match="13 tokens are no multiple of chunk=4"):
        layer(torch.randn(1, 13, WIDTH))


def made(kind: Any) -> Any:
    more = {Pattention: (5, 12), GatedImageAttention: (T,), ValueBankAttention: (3,), HybridMemory: (4, T)}
    return kind(WIDTH, *more.get(kind, ()))


KINDS = [
    *RECURRENT, FeedbackAttention, GatedImageAttention, MemoryRead, Pattention, TwoWayLinearAttention, DifferentialLinearAttention,
    ValueBankAttention, HybridMemory,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_each_can_be_compiled(kind: Any) -> None:
    x, layer = tokens(), made(kind)
    values = {FeedbackAttention: (x, x.sin()), ValueBankAttention: (x, torch.randn(3, WIDTH))}.get(kind, (x,))
    with torch.no_grad():
        found = torch.compile(layer, backend="dyncc", options={"engine": "reference"})(*values)
        torch.testing.assert_close(found, layer(*values))


def test_what_pairs_all_tokens_is_fused() -> None:
    x, layer = torch.randn(2, 24, WIDTH), made(DifferentialLinearAttention)
    with torch.no_grad():
        fast = torch.compile(layer, backend="dyncc", options={"engine": "reference", "passes": "fuse-linear-attention"})
        torch.testing.assert_close(fast(x), layer(x), rtol=1e-4, atol=1e-5)
    assert dyncc.reports()[-1].rewrites[0].applied, dyncc.reports()[-1].rewrites[0].reason
