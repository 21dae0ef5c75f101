"""Gated linear attention in segments beside each other: what stands in front of them, and kernels of both rules in Triton's interpreter."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from test_gated_linear_attention import DECAYS, close, decays, drawn, judged
from test_generator import interpreted
from torch import Tensor

from dyncc.kernels.gated_linear_attention.gpu import spec_of
from dyncc.kernels.gated_linear_attention.segments import beside, by_segments, in_front, in_turn, left, split
from dyncc.kernels.generator.kinds import LinearChunk

SIZES = (2, 3, 150, 5, 4)
linux = pytest.mark.skipif(sys.platform != "linux", reason="Triton has wheels for Linux only")


class InATen(LinearChunk):
    """A kernel that is its truth, and tells how many sequences it was given."""

    seen: list[int] = []

    def run(self, *given: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        self.seen.append(given[0].shape[0])
        return self.truth(*given, **more)


@pytest.mark.parametrize("kind", DECAYS)
def test_what_stands_in_front_of_a_segment_is_the_state_of_the_recurrence(kind: str) -> None:
    torch.manual_seed(0)
    q, k, v, decay = drawn(2, 3, 96, 5, 4)
    decay = decays(kind, (2, 3, 96, 5))
    held = torch.randn(2, 3, 5, 4)
    spread = decay if decay is None else decay.expand(2, 3, 96, decay.shape[3])
    before, last = in_front(*(None if x is None else x.unflatten(2, (6, 16)) for x in (k, v, spread)), held)  # type: ignore[arg-type]
    for i in range(7):
        close((q, before[:, :, i] if i < 6 else last), (q, held))
        held = judged(*(None if x is None else x[:, :, 16 * i : 16 * i + 16] for x in (q, k, v, spread)), held)[1]


@pytest.mark.parametrize("kind", DECAYS)
def test_segments_compute_the_recurrence(kind: str) -> None:
    torch.manual_seed(0)
    q, k, v, _ = drawn(*SIZES)
    decay = decays(kind, SIZES[:4])
    name = "none" if decay is None else "head" if decay.shape[3] == 1 else "channel"
    spec = InATen(5, 4, decay=name, rows=16, dtype="float32")
    for state in (None, torch.randn(2, 3, 5, 4)):
        InATen.seen.clear()
        close(by_segments(spec, q, k, v, decay, state, 0.5, at_once=8, least=32), judged(q, k, v, decay, state, scale=0.5))
        assert InATen.seen == [2 * 4, 2]  # four segments of 32 tokens of each sequence, and what is left


def test_few_tokens_and_many_programs_stay_whole() -> None:
    q, k, v, decay = drawn(1, 2, 40, 5, 4)
    spec = InATen(5, 4, rows=16, dtype="float32")
    InATen.seen.clear()
    by_segments(spec, q, k, v, decay)
    assert InATen.seen == [1]
    assert split(4096, 16, 127) == (9, 448) and split(4096, 16, 128) == (1, 4096)
    assert split(255, 16, 1) == (1, 255) and split(256, 16, 1) == (2, 128)
    assert split(64, 16, 1, least=16) == (4, 16) and split(70, 32, 1, least=1)[1] == 32 and split(0, 16, 0) == (1, 0)


def test_a_sequence_is_not_copied_in_whatever_order_it_lies() -> None:
    by_tokens, by_heads = torch.randn(1, 70, 3, 5).transpose(1, 2), torch.randn(1, 3, 70, 5)
    for x in (by_tokens, by_heads, torch.randn(2, 64, 3, 5).transpose(1, 2)):
        parts = beside(x[:, :, :64].unflatten(2, (4, 16)))
        assert parts.shape == (4 * x.shape[0], 3, 16, 5) and parts.data_ptr() == x.data_ptr()
        assert torch.equal(in_turn(parts, x.shape[0]), x[:, :, :64])


def test_sums_behind_a_token_are_no_differences() -> None:
    fell = torch.tensor([float("-inf"), -1e-4, -1e4, -1e-4, float("-inf"), -1e-4, -1e-4]).view(1, 1, 1, 7, 1)
    assert left(fell).flatten().tolist() == pytest.approx([float("-inf")] * 4 + [-2e-4, -1e-4, 0.0], rel=1e-6)


@linux
def test_ops_run_generated_kernels_in_the_interpreter() -> None:
    assert interpreted("interpret_linear_attention.py", "some") == "compared 3"


@linux
@pytest.mark.full
@pytest.mark.parametrize(("part", "count"), [("ops", 85), ("segments", 57)])
def test_ops_and_segments_compute_the_recurrence_in_the_interpreter(part: str, count: int) -> None:
    assert interpreted("interpret_linear_attention.py", part) == f"compared {count}"


def test_no_kernel_where_tensors_do_not_fit() -> None:
    q, k, v, decay = drawn(1, 2, 40, 5, 4)
    assert spec_of(q, k[:, :, :3], v, decay, None, "add") is None and spec_of(q.double(), k, v, decay, None, "add") is None
