"""Distances between outputs, and the demo's report of them."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from dyncc import quality
from dyncc.bench_result import BenchResult
from dyncc.demo_report import Finding, summary, write_report
from dyncc.sentences import embedding_cosines, mean_pooled
from dyncc.timing import Timings


def test_equal_logits_are_no_distance_apart() -> None:
    logits = CausalLMOutput(logits=torch.randn(2, 3, 11))
    assert quality.compare(logits, logits) == {"max_rel_error": 0.0, "kl": pytest.approx(0.0, abs=1e-6), "top1_agreement": 1.0}


def test_kl_of_two_known_distributions() -> None:
    dense, other = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert quality.kl(dense, other) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


def test_top1_agreement_counts_positions() -> None:
    dense = torch.eye(4)[None]
    other = dense.clone()
    other[0, 0] = torch.tensor([0.0, 2.0, 0.0, 0.0])
    assert quality.top1_agreement(dense, other) == 0.75


def test_embeddings_are_compared_by_cosine_after_pooling() -> None:
    hidden = torch.randn(2, 5, 8)
    turned = BaseModelOutput(last_hidden_state=hidden[:, torch.randperm(5)])
    found = quality.compare(BaseModelOutput(last_hidden_state=hidden), turned)
    assert found["cosine"] == pytest.approx(1.0) and "kl" not in found


def test_a_tuple_with_the_vocabulary_size_holds_logits() -> None:
    outputs = (torch.randn(1, 1, 16), torch.randn(1, 2, 4, 8))
    assert "kl" in quality.compare(outputs, outputs, vocabulary=16)


def test_shortened_keys_are_left_out_of_the_error() -> None:
    logits = torch.randn(1, 1, 16)
    assert quality.compare((logits, torch.randn(1, 8, 4)), (logits, torch.randn(1, 4, 4)))["max_rel_error"] == 0.0


def test_relative_error_is_the_worst_output() -> None:
    dense, other = (torch.tensor([1.0, 4.0]), torch.tensor([2.0])), (torch.tensor([1.0, 3.0]), torch.tensor([2.1]))
    assert quality.max_rel_error(dense, other) == pytest.approx(0.25)


def test_outputs_of_other_shapes_are_not_compared() -> None:
    assert quality.compare((torch.randn(2, 3),), (torch.randn(2, 4),)) == {}


def test_pads_do_not_count_in_a_sentence_embedding() -> None:
    hidden = torch.randn(1, 4, 8)
    mask = torch.tensor([[1, 1, 0, 0]])
    assert torch.allclose(mean_pooled(hidden, mask), mean_pooled(hidden[:, :2], mask[:, :2]))


def test_embedding_cosines_take_the_mean_and_the_worst() -> None:
    def dense(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]]))

    def pruned(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]]),)

    ones = torch.ones(2, 1, dtype=torch.long)
    found = embedding_cosines(dense, pruned, [{"input_ids": ones, "attention_mask": ones}])
    assert found["passages"] == 2 and found["smallest_cosine"] == pytest.approx(math.sqrt(0.5))
    assert found["mean_cosine"] == pytest.approx((1 + math.sqrt(0.5)) / 2)


def test_the_demo_states_quality_beside_speed(tmp_path: Path) -> None:
    timings = Timings(seconds={"inductor": [0.2, 0.2], "dyncc": [0.1, 0.1]}, first={"inductor": 9.0, "dyncc": 8.0})
    flops = {"dense": 4 * 10**9, "now": 10**9}
    result = BenchResult("pruned", "evit", 2, "inductor", 2, timings, {"dyncc": {"cosine": 0.9}}, [], [], flops, {}, False, {})
    finding = Finding("an encoder", "256 tokens", result, {"passages": 8, "mean_cosine": 0.97, "smallest_cosine": 0.91})
    report, data = write_report(tmp_path / "out", [finding], {"threads": 2}, 12.0)
    row = "| an encoder | 256 tokens | 200.0 ms | 100.0 ms | 2.00 [2.00, 2.00] | 4.0 G -> 1.0 G | "
    assert row + "cosine 0.970 (worst 0.910) over 8 passages |" in report.read_text() and "threads 2" in report.read_text()
    assert '"mean_cosine": 0.97' in data.read_text()
    assert "2.00 [2.00," in summary([finding]) and "200.0 ms" in summary([finding])


def test_the_demo_says_when_a_side_failed() -> None:
    timings = Timings(seconds={"inductor": [0.2]}, first={"inductor": 9.0}, failures={"dyncc": "RuntimeError: no"})
    finding = Finding("a", "b", BenchResult("a", None, 1, "inductor", 1, timings, {}, [], [], {}, {}, False, {}))
    assert finding.row()[3:6] == ("failed", "-", "-")
