"""exit-early in Inductor and ONNX Runtime: conditions are taken and not taken, and nothing is compiled anew for other rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_exit_early import DECODER, ENCODER, by_hand, optimized, spread
from tiny import Tiny, dynamic, inputs

import dyncc
from dyncc.passes.exit_scores import max_prob


def sorted_rows(tiny: Tiny, threshold: float, count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that are sure behind layer 1, and rows that are not."""
    model, (ids,) = tiny.build(), inputs(tiny, count)
    model.blocks = model.blocks[:2]
    with torch.no_grad():
        sure = max_prob(model(ids)) >= threshold
    return ids[sure], ids[~sure]


def batches(tiny: Tiny, threshold: float, batch: int) -> dict[str, torch.Tensor]:
    """Batches in which every row leaves first, no row does, and some do."""
    sure, rest = sorted_rows(tiny, threshold)
    assert len(sure) >= batch and len(rest) >= batch
    mixed = torch.cat([rest[:1], sure[: batch - 1]]) if batch > 1 else rest[:1]
    return {"all": sure[:batch], "none": rest[:batch], "one stays": mixed}


@pytest.mark.parametrize(
    ("tiny", "layers", "buckets"),
    [
        (ENCODER, (1,), "2"), pytest.param(ENCODER, (1, 2), "2,4", marks=pytest.mark.full),
        pytest.param(DECODER, (1, 2), "2,4", marks=pytest.mark.full),
    ],
)  # fmt: skip
def test_onnx_takes_both_sides_of_each_condition(tmp_path: Path, tiny: Tiny, layers: tuple[int, ...], buckets: str) -> None:
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    threshold = spread(tiny.build(), inputs(tiny, 64))
    example = inputs(tiny, 8)
    text = f"layers={','.join(map(str, layers))} threshold={threshold} realise=compact buckets={buckets}"
    made = optimized(tiny.build(), example, text, dynamic_shapes=(dynamic(example)[0],))
    made.export_onnx(tmp_path / "exits.onnx")
    nodes = [n for f in _graphs(onnx.load(tmp_path / "exits.onnx").graph) for n in f.node]
    conditions = [n for n in nodes if n.op_type == "If"]
    assert len(conditions) == len(layers) * (1 + len(buckets.split(",")))  # a site: does any row stay, and do they fit each bucket
    assert any(n.op_type == "Gather" for n in nodes)
    session = ort.InferenceSession(tmp_path / "exits.onnx")
    name = session.get_inputs()[0].name
    for batch in (8, 3):
        for ids in batches(tiny, threshold, batch).values():
            found = torch.from_numpy(session.run(None, {name: ids.numpy()})[0])
            with torch.no_grad():
                torch.testing.assert_close(found, by_hand(tiny, (ids,), layers, "max-prob", threshold), rtol=1e-4, atol=1e-5)


def _graphs(graph: Any) -> list[Any]:
    inner = [a.g for n in graph.node for a in n.attribute if a.HasField("g")]
    return [graph, *(g for part in inner for g in _graphs(part))]


@pytest.mark.full
@pytest.mark.parametrize("engine", ["inductor", "onnxruntime"])
@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("realise", ["select", "cond", "compact"])
def test_engines_agree_whatever_rows_leave(engine: str, batch: int, realise: str) -> None:
    threshold = spread(ENCODER.build(), inputs(ENCODER, 64))
    made = optimized(ENCODER.build(), inputs(ENCODER, batch), f"layers=1,2 threshold={threshold} realise={realise}", engine=engine)
    assert made.report.engine == engine
    for ids in batches(ENCODER, threshold, batch).values():
        with torch.no_grad():
            torch.testing.assert_close(made(ids), by_hand(ENCODER, (ids,), (1, 2), "max-prob", threshold), rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_fifty_batches_compile_one_graph() -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    threshold = spread(ENCODER.build(), inputs(ENCODER, 64))
    made = optimized(ENCODER.build(), inputs(ENCODER, 8), f"layers=1 threshold={threshold} realise=compact buckets=2,4", engine="inductor")
    with torch.no_grad():
        made(*inputs(ENCODER, 8))
        before = counters["unique_graphs"]
        for seed in range(50):
            (ids,) = inputs(ENCODER, 8, seed=seed)
            torch.testing.assert_close(made(ids), by_hand(ENCODER, (ids,), (1,), "max-prob", threshold), rtol=1e-4, atol=1e-5)
    assert counters["unique_graphs"] == before


@pytest.mark.full
def test_torch_compile_takes_it_too() -> None:
    torch._dynamo.reset()
    threshold = spread(ENCODER.build(), inputs(ENCODER, 64))
    model = ENCODER.build()
    fast = torch.compile(model, backend="dyncc", options={"passes": f"exit-early{{layers=1,2 threshold={threshold}}}", "strict": True})
    with torch.no_grad():
        for ids in batches(ENCODER, threshold, 8).values():
            torch.testing.assert_close(fast(ids), by_hand(ENCODER, (ids,), (1, 2), "max-prob", threshold), rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_a_saved_model_still_leaves_early(tmp_path: Path) -> None:
    threshold = spread(ENCODER.build(), inputs(ENCODER, 64))
    made = optimized(ENCODER.build(), inputs(ENCODER, 8), f"layers=1,2 threshold={threshold} buckets=2,4")
    loaded = dyncc.load(made.save(tmp_path / "exits"))
    for ids in batches(ENCODER, threshold, 8).values():
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids), made(ids), rtol=1e-4, atol=1e-5)
