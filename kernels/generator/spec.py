"""What a generated attention kernel computes, and in which pieces: one frozen value, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, fields

from dyncc.errors import BadKernelSpec, near
from dyncc.kernels.generator.epilogues import EPILOGUES

DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4}
"""Bytes of each type that kernels take."""
MASKS = ("none", "bool", "added")
WIDEST = 512
"""Channels of a head above which one program's rows no longer fit any device's registers."""


@dataclass(frozen=True)
class KernelSpec:
    """Attention of [B, H, Tq, width] queries over [B, G, Tk, width] keys, as `dyncc::attend` means it.

    `wide` is the width of values (0: that of keys). `epilogues` are names of EPILOGUES, in order. `rows` and `keys` are the tile sizes of
    one program, `warps` how many work on it (0: chosen).

    Raises:
        BadKernelSpec: no such kernel can be made; the message names the field.
    """

    width: int
    dtype: str = "bfloat16"
    wide: int = 0
    causal: bool = False
    window: int = 0
    cap: float = 0.0
    mask: str = "none"
    sinks: bool = False
    epilogues: tuple[str, ...] = ()
    rows: int = 0
    keys: int = 0
    warps: int = 0
    stages: int = 2

    def __post_init__(self) -> None:
        _check(0 < self.width <= WIDEST, "width", self.width, f"a head has 1 to {WIDEST} channels")
        _check(0 <= self.wide <= WIDEST, "wide", self.wide, f"a value has 1 to {WIDEST} channels, or 0 for as many as a key")
        _check(self.dtype in DTYPES, "dtype", self.dtype, f"kernels take {', '.join(DTYPES)}")
        _check(self.mask in MASKS, "mask", self.mask, f"choose one of {', '.join(MASKS)}")
        _check(self.window >= 0 and (self.causal or not self.window), "window", self.window, "a window needs causal=True and counts keys")
        _check(0 <= self.cap < float("inf"), "cap", self.cap, "a soft cap is a positive number, or 0 for none")
        for name in self.epilogues:
            _check(name in EPILOGUES, "epilogues", name, f"choose of {', '.join(EPILOGUES)}{near(name, EPILOGUES)}")
        _check(len(set(self.epilogues)) == len(self.epilogues), "epilogues", ",".join(self.epilogues), "each may stand once")
        for name, size in (("rows", self.rows), ("keys", self.keys)):
            _check(size == 0 or (size >= 16 and size & (size - 1) == 0), name, size, "a tile is a power of two of 16 at least")
        _check(self.warps in (0, 1, 2, 4, 8, 16), "warps", self.warps, "a program has 1, 2, 4, 8 or 16 warps, or 0 to choose")
        _check(1 <= self.stages <= 8, "stages", self.stages, "1 to 8 stages are loaded ahead")

    @property
    def value_width(self) -> int:
        return self.wide or self.width

    @property
    def lanes(self) -> tuple[int, int]:
        """Channels of keys and of values as tiles hold them: powers of two, 16 at least."""
        return _power(self.width), _power(self.value_width)

    @property
    def tile(self) -> tuple[int, int]:
        """Query rows and keys that a program works on at once: fewer where heads are wide, so that registers suffice."""
        heavy = max(self.lanes) * (4 if DTYPES[self.dtype] == 4 else 1)
        rows, keys = (64, 64) if heavy <= 64 else (64, 32) if heavy <= 128 else (32, 32) if heavy <= 256 else (16, 16)
        return self.rows or rows, self.keys or keys

    @property
    def team(self) -> int:
        """Warps of a program: more where a tile of results, or of a mask beside it, is large."""
        return self.warps or (8 if max(self.lanes) >= 128 or self.mask != "none" else 4)

    @property
    def name(self) -> str:
        """A short name that tells specs apart: `attend_w64_bfloat16_causal_gate_sigmoid`."""
        told = [f"attend_w{self.width}" + (f"x{self.wide}" if self.wide else ""), self.dtype, *(["causal"] if self.causal else [])]
        told += [f"window{self.window}"] if self.window else []
        told += [f"cap{self.cap:g}".replace(".", "p")] if self.cap else []
        told += [f"mask_{self.mask}"] if self.mask != "none" else []
        told += [*(["sinks"] if self.sinks else []), *(e.replace("-", "_") for e in self.epilogues)]
        told += [f"tile{self.rows}x{self.keys}"] if self.rows or self.keys else []
        return "_".join(told)

    def __str__(self) -> str:
        told = [(f.name, getattr(self, f.name)) for f in fields(self) if f.name == "width" or getattr(self, f.name) != f.default]
        return " ".join(f"{name}={','.join(value) if isinstance(value, tuple) else value}" for name, value in told)


def _check(holds: bool, option: str, value: object, problem: str) -> None:
    if not holds:
        raise BadKernelSpec(option=option, value=value, problem=problem)


def _power(size: int) -> int:
    """
    >>> [_power(n) for n in (1, 16, 17, 96)]
    [16, 16, 32, 128]
    """
    return max(16, 1 << (size - 1).bit_length())
