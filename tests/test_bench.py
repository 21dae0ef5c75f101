"""Statistics of paired timing, and what `bench` makes of variants that work and that fail."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

from dyncc import breakeven, evidence, timing
from dyncc.bench import Variant, bench
from dyncc.bench_result import BenchResult, rewrite_rows
from dyncc.errors import DynccUsageError
from dyncc.options import PEERS
from dyncc.timing import Timings, paired, paired_ratio


class Clock:
    """A clock that only moves when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def takes(self, seconds: float) -> Any:
        def call() -> None:
            self.now += seconds

        return call


class Small(torch.nn.Module):
    """A module with nothing for dyncc to rewrite."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x))


def test_ratio_of_known_times() -> None:
    ratio = paired_ratio([2.0, 4.0, 6.0, 8.0], [1.0, 2.0, 3.0, 4.0])
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 2.0)


def test_ratio_pairs_within_a_round() -> None:
    drifting = np.linspace(1.0, 50.0, 31)
    ratio = paired_ratio(list(1.5 * drifting), list(drifting))
    assert ratio.median == pytest.approx(1.5) and ratio.high - ratio.low < 1e-9


def test_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(100):
        baseline = 1.3 * rng.lognormal(0.0, 0.2, 21)
        ratio = paired_ratio(list(baseline), list(rng.lognormal(0.0, 0.2, 21)))
        covered += ratio.low <= 1.3 <= ratio.high
        assert ratio.low <= ratio.median <= ratio.high
    assert covered >= 88


def test_interval_narrows_with_more_pairs() -> None:
    rng = np.random.default_rng(3)
    noisy = [list(rng.lognormal(0.0, 0.3, 400)) for _ in range(2)]
    few, many = paired_ratio(noisy[0][:20], noisy[1][:20]), paired_ratio(*noisy)
    assert many.high - many.low < (few.high - few.low) / 2


def test_interval_is_deterministic() -> None:
    rng = np.random.default_rng(0)
    baseline, variant = rng.random(20) + 1, rng.random(20) + 1
    assert paired_ratio(list(baseline), list(variant)) == paired_ratio(list(baseline), list(variant))


@pytest.mark.parametrize(("baseline", "variant"), [([], []), ([1.0], [1.0, 2.0])])
def test_ratio_needs_pairs(baseline: list[float], variant: list[float]) -> None:
    with pytest.raises(ValueError, match="pairs are needed"):
        paired_ratio(baseline, variant)


def test_paired_interleaves_and_rotates() -> None:
    calls: list[str] = []
    paired({name: lambda name=name: calls.append(name) for name in "abc"}, pairs=4, warmup=1)
    assert "".join(calls) == "aabbcc" + "abc" + "bca" + "cab" + "abc"


def test_paired_measures_first_calls_and_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    steps = iter([9.0, 1.0, 1.0, 2.0, 2.0, 2.0])

    def compiled() -> None:
        clock.now += next(steps)

    timings = paired({"compiled": compiled, "plain": clock.takes(4.0)}, pairs=3, warmup=2)
    assert timings.first == {"compiled": 9.0, "plain": 4.0}
    assert timings.seconds == {"compiled": [2.0, 2.0, 2.0], "plain": [4.0, 4.0, 4.0]}
    assert timings.ratio("plain", "compiled").median == 2.0 and timings.median("plain") == 4.0


class Queue:
    """An accelerator in place of `torch.accelerator`: a call takes no time, what it queued is done when somebody waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self.queued, self.waits = Clock(monkeypatch), 0.0, 0
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "synchronize", self.wait)

    def wait(self) -> None:
        self.clock.now += self.queued
        self.queued, self.waits = 0.0, self.waits + 1

    def takes(self, seconds: float) -> Any:
        def call(*_: Any) -> tuple[()]:
            self.queued += seconds
            return ()

        return call


