"""Inputs of the zoo's models and the dynamic dimensions of each."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import Dim
from zoo_model import BOS, EOS, IMAGE, PAD, POSITIONS, Inputs

Side = str


def _lengths(batch: int, length: int, padding: bool) -> list[int]:
    """Real tokens a row: the first row is full, the next ones lose 3, then 6, then 3 again."""
    return [length - (3 * (1 + row % 2) if padding and row else 0) for row in range(batch)]


def text(batch: int, length: int, seed: int, padding: bool, side: Side = "right") -> Inputs:
    """Token ids that start with BOS and end with EOS, and with padding the mask; pads stand on `side`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((batch, length), PAD)
    mask = torch.zeros(batch, length, dtype=torch.long)
    for row, real in enumerate(_lengths(batch, length, padding)):
        words = torch.randint(4, BOS, (real,), generator=generator)
        words[0], words[-1] = BOS, EOS
        place = slice(0, real) if side == "right" else slice(length - real, length)
        ids[row, place], mask[row, place] = words, 1
    return (ids, mask) if padding else (ids,)


def text_left(batch: int, length: int, seed: int, padding: bool) -> Inputs:
    """`text` with the pads before the words, as generation wants them."""
    return text(batch, length, seed, padding, "left")


def image(batch: int, length: int, seed: int, padding: bool) -> Inputs:
    """Pixel values; the length is the image's own."""
    return (torch.randn(batch, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(seed)),)


def text_and_image(batch: int, length: int, seed: int, padding: bool) -> Inputs:
    """Token ids, pixel values and, with padding, the mask."""
    ids, *mask = text(batch, length, seed, padding)
    return (ids, *image(batch, length, seed, padding), *mask)


def audio(batch: int, length: int, seed: int, padding: bool) -> Inputs:
    """Spectrogram frames, twice as many as tokens."""
    return (torch.randn(batch, 8, 26, generator=torch.Generator().manual_seed(seed)),)


def dynamic_text(padding: bool) -> tuple[Any, ...]:
    """Batch and length of the ids, and of the mask."""
    dims = {0: Dim("batch", min=2, max=64), 1: Dim("length", min=2, max=POSITIONS)}
    return (dims, dims) if padding else (dims,)


def dynamic_batch(padding: bool) -> tuple[Any, ...]:
    """The batch of the one input."""
    return ({0: Dim("batch", min=2, max=64)},)


def dynamic_text_and_image(padding: bool) -> tuple[Any, ...]:
    """One batch of texts and another of images, and the texts' length."""
    texts = {0: Dim("texts", min=2, max=64), 1: Dim("length", min=2, max=POSITIONS)}
    images = {0: Dim("images", min=2, max=64)}
    return (texts, images, texts) if padding else (texts, images)
