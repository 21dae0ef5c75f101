"""The lines of attention: one program computes a tile of rows of one head, with the online softmax (Milakov and Gimelshein 2018; Dao et al.
2022): keys come tile by tile, and what was summed is shrunk when a larger logit turns up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dyncc.kernels.generator.frame import DIVIDED, ids, nothing_summed, softmax_step, tensors, tile
from dyncc.kernels.generator.kinds.head_base import query_tile
from dyncc.kernels.generator.spec import power

if TYPE_CHECKING:
    from dyncc.kernels.generator.kinds.attend import Attend


def lines(spec: Attend) -> list[str]:
    """Up to `result`."""
    return [*_setup(spec), *_start(spec), *_loop(spec), DIVIDED]


def _setup(spec: Attend) -> list[str]:
    lines = [
        f"KEYS: tl.constexpr = {spec.tile[1]}",
        *ids(spec.tile[0], spec.value_width),
        "group = head // (HEADS // GROUPS)",
        *(_packed(spec) if spec.packed else []),
        *tile(spec.lanes[1]),
        *query_tile(spec.width, spec.lanes[0]),
        *([f"first, last = {_span(spec)}"] if spec.mask != "blocks" else []),
        *(f"{name}_at = {name} + batch * {name}_batch + group * {name}_head{_from(spec, name + '_row')}" for name in ("k", "v")),
    ]
    if spec.mask == "blocks":
        lines.append("listed_at = listed + batch * listed_batch + head * listed_head + block * listed_tile")
        lines.append("count = tl.load(counts + batch * counts_batch + head * counts_head + block)")
    elif spec.mask != "none":
        lines.append(f"mask_at = mask + batch * mask_batch + head * mask_head + here * mask_row{_from(spec, 'mask_key')}")
    return lines


def _packed(spec: Attend) -> list[str]:
    """A sequence of many that lie behind each other: every tensor from where it begins, and its own length."""
    names = [operand.name for operand in tensors(spec.operands(), spec.epilogues) if "row" in operand.strides]
    return [
        "begin = tl.load(starts + batch)",
        "rows = (tl.load(starts + batch + 1) - begin).to(tl.int32)",
        "keys = rows",
        *(f"{name} += begin * {name}_row" for name in names),
        "batch = batch * 0",
    ]


def _span(spec: Attend) -> str:
    """The keys that some row of the tile sees."""
    first = f"tl.maximum(block * ROWS - {spec.window - 1}, 0) // KEYS * KEYS" if spec.window else "0"
    return f"{first}, {'tl.minimum(keys, (block + 1) * ROWS)' if spec.causal else 'keys'}"


def _from(spec: Attend, stride: str) -> str:
    return f" + first.to(tl.int64) * {stride}" if spec.window and spec.mask != "blocks" else ""


def _start(spec: Attend) -> list[str]:
    """The state of the sums: a sink is a first logit that has no value."""
    lines = nothing_summed(spec.lanes[1])
    if not spec.sinks:
        return lines
    sunk = ["top = tl.zeros([ROWS], dtype=tl.float32) + tl.load(sinks + head).to(tl.float32)"]
    return [*sunk, "total = tl.full([ROWS], 1.0, dtype=tl.float32)", lines[-1]]


def _loop(spec: Attend) -> list[str]:
    """Tiles of keys that every row sees need no comparisons: those come first, where it is known where they end."""
    if spec.mask == "blocks":
        start = ["start = tl.load(listed_at + turn) * KEYS", *(f"{x}_from = {x}_at + start * {x}_row" for x in "kv")]
        return ["for turn in range(0, count):", *_indented([*start, "key = start.to(tl.int32) + hop", *_keys(spec, False)])]
    moved = [f"{x}_at += KEYS * {x}_{'key' if x == 'mask' else 'row'}" for x in ("k", "v", *(["mask"] if spec.mask != "none" else []))]
    edge = _indented(["key = start + hop", *_keys(spec, False), *moved])
    if spec.window or spec.cap or spec.mask != "none":  # beside a cap two loops took more registers than a thread has
        return ["for start in range(first, last, KEYS):", *edge]
    seen = "tl.minimum(keys, block * ROWS)" if spec.causal else "keys"
    whole = f"whole = {seen} // KEYS * KEYS  # every row sees all keys in front of it"
    inner = _indented([*_keys(spec, True), *moved])
    return [whole, "for _ in range(first, whole, KEYS):", *inner, "for start in range(whole, last, KEYS):", *edge]


def _indented(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def _keys(spec: Attend, seen: bool) -> list[str]:
    """One tile of keys; `seen`: every row sees all of it."""
    k, v = ("k_from", "v_from") if spec.mask == "blocks" else ("k_at", "v_at")
    inside = ["", ""] if seen else ["(key < keys)[None, :]", "(key < keys)[:, None]"]
    hidden = [] if seen else [f"seen = {_seen(spec)}", *_masked(spec), 'logits = tl.where(seen, logits, -float("inf"))']
    return [
        f"k_tile = tl.load({k} + hop[None, :] * k_row + channel[:, None]{_within(inside[0], 'filled[:, None]', spec.width)})",
        f"logits = tl.dot(q_tile, k_tile{spec.precision}) * scale",
        *_capped(spec),
        *hidden,
        f"v_tile = tl.load({v} + hop[:, None] * v_row + lane[None, :]{_within(inside[1], '(lane < WIDTH)[None, :]', spec.value_width)})",
        *softmax_step(spec.precision),
    ]


def _within(keys: str, channels: str, width: int) -> str:
    """The mask of a load: that of keys, and of channels where a tile has more than there are."""
    told = " & ".join(x for x in (keys, channels if power(width) != width else "") if x)
    return f", mask={told}, other=0.0" if told else ""


def _capped(spec: Attend) -> list[str]:
    """cap tanh(x / cap), with tanh(y) = 2 sigmoid(2 y) - 1."""
    return [f"logits = {spec.cap!r} * (2.0 * tl.sigmoid(logits * {2.0 / spec.cap!r}) - 1.0)"] if spec.cap else []


def _seen(spec: Attend) -> str:
    told = ["(key < keys)[None, :]"]
    told += ["(key[None, :] <= at[:, None])"] if spec.causal else []
    told += [f"(key[None, :] > at[:, None] - {spec.window})"] if spec.window else []
    return " & ".join(told)


def _masked(spec: Attend) -> list[str]:
    if spec.mask in ("none", "blocks"):
        return []
    told = "tl.load(mask_at + step[:, None] * mask_row + hop[None, :] * mask_key, mask=within, other=0)"
    use = f"seen = seen & ({told} != 0)" if spec.mask == "bool" else f"logits = logits + {told}.to(tl.float32)"
    return ["within = (at < rows)[:, None] & (key < keys)[None, :]", use]
