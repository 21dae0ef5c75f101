"""fuse-gated-attention: a gate goes into its attention, however both are written; what is no gate stays, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from graphs import node, program
from torch import nn
from torch.nn import functional as F

import dyncc
from dyncc.backends.open_gates import with_open_gates
from dyncc.evidence import relative_error
from dyncc.ir import argument, is_attention, op_name, shape
from dyncc.passes.fuse_attention import FuseAttention
from dyncc.passes.fuse_gated_attention import FuseGatedAttention
from dyncc.rewrite import Applied, Context, apply_pass, fingerprint

B, H, T, D = 2, 4, 7, 8
C = H * D
Model = Callable[..., Any]


def given() -> list[torch.Tensor]:
    """A sequence, one weight for queries, keys, values and gate each, and one for the result."""
    torch.manual_seed(0)
    return [torch.randn(B, T, C), torch.randn(4, C, C) * 0.3, torch.randn(C, C) * 0.3]


def heads(x: Any) -> Any:
    return x.view(B, T, H, D).transpose(1, 2)


def qkv(x: Any, w: Any) -> tuple[Any, Any, Any]:
    q, k, v = (heads(F.linear(x, w[i])) for i in range(3))
    return q, k, v


def by_sdpa(x: Any, w: Any, o: Any) -> Any:
    """Heads merged, then the gate, one number a channel, from a projection of its own; a residual around it."""
    out = F.scaled_dot_product_attention(*qkv(x, w), is_causal=True).transpose(1, 2).reshape(B, T, C)
    return x + F.linear(out * torch.sigmoid(F.linear(x, w[3])), o)


def by_matmul(x: Any, w: Any, o: Any) -> Any:
    """The gate before heads move back, one number a head."""
    q, k, v = qkv(x, w)
    out = torch.softmax(q @ k.transpose(2, 3) * D**-0.5, -1) @ v
    gate = F.linear(x, w[3, :H]).transpose(1, 2).unsqueeze(-1)
    return F.linear((torch.sigmoid(gate) * out).transpose(1, 2).reshape(B, T, C), o)


def by_einsum(x: Any, w: Any, o: Any) -> Any:
    """Tokens before heads all the way, the gate behind its activation laid out, silu."""
    q, k, v = (F.linear(x, w[i]).view(B, T, H, D) for i in range(3))
    weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k), -1)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    return F.linear((out * F.silu(F.linear(x, w[3])).view(B, T, H, D)).reshape(B, T, C), o)


def packed(x: Any, w: Any, o: Any) -> Any:
    """Queries and gate out of one projection, side by side in each head."""
    both = F.linear(x, torch.cat([w[0], w[3]]).view(2, H, D, C).transpose(0, 1).reshape(2 * C, C)).view(B, T, H, 2 * D)
    q, gate = torch.chunk(both, 2, dim=-1)
    _, k, v = qkv(x, w)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2).reshape(B, T, -1).contiguous()
    return F.linear(out * torch.sigmoid(gate.reshape(B, T, -1)), o)


def one_a_token(x: Any, w: Any, o: Any) -> Any:
    """One number a token, silu written out."""
    gate = F.linear(x, w[3, :1])
    out = F.scaled_dot_product_attention(*qkv(x, w)).transpose(1, 2).flatten(2)
    return F.linear(out * (gate * torch.sigmoid(gate)), o)


def capped(x: Any, w: Any, o: Any) -> Any:
    """Behind a soft cap, in heads beside tokens."""
    q, k, v = qkv(x, w)
    out = (torch.softmax(torch.tanh(q @ k.transpose(2, 3) / 5) * 5, -1) @ v).transpose(1, 2)
    return F.linear((out * torch.sigmoid(F.linear(x, w[3])).view(B, T, H, D)).reshape(B, T, C), o)


def in_fp32(x: Any, w: Any, o: Any) -> Any:
    """A gate of bf16 that is activated in fp32 and cast back."""
    x, w, o = x.bfloat16(), w.bfloat16(), o.bfloat16()
    out = F.scaled_dot_product_attention(*qkv(x, w)).transpose(1, 2).reshape(B, T, C)
    return F.linear(out * torch.sigmoid(F.linear(x, w[3]).float()).to(out.dtype), o).float()


def by_a_projection(x: Any, w: Any, o: Any) -> Any:
    """No activation: the projection itself multiplies, and a residual goes around it (NiNformer's form of a gate)."""
    out = F.scaled_dot_product_attention(*qkv(x, w)).transpose(1, 2).reshape(B, T, C)
    return x + F.linear(x, w[3]) * out


def beside_another(x: Any, w: Any, o: Any) -> Any:
    """A gate and its complement between two branches (ViG's and GAM's form)."""
    share = torch.sigmoid(F.linear(x, w[3]))
    return share * F.scaled_dot_product_attention(*qkv(x, w)).transpose(1, 2).reshape(B, T, C) + (1 - share) * F.linear(x, o)


def half(x: Any, w: Any, o: Any) -> Any:
    """As autocast writes it: operands cast in front of each product."""
    x, w, o = x.bfloat16(), w.bfloat16(), o.bfloat16()
    return by_sdpa(x, w, o).float()


FUSED = {
    f.__name__: (f, activation, sizes)
    for f, activation, sizes in (
        (by_sdpa, "sigmoid", [B, H, T, D]),
        (by_matmul, "sigmoid", [B, H, T, 1]),
        (by_einsum, "silu", [B, H, T, D]),
        (packed, "sigmoid", [B, H, T, D]),
        (one_a_token, "silu", [B, 1, T, 1]),
        (capped, "sigmoid", [B, H, T, D]),
        (half, "sigmoid", [B, H, T, D]),
        (in_fp32, "sigmoid", [B, H, T, D]),
        (by_a_projection, "none", [B, H, T, D]),
        (beside_another, "sigmoid", [B, H, T, D]),
    )
}


def fused(function: Model) -> tuple[Any, Applied]:
    captured = program(function, *given())
    spelled = apply_pass(captured, FuseAttention(), Context())
    return spelled.program, apply_pass(spelled.program, FuseGatedAttention(), Context())


@pytest.mark.parametrize("name", FUSED)
def test_however_the_gate_is_written_it_goes_into_the_attention(name: str) -> None:
    function, activation, sizes = FUSED[name]
    _, applied = fused(function)
    assert applied.applied and applied.modified, applied.reason
    assert (applied.result.found, applied.result.expected, applied.result.misses) == (1, 1, ())
    made = node(applied.program, "attend")
    assert [n for n in applied.program.graph.nodes if is_attention(n)] == [made]
    assert argument(made, "activation") == activation and list(shape(argument(made, "gate"))) == sizes
    names = {op_name(n) for n in applied.program.graph.nodes if n.op == "call_function"}
    assert name == "beside_another" or not {"sigmoid", "silu", "mul"} & names
    want, got = function(*given()), applied.program.module(*given())[0]
    assert relative_error(want, got) < (2e-2 if name in ("half", "in_fp32") else 1e-5)


def test_a_closed_gate_gives_nothing_and_zero_weights_half() -> None:
    _, applied = fused(by_sdpa)
    x, w, o = given()
    w[3] = 0.0
    ungated = F.linear(F.scaled_dot_product_attention(*qkv(x, w), is_causal=True).transpose(1, 2).reshape(B, T, C), o)
    torch.testing.assert_close(applied.program.module(x, w, o)[0], x + 0.5 * ungated, rtol=1e-5, atol=1e-5)


def sdpa(x: Any, w: Any) -> Any:
    return F.scaled_dot_product_attention(*qkv(x, w)).transpose(1, 2).reshape(B, T, C)


def of_itself(x: Any, w: Any, o: Any) -> Any:
    out = sdpa(x, w)
    return F.linear(out * torch.sigmoid(F.linear(out, w[3])), o)


def of_its_tokens(x: Any, w: Any, o: Any) -> Any:
    """A projection of the result before it is merged: read elsewhere."""
    out = F.scaled_dot_product_attention(*qkv(x, w))
    return out * torch.sigmoid(x.view(B, T, H, D).transpose(1, 2)), out.mean()


def behind_the_projection(x: Any, w: Any, o: Any) -> Any:
    return F.linear(sdpa(x, w), o) * torch.sigmoid(F.linear(x, w[3]))


def values_gated(x: Any, w: Any, o: Any) -> Any:
    q, k, v = qkv(x, w)
    return F.linear(F.scaled_dot_product_attention(q, k, v * heads(F.linear(x, w[3]).sigmoid())).transpose(1, 2).reshape(B, T, C), o)


def behind_a_norm(x: Any, w: Any, o: Any) -> Any:
    return F.linear(F.rms_norm(sdpa(x, w), (C,)) * torch.sigmoid(F.linear(x, w[3])), o)


def wider(x: Any, w: Any, o: Any) -> Any:
    """The gate was computed in fp32: in bf16 it would be another."""
    out = sdpa(x.bfloat16(), w.bfloat16())
    return out * torch.sigmoid(F.linear(x, w[3])).to(out.dtype)


REFUSED: dict[str, tuple[Model, str]] = {
    "of itself": (of_itself, "its result is read elsewhere too, before the gate"),
    "read elsewhere": (of_its_tokens, "its result is read elsewhere too, before the gate"),
    "behind the projection": (behind_the_projection, "no attention's result is multiplied by anything before it is projected"),
    "relu": (lambda x, w, o: F.linear(sdpa(x, w) * F.relu(F.linear(x, w[3])), o), "what multiplies it went through relu"),
    "shifted": (lambda x, w, o: F.linear(sdpa(x, w) * (1 + torch.sigmoid(F.linear(x, w[3]))), o), "what multiplies it went through add"),
    "a layer's scale": (lambda x, w, o: F.linear(sdpa(x, w) * o[0], o), "gates through sigmoid or silu are known"),
    "another type": (lambda x, w, o: sdpa(x, w) * torch.sigmoid(F.linear(x, w[3]).double()), "the gate is torch.float64, the attention"),
    "tokens split": (
        lambda x, w, o: sdpa(x, w).view(B * T, C) * torch.sigmoid(F.linear(x, w[3])).view(B * T, C),
        "view ([14, 32]) stands between it and the gate",
    ),
    "values": (values_gated, "its values are gated, not its result"),
    "a norm": (behind_a_norm, "its result is normalised before anything multiplies it"),
    "computed wider": (wider, "the gate is torch.float32, the attention torch.bfloat16"),
    "no attention": (lambda x, w, o: F.linear(x, o), "no fused attention in the graph; fuse-attention goes before it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_gate_of_this_kind_stays(name: str) -> None:
    function, reason = REFUSED[name]
    before, applied = fused(function)
    text = fingerprint(before.graph)
    assert not applied.applied and reason in applied.reason
    assert applied.program is before and fingerprint(before.graph) == text


def folded(x: Any, w: Any, o: Any) -> Any:
    """The heads of a group as rows of its one key head, and split again behind attention."""
    q, k, v = qkv(x, w)
    out = F.scaled_dot_product_attention(q.reshape(B, 2, H // 2 * T, D), k[:, :2], v[:, :2]).reshape(B, H, T, D)
    return F.linear(out.transpose(1, 2).reshape(B, T, C) * torch.sigmoid(F.linear(x, w[3])), o)


def test_a_gate_behind_folded_heads() -> None:
    _, applied = fused(folded)
    assert applied.applied, applied.reason
    made = node(applied.program, "attend")
    assert list(shape(made)) == list(shape(argument(made, "gate"))) == [B, 2, 2 * T, D]
    assert relative_error(folded(*given()), applied.program.module(*given())[0]) < 1e-5


SDPA = "scaled_dot_product_attention"


@pytest.mark.parametrize(("function", "left"), [(by_sdpa, SDPA), (by_einsum, SDPA), (capped, "attend")])
def test_for_inductor_on_a_cpu_the_gate_stands_behind_attention_again(function: Model, left: str) -> None:
    _, applied = fused(function)
    opened = with_open_gates(applied.program)
    (attention,) = [n for n in opened.graph.nodes if is_attention(n)]
    assert op_name(attention) == left and argument(attention, "gate") is None
    assert relative_error(function(*given()), opened.module(*given())[0]) < 1e-5
    assert with_open_gates(opened) is opened


def test_autocast_around_a_compiled_call() -> None:
    """Casts stand in front of products; attention and its gate have one type."""
    x, w, o = given()
    torch._dynamo.reset()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fast = torch.compile(by_sdpa, backend="dyncc", options={"passes": "fuse-gated-attention", "engine": "reference"})
        got, want = fast(x, w, o), by_sdpa(x, w, o)
    assert got.dtype == want.dtype and relative_error(want, got) < 2e-2
    (rewrite,) = dyncc.reports()[-1].rewrites
    assert (rewrite.applied, rewrite.found) == (True, 1), rewrite.reason


def test_with_gradients_it_refuses_and_says_what_to_do() -> None:
    applied = apply_pass(replace(program(by_sdpa, *given()), needs_grad=True), FuseGatedAttention(), Context())
    assert not applied.applied and "torch.inference_mode()" in applied.reason


SMALL: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 96, "max_position_embeddings": 64, "pad_token_id": 1,
}  # fmt: skip
FULL = {"layer_types": ["full_attention"] * 2}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1}
WINDOW = {"sliding_window": 8}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Qwen3Next": ("Qwen3NextConfig", {**FULL, **EXPERTS, "mlp_only_layers": [0, 1]}, {"gate": True}),
    "Qwen3_5": ("Qwen3_5TextConfig", FULL, {"gate": True}),
    "Afmoe": ("AfmoeConfig", {**WINDOW, **EXPERTS, "num_dense_layers": 2, "moe_intermediate_size": 16}, {"gate": True}),
    "Gemma2": ("Gemma2Config", {**WINDOW, "attn_logit_softcapping": 5.0}, {"cap": 5.0}),
    "GptOss": ("GptOssConfig", {**WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1}, {"sinks": True}),
}
"""Models with gates, soft caps and sinks: their configuration, and what their attention has."""


class Gated(nn.Module):
    """A language model with random weights, as logits of each position."""

    def __init__(self, name: str, attn: str) -> None:
        super().__init__()
        config = getattr(hf, MODELS[name][0])(**SMALL, **MODELS[name][1], attn_implementation=attn)
        torch.manual_seed(0)
        self.model = getattr(hf, f"{name}ForCausalLM")(config).eval()
        for weight in self.model.parameters():
            weight.data += 0.1 * torch.randn_like(weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


FULLY = [(n, a) for n in MODELS for a in ("eager", "sdpa") if a == "eager" or "gate" in MODELS[n][2]]


@pytest.mark.parametrize(
    ("name", "attn"), [pytest.param(*pair, marks=[] if pair[0] == "Qwen3Next" else pytest.mark.full) for pair in FULLY]
)
def test_models_with_gates_caps_and_sinks(name: str, attn: str) -> None:
    if not hasattr(hf, MODELS[name][0]):
        pytest.skip("this transformers has no such model")
    ids = torch.arange(2, 24).view(2, 11)
    with torch.no_grad():
        model = Gated(name, attn)
        passes = "fuse-attention simplify-mask drop-repeat-kv fuse-gated-attention"
        optimized = dyncc.optimize(model, (ids,), passes=passes, engine="reference")
        assert relative_error(model(ids), optimized(ids)) < 1e-5
    made = [n for n in optimized._outcome.program.graph.nodes if is_attention(n)]
    assert len(made) == 2
    for attention in made:
        for told, value in MODELS[name][2].items():
            found = argument(attention, told)
            assert found is not None and (value is True or found == value)
    gates = optimized.report.rewrites[-1]
    assert (gates.applied, gates.found) == (("gate" in MODELS[name][2]), 2 * ("gate" in MODELS[name][2])), gates.reason
