"""Modules that turn a transformers model's keyword call and output object into positional tensors."""

from __future__ import annotations

import torch
from torch import nn

Outputs = torch.Tensor | tuple[torch.Tensor, ...]


def _pick(output: object, fields: tuple[str, ...]) -> Outputs:
    picked = tuple(getattr(output, field) for field in fields)
    return picked if len(picked) > 1 else picked[0]


class TextModel(nn.Module):
    """`forward(ids, mask=None)`, giving the named fields; further fixed keywords go to the model."""

    def __init__(self, model: nn.Module, *fields: str, **fixed: object) -> None:
        super().__init__()
        self.model, self.fields, self.fixed = model, fields, fixed

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Outputs:
        return _pick(self.model(input_ids=ids, attention_mask=mask, **self.fixed), self.fields)


class ImageModel(nn.Module):
    """`forward(pixels)`, giving the named fields."""

    def __init__(self, model: nn.Module, *fields: str) -> None:
        super().__init__()
        self.model, self.fields = model, fields

    def forward(self, pixels: torch.Tensor) -> Outputs:
        return _pick(self.model(pixel_values=pixels), self.fields)


class DualModel(nn.Module):
    """`forward(ids, pixels, mask=None)`: both towers in one graph."""

    def __init__(self, model: nn.Module, *fields: str) -> None:
        super().__init__()
        self.model, self.fields = model, fields

    def forward(self, ids: torch.Tensor, pixels: torch.Tensor, mask: torch.Tensor | None = None) -> Outputs:
        return _pick(self.model(input_ids=ids, pixel_values=pixels, attention_mask=mask), self.fields)


class AudioModel(nn.Module):
    """`forward(frames)`, giving the last hidden state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, frames: torch.Tensor) -> Outputs:
        return self.model(frames).last_hidden_state
