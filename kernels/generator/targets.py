"""Devices that kernels are compiled for, without one at hand: what a program may use there, and the peaks of the roofline."""

from __future__ import annotations

from dataclasses import dataclass

from dyncc.errors import UnknownTarget, near


@dataclass(frozen=True)
class Target:
    """`shared` bytes a program may use, `registers` of one multiprocessor (one SIMD on hip), `threads` resident there; peaks of the device.

    `tensor` and `vector` are operations a second of 16-bit matrix units and of fp32, `bandwidth` bytes a second, as vendors publish them.
    """

    backend: str
    arch: int | str
    warp: int
    shared: int
    shared_all: int
    registers: int
    warps: int
    tensor: float
    vector: float
    bandwidth: float

    @property
    def name(self) -> str:
        return f"{self.backend}:{self.arch}"


TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target("cuda", 80, 32, 166912, 167936, 65536, 64, 312e12, 19.5e12, 2.0e12),
        Target("cuda", 90, 32, 232448, 233472, 65536, 64, 989e12, 67e12, 3.35e12),
        Target("cuda", 100, 32, 232448, 233472, 65536, 64, 2250e12, 80e12, 8.0e12),
        Target("hip", "gfx942", 64, 65536, 65536, 512, 8, 1307e12, 163e12, 5.3e12),
    )
}


def target(name: str) -> Target:
    """A target by name, such as "cuda:90".

    Raises:
        UnknownTarget: there is none of that name.
    """
    if name not in TARGETS:
        raise UnknownTarget(name=name, near=near(name, TARGETS), known=", ".join(TARGETS))
    return TARGETS[name]


def occupancy(t: Target, registers: int, shared: int, warps: int) -> float:
    """The share of resident warps that registers and shared memory leave room for.

    >>> occupancy(TARGETS["cuda:90"], 128, 49152, 4)
    0.25
    """
    if t.backend == "hip":  # registers count for one SIMD, of which a compute unit has four
        waves = min(t.warps, t.registers // max(1, registers))
        by_shared = t.shared_all // shared * warps / 4 if shared else waves
        return min(float(waves), by_shared) / t.warps
    programs = t.registers // max(1, registers * t.warp * warps)
    if shared:
        programs = min(programs, t.shared_all // (shared + 1024))
    return min(t.warps, programs * warps) / t.warps
