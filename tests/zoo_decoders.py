"""Causal decoders of the zoo: language models and sequence classifiers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf
import zoo_inputs as feed
from torch import nn
from zoo_model import BOS, EOS, HEADS, HIDDEN, KV_HEADS, PAD, POSITIONS, VOCAB, WIDE, ZooModel
from zoo_wrappers import TextModel

Make = Callable[[str, int], nn.Module]


def _sizes(attn: str, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "num_labels": 5,
        "attn_implementation": attn,
    }  # fmt: skip


def _gated(attn: str, layers: int, **more: Any) -> dict[str, Any]:
    return {**_sizes(attn, layers), "num_key_value_heads": KV_HEADS, "intermediate_size": WIDE, **more}


def _logits(model: nn.Module, **fixed: Any) -> nn.Module:
    return TextModel(model, "logits", use_cache=False, **fixed)


def _llama_like(name: str, **more: Any) -> Make:
    """The language model of the architecture `name`, with grouped key/value heads."""

    def make(attn: str, layers: int) -> nn.Module:
        config = getattr(hf, f"{name}Config")(**_gated(attn, layers, **more))
        return _logits(getattr(hf, f"{name}ForCausalLM")(config))

    return make


def _gpt2_config(attn: str, layers: int) -> hf.GPT2Config:
    return hf.GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=layers, n_head=HEADS, n_inner=WIDE, n_positions=POSITIONS, pad_token_id=PAD,
        bos_token_id=BOS, eos_token_id=EOS, num_labels=5, attn_implementation=attn,
    )  # fmt: skip


def gpt2(attn: str, layers: int) -> nn.Module:
    return _logits(hf.GPT2LMHeadModel(_gpt2_config(attn, layers)))


def gpt2_classifier(attn: str, layers: int) -> nn.Module:
    return _logits(hf.GPT2ForSequenceClassification(_gpt2_config(attn, layers)))


def llama_classifier(attn: str, layers: int) -> nn.Module:
    return _logits(hf.LlamaForSequenceClassification(hf.LlamaConfig(**_gated(attn, layers))))


def llama_last(attn: str, layers: int) -> nn.Module:
    return _logits(hf.LlamaForCausalLM(hf.LlamaConfig(**_gated(attn, layers))), logits_to_keep=1)


def opt(attn: str, layers: int) -> nn.Module:
    return _logits(hf.OPTForCausalLM(hf.OPTConfig(**_sizes(attn, layers), ffn_dim=WIDE, word_embed_proj_dim=HIDDEN)))


def gpt_neox(attn: str, layers: int) -> nn.Module:
    return _logits(hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_sizes(attn, layers), intermediate_size=WIDE)))


def _lm(name: str, make: Make, **flags: Any) -> ZooModel:
    return ZooModel(name, make, feed.text_left, feed.dynamic_text, "decoder", causal=True, **flags)


def _classifier(name: str, make: Make, **flags: Any) -> ZooModel:
    return ZooModel(name, make, feed.text, feed.dynamic_text, "decoder", causal=True, token_output=False, **flags)


_HEAD_DIM = HIDDEN // HEADS

DECODERS: tuple[ZooModel, ...] = (
    _lm("gpt2", gpt2),
    _classifier("gpt2-classifier", gpt2_classifier),
    _lm("llama", _llama_like("Llama"), grouped_heads=True),
    _classifier("llama-classifier", llama_classifier, grouped_heads=True),
    _lm("llama-last", llama_last, token_output=False, last_token_only=True, grouped_heads=True),
    _lm("opt", opt),
    _lm("mistral", _llama_like("Mistral", sliding_window=8), grouped_heads=True),
    _lm("qwen2", _llama_like("Qwen2"), grouped_heads=True),
    _lm("qwen3", _llama_like("Qwen3", head_dim=_HEAD_DIM), grouped_heads=True),
    _lm(
        "gemma2",
        _llama_like("Gemma2", head_dim=_HEAD_DIM, query_pre_attn_scalar=_HEAD_DIM, sliding_window=6),
        attns=("eager",),
        grouped_heads=True,
    ),
    _lm("phi3", _llama_like("Phi3", original_max_position_embeddings=POSITIONS), grouped_heads=True),
    _lm("gpt-neox", gpt_neox),
)
