"""What every generated kernel has around its own lines: arguments, program ids, a tile of rows, epilogues and the store."""

from __future__ import annotations

from dataclasses import dataclass

from dyncc.kernels.generator.epilogues import EPILOGUES, load

TILE = ("batch", "head", "row")
"""The strides of [B, H, T, D] whose channels lie side by side."""
PLACE = ("batch", "head", "row", "lane")
"""The strides of a tensor that was broadcast to [B, H, T, D]."""


@dataclass(frozen=True)
class Operand:
    """A tensor argument: `strides` by the names of their dimensions; none where it is contiguous.

    `holds` is "given" (the spec's dtype), "stored" (that of its results), "float", "index" (int64) or "mask" (one byte).
    """

    name: str
    strides: tuple[str, ...] = ()
    holds: str = "given"


OUT = Operand("out", TILE, "stored")


def tensors(operands: tuple[Operand, ...], epilogues: tuple[str, ...]) -> list[Operand]:
    """A kind's own tensors and behind them those of the epilogues."""
    ends = [EPILOGUES[name] for name in epilogues]
    read = [Operand(name, PLACE) for e in ends for name in e.tensors]
    return [*operands, *read, *(Operand(name, ("batch",), "index") for e in ends for name in e.indices)]


def ids(rows: int, width: int) -> list[str]:
    """One program: a tile of rows of one head of one sequence."""
    return [
        f"ROWS: tl.constexpr = {rows}",
        f"WIDTH: tl.constexpr = {width}",
        "block, which = tl.program_id(0), tl.program_id(1)",
        "batch, head = (which // HEADS).to(tl.int64), (which % HEADS).to(tl.int64)",
    ]


def tile(lanes: int) -> list[str]:
    """Rows and channels of the tile, and which of them are inside."""
    return [
        "here = block.to(tl.int64) * ROWS  # places in memory: 64 bits up to the tile, 32 inside it",
        f"step, lane = tl.arange(0, ROWS), tl.arange(0, {lanes})",
        "at = block * ROWS + step",
        "kept = (at < rows)[:, None] & (lane < WIDTH)[None, :]",
    ]


def read(name: str, into: str = "", head: str = "head") -> list[str]:
    """The lines that load the tile of an operand with the strides TILE."""
    return [
        f"{name}_at = {name} + batch * {name}_batch + {head} * {name}_head + here * {name}_row",
        f"{into or name + '_tile'} = tl.load({name}_at + step[:, None] * {name}_row + lane[None, :], mask=kept, other=0.0).to(tl.float32)",
    ]


def ending(epilogues: tuple[str, ...], place: str = "") -> list[str]:
    """What turns the tile `result` into what is stored in `out`; rows go to `place` where a kind has worked one out, else in order."""
    lines: list[str] = []
    for epilogue in (EPILOGUES[name] for name in epilogues):
        lines += [line for name in epilogue.tensors for line in load(name, place)]
        lines += epilogue.lines
    moved = "slot" if any(EPILOGUES[name].moves for name in epilogues) else place
    first, rows = ("", moved) if moved else (" + here * out_row", "step")
    return [
        *lines,
        f"out_at = out + batch * out_batch + head * out_head{first}",
        f"tl.store(out_at + {rows}[:, None] * out_row + lane[None, :], result.to(out.dtype.element_ty), mask=kept)",
    ]


def softmax_step(precision: str) -> list[str]:
    """Masked `logits` [rows, keys] and `v_tile` [keys, channels] join what `top`, `total` and `acc` have summed."""
    return [
        "higher = tl.maximum(top, tl.max(logits, axis=1))",
        'base = tl.where(higher == -float("inf"), 0.0, higher)',
        "weights = tl.exp(logits - base[:, None])",
        "shrink = tl.exp(top - base)",
        "total = total * shrink + tl.sum(weights, axis=1)",
        f"acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * shrink[:, None]{precision})",
        "top = higher",
    ]


def nothing_summed(wide: int) -> list[str]:
    """The sums of a softmax that has seen no key."""
    lines = ['top = tl.full([ROWS], -float("inf"), dtype=tl.float32)', "total = tl.zeros([ROWS], dtype=tl.float32)"]
    return [*lines, f"acc = tl.zeros([ROWS, {wide}], dtype=tl.float32)"]


DIVIDED = "result = acc / tl.where(total == 0.0, 1.0, total)[:, None]"
"""The mean of what was summed with weights, of which `total` is the sum; a row that has none gives zeros."""
