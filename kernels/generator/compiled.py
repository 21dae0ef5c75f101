"""Kernels compiled ahead of time, for devices that are not here: what they take, and the least time that a device needs for them.

Triton compiles to machine code without a device; the numbers are read from that code (by `cuobjdump` on NVIDIA, off the assembly's own
notes on AMD).
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dyncc.errors import BadKernelSpec
from dyncc.kernels.generator import store
from dyncc.kernels.generator.source import arguments, source
from dyncc.kernels.generator.spec import KernelSpec
from dyncc.kernels.generator.targets import Target, occupancy, target

POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "int8": "*i8"}
TYPES = {"float": "*fp32", "index": "*i64", "mask": "*u8", "size": "i32", "number": "fp32", "constant": "constexpr"}


@dataclass(frozen=True)
class Compiled:
    """One kernel on one target. `spills` and `shared_memory` are bytes, `registers` of one thread, `seconds` the roofline's least time."""

    name: str
    spec: str
    target: str
    registers: int
    spills: int
    shared_memory: int
    occupancy: float
    flops: int
    bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compiled(spec: KernelSpec, where: str) -> Compiled:
    """Compile a spec for a target, or read from disk what that gave before.

    Raises:
        UnknownTarget: there is no target of that name.
        BadKernelSpec: the kernel needs more shared memory than a program has there.
    """
    t = target(where)
    _check_shared(spec.least_shared(), spec, t)
    name = store.key("compiled", source(spec), t.name, *map(str, spec.options(t.backend == "cuda").values()))
    file = store.kept(name, ".json", lambda: json.dumps(_compile(spec, t)))
    registers, spills, shared = json.loads(store.read(file) or "")
    _check_shared(shared, spec, t)
    flops, moved = spec.work()
    peak = t.vector if spec.exact else t.tensor
    seconds = max(flops / peak, moved / t.bandwidth)
    busy = occupancy(t, registers, shared, spec.team)
    return Compiled(spec.name, str(spec), t.name, registers, spills, shared, busy, flops, moved, seconds)


def _check_shared(needed: int, spec: KernelSpec, t: Target) -> None:
    if needed > t.shared:
        choice = " or ".join(_smaller(spec, t)) or "a smaller width"
        problem = f"it takes {needed:,} bytes of shared memory and {t.name} has {t.shared:,}; give {choice}"
        raise BadKernelSpec(option="stages", value=spec.depth, problem=problem)


def _smaller(spec: KernelSpec, t: Target) -> list[str]:
    """For each field that changes what is loaded ahead, the largest choice that may fit."""
    found = []
    for name, sizes in (*((tile, (128, 64, 32, 16)) for tile in spec.tiles), ("stages", tuple(range(spec.depth - 1, 0, -1)))):
        with contextlib.suppress(BadKernelSpec):
            changes: list[dict[str, Any]] = [{name: size} for size in sizes]
            least = {change[name]: replace(spec, **change).least_shared() for change in changes}
            found += [f"{name}={size}" for size, needed in least.items() if needed < spec.least_shared() and needed <= t.shared][:1]
    return found


def machine_code(spec: KernelSpec, where: str) -> Any:
    """What Triton compiles a spec to: `.asm` by kind ("ptx", "cubin", "amdgcn", ...) and `.metadata`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dyncc.kernels.generator.module import kernel

    t, told = target(where), arguments(spec)
    types = {**TYPES, "given": POINTERS[spec.dtype], "stored": POINTERS[spec.stored]}
    signature = {name: types[kind] for name, kind in told}
    whole = [i for i, (name, kind) in enumerate(told) if kind in ("given", "stored", "mask", "float") or _a_row(name)]
    aligned = {(i,): [["tt.divisibility", 16]] for i in whole}
    made = ASTSource(kernel(spec), signature, spec.constants(), aligned)
    return triton.compile(made, target=GPUTarget(t.backend, t.arch, t.warp), options=spec.options(t.backend == "cuda"))


def _a_row(name: str) -> bool:
    """Strides of rows, heads and sequences: multiples of 16 where a head's width is."""
    return name.endswith(("_batch", "_head", "_row"))


def _compile(spec: KernelSpec, t: Target) -> tuple[int, int, int]:
    made = machine_code(spec, t.name)
    read = _amd if t.backend == "hip" else _nvidia
    return *read(made), made.metadata.shared


def _nvidia(made: Any) -> tuple[int, int]:
    """Registers of a thread, and bytes that do not fit them."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    return registers, stack + local


def _amd(made: Any) -> tuple[int, int]:
    text = made.asm["amdgcn"]
    registers, spilled = (int(re.search(rf"\.vgpr_{name}:\s*(\d+)", text)[1]) for name in ("count", "spill_count"))  # type: ignore[index]
    return registers, spilled * 4
