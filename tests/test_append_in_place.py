"""append-in-place: what a graph that owns its cache gives is the concatenation, and no two continuations of one past see each other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import onnx
import pytest
import torch
from hypothesis import given, settings
from test_kv_cache import VOCABULARY, prompt, tiny_llama
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

import dyncc
from dyncc.kernels.append_rows import APPEND, ROOM, capacity
from dyncc.kernels.append_rows.buffers import _marks
from dyncc.own_ops import EXPORTED, spelled_out

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "no_grad")

PASS = "append-in-place"


def rows(count: int, seed: int = 0, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, count, 4, generator=torch.Generator().manual_seed(seed))


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "crop": lambda t: t[:, :, : max(1, t.shape[2] - 3)],
    "reorder": lambda t: t.index_select(0, torch.tensor([1, 0])),
    "tail": lambda t: t[:, :, 1:],
    "clone": lambda t: t.clone(),
    "deepcopy": copy.deepcopy,
    "fewer heads": lambda t: torch.cat([t[:, :2], t[:, 1:2]], 1),
    "same": lambda t: t,
}


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(CHANGES)), st.integers(0, 9), st.sampled_from([1, 2, 300, 600])), max_size=12))
def test_any_order_of_continuations_is_concatenation(steps: list[tuple[str, int, int]]) -> None:
    """Any result so far, changed in some way, is gone on with; all that was ever handed out stays as it was."""
    handed = [(rows(2), rows(2))]
    for seed, (change, at, count) in enumerate(steps):
        past, then = (CHANGES[change](t) for t in handed[at % len(handed)])
        new = rows(count, seed)
        handed.append((APPEND(past, new), torch.cat([then, new], 2)))
    assert all(torch.equal(found, then) for found, then in handed)


def test_one_past_goes_on_in_place_until_its_buffer_is_full_and_only_once() -> None:
    first = APPEND(rows(5), rows(1))
    second, other = APPEND(first, rows(1, 1)), APPEND(first, rows(1, 2))
    assert second.data_ptr() == first.data_ptr() != other.data_ptr()
    full = APPEND(second, rows(ROOM - 7, 3))
    assert full.data_ptr() == first.data_ptr() and full.shape[2] == ROOM
    grown = APPEND(full, rows(1, 4))
    assert grown.data_ptr() != first.data_ptr() and grown.stride(1) == capacity(ROOM + 1) * 4
    assert torch.equal(grown[:, :, :ROOM], full) and torch.equal(full[:, :, :7], second) and torch.equal(other[:, :, :6], first)


def test_threads_that_go_on_from_one_past_do_not_meet() -> None:
    past = APPEND(rows(5), rows(1))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: APPEND(past, rows(1, seed)), range(8)))
    for seed, one in enumerate(found):
        assert torch.equal(one, torch.cat([past, rows(1, seed)], 2))
    assert sum(one.data_ptr() == past.data_ptr() for one in found) == 1


def test_no_cuda_graph_records_it() -> None:
    assert torch.Tag.cudagraph_unsafe in APPEND.tags


@pytest.mark.parametrize("part", [slice(0, 1), slice(1, 2)])
def test_a_part_of_the_batch_does_not_go_on_in_the_buffer_of_all(part: slice) -> None:
    whole = APPEND(rows(5), rows(1))
    alone = APPEND(whole[part], rows(1, 1, batch=1))
    assert alone.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr() and torch.equal(alone[:, :, :6], whole[part])


def test_memory_of_inference_mode_is_left_when_that_mode_ends() -> None:
    with torch.inference_mode():
        past = APPEND(rows(5), rows(1))
    assert torch.equal(APPEND(past, rows(1, 1)), torch.cat([past, rows(1, 1)], 2))


def test_other_numbers_in_the_same_memory_are_no_past_of_it() -> None:
    past = APPEND(rows(5), rows(1))
    whole = past.view(torch.int32)
    assert torch.equal(APPEND(whole, torch.ones_like(whole[:, :, :1]))[:, :, :6], whole)


def test_marks_go_with_their_memory() -> None:
    known = len(_marks)
    for seed in range(5):
        APPEND(rows(3, seed), rows(1))
    assert len(_marks) <= known + 1


def test_fake_values_have_the_strides_of_real_ones() -> None:
    for count in (1, ROOM - 5, ROOM):
        torch.library.opcheck(APPEND, (rows(5), rows(count)), test_utils=("test_faketensor",))


def compiled(model: Any, engine: str = "reference") -> Any:
    return torch.compile(model, backend="dyncc", options={"engine": engine, "passes": PASS})


def logits(run: Any, ids: Tensor, cache: Any) -> Tensor:
    found: Tensor = run(input_ids=ids, past_key_values=cache).logits
    return found


def applied(reports: list[Any]) -> list[bool]:
    assert not any(r.fallback for r in reports)
    return [r.applied for report in reports for r in report.rewrites if r.name == PASS]


def continued(engine: str, steps: int) -> None:
    model, ids = tiny_llama(), prompt(2, 7)["input_ids"]
    run, ours, theirs, known, kept = compiled(model, engine), DynamicCache(), DynamicCache(), len(dyncc.reports()), 0
    token = ids
    for _ in range(steps):
        before = ours.layers[0].keys.data_ptr() if ours.layers else 0
        expected = logits(model, token, theirs)
        torch.testing.assert_close(logits(run, token, ours), expected, rtol=1e-4, atol=1e-5)
        kept += ours.layers[0].keys.data_ptr() == before
        token = expected[:, -1:].argmax(-1)
    for layer, then in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close(layer.keys, then.keys)
        torch.testing.assert_close(layer.values, then.values)
    reports = dyncc.reports()[known:]
    assert applied(reports) == [False] + [True] * (len(reports) - 1) and len(reports) <= 4
    assert kept >= steps - 1 - len(reports)  # a compilation tries its graph on the past, which moves once then


@pytest.mark.full
@pytest.mark.parametrize("engine", ["reference", "inductor"])
def test_fifty_steps_of_a_cache_that_the_graph_owns(engine: str) -> None:
    continued(engine, 50)


@pytest.mark.full
@pytest.mark.parametrize("engine", ["reference", "inductor"])
def test_branches_crops_and_reorders_of_one_past(engine: str) -> None:
    """Each of several continuations gives what it gives alone: two branches that take turns, one that goes back and tries again."""
    model, ids = tiny_llama(), prompt(2, 9)["input_ids"]
    run, turn = compiled(model, engine), torch.tensor([1, 0])
    tails = torch.randint(1, VOCABULARY, (3, 2, 5), generator=torch.Generator().manual_seed(5))
    base = DynamicCache()
    logits(run, ids, base)
    logits(run, ids[:, :1], base)
    caches = [base, copy.deepcopy(base), shallow(base)]
    texts = [torch.cat([ids, ids[:, :1]], 1)] * 3
    for step in range(5):
        for which, cache in enumerate(caches):
            if step == 3 and which == 1:
                cache.reorder_cache(turn)
                texts[1] = texts[1][turn]
            if step == 3 and which == 2:
                cache.crop(-2)
                texts[2] = texts[2][:, :-2]
            token = tails[which][:, step : step + 1]
            found = logits(run, token, cache)
            texts[which] = torch.cat([texts[which], token], 1)
            torch.testing.assert_close(found[:, -1], logits(model, texts[which], DynamicCache())[:, -1], rtol=1e-4, atol=1e-5)


def shallow(cache: DynamicCache) -> DynamicCache:
    """Another cache of the very same tensors."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


