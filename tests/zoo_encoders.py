"""Text and audio encoders of the zoo."""

from __future__ import annotations

from typing import Any

import transformers as hf
import zoo_inputs as feed
from torch import nn
from zoo_model import HEADS, HIDDEN, PAD, POSITIONS, VOCAB, WIDE, Needs, ZooModel
from zoo_wrappers import AudioModel, TextModel


def _bert_sizes(attn: str, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "intermediate_size": WIDE, "max_position_embeddings": POSITIONS + 2, "pad_token_id": PAD, "num_labels": 5,
        "attn_implementation": attn,
    }  # fmt: skip


def bert(attn: str, layers: int) -> nn.Module:
    return TextModel(hf.BertModel(hf.BertConfig(**_bert_sizes(attn, layers))), "last_hidden_state", "pooler_output")


def bert_classifier(attn: str, layers: int) -> nn.Module:
    return TextModel(hf.BertForSequenceClassification(hf.BertConfig(**_bert_sizes(attn, layers))), "logits")


def roberta(attn: str, layers: int) -> nn.Module:
    return TextModel(hf.RobertaModel(hf.RobertaConfig(**_bert_sizes(attn, layers))), "last_hidden_state", "pooler_output")


def distilbert(attn: str, layers: int) -> nn.Module:
    config = hf.DistilBertConfig(
        vocab_size=VOCAB, dim=HIDDEN, n_layers=layers, n_heads=HEADS, hidden_dim=WIDE, max_position_embeddings=POSITIONS,
        pad_token_id=PAD, attn_implementation=attn,
    )  # fmt: skip
    return TextModel(hf.DistilBertModel(config), "last_hidden_state")


def t5_encoder(attn: str, layers: int) -> nn.Module:
    config = hf.T5Config(
        vocab_size=VOCAB, d_model=HIDDEN, d_kv=HIDDEN // HEADS, num_heads=HEADS, num_layers=layers, d_ff=WIDE,
        relative_attention_num_buckets=8, relative_attention_max_distance=20, pad_token_id=PAD, attn_implementation=attn,
    )  # fmt: skip
    return TextModel(hf.T5EncoderModel(config), "last_hidden_state")


def whisper_encoder(attn: str, layers: int) -> nn.Module:
    config = hf.WhisperConfig(
        vocab_size=VOCAB, d_model=HIDDEN, encoder_layers=layers, encoder_attention_heads=HEADS, encoder_ffn_dim=WIDE, decoder_layers=1,
        decoder_attention_heads=HEADS, num_mel_bins=8, max_source_positions=13, pad_token_id=PAD, bos_token_id=2, eos_token_id=3,
        decoder_start_token_id=2, attn_implementation=attn,
    )  # fmt: skip
    return AudioModel(hf.WhisperModel(config).encoder)


_T5_SDPA = Needs("transformers", "5.15", "the T5 encoder has no sdpa attention", attn="sdpa")
_UNMASKED: dict[str, Any] = {"has_mask": False, "plain_masks": False}

ENCODERS: tuple[ZooModel, ...] = (
    ZooModel("bert", bert, feed.text, feed.dynamic_text, "encoder", has_cls=True),
    ZooModel("bert-classifier", bert_classifier, feed.text, feed.dynamic_text, "encoder", has_cls=True, fixed_rows=True),
    ZooModel("roberta", roberta, feed.text, feed.dynamic_text, "encoder", has_cls=True),
    ZooModel("distilbert", distilbert, feed.text, feed.dynamic_text, "encoder", has_cls=True),
    ZooModel("t5-encoder", t5_encoder, feed.text, feed.dynamic_text, "encoder", plain_masks=False, needs=(_T5_SDPA,)),
    ZooModel("whisper-encoder", whisper_encoder, feed.audio, feed.dynamic_batch, "audio", fixed_tokens=13, **_UNMASKED),
)
