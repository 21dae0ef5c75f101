"""What a model of the zoo is: how to build and feed it, and what its config promises.

Sizes are chosen so that no two axes can be told apart by luck alone: batch 3, 11 text tokens (26 patch tokens), hidden 64,
4 heads of 16, 2 key/value heads, 4 layers, 96 wide MLPs, 99 words.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from packaging.version import Version
from torch import nn

BATCH, LENGTH, LAYERS = 3, 11, 4
HIDDEN, HEADS, KV_HEADS, WIDE, VOCAB, POSITIONS = 64, 4, 2, 96, 99, 64
IMAGE, PATCH = 20, 4
PATCHES = (IMAGE // PATCH) ** 2
PAD, BOS, EOS = 1, 97, 98

VARIANT = re.compile("-(last|classifier|text|vision|encoder)$")

Attn = Literal["sdpa", "eager"]
Inputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Needs:
    """What a library cannot do with a model before `release`, met before dyncc sees a graph: that is left out, for this reason.

    `attn`: in that form of attention only. `dynamic`: at a dynamic batch and length only.
    """

    library: Literal["torch", "transformers"]
    release: str
    reason: str
    attn: Attn | None = None
    dynamic: bool = False

    def met(self) -> bool:
        """Whether the installed library can."""
        return Version(importlib.metadata.version(self.library)) >= Version(self.release)

    def __str__(self) -> str:
        return f"{self.reason} before {self.library} {self.release}"


@dataclass(frozen=True)
class ZooModel:
    """One architecture: how to build it, how to feed it, and what its config says should be found in its graph.

    `fixed_rows`: the outputs read the first or the last row only, behind at least one tower. `all_positions`: a causal model's output
    covers every position. `plain_masks`: without padding, fused attention is handed a mask that says nothing, or only causal.
    """

    name: str
    make: Callable[[str, int], nn.Module]
    feed: Callable[[int, int, int, bool], Inputs]
    dynamic: Callable[[bool], tuple[Any, ...]]
    family: Literal["encoder", "decoder", "vision", "dual", "audio"]
    attention_per_layer: int = 1
    extra_attention: int = 0
    fixed_tokens: int | None = None
    causal: bool = False
    has_cls: bool = False
    has_mask: bool = True
    fixed_rows: bool = False
    all_positions: bool = False
    grouped_heads: bool = False
    plain_masks: bool = True
    attns: tuple[Attn, ...] = ("sdpa", "eager")
    needs: tuple[Needs, ...] = ()

    @property
    def architecture(self) -> str:
        """The name without the task: variants of one model count once."""
        return VARIANT.sub("", self.name)

    def left_out(self, attn: Attn, dynamic: bool = False) -> str:
        """Why the installed libraries cannot do this form of attention (at a dynamic batch and length), or ""."""
        lacks = (n for n in self.needs if n.attn in (None, attn) and (dynamic or not n.dynamic) and not n.met())
        return next(map(str, lacks), "")

    @property
    def able(self) -> tuple[Attn, ...]:
        """The forms of attention that the installed libraries can do."""
        return tuple(attn for attn in self.attns if not self.left_out(attn))

    def build(self, attn: Attn = "sdpa", layers: int = LAYERS) -> nn.Module:
        """The model in eval mode, with every parameter (biases and norms too) moved off its initial value by a fixed seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(17)
            module = self.make(attn, layers).eval()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
        return module

    def inputs(self, batch: int = BATCH, length: int = LENGTH, seed: int = 0, padding: bool = False) -> Inputs:
        """Positional arguments; with `padding` an attention mask is among them and all but the first row hold pads."""
        if padding and not self.has_mask:
            raise ValueError(f"{self.name} takes no attention mask")
        return self.feed(batch, length, seed, padding)

    def token_length(self, length: int = LENGTH) -> int:
        """How many tokens the layers see."""
        return length if self.fixed_tokens is None else self.fixed_tokens

    def expected_attention(self, layers: int = LAYERS) -> int:
        """Softmaxes that the config promises: one a layer and tower, and those of pooling heads."""
        return layers * self.attention_per_layer + self.extra_attention

    def dynamic_shapes(self, padding: bool = False) -> tuple[Any, ...]:
        """`torch.export`'s dynamic_shapes for `inputs(padding=padding)`: batch, and length where the model allows it."""
        return self.dynamic(padding)


def outputs_of(result: Any) -> tuple[torch.Tensor, ...]:
    """A model's result as a tuple of tensors."""
    return result if isinstance(result, tuple) else (result,)


def relative_error(actual: Any, expected: Any) -> float:
    """max|a-b| / max|expected| over each output, the worst of them."""
    pairs = zip(outputs_of(actual), outputs_of(expected), strict=True)
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() for a, b in pairs)
