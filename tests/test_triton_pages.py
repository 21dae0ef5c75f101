"""The Triton kernels of page selection: against their truths in the interpreter, in its own process; and compiled for real targets."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton", reason="Triton has wheels for Linux only")

AGAINST_TRUTH = """
import torch
from dyncc.kernels.select_keys import attend_selected, page_bounds, page_keys, page_scores, select_keys
from dyncc.kernels.select_keys.triton_pages import attend, score
generator = torch.Generator().manual_seed(0)
count = 0
heads, width, keys, page = 6, 24, 70, 4
for groups, share in ((1, "head"), (3, "layer")):
    q, k, v = (torch.randn(2, h, n, width, generator=generator) for h, n in ((heads, 1), (groups, keys), (groups, keys)))
    low, high = page_bounds(k, page)
    torch.testing.assert_close(score(q, low, high), page_scores(q, low, high, "head"), rtol=1e-5, atol=1e-5)
    pages = select_keys(page_scores(q, low, high, share), 9, recents=1)
    index = page_keys(pages, page)
    torch.testing.assert_close(attend(q, k, v, pages, page), attend_selected(q, k, v, None, index, ragged=True), rtol=1e-5, atol=1e-5)
    visible = torch.rand(2, keys, generator=generator) > 0.3
    visible[:, -1] = True  # a step sees itself
    masked = attend_selected(q, k, v, visible[:, None, None], index, ragged=True)
    torch.testing.assert_close(attend(q, k, v, pages, page, visible), masked, rtol=1e-5, atol=1e-5)
    count += 1
print("compared", count)
"""


@pytest.mark.full
def test_the_kernels_compute_their_truths_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", AGAINST_TRUTH], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "compared 2"


TARGETS = [(90, "bf16"), pytest.param(80, "bf16", marks=pytest.mark.full), pytest.param(90, "fp32", marks=pytest.mark.full)]


@pytest.mark.parametrize(("arch", "dtype"), TARGETS)
def test_the_kernels_compile_without_a_gpu(arch: int, dtype: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dyncc.kernels.select_keys import triton_pages

    sizes = {"HEADS": 9, "GROUPS": 3, "WIDTH": 64, "LANES": 64}
    pages = {**sizes, "CHOICES": 9, "PAGE": 16, "KEYS": 16, "SPLIT": 8, "MASKED": True}
    given, floats = f"*{dtype}", "*fp32"
    signatures = [
        (triton_pages.score_pages, [given, given, given, floats, "i32"], {**sizes, "BLOCK": 64}),
        (triton_pages.attend_split, [given] * 3 + ["*i64", "*u8", floats, floats, floats, "i32", "i32", "fp32"], pages),
        (triton_pages.join_splits, [floats, floats, floats, given, "i32"], {"PARTS": 8, "WIDTH": 64, "LANES": 64}),
    ]
    for kernel, types, constants in signatures:
        names = [name for name in kernel.arg_names if name not in constants]
        signature = dict(zip(names, types, strict=True)) | dict.fromkeys(constants, "constexpr")
        made = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", arch, 32))
        assert len(made.asm["cubin"]) > 1000 and f".target sm_{arch}" in made.asm["ptx"]
