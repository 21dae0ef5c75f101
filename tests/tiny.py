"""Small random transformers, drawn by hypothesis: what the law tests hold every policy against."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

VOCABULARY = 31
LONGEST = 64


@dataclass(frozen=True)
class Tiny:
    """What a tiny transformer looks like. `kind` encoder or decoder; `returns` "first", "last" or "all" rows of the output, or those
    "picked" at the greatest id; `norm` and `positions` by name; `fused` attention is one SDPA call; `causal` "flag" or "mask" says how a
    decoder hides the future."""

    kind: str = "encoder"
    returns: str = "first"
    layers: int = 3
    heads: int = 4
    groups: int = 2
    width: int = 4
    norm: str = "pre"
    positions: str = "learned"
    fused: bool = True
    causal: str = "mask"
    keys: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def with_(self, **changes: Any) -> Tiny:
        return replace(self, **changes)

    def build(self) -> TinyModel:
        """The model, in evaluation mode, with weights that depend on `seed` only."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = TinyModel(self)
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.4)
        return model.eval().to(self.dtype)


class Block(nn.Module):
    """One layer: attention and an MLP, each with its norm in front of it or behind the residual add."""

    def __init__(self, tiny: Tiny):
        super().__init__()
        size = tiny.heads * tiny.width
        self.tiny = tiny
        self.q = nn.Linear(size, size)
        self.k = nn.Linear(size, tiny.groups * tiny.width)
        self.v = nn.Linear(size, tiny.groups * tiny.width)
        self.o = nn.Linear(size, size)
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)
        self.first, self.second = nn.LayerNorm(size), nn.LayerNorm(size)

    def forward(self, x: Any, turn: Any, mask: Any, past: Any) -> tuple[Any, Any, Any]:
        pre = self.tiny.norm == "pre"
        mixed, k, v = self.attend(self.first(x) if pre else x, turn, mask, past)
        x = x + mixed if pre else self.first(x + mixed)
        changed = self.down(F.gelu(self.up(self.second(x) if pre else x)))
        return (x + changed if pre else self.second(x + changed)), k, v

    def attend(self, x: Any, turn: Any, mask: Any, past: Any) -> tuple[Any, Any, Any]:
        tiny, (B, T, C) = self.tiny, x.shape
        q, k, v = (p(x).view(B, T, -1, tiny.width).transpose(1, 2) for p in (self.q, self.k, self.v))
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        wide_k, wide_v = repeat(k, tiny.heads), repeat(v, tiny.heads)
        causal = tiny.kind == "decoder" and mask is None and past is None
        if tiny.fused:
            out = F.scaled_dot_product_attention(q, wide_k, wide_v, attn_mask=mask, is_causal=causal)
        else:
            logits = q @ wide_k.transpose(-1, -2) * tiny.width**-0.5
            if mask is not None:
                logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
            out = torch.softmax(logits, -1, dtype=torch.float32).to(q.dtype) @ wide_v
        return self.o(out.transpose(1, 2).reshape(B, T, C)), k, v


