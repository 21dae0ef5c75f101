"""Small hand-written models, each with one structure that a token axis must be followed through."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

HEADS, HEAD_DIM = 3, 4
SIZE = HEADS * HEAD_DIM


@torch.library.custom_op("dyncc_tests::opaque", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    """An op that no axis rule knows."""
    return x * 1.5


@opaque.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def heads_apart(x: torch.Tensor) -> torch.Tensor:
    return x.view(x.shape[0], x.shape[1], HEADS, HEAD_DIM).transpose(1, 2)


def heads_together(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], -1, SIZE)


class Layer(nn.Module):
    """Pre-norm attention and MLP; queries, keys and values by one linear each."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(SIZE), nn.LayerNorm(SIZE)
        self.qkv, self.out = nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, SIZE)
        self.up, self.down = nn.Linear(SIZE, 2 * SIZE), nn.Linear(2 * SIZE, SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attend(self.before(x))
        return x + self.down(F.gelu(self.up(self.between(x))))

    def project(self, x: torch.Tensor) -> list[torch.Tensor]:
        weights, biases = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
        return [heads_apart(F.linear(x, w, b)) for w, b in zip(weights, biases, strict=True)]

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(heads_together(F.scaled_dot_product_attention(*self.project(x))))


class Flattened(Layer):
    """Linears over [B*T, C], written as addmm, in the attention and in the MLP."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        x = x + self.attend(self.before(x))
        inner = F.gelu(torch.addmm(self.up.bias, self.between(x).view(-1, C), self.up.weight.t()))
        return x + torch.addmm(self.down.bias, inner, self.down.weight.t()).view(B, T, C)

    def project(self, x: torch.Tensor) -> list[torch.Tensor]:
        B, T, C = x.shape
        flat = torch.addmm(self.qkv.bias, x.view(B * T, C), self.qkv.weight.t())
        return [heads_apart(part) for part in flat.view(B, T, 3 * C).split(C, 2)]


class Packed(Layer):
    """One linear for queries, keys and values, taken apart by a view of five dimensions."""

    def project(self, x: torch.Tensor) -> list[torch.Tensor]:
        B, T, _ = x.shape
        return list(self.qkv(x).view(B, T, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4).unbind(0))


class Windows(Layer):
    """Attention inside windows of four tokens."""

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        return super().attend(x.reshape(B * (T // 4), 4, C)).reshape(B, T, C)


class Rolled(Layer):
    """The MLP of a token sees the token two places before it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attend(self.before(x))
        return x + self.down(F.gelu(self.up(torch.roll(self.between(x), 2, 1))))


class Opaque(Layer):
    """An unknown op between the two linears of the MLP."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attend(self.before(x))
        return x + self.down(opaque(self.up(self.between(x))))


class Stack(nn.Module):
    """Layers over [B, T, C], giving three numbers from the first row."""

    def __init__(self, layer: type[Layer] = Layer, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(SIZE), nn.Linear(SIZE, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(self.run(x))

    def run(self, x: torch.Tensor, first: int = 0) -> torch.Tensor:
        for layer in list(self.layers)[first:]:
            x = layer(x)
        return x

    def read(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x)[:, 0])


class AllRows(Stack):
    """The same, giving numbers for every row."""

    def read(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x))


class Patches(Stack):
    """A grid of patches as tokens behind a class token."""

    def __init__(self) -> None:
        super().__init__(Packed)
        self.patch = nn.Conv2d(3, SIZE, 2, 2)
        self.cls, self.places = nn.Parameter(torch.zeros(1, 1, SIZE)), nn.Parameter(torch.zeros(1, 17, SIZE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        return super().forward(torch.cat([self.cls.expand(x.shape[0], -1, -1), tokens], 1) + self.places)


class Continued(nn.Module):
    """New tokens [B, T, C] behind the keys and values [B, H, P, D] of earlier ones; gives the last row and each layer's keys and values."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(SIZE), nn.Linear(SIZE, 3)

    def forward(self, x: torch.Tensor, *past: torch.Tensor) -> Any:
        done, new = past[0].shape[2], x.shape[1]
        seen = torch.arange(done + new)[None, :] <= torch.arange(done, done + new)[:, None]
        cache = []
        for i, layer in enumerate(self.layers):
            q, k, v = layer.project(layer.before(x))
            k, v = torch.cat([past[2 * i], k], 2), torch.cat([past[2 * i + 1], v], 2)
            cache += [k, v]
            x = x + layer.out(heads_together(F.scaled_dot_product_attention(q, k, v, attn_mask=seen)))
            x = x + layer.down(F.gelu(layer.up(layer.between(x))))
        return self.head(self.norm(x)[:, -1]), *cache


def build(model: type[nn.Module], *args: Any) -> nn.Module:
    """The model in eval mode with fixed random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module = model(*args).eval()
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    return module


def numbers(*size: int, seed: int = 0) -> torch.Tensor:
    """A tensor of fixed random numbers."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))
