"""A vision transformer of 12 layers for the canvases, and how it is trained: minutes on two cores, once; the weights are kept in dyncc's
cache folder under a name that changes with this text.

Patches attend to the four beside them (neighbourhood attention, Hassani et al. 2023, in its smallest form), and the class token to the
patch at the upper left: what a patch shows travels one patch a layer, so that a digit far away is known late. The first layers learn to
read digits nearby before all layers learn to carry what is far.
"""

from __future__ import annotations

import hashlib
import math
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dyncc.models import models_folder
from dyncc.outputs import replaced_file

from .canvases import MOST, SIDE, Canvases, Drawn

LAYERS, WIDTH, HEADS, PATCH = 12, 128, 2, 16
SUPERVISED, MEAN = {2: 0.5, 3: 0.3, 5: 0.3, 7: 0.3, 11: 1.0}, {2: 0.3, 11: 0.2}
"""Weights of the loss behind layers: of the class token's answer, and of the mean patch's, which teaches patches sooner."""
STEPS, BATCH, RATE, WARM, CURRICULUM = 2000, 64, 2e-3, 100, 0.3
FIRST, READING, FARTHER = 4, 0.5, 0.5
"""Layers that learn first, on digits nearby alone, for which share of the steps; and what share of digits is nearby behind those."""


class Block(nn.Module):
    """A pre-norm layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


def neighbours(side: int) -> Tensor:
    """[1 + T, 1 + T], true where a token sees another: itself and those beside it; the class token, the first, sees the first patch."""
    row, column = torch.arange(side * side) // side, torch.arange(side * side) % side
    apart = (row[:, None] - row).abs() + (column[:, None] - column).abs()
    seen = torch.zeros(1 + side * side, 1 + side * side, dtype=torch.bool)
    seen[1:, 1:] = apart <= 1
    seen[0, :2] = True
    return seen


class Classifier(nn.Module):
    """Canvases [B, 1, 64, 64] -> logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(PATCH * PATCH, WIDTH)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, WIDTH))
        self.places = nn.Parameter(0.02 * torch.randn(1, (SIDE // PATCH) ** 2 + 1, WIDTH))
        self.register_buffer("mask", neighbours(SIDE // PATCH), persistent=False)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def embed(self, images: Tensor) -> Tensor:
        side = SIDE // PATCH
        patches = self.stem(images.reshape(-1, side, PATCH, side, PATCH).transpose(2, 3).reshape(-1, side * side, PATCH * PATCH))
        return torch.cat([self.token.expand(patches.shape[0], -1, -1), patches], 1) + self.places

    def states(self, images: Tensor, layers: int = LAYERS) -> tuple[Tensor, Tensor]:
        """The class token behind each of the first layers and the mean over the patches, [B, L, D] both."""
        x, tokens, means = self.embed(images), [], []
        for block in self.blocks[:layers]:
            x = block(x, self.mask)
            tokens.append(x[:, 0])
            means.append(x[:, 1:].mean(1))
        return torch.stack(tokens, 1), torch.stack(means, 1)

    def answer(self, states: Tensor) -> Tensor:
        """The head on class tokens [..., D]."""
        return self.head(self.norm(states))

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        for block in self.blocks:
            x = block(x, self.mask)
        return self.head(self.norm(x[:, 0]))


def trained(canvases: Canvases, steps: int = STEPS) -> Classifier:
    """The model after so many steps: from the cache folder, or trained now and put there."""
    source = "".join(Path(__file__).with_name(name).read_text() for name in ("canvases.py", "classifier.py"))
    path = models_folder() / f"digits-{steps}-{hashlib.sha256(source.encode()).hexdigest()[:12]}.safetensors"
    torch.manual_seed(0)
    model = Classifier()
    if path.is_file():
        model.load_state_dict(load_file(path))
    else:
        train(model, canvases, steps)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as fresh:
            save_file(model.state_dict(), fresh)
    return model.eval()


def train(model: Classifier, canvases: Canvases, steps: int) -> None:
    """AdamW with warm-up and cosine on fresh canvases, whose clutter grows at first; all layers when the first ones can read."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    start, busy = time.perf_counter(), time.process_time()
    for step in range(steps):
        most = round(MOST * min(1.0, step / steps / CURRICULUM))
        layers, near = (FIRST, 1.0) if step < READING * steps else (LAYERS, FARTHER)
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / WARM) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        loss = _loss(model, canvases.some(BATCH, most, near), layers)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0:
            print(f"  step {step + 1} of {steps}, loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    seconds, cores = time.perf_counter() - start, time.process_time() - busy
    print(f"trained on {steps * BATCH:,} canvases in {seconds:.0f} s ({cores:.0f} s of processor time)", flush=True)


def _loss(model: Classifier, drawn: Drawn, layers: int) -> Tensor:
    tokens, means = map(model.answer, model.states(drawn.images, layers))
    losses = [
        weight * F.cross_entropy(answers[:, layer], drawn.labels)
        for answers, weights in ((tokens, SUPERVISED), (means, MEAN))
        for layer, weight in weights.items()
        if layer < layers
    ]
    return torch.stack(losses).sum()