def rotate(x: Any, cos: Any, sin: Any) -> Any:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def repeat(x: Any, heads: int) -> Any:
    """[B, G, T, D] as [B, H, T, D], each group's copies side by side."""
    B, G, T, D = x.shape
    return x if heads == G else x[:, :, None].expand(B, G, heads // G, T, D).reshape(B, heads, T, D)


class TinyModel(nn.Module):
    """ids [B, T] (and attention_mask [B, T]) -> rows of the output, then every layer's keys and values when `keys` is set."""

    def __init__(self, tiny: Tiny):
        super().__init__()
        size = tiny.heads * tiny.width
        self.tiny = tiny
        self.tokens, self.places = nn.Embedding(VOCABULARY, size), nn.Embedding(LONGEST, size)
        self.blocks = nn.ModuleList(Block(tiny) for _ in range(tiny.layers))
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, VOCABULARY)

    def forward(self, ids: Any, attention_mask: Any = None, *past: Any) -> Any:
        """`past` holds keys and values of each layer in turn: ids then follow behind them."""
        tiny = self.tiny
        done = past[0].shape[2] if past else 0
        positions = torch.arange(done, done + ids.shape[1], device=ids.device).unsqueeze(0)
        if tiny.kind == "decoder" and attention_mask is not None:
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        x, turn = self.tokens(ids), None
        if tiny.positions == "rope":
            turn = self.angles(positions, x.dtype)
        else:
            x = x + self.places(positions)
        mask, cache = self.mask(ids, attention_mask, done), []
        for i, block in enumerate(self.blocks):
            x, k, v = block(x, turn, mask, past[2 * i : 2 * i + 2] if past else None)
            cache += [k, v]
        if tiny.returns == "picked":
            x = x[torch.arange(x.shape[0], device=x.device), ids.argmax(1)]
        x = x[:, 0] if tiny.returns == "first" else x[:, -1] if tiny.returns == "last" else x
        logits = self.head(self.norm(x))
        return (logits, *cache) if tiny.keys else logits

    def mask(self, ids: Any, attention_mask: Any, done: int) -> Any:
        """True where a row sees a key; None when SDPA's own flag says it all, or when everything is seen."""
        rows = torch.arange(done, done + ids.shape[1], device=ids.device)
        columns = torch.arange(done + ids.shape[1], device=ids.device)
        real = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        if self.tiny.kind == "encoder":
            return real
        if real is None and self.tiny.causal == "flag" and self.tiny.fused and not done:
            return None
        seen = (columns[None, :] <= rows[:, None])[None, None]
        own = (columns[None, :] == rows[:, None])[None, None]
        return seen if real is None else (seen & real) | own

    def angles(self, positions: Any, dtype: torch.dtype) -> tuple[Any, Any]:
        speed = 10.0 ** -torch.arange(self.tiny.width // 2, device=positions.device)
        angle = positions[:, None, :, None].float() * speed.repeat(2)
        return angle.cos().to(dtype), angle.sin().to(dtype)


def repeated_heads(tiny: Tiny) -> TinyModel:
    """The same function with as many key heads as query heads: each group's weights are copied to its heads."""
    grouped, wide = tiny.build(), tiny.with_(groups=tiny.heads).build()
    state = grouped.state_dict()
    for name, value in state.items():
        if ".k." in name or ".v." in name:
            rows = value.view(tiny.groups, tiny.width, *value.shape[1:])
            state[name] = rows.repeat_interleave(tiny.heads // tiny.groups, 0).flatten(0, 1)
    wide.load_state_dict(state)
    return wide


def inputs(tiny: Tiny, batch: int = 2, length: int = 9, padded: bool = False, seed: int = 1) -> tuple[torch.Tensor, ...]:
    """ids and, when padded, a mask: encoders are padded on the right, decoders on the left; the first row is full."""
    ids = torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
    if not padded:
        return (ids,)
    short = torch.arange(batch).clamp(max=length - 3) % 4
    columns = torch.arange(length)
    real = columns < length - short[:, None] if tiny.kind == "encoder" else columns >= short[:, None]
    return ids, real.long()


def dynamic(values: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
    """dynamic_shapes with batch and length free."""
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=LONGEST)
    return tuple({0: batch, 1: length} for _ in values)


EITHER = st.booleans()


@st.composite
def tinies(draw: st.DrawFn, kind: str | None = None, returns: tuple[str, ...] = (), fixed: dict[str, Any] | None = None) -> Tiny:
    """Drawn models: every combination of form, small sizes."""
    kind = kind or draw(st.sampled_from(("encoder", "decoder")))
    heads, groups = draw(st.sampled_from(((2, 2), (4, 2), (3, 1), (4, 4), (6, 2))))
    tiny = Tiny(
        kind=kind,
        returns=draw(st.sampled_from(returns or (("first", "all") if kind == "encoder" else ("last",)))),
        layers=draw(st.integers(2, 4)),
        heads=heads,
        groups=groups,
        width=draw(st.sampled_from((2, 4, 6))),
        norm=draw(st.sampled_from(("pre", "post"))),
        positions=draw(st.sampled_from(("rope", "learned"))),
        fused=draw(EITHER),
        causal=draw(st.sampled_from(("flag", "mask"))),
        dtype=draw(st.sampled_from((torch.float32, torch.float32, torch.bfloat16))),
        seed=draw(st.integers(0, 9)),
    )
    return tiny.with_(**(fixed or {}))
