"""Kernels compiled ahead of time, for devices that are not here: what they take, and the least time that a device needs for them.

Triton compiles to machine code without a device; the numbers are read from that code (by `cuobjdump` on NVIDIA, off the assembly's own
notes on AMD).
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dyncc.errors import BadKernelSpec
from dyncc.kernels.generator import store
from dyncc.kernels.generator.source import arguments, source
from dyncc.kernels.generator.spec import DTYPES, KernelSpec
from dyncc.kernels.generator.targets import Target, occupancy, target

POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}
HEADS, GROUPS, TOKENS = 32, 8, 4096
"""What FLOPs, bytes and the roofline are told for: one sequence of so many tokens and heads."""


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
    _check_shared(least_shared(spec), spec, t)
    name = store.key("compiled", source(spec), t.name, str(spec.team), str(spec.stages))
    file = store.kept(name, ".json", lambda: json.dumps(_compile(spec, t)))
    registers, spills, shared = json.loads(store.read(file) or "")
    _check_shared(shared, spec, t)
    flops, moved = work(spec)
    peak = t.vector if spec.dtype == "float32" else t.tensor
    seconds = max(flops / peak, moved / t.bandwidth)
    busy = occupancy(t, registers, shared, spec.team)
    return Compiled(spec.name, str(spec), t.name, registers, spills, shared, busy, flops, moved, seconds)


def least_shared(spec: KernelSpec) -> int:
    """Bytes of the key and value tiles that are loaded ahead: no kernel of this spec needs fewer."""
    return (spec.stages - 1) * spec.tile[1] * sum(spec.lanes) * DTYPES[spec.dtype]


def work(spec: KernelSpec) -> tuple[int, int]:
    """Operations and bytes of one sequence of TOKENS tokens: a multiply-add counts two, every operand is read once."""
    seen = TOKENS * TOKENS
    if spec.causal:
        span = min(spec.window or TOKENS, TOKENS)
        seen = span * (span + 1) // 2 + (TOKENS - span) * span
    flops = 2 * HEADS * seen * (spec.width + spec.value_width)
    channels = (HEADS + GROUPS) * (spec.width + spec.value_width)
    channels += HEADS * spec.value_width * len(spec.epilogues)
    mask = TOKENS * TOKENS * {"none": 0, "bool": 1, "added": DTYPES[spec.dtype]}[spec.mask]
    return flops, TOKENS * channels * DTYPES[spec.dtype] + mask


def _check_shared(needed: int, spec: KernelSpec, t: Target) -> None:
    if needed > t.shared:
        problem = f"it takes {needed:,} bytes of shared memory and {t.name} has {t.shared:,}; give smaller keys=, or fewer stages="
        raise BadKernelSpec(option="keys", value=spec.tile[1], problem=problem)


def machine_code(spec: KernelSpec, where: str) -> Any:
    """What Triton compiles a spec to: `.asm` by kind ("ptx", "cubin", "amdgcn", ...) and `.metadata`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dyncc.kernels.generator.module import kernel

    t, told = target(where), arguments(spec)
    types = {"pointer": POINTERS[spec.dtype], "size": "i32", "number": "fp32", "constant": "constexpr"}
    types["mask"] = "*u8" if spec.mask == "bool" else POINTERS[spec.dtype]
    signature = {name: types[kind] for name, kind in told}
    aligned = {(i,): [["tt.divisibility", 16]] for i, (name, kind) in enumerate(told) if kind in ("pointer", "mask") or _a_row(name)}
    made = ASTSource(kernel(spec), signature, {"HEADS": HEADS, "GROUPS": GROUPS}, aligned)
    options = {"num_warps": spec.team, "num_stages": spec.stages}
    return triton.compile(made, target=GPUTarget(t.backend, t.arch, t.warp), options=options)


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
