"""Attentions of a decoding step as sites for choosing keys: their parts, whether they fit, and choices that name keys of several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from dyncc.analysis.attention import AttentionRegion, kv_sources
from dyncc.ir import argument, is_symbolic, operands, same_size, shape
from dyncc.kernels.select_keys import REMEMBERED
from dyncc.passes.drop_repeat_kv import repeated
from dyncc.passes.page_choice import PAGE_SCORES

QUERY_HEADS = 128
"""A cache does not know how many heads a query has: it has room for so many."""


@dataclass(frozen=True)
class Choice:
    """Chosen keys `index` [B, C, S], made for an attention of so many query heads and (key heads, keys)."""

    index: fx.Node
    heads: Any
    keys: tuple[Any, ...]

    def fits(self, region: AttentionRegion) -> bool:
        """Whether it names keys of another attention too: as many heads, as many keys."""
        q, _, v = parts(region)
        return shape(q)[1] == self.heads and all(same_size(a, b) for a, b in zip(self.keys, shape(v)[1:3], strict=True))


def logits(region: AttentionRegion) -> fx.Node:
    """Scaled and masked, [B, H, 1, N]."""
    assert region.softmax is not None
    return operands(region.softmax)[0]


def parts(region: AttentionRegion) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Queries [B, H, 1, D] and the keys and values [B, G, N, D] that stand behind copies for each head (values alone, where an attention
    is spelled out)."""
    q, k, v = operands(region.out)[:3] if region.fused else (region.q, region.k, region.v)
    wide_k, wide_v = repeated(k), repeated(v)
    if not region.fused:
        return q, k, wide_v or v
    return (q, wide_k, wide_v) if wide_k is not None and wide_v is not None else (q, k, v)


def _spelled_problem(region: AttentionRegion, score: str, remembers: str) -> str:
    sizes, out = shape(logits(region)), shape(region.out)
    if remembers:
        return f"it is spelled out, and {remembers} needs its plain queries and keys; load the model with attn_implementation='sdpa'"
    if score in (*PAGE_SCORES, "pairs"):
        return f"it is spelled out, and score={score} needs its plain queries and keys; load the model with attn_implementation='sdpa'"
    if len(sizes) != 4 or len(out) != 4 or len(shape(region.v)) != 4:
        return f"its logits are {list(sizes)}, not [batch, heads, row, keys]"
    if is_symbolic(sizes[2]) or sizes[2] != 1:
        return f"it has {sizes[2]} query rows; select-kv acts on decoding steps, which have one"
    return ""


def _fused_problem(region: AttentionRegion) -> str:
    q, k, _ = parts(region)
    rows = shape(q)[-2]
    if len(shape(q)) != 4 or len(shape(k)) != 4:
        return f"its queries are {list(shape(q))}, not [batch, heads, row, width]"
    if is_symbolic(rows) or rows != 1:
        return f"it has {rows} query rows; select-kv acts on decoding steps, which have one"
    if argument(region.out, "is_causal", False):
        return "its causal flag hides all keys but the first from a single row"
    if argument(region.out, "dropout_p", 0.0):
        return "dropout is active"
    mask = () if region.mask is None else shape(region.mask)
    if mask and (len(mask) != 4 or not all(isinstance(size, int) and size == 1 for size in mask[1:3])):
        return f"its mask is {list(mask)}; one row for all heads, [batch, 1, 1, keys], can follow the choice"
    return ""


def state_mark(region: AttentionRegion, policy: str) -> fx.Node | None:
    """The node that stands for what an attention's cache layer remembers for a pass, by its text; None where it remembers nothing."""
    found = (n for source in kv_sources(region) for n in source.users if n.target is REMEMBERED and n.args[2] == policy)
    return next(found, None)


def _state_problem(region: AttentionRegion, remembers: str, policy: str) -> str:
    if state_mark(region, policy) is None:
        return f"{remembers} looks back to the former step, which only dyncc.KVCache({policy!r}) remembers"
    heads = shape(parts(region)[0])[1]
    return f"it has {heads} query heads; a cache remembers {QUERY_HEADS} of them at most" if heads > QUERY_HEADS else ""


def problem(region: AttentionRegion, score: str, remembers: str = "", policy: str = "") -> str:
    """Why keys cannot be chosen by a score for an attention; ''. `remembers` is the option that looks back, of the pass whose text is
    `policy`."""
    why = region.extras or _fused_problem(region) if region.fused else _spelled_problem(region, score, remembers)
    return why or (_state_problem(region, remembers, policy) if remembers else "")
