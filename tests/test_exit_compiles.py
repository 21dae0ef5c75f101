"""How often exit-early compiles: one graph for a model, in it one copy of the region for each bucket, whatever rows leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_exit_early import ENCODER, by_hand, optimized, spread
from tiny import inputs

import dyncc
from dyncc.ir import is_attention
from dyncc.passes.exit_scores import max_prob

BUCKETS = (2, 4)


def attentions(module: Any) -> int:
    """Attentions in a graph and in the bodies of its conditions."""
    graphs = [m.graph for m in module.modules() if isinstance(m, torch.fx.GraphModule)]
    return sum(is_attention(n) for graph in graphs for n in graph.nodes)


@torch.no_grad()
def test_a_region_is_there_once_for_each_bucket_and_once_for_all_rows() -> None:
    made = optimized(ENCODER.build(), inputs(ENCODER, 8), "layers=1,2 threshold=0.5 realise=compact buckets=2,4")
    assert attentions(made.program.module) == 2 + 2 * (len(BUCKETS) + 1)  # layers 0 and 1 for all; layers 2 and 3 are a region each


@pytest.mark.parametrize("engine", ["reference", pytest.param("inductor", marks=pytest.mark.full)])
@torch.no_grad()
def test_fifty_contents_of_a_batch_are_one_compilation(engine: str) -> None:
    torch._dynamo.reset()
    counters, before = torch._dynamo.utils.counters, len(dyncc.reports())
    counters.clear()
    threshold, buckets = spread(ENCODER.build(), inputs(ENCODER, 64)), set()
    short, model = ENCODER.build(), ENCODER.build()
    short.blocks = short.blocks[:2]
    text = f"exit-early{{layers=1 threshold={threshold} realise=compact buckets=2,4}}"
    fast = torch.compile(model, backend="dyncc", options={"passes": text, "engine": engine, "evidence": "off", "strict": True})
    for seed in range(50):
        (ids,) = inputs(ENCODER, 8, seed=seed)
        stay = int((max_prob(short(ids)) < threshold).sum())
        buckets.add(sum(stay > size for size in (0, *BUCKETS)))
        torch.testing.assert_close(fast(ids), by_hand(ENCODER, (ids,), (1,), "max-prob", threshold), rtol=1e-4, atol=1e-5)
    assert len(buckets) >= 3, "several buckets were taken"
    assert counters["stats"]["unique_graphs"] == len(dyncc.reports()) - before == 1 and not counters["recompiles"]
    torch._dynamo.reset()
