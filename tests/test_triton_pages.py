"""Page selection by generated kernels against its truths, in the interpreter; test_generator.py compiles them for real targets."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

AGAINST_TRUTH = """
import torch
from dyncc.kernels.select_keys import attend_selected, page_bounds, page_keys, page_scores, select_keys
from dyncc.kernels.select_keys.triton_pages import attend, score
generator = torch.Generator().manual_seed(0)
count = 0
heads, width, keys, page = 6, 24, 70, 4
for groups, share in ((1, "head"), (3, "layer"), (3, "group"), (2, "head")):
    q, k, v = (torch.randn(2, h, n, width, generator=generator) for h, n in ((heads, 1), (groups, keys), (groups, keys)))
    low, high = page_bounds(k, page)
    torch.testing.assert_close(score(q, low, high), page_scores(q, low, high, "head"), rtol=1e-5, atol=1e-5)
    pages = select_keys(page_scores(q, low, high, share), 9, recents=1)
    index = page_keys(pages, page)
    plain = attend_selected(q, k, v, None, index, ragged=True)
    torch.testing.assert_close(attend(q, k, v, pages, page), plain, rtol=1e-5, atol=1e-5)
    inside = index.clamp(max=keys - 1)[:, :, :33]
    torch.testing.assert_close(attend(q, k, v, inside, 1), attend_selected(q, k, v, None, inside), rtol=1e-5, atol=1e-5)
    gate = torch.randn(2, heads, 1, 1, generator=generator)
    gated = attend(q, k, v, pages, page, epilogues=("gate-sigmoid",), gate=gate)
    torch.testing.assert_close(gated, plain * gate.sigmoid(), rtol=1e-5, atol=1e-5)
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
    assert done.stdout.strip() == "compared 4"
