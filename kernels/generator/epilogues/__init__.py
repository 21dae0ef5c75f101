"""What a kernel does to its result before it is stored: one file an epilogue, composed in the order of the spec.

An epilogue gets the result tile `result` [rows, channels] in fp32 and leaves its own in it. It may read the tile of each of its tensors
(`gate_tile` of `gate`), its numbers, `kept` (which rows and channels are inside) and `WIDTH`, the number of channels. Its file says
TENSORS, NUMBERS, WHOLE, the lines of each name in EPILOGUES, and in TRUTHS what each means in ATen; where they are not the usual ones also
INDICES, SIZES, STORES and MOVES.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Epilogue:
    """`tensors`: arguments as they are broadcast to [B, H, T, channels], each with four strides; `numbers`: scalar arguments; `lines`.

    `truth` takes the result in fp32, then the tensors and the numbers. `whole`: it reads all channels of a row, not each alone. `indices`:
    arguments [B, count] of int64; `sizes`: integer arguments. `stores`: the type of what is stored, where it is not the kernel's.
    `moves`: it leaves in `slot` where in `out`, a cache that all sequences share, each row goes.
    """

    tensors: tuple[str, ...]
    numbers: tuple[str, ...]
    lines: tuple[str, ...]
    truth: Callable[..., Tensor]
    whole: bool = False
    indices: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    stores: str = ""
    moves: bool = False


def _found() -> dict[str, Epilogue]:
    modules = [importlib.import_module(f"{__name__}.{file.name}") for file in pkgutil.iter_modules(__path__)]
    found = ((m, name, lines) for m in modules for name, lines in m.EPILOGUES.items())
    return {name: Epilogue(m.TENSORS, m.NUMBERS, lines, m.TRUTHS[name], m.WHOLE, **_unusual(m)) for m, name, lines in found}


def _unusual(module: Any) -> dict[str, Any]:
    return {name.lower(): getattr(module, name) for name in ("INDICES", "SIZES", "STORES", "MOVES") if hasattr(module, name)}


EPILOGUES: dict[str, Epilogue] = _found()
"""Every epilogue by name: those of the files in this folder."""


def load(name: str, place: str = "") -> list[str]:
    """The lines that load a tensor argument's tile in fp32: rows in order from `here` on, or those at `place`."""
    first, rows = ("", place) if place else (f" + here * {name}_row", "step")
    return [
        f"{name}_at = {name} + batch * {name}_batch + head * {name}_head{first}",
        f"{name}_at = {name}_at + {rows}[:, None] * {name}_row + lane[None, :] * {name}_lane",
        f"{name}_tile = tl.load({name}_at, mask=kept, other=0.0).to(tl.float32)",
    ]