def test_what_an_accelerator_still_computes_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(monkeypatch)
    call = queue.takes(2.0)
    call.prepare = queue.takes(100.0)
    assert paired({"a": call, "b": queue.takes(3.0)}, pairs=2).seconds == {"a": [2.0, 2.0], "b": [3.0, 3.0]}
    assert timing.least_seconds({"a": queue.takes(2.0), "b": queue.takes(5.0)}) == {"a": 2.0, "b": 5.0}
    assert breakeven.paired_ratio(queue.takes(6.0), queue.takes(2.0), []) == 3.0
    assert evidence.run_isolated(queue.takes(7.0), [], False) == ([], 7.0)


def test_where_there_is_no_accelerator_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(monkeypatch)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert timing.seconds_of(queue.takes(2.0)) == 0.0 and queue.waits == 0


def test_prepare_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    call = clock.takes(1.0)
    call.prepare = clock.takes(100.0)
    assert paired({"a": call}, pairs=2).seconds == {"a": [1.0, 1.0]}


def test_a_failing_variant_is_left_out_and_named() -> None:
    def broken() -> None:
        raise RuntimeError("no such kernel\nsecond line")

    timings = paired({"broken": broken, "fine": lambda: None}, pairs=2)
    assert timings.failures == {"broken": "RuntimeError: no such kernel"}
    assert list(timings.seconds) == ["fine"] and list(timings.first) == ["fine"]


def test_a_usage_error_is_raised() -> None:
    def misused() -> None:
        raise DynccUsageError(problem="no such pass")

    with pytest.raises(DynccUsageError, match="no such pass"):
        paired({"dyncc": misused})


def test_what_a_backend_raised_is_named_without_its_wrapping() -> None:
    def compiled(error: Exception) -> None:
        wrapped = RuntimeError("backend='dyncc' raised:")
        wrapped.inner_exception = error  # type: ignore[attr-defined]
        raise wrapped

    timings = paired({"broken": lambda: compiled(KeyError("no such node"))})
    assert timings.failures == {"broken": "KeyError: 'no such node'"}
    with pytest.raises(DynccUsageError, match="layer 99"):
        paired({"dyncc": lambda: compiled(DynccUsageError(problem="layer 99 is out of range"))})


def test_paired_tells_its_progress() -> None:
    told: list[tuple[str, int, int]] = []
    paired({"a": lambda: None}, pairs=2, warmup=0, progress=lambda *step: told.append(step))
    assert told == [("first call: a", 0, 1), ("first call: a", 1, 1), ("pairs", 0, 2), ("pairs", 1, 2), ("pairs", 2, 2)]


def test_paired_needs_a_round() -> None:
    with pytest.raises(ValueError, match="at least one round"):
        paired({"a": lambda: None}, pairs=0)


@pytest.mark.parametrize("door", [1, 2])
def test_bench_compares_with_peers_and_reports_a_failing_one(door: int) -> None:
    told: list[str] = []
    result = bench(
        Small(),
        (torch.randn(4, 8),),
        pairs=3,
        against=("eager", "no-such-backend"),
        engine="reference",
        door=door,
        progress=lambda what, done, total: told.append(what),
    )
    assert set(result.ratios) == {"eager"} and result.ratios["eager"].low > 0
    assert "no-such-backend" in result.timings.failures["no-such-backend"]
    assert result.quality["dyncc"]["max_rel_error"] <= 1e-5 and result.quality["dyncc"]["cosine"] == pytest.approx(1.0)
    assert "first call: dyncc" in told and "pairs" in told
    assert json.loads(json.dumps(result.to_dict()))["ratios"]["eager"]["median"] == result.ratios["eager"].median
    for word in ("eager", "no-such-backend", "failed", "dyncc", "first call"):
        assert word in str(result)


def test_bench_knows_two_doors() -> None:
    with pytest.raises(ValueError, match="door=3"):
        bench(Small(), (torch.randn(4, 8),), door=3)


