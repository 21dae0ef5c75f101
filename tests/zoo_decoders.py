"""Causal decoders of the zoo: language models and sequence classifiers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf
import zoo_inputs as feed
from torch import nn
from zoo_model import BOS, EOS, HEADS, HIDDEN, KV_HEADS, PAD, POSITIONS, VOCAB, WIDE, Needs, ZooModel
from zoo_wrappers import TextModel

Make = Callable[[str, int], nn.Module]
"""(attention form, layers) -> the transformers model."""


def _sizes(attn: str, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "num_labels": 5,
        "attn_implementation": attn,
    }  # fmt: skip


def _gated(attn: str, layers: int, **more: Any) -> dict[str, Any]:
    return {**_sizes(attn, layers), "num_key_value_heads": KV_HEADS, "intermediate_size": WIDE, **more}


def _llama_like(name: str, **more: Any) -> Make:
    """The language model of the architecture `name`, with grouped key/value heads."""

    def make(attn: str, layers: int) -> nn.Module:
        config = getattr(hf, f"{name}Config")(**_gated(attn, layers, **more))
        return getattr(hf, f"{name}ForCausalLM")(config)

    return make


def _gpt2_config(attn: str, layers: int) -> hf.GPT2Config:
    """One position more than the longest text: before transformers 5.2, torch.export sets the table's own length apart from the others."""
    return hf.GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=layers, n_head=HEADS, n_inner=WIDE, n_positions=POSITIONS + 1, pad_token_id=PAD,
        bos_token_id=BOS, eos_token_id=EOS, num_labels=5, attn_implementation=attn,
    )  # fmt: skip


def gpt2(attn: str, layers: int) -> nn.Module:
    return hf.GPT2LMHeadModel(_gpt2_config(attn, layers))


def gpt2_classifier(attn: str, layers: int) -> nn.Module:
    return hf.GPT2ForSequenceClassification(_gpt2_config(attn, layers))


def llama_classifier(attn: str, layers: int) -> nn.Module:
    return hf.LlamaForSequenceClassification(hf.LlamaConfig(**_gated(attn, layers)))


def opt(attn: str, layers: int) -> nn.Module:
    return hf.OPTForCausalLM(hf.OPTConfig(**_sizes(attn, layers), ffn_dim=WIDE, word_embed_proj_dim=HIDDEN))


def gpt_neox(attn: str, layers: int) -> nn.Module:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_sizes(attn, layers), intermediate_size=WIDE))


def _logits(make: Make, **fixed: Any) -> Make:
    return lambda attn, layers: TextModel(make(attn, layers), "logits", use_cache=False, **fixed)


def _whole(name: str, make: Make, **flags: Any) -> ZooModel:
    """A language model that returns the logits of every position."""
    return ZooModel(name, _logits(make), feed.text_left, feed.dynamic_text, "decoder", causal=True, all_positions=True, **flags)


def _last(name: str, make: Make, **flags: Any) -> ZooModel:
    """A language model that returns the logits of its last position."""
    flags = {"causal": True, "fixed_rows": True, **flags}
    return ZooModel(f"{name}-last", _logits(make, logits_to_keep=1), feed.text_left, feed.dynamic_text, "decoder", **flags)


def _classifier(name: str, make: Make, **flags: Any) -> ZooModel:
    return ZooModel(name, _logits(make), feed.text, feed.dynamic_text, "decoder", causal=True, **flags)


_HEAD_DIM = HIDDEN // HEADS
_ANY_LENGTH = Needs("torch", "2.13", "torch.export cannot follow repeated keys at every length", dynamic=True)
_GROUPED: dict[str, Any] = {"grouped_heads": True, "needs": (_ANY_LENGTH,)}

DECODERS: tuple[ZooModel, ...] = (
    _whole("gpt2", gpt2),
    _last("gpt2", gpt2),
    _classifier("gpt2-classifier", gpt2_classifier),
    _whole("llama", _llama_like("Llama"), **_GROUPED),
    _last("llama", _llama_like("Llama"), **_GROUPED),
    _classifier("llama-classifier", llama_classifier, **_GROUPED),
    _last("opt", opt),
    _last("mistral", _llama_like("Mistral", sliding_window=8), plain_masks=False, **_GROUPED),
    _last("qwen2", _llama_like("Qwen2"), **_GROUPED),
    _last("qwen3", _llama_like("Qwen3", head_dim=_HEAD_DIM), **_GROUPED),
    _last(
        "gemma2", _llama_like("Gemma2", head_dim=_HEAD_DIM, query_pre_attn_scalar=_HEAD_DIM, sliding_window=6), attns=("eager",), **_GROUPED
    ),
    _last("phi3", _llama_like("Phi3", original_max_position_embeddings=POSITIONS), **_GROUPED),
    _last("gpt-neox", gpt_neox),
)
