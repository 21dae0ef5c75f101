"""Generated kernels on the first machine with a GPU: correctness against their truths, then speed beside other ways to the same result.

    python benchmarks/gpu.py --write

Without a GPU it says so and returns 2. A kernel that differs from its truth stops it with 1, before anything is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_rivals import rivals
from record import progress, write

from dyncc.bench_result import environment
from dyncc.evidence import TOLERANCE
from dyncc.kernels.generator.kinds import Attend, AttendChosen, ExitConfidence, LinearChunk, Rows
from dyncc.kernels.generator.samples import beside_truth, closeness, sample
from dyncc.kernels.generator.spec import KernelSpec
from dyncc.kernels.generator.standard import GATED_NORM, STANDARD
from dyncc.kernels.generator.tune import preferred
from dyncc.kernels.select_keys import triton_pages
from dyncc.timing import paired

KERNEL = "generated"
NO_GPU = "no GPU: torch sees no CUDA or ROCm device here, so nothing was run; start it on a machine with one"
SIZES: tuple[dict[str, int], ...] = ({}, {"batch": 1, "heads": 8, "groups": 4, "rows": 333, "keys": 1001, "chosen": 40})
"""What kernels are compared at: odd lengths, below one tile and above."""
TIMED: tuple[tuple[KernelSpec, dict[str, Any]], ...] = (
    *((Attend(width, causal=True), {"rows": rows}) for width in (64, 128) for rows in (1024, 4096)),
    (Attend(128, causal=True, epilogues=("gate-sigmoid",)), {"rows": 4096}),
    (Attend(128, causal=True, cap=50.0), {"rows": 4096}),
    (Attend(128, causal=True, cap=50.0, window=1024), {"rows": 4096}),
    *((AttendChosen(128), {"keys": keys, "chosen": 128}) for keys in (8192, 32768)),
    *((LinearChunk(width, decay=decay), {"rows": 4096}) for width in (64, 128) for decay in ("channel", "head")),
    (LinearChunk(64, epilogues=GATED_NORM), {"rows": 4096}),
    (Rows(4096, epilogues=GATED_NORM), {"rows": 4096, "heads": 1}),
    (ExitConfidence(2048), {"rows": 16, "keys": 131072}),
)
REPEATS = 10
"""Calls of one timing, so that what it costs to wait for the device counts little."""


def differences(device: str, specs: tuple[KernelSpec, ...] = STANDARD) -> list[str]:
    """The specs whose kernel differs from its truth, each with how much."""
    found = []
    for spec, sizes in ((spec, sizes) for spec in specs for sizes in SIZES):
        close = TOLERANCE[getattr(torch, spec.dtype)]
        try:
            for one, other in beside_truth(spec, device, **sizes):
                torch.testing.assert_close(one, other, **closeness(one, close))
        except AssertionError as error:
            found.append(f"{spec.name} at {sizes or 'small sizes'}: {'; '.join(str(error).strip().splitlines()[-2:])}")
    return found


def timed(spec: Any, sizes: dict[str, Any], pairs: int) -> dict[str, Any]:
    """Microseconds of the kernel and of each rival, and how many times faster the kernel is."""
    given, more = sample(spec, "cuda", **{"batch": 1, "heads": 32, "groups": 8, **sizes})
    spec = preferred(spec, torch.device("cuda"))
    ways: dict[str, Callable[[], Any]] = {KERNEL: partial(_whole, spec, *given, **more)}
    for name, (rival, first) in rivals(spec).items():
        ways[name] = partial(torch.compile(rival, dynamic=False) if first else rival, spec, *given, **more)
    timings = paired({name: partial(_repeated, way) for name, way in ways.items()}, pairs=pairs, warmup=2, progress=progress)
    rows: dict[str, Any] = {name: {"us": 1e6 * timings.median(name) / REPEATS} for name in timings.seconds}
    for name in (n for n in rows if n != KERNEL and KERNEL in rows):
        rows[name]["kernel_times_faster"] = timings.ratio(name, KERNEL).to_dict()
        print(f"{spec.name} {sizes}: {rows[KERNEL]['us']:.0f} us, {timings.ratio(name, KERNEL)} times {name}")
    for name, problem in timings.failures.items():
        rows[name] = {"failed": problem}
        print(f"{spec.name} {sizes}: {name} failed: {problem}")
    return rows


def _whole(spec: Any, *given: Any, **more: Any) -> Any:
    """A kernel with all that its result takes: parts of attention are joined."""
    return triton_pages.attend(*given, spec.page, **more) if spec.entry == "attend_chosen" else spec.run(*given, **more)


def _repeated(way: Callable[[], Any]) -> None:
    for _ in range(REPEATS):
        way()
    torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> int:
    """0, or 1 where a kernel differs from its truth, or 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/gpu.json")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    torch.manual_seed(0)
    with torch.no_grad():
        wrong = differences("cuda")
        for line in wrong:
            print(f"differs from its truth: {line}", file=sys.stderr)
        if wrong:
            return 1
        print(f"{len(STANDARD)} kernels equal their truths at {len(SIZES)} sizes")
        found = {f"{spec.name} {sizes}": timed(spec, sizes, options.pairs) for spec, sizes in TIMED}
    if options.write:
        device = torch.cuda.get_device_name()
        write("gpu", {device: {"kernels": found, "pairs": options.pairs, "environment": environment()}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
