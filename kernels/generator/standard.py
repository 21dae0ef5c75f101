"""The kernels that `dyncc kernels` shows: attention as models have it, with each epilogue."""

from __future__ import annotations

from dyncc.kernels.generator.spec import KernelSpec

STANDARD: tuple[KernelSpec, ...] = (
    KernelSpec(64),
    KernelSpec(64, causal=True),
    KernelSpec(128, causal=True),
    KernelSpec(128, causal=True, epilogues=("gate-sigmoid",)),
    KernelSpec(128, causal=True, epilogues=("gate-silu", "residual")),
    KernelSpec(64, causal=True, epilogues=("norm",)),
    KernelSpec(128, causal=True, cap=50.0),
    KernelSpec(128, causal=True, cap=50.0, window=4096),
    KernelSpec(64, causal=True, sinks=True, window=128),
    KernelSpec(64, mask="bool"),
    KernelSpec(64, mask="added"),
    KernelSpec(64, "float32", causal=True),
)
