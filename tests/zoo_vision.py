"""Vision models of the zoo, and the dual encoders with their text towers."""

from __future__ import annotations

from typing import Any

import transformers as hf
import zoo_inputs as feed
from torch import nn
from zoo_model import BOS, EOS, HEADS, HIDDEN, IMAGE, PAD, PATCH, PATCHES, POSITIONS, VOCAB, WIDE, ZooModel
from zoo_wrappers import DualModel, ImageModel, TextModel


def _tower(layers: int) -> dict[str, Any]:
    return {"hidden_size": HIDDEN, "num_hidden_layers": layers, "num_attention_heads": HEADS, "intermediate_size": WIDE}


def _image(attn: str, layers: int) -> dict[str, Any]:
    return {**_tower(layers), "image_size": IMAGE, "patch_size": PATCH, "attn_implementation": attn}


def _words(layers: int) -> dict[str, Any]:
    return {
        **_tower(layers), "vocab_size": VOCAB, "max_position_embeddings": POSITIONS, "pad_token_id": PAD, "bos_token_id": BOS,
        "eos_token_id": EOS,
    }  # fmt: skip


def vit(attn: str, layers: int) -> nn.Module:
    return ImageModel(hf.ViTForImageClassification(hf.ViTConfig(**_image(attn, layers), num_labels=5)), "logits")


def deit(attn: str, layers: int) -> nn.Module:
    return ImageModel(hf.DeiTForImageClassification(hf.DeiTConfig(**_image(attn, layers), num_labels=5)), "logits")


def dinov2(attn: str, layers: int) -> nn.Module:
    config = hf.Dinov2Config(**_image(attn, layers), mlp_ratio=2)
    return ImageModel(hf.Dinov2Model(config), "last_hidden_state", "pooler_output")


def clip_text(attn: str, layers: int) -> nn.Module:
    config = hf.CLIPTextConfig(**_words(layers), attn_implementation=attn)
    return TextModel(hf.CLIPTextModel(config), "pooler_output")


def clip_vision(attn: str, layers: int) -> nn.Module:
    config = hf.CLIPVisionConfig(**_image(attn, layers))
    return ImageModel(hf.CLIPVisionModel(config), "last_hidden_state", "pooler_output")


def clip(attn: str, layers: int) -> nn.Module:
    images = {**_tower(layers), "image_size": IMAGE, "patch_size": PATCH}
    config = hf.CLIPConfig(text_config=_words(layers), vision_config=images, projection_dim=48, attn_implementation=attn)
    return DualModel(hf.CLIPModel(config), "logits_per_image", "logits_per_text", "text_embeds", "image_embeds")


def siglip_text(attn: str, layers: int) -> nn.Module:
    config = hf.SiglipTextConfig(**_words(layers), attn_implementation=attn)
    return TextModel(hf.SiglipTextModel(config), "last_hidden_state", "pooler_output")


def siglip_vision(attn: str, layers: int) -> nn.Module:
    config = hf.SiglipVisionConfig(**_image(attn, layers))
    return ImageModel(hf.SiglipVisionModel(config), "last_hidden_state", "pooler_output")


_PATCHES: dict[str, Any] = {"has_cls": True, "has_mask": False}
_SQUARE: dict[str, Any] = {"fixed_tokens": PATCHES, "has_mask": False, "plain_masks": False}

VISION: tuple[ZooModel, ...] = (
    ZooModel("vit", vit, feed.image, feed.dynamic_batch, "vision", fixed_tokens=PATCHES + 1, fixed_rows=True, **_PATCHES),
    ZooModel("deit", deit, feed.image, feed.dynamic_batch, "vision", fixed_tokens=PATCHES + 2, fixed_rows=True, **_PATCHES),
    ZooModel("dinov2", dinov2, feed.image, feed.dynamic_batch, "vision", fixed_tokens=PATCHES + 1, **_PATCHES),
    ZooModel("clip-text", clip_text, feed.text, feed.dynamic_text, "encoder", causal=True),
    ZooModel("clip-vision", clip_vision, feed.image, feed.dynamic_batch, "vision", fixed_tokens=PATCHES + 1, plain_masks=False, **_PATCHES),
    ZooModel("clip", clip, feed.text_and_image, feed.dynamic_text_and_image, "dual", attention_per_layer=2, fixed_rows=True),
    ZooModel("siglip-text", siglip_text, feed.text, feed.dynamic_text, "encoder"),
    ZooModel("siglip-vision", siglip_vision, feed.image, feed.dynamic_batch, "vision", extra_attention=1, **_SQUARE),
)
