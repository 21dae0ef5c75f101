"""How pairs of tokens inside a chunk decay, and what tokens write by the delta rule.

Decays are only ever multiplied up from a boundary outwards, as in `gated_linear_attention/chunks.py`: no factor exceeds 1, nothing
overflows, and -inf is a decay as any. With one decay a head, what row i keeps of row j is summed for each pair; with one a channel, a block
of 2n rows reads its first half across the boundary between the halves, for n of 1, 2, 4, ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dyncc.kernels.generator.kinds.linear_chunk import LinearChunk

PIECE = 32
"""Channels of which weights are summed at once."""


def _no_decay(spec: LinearChunk) -> list[str]:
    return [f"weights = tl.where(behind, 0.0, tl.dot(q_tile, tl.trans(k_tile){spec.precision}))", "across = 1.0"]


def sums_of_heads(spec: LinearChunk) -> list[str]:
    """Sums from behind row j up to row i, for each pair, and those over whole rows: none is a difference."""
    return [
        "fell = tl.load(decay_at + place * decay_row, mask=at < rows, other=0.0)",
        "apart = tl.cumsum(tl.where(after, fell[:, None], 0.0), axis=0)",
        "since, left = tl.cumsum(fell, axis=0), tl.sum(tl.where(after, fell[:, None], 0.0), axis=0)",
    ] if spec.decay == "head" else []  # fmt: skip


def _of_heads(spec: LinearChunk) -> list[str]:
    return [
        f"weights = tl.where(behind, 0.0, tl.dot(q_tile, tl.trans(k_tile){spec.precision}) * tl.exp(apart))",
        "q_tile = (q_tile * tl.exp(since)[:, None]).to(v_tile.dtype)",
        "k_tile = (k_tile * tl.exp(left)[:, None]).to(v_tile.dtype)",
        "across = tl.exp(tl.sum(fell, axis=0))",
    ]


def _of_channels(spec: LinearChunk) -> list[str]:
    """Sums from the start of a row's block up to it, and from behind it to the block's end, for blocks of 1, 2, 4, ... rows.

    Weights are summed a few channels at a time, which keeps few numbers alive.
    """
    some = min(16 if spec.exact else PIECE, spec.lanes[0])
    inner = [
        f"piece = part + tl.arange(0, {some})",
        f"some = (at < rows)[:, None] & (piece < {spec.width})[None, :]",
        *(f"{x}_part = tl.load({x}_at + place[:, None] * {x}_row + piece[None, :], mask=some, other=0.0)" for x in ("q", "k")),
        *_decays("piece", "some", spec),
        "weights += tl.where(after | behind, 0.0, tl.sum(q_part.to(tl.float32) * k_part, axis=1)[:, None])",
    ]
    half = 1
    while half < spec.chunk:
        inner += [
            *_sums(half, spec.chunk, some),
            "late, early = (q_part * tl.exp(since)).to(v_tile.dtype), (k_part * tl.exp(left)).to(v_tile.dtype)",
            f"one, two = step[None, :] // {half}, step[:, None] // {half}",
            f"weights += tl.where((two % 2 == 1) & (one == two - 1), tl.dot(late, tl.trans(early){spec.precision}), 0.0)",
        ]
        half *= 2
    return [
        "weights = tl.zeros([ROWS, ROWS], dtype=tl.float32)",
        f"for part in range(0, {spec.width}, {some}):",
        *(f"    {line}" for line in inner),
        *_decays("channel", "inside", spec),
        "since, left = tl.cumsum(fell, axis=0), tl.cumsum(tl.where((step == ROWS - 1)[:, None], 0.0, comes), axis=0, reverse=True)",
        "q_tile, k_tile = (q_tile * tl.exp(since)).to(v_tile.dtype), (k_tile * tl.exp(left)).to(v_tile.dtype)",
        "across = tl.exp(tl.sum(fell, axis=0))[:, None]",
    ]


def written(spec: LinearChunk) -> list[str]:
    """What tokens write by the delta rule, in place of their values: u of (1 + system) u = beta (v - k S), solved row by row in fp32."""
    apart, since = (" * tl.exp(apart)", " * tl.exp(since)[:, None]") if spec.decay == "head" else ("", "")
    return [
        "beta_tile = tl.load(beta_at + place * beta_row, mask=at < rows, other=0.0)[:, None]",
        f"system = tl.where(after, beta_tile * tl.dot(k_tile, tl.trans(k_tile){spec.precision}){apart}, 0.0)",
        "solved = tl.where(step[:, None] == step[None, :], 1.0, 0.0)",
        "for row in range(1, tl.minimum(ROWS, rows - start)):",
        "    now = step[:, None] == row",
        "    earlier = tl.sum(tl.where(now, system, 0.0), axis=0)[:, None] * solved",
        "    solved = tl.where(now, solved - tl.sum(earlier, axis=0)[None, :], solved)",
        f"known = tl.dot((k_tile{since}).to(v_tile.dtype), held.to(v_tile.dtype){spec.precision})",
        "wrong = (beta_tile * (v_tile - known)).to(v_tile.dtype)",
        f"v_tile = tl.dot(solved.to(v_tile.dtype), wrong{spec.precision}).to(v_tile.dtype)",
    ]


def _decays(lanes: str, mask: str, spec: LinearChunk) -> list[str]:
    """`fell`, each row's decay, and `comes`, that of the row behind it."""
    behind = f"(at + 1 < rows)[:, None] & ({lanes} < {spec.width})[None, :]"
    return [
        f"decay_in = decay_at + place[:, None] * decay_row + {lanes}[None, :]",
        f"fell = tl.load(decay_in, mask={mask}, other=0.0)",
        f"comes = tl.load(decay_in + decay_row, mask={behind}, other=0.0)",
    ]


def _sums(half: int, chunk: int, lanes: int) -> list[str]:
    if half == 1:
        return ["since, left = fell, tl.zeros_like(fell)"]
    blocks, flat = f"[{chunk // half}, {half}, {lanes}]", f"[ROWS, {lanes}]"
    return [
        f"tail = tl.where((step % {half} == {half - 1})[:, None], 0.0, comes)",
        f"since = tl.reshape(tl.cumsum(tl.reshape(fell, {blocks}), axis=1), {flat})",
        f"left = tl.reshape(tl.cumsum(tl.reshape(tail, {blocks}), axis=1, reverse=True), {flat})",
    ]


DECAYED = {"none": _no_decay, "head": _of_heads, "channel": _of_channels}
"""The lines that leave `weights` of pairs, `q_tile` and `k_tile` as they meet the state, and what the state keeps `across` a chunk."""