def test_a_mistake_in_the_pipeline_is_raised_before_anything_runs() -> None:
    with pytest.raises(DynccUsageError, match="prune-token"):
        bench(Small(), (torch.randn(4, 8),), passes="prune-token", pairs=1)


def test_an_unknown_engine_is_raised_before_anything_runs() -> None:
    with pytest.raises(DynccUsageError, match="inductr"):
        bench(Small(), (torch.randn(4, 8),), passes="", engine="inductr", pairs=1)


def test_own_time_is_a_share_of_inductors_first_call() -> None:
    result = _result(first={"inductor": 20.0, "dyncc": 25.0}, own={"capture": 2.0, "passes": 1.0, "evidence": 1.0, "lowering": 18.0})
    assert result.own_seconds == 4.0 and result.own_share == 0.2
    assert "dyncc's own time: 4.0 s = 20% of plain Inductor's first call" in str(result)


def test_own_share_needs_inductor() -> None:
    assert _result(first={"dyncc": 25.0}, own={"capture": 2.0}).own_share is None


def test_rewrites_are_shown_applied_or_refused() -> None:
    class Rewrite:
        def __init__(self, name: str, applied: bool, reason: str) -> None:
            self.name, self.applied, self.reason, self.found, self.expected, self.exact = name, applied, reason, 30, 30, True

    class Report:
        rewrites = (Rewrite("drop-repeat-kv", True, ""), Rewrite("slice-last-token", False, "every position is used"))

    text = str(_result(rewrites=rewrite_rows([Report()])))
    assert "drop-repeat-kv: applied 30 of 30" in text and "slice-last-token: refused: every position is used" in text


def _result(first: dict[str, float] | None = None, own: dict[str, float] | None = None, rewrites: Any = ()) -> BenchResult:
    first = first or {"inductor": 1.0, "dyncc": 1.0}
    timings = Timings(seconds={name: [1.0, 1.0] for name in first}, first=first)
    return BenchResult("a model", None, 1, "inductor", 2, timings, {}, list(rewrites), [], {"dense": 2 * 10**9}, own or {}, False, {})


def test_first_calls_find_no_work_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("DYNCC_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    seen: list[tuple[str | None, str | None]] = []

    def build() -> Any:
        seen.append((os.environ.get("DYNCC_CACHE_DIR"), os.environ.get("TORCHINDUCTOR_CACHE_DIR")))
        return lambda: None

    variant = Variant(build, (), {})
    variant()
    variant()
    (ours, inductors), *again = seen
    assert not again and ours != str(tmp_path) and inductors != str(tmp_path)
    assert os.environ["DYNCC_CACHE_DIR"] == os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)


# peers
@pytest.fixture(scope="module")
def peers_result() -> BenchResult:
    """A decoder of transformers and a plain module's input, all peers side by side."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()
    ids = torch.arange(8)[None]
    named = {"input_ids": ids, "use_cache": False}
    return bench(model, (), named, passes="", engine="reference", pairs=2, warmup=0, against=PEERS, evidence="off")


@pytest.mark.full
def test_every_peer_runs_the_same_model_in_one_run(peers_result: BenchResult) -> None:
    installed = [name for name in PEERS if name != "openvino" or find_spec("openvino")]
    assert set(peers_result.timings.seconds) >= {*installed, "dyncc"}, peers_result.timings.failures
    assert all(peers_result.quality[name]["max_rel_error"] < 1e-4 for name in installed if name != "eager")


def test_a_peer_that_cannot_run_the_model_is_a_failure_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    against = ("transformers-onnx", "openvino")
    result = bench(Small(), (torch.randn(2, 8),), passes="", engine="reference", pairs=2, warmup=0, against=against, evidence="off")
    assert list(result.timings.seconds) == ["dyncc"]
    assert "exports models of transformers only, not a Small" in result.timings.failures["transformers-onnx"]
    assert "pip install openvino" in result.timings.failures["openvino"]
    assert "pip install openvino" in str(result)