@pytest.mark.full
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}])
def test_generate_gives_the_dense_tokens(how: dict[str, Any]) -> None:
    model, options = tiny_llama(), {**prompt(2, pads=3), "max_new_tokens": 20, "do_sample": False, **how}
    expected, known = model.generate(**options), len(dyncc.reports())
    model.compile(backend="dyncc", options={"engine": "reference", "passes": PASS})
    assert torch.equal(model.generate(**options), expected)
    assert any(applied(dyncc.reports()[known:]))


class Step(nn.Module):
    """A decoding step that takes and returns its keys; `edit` does something to each behind the concatenation."""

    def __init__(self, edit: Callable[[Tensor], Any] = lambda k: None, join: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.project, self.edit = nn.Linear(8, 24), edit
        self.join = join or (lambda past, new: torch.cat([past, new], 2))

    def forward(self, x: Tensor, past_k: Tensor, past_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (t.unflatten(2, (2, 4)).transpose(1, 2) for t in self.project(x).chunk(3, 2))
        k, v = self.join(past_k, k), self.join(past_v, v)
        for t in (k, v):
            self.edit(t)
        return F.scaled_dot_product_attention(q.to(k.dtype), k, v), k, v


def step_inputs(past: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(2)
    x, k, v = (torch.randn(*size, generator=draw) for size in ((1, 1, 8), (1, 2, past, 4), (1, 2, past, 4)))
    return x, k.to(dtype), v.to(dtype)


def optimized(step: Step, inputs: tuple[Tensor, ...]) -> Any:
    grows = {2: torch.export.Dim.DYNAMIC}
    return dyncc.optimize(step.eval(), inputs, passes=PASS, engine="reference", evidence="numeric", dynamic_shapes=({}, grows, grows))


def test_a_step_that_takes_and_returns_its_keys_appends_to_them() -> None:
    step, (x, k, v) = Step(), step_inputs()
    made = optimized(step, (x, k, v))
    assert [r.found for r in made.report.rewrites if r.applied] == [2]
    _, k1, v1 = made(x, k, v)
    ptr = k1.data_ptr()
    for count in range(3):
        found, then = made(x + count, k1, v1), step(x + count, k1.clone(), v1.clone())
        for a, b in zip(found, then, strict=True):
            torch.testing.assert_close(a, b)
        _, k1, v1 = found
        assert k1.data_ptr() == ptr


def _zero(k: Tensor) -> None:
    k[:, :, 0].zero_()


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (Step(edit=_zero), "rows into which the graph writes"),
        (Step(join=lambda past, new: torch.cat([new, past], 2)), "does not begin with a past that the graph takes"),
        (Step(join=lambda past, new: torch.cat([past, new, new], 2)), "does not join two parts"),
        (Step(join=lambda past, new: torch.cat([past * 2, new], 2)), "does not begin with a past that the graph takes"),
        (Step(join=lambda past, new: new), "no attention reads a concatenation of a past"),
    ],
)
def test_what_is_no_past_of_the_graphs_own_is_left_alone(step: Step, words: str) -> None:
    inputs = step_inputs()
    made = optimized(step, inputs)
    (told,) = [r for r in made.report.rewrites if r.name == PASS]
    assert not told.applied and words in told.reason
    for a, b in zip(made(*inputs), step(*inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_keys_of_two_dtypes_are_left_alone() -> None:
    made = optimized(Step(), step_inputs(dtype=torch.float64))
    (told,) = [r for r in made.report.rewrites if r.name == PASS]
    assert not told.applied and "joins keys of two kinds (torch.float64 and torch.float32)" in told.reason


@pytest.mark.full
def test_what_is_exported_or_saved_concatenates(tmp_path: Path) -> None:
    step, inputs = Step(), step_inputs()
    made = optimized(step, inputs)
    assert any(n.target is APPEND for n in made._outcome.program.graph.nodes)
    assert not any(n.target is APPEND for n in spelled_out(made._outcome.program, EXPORTED).graph.nodes)
    written = onnx.load(made.export_onnx(tmp_path / "step.onnx").path)
    assert {n.domain for n in written.graph.node} <= {"", "com.microsoft"} and "Concat" in {n.op_type for n in written.graph.node}
    made.save(tmp_path / "step")
    for a, b in zip(dyncc.load(tmp_path / "step")(*inputs), step(*inputs), strict=True):
        torch.testing.assert_close(a, b)
