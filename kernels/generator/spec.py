"""What every generated kernel can be asked: its type, its epilogues, its warps and stages. A kind derives from it, in a file of `kinds`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from dyncc.errors import BadKernelSpec, near
from dyncc.kernels.generator.epilogues import EPILOGUES
from dyncc.kernels.generator.frame import Operand, ending

DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4}
"""Bytes of each type that kernels take."""
WIDEST = 512
"""Channels of a head above which one program's rows no longer fit any device's registers."""


@dataclass(frozen=True, kw_only=True)
class KernelSpec(ABC):
    """A kernel of one kind: a frozen value, checked when it is made. Of a kind that lacks an abstract method none can be made.

    `epilogues` are names of EPILOGUES, in order; `warps` is how many work on one program, `stages` how many tiles
    are loaded ahead (0: chosen).

    Raises:
        BadKernelSpec: no such kernel can be made; the message names the field.
        TypeError: its kind lacks methods; the message names them.
    """

    entry: ClassVar[str]
    """The kernel's name in its source."""
    title: ClassVar[str]
    """The first word of its source: what it is."""
    tiles: ClassVar[tuple[str, ...]] = ()
    """Fields that make a program smaller."""
    large: ClassVar[Mapping[str, int]] = {}
    """Sizes at which that is tried, where they are not those of most kinds."""
    ends: ClassVar[bool] = True
    """Whether it stores one tile of results `out`, which epilogues can change."""
    in_order: ClassVar[bool] = True
    """Whether row `at` of a sequence goes to row `at` of `out`, so that an epilogue can say where else it goes."""
    registers: ClassVar[int] = 0
    """How many of them NVIDIA's assembler may give a thread, where it would rather spill a few than run fewer programs (0: its choice)."""

    dtype: str = "bfloat16"
    epilogues: tuple[str, ...] = ()
    warps: int = 0
    stages: int = 0

    def __post_init__(self) -> None:
        check(self.dtype in DTYPES, "dtype", self.dtype, f"kernels take {', '.join(DTYPES)}")
        check(self.ends or not self.epilogues, "epilogues", ",".join(self.epilogues), f"{self.entry} stores no tile that they could change")
        for name in self.epilogues:
            if name not in EPILOGUES:
                raise BadKernelSpec(option="epilogues", value=name, problem=f"choose of {', '.join(EPILOGUES)}{near(name, EPILOGUES)}")
        read = [x for name in self.epilogues for x in EPILOGUES[name].tensors]
        check(len(set(read)) == len(read), "epilogues", ",".join(self.epilogues), "each may stand once, and one of those that read a gate")
        self._check_last()
        for name in self.tiles:
            size = getattr(self, name)
            check(size == 0 or (size >= 16 and size & (size - 1) == 0), name, size, "a tile is a power of two of 16 at least")
        check(self.warps in (0, 1, 2, 4, 8, 16), "warps", self.warps, "a program has 1, 2, 4, 8 or 16 warps, or 0 to choose")
        check(0 <= self.stages <= 8, "stages", self.stages, "1 to 8 stages are loaded ahead, or 0 to choose")

    def _check_last(self) -> None:
        """What stores another type, or elsewhere, ends what is computed."""
        told = [EPILOGUES[name] for name in self.epilogues]
        rank = [2 if e.moves else 1 if e.stores else 0 for e in told]
        last = "the type of what is stored changes behind all that computes, and its place behind that"
        check(rank == sorted(rank) and max(rank.count(1), rank.count(2)) < 2, "epilogues", ",".join(self.epilogues), last)
        check(self.in_order or 2 not in rank, "epilogues", ",".join(self.epilogues), f"{self.entry} has places of its own for its rows")

    @property
    def stored(self) -> str:
        """The type of its results."""
        return next((EPILOGUES[name].stores for name in self.epilogues if EPILOGUES[name].stores), self.dtype)

    @property
    def moves(self) -> bool:
        """Whether an epilogue says where in `out` its rows go."""
        return any(EPILOGUES[name].moves for name in self.epilogues)

    @property
    def team(self) -> int:
        """Warps of a program."""
        return self.warps or 4

    @property
    def depth(self) -> int:
        """Stages of a program."""
        return self.stages or 2

    def options(self, nvidia: bool) -> dict[str, int]:
        """What Triton is told when it compiles."""
        more = {"maxnreg": self.registers} if nvidia and self.registers else {}
        return {"num_warps": self.team, "num_stages": self.depth, **more}

    def choices(self) -> Mapping[str, tuple[int, ...]]:
        """Fields that change how it runs and not what it computes, and what is tried for each on a device."""
        return {"warps": (4, 8), "stages": (2, 3, 4)}

    def formless(self) -> Self:
        """The same kernel with the form that it chooses by itself."""
        chosen: dict[str, Any] = dict.fromkeys((*self.tiles, "warps", "stages"), 0)
        return replace(self, **chosen)

    def alike(self) -> Self:
        """One kernel for all that run equally fast in the same form."""
        return self.formless()

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype]

    @property
    def exact(self) -> bool:
        """Whether products are of fp32 numbers, which matrix units would round."""
        return self.dtype == "float32"

    @property
    def precision(self) -> str:
        """The last argument of its products."""
        return ', input_precision="ieee"' if self.exact else ""

    @abstractmethod
    def operands(self) -> tuple[Operand, ...]:
        """Its own tensors, `out` among them where it `ends`."""

    def sizes(self) -> tuple[str, ...]:
        """Its own integer arguments."""
        return ("rows",)

    def numbers(self) -> tuple[str, ...]:
        """Its own scalar arguments."""
        return ()

    def constants(self) -> dict[str, int]:
        """What is fixed when it is compiled, at the sizes that figures are told for."""
        return {"HEADS": 32}

    @abstractmethod
    def body(self, ending: list[str]) -> list[str]:
        """Its lines. Where it `ends`, they leave fp32 `result` [ROWS, lanes] in front of `ending`, which reads `kept` and `WIDTH`."""

    def ending(self) -> list[str]:
        return ending(self.epilogues) if self.ends else []

    @abstractmethod
    def work(self) -> tuple[int, int]:
        """Operations and bytes at the sizes that figures are told for: a multiply-add counts two, every operand is read once."""

    def least_shared(self) -> int:
        """Bytes of shared memory below which no kernel of this spec gets."""
        return 0

    @abstractmethod
    def sized(self) -> str:
        """The first word of its name behind its kind."""

    def told(self) -> list[str]:
        """More words of its name."""
        return []

    @abstractmethod
    def run(self, *given: Tensor, **more: Any) -> Any:
        """Launch it on tensors. Each kind says which."""

    @abstractmethod
    def truth(self, *given: Tensor, **more: Any) -> Any:
        """What `run` gives, in plain ATen."""

    @property
    def name(self) -> str:
        """A short name that tells specs apart: `attend_w64_bfloat16_causal_gate_sigmoid`."""
        told = [f"{self.entry}_{self.sized()}", self.dtype, *self.told(), *(e.replace("-", "_") for e in self.epilogues)]
        sizes = [getattr(self, name) for name in self.tiles]
        return "_".join([*told, *(["tile" + "x".join(map(str, sizes))] if any(sizes) else [])])

    def __str__(self) -> str:
        own = [f for f in fields(self) if f.name not in KernelSpec.__dataclass_fields__]
        told = [(f.name, getattr(self, f.name)) for f in (*own, *fields(KernelSpec))]
        shown = [(name, value) for name, value in told if value != self.__dataclass_fields__[name].default]
        return " ".join(f"{name}={','.join(value) if isinstance(value, tuple) else value}" for name, value in shown)


def check(holds: bool, option: str, value: object, problem: str) -> None:
    """
    Raises:
        BadKernelSpec: it does not hold.
    """
    if not holds:
        raise BadKernelSpec(option=option, value=value, problem=problem)


def dtype_of(x: Tensor) -> str:
    """A tensor's type as specs name it."""
    return str(x.dtype).removeprefix("torch.")


def check_width(width: int, option: str = "width") -> None:
    check(0 < width <= WIDEST, option, width, f"a head has 1 to {WIDEST} channels")


def power(size: int, least: int = 16) -> int:
    """The power of two that holds `size`.

    >>> [power(n) for n in (1, 16, 17, 96)]
    [16, 16, 32, 128]
    """
    return max(least, 1 << (size - 1).bit_length())
