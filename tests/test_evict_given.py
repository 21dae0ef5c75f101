"""evict-kv with trained weights from a file (LookaheadKV, TRIM-KV, Attention-Gate): what they compute, and files that are not taken."""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from test_evict_ahead import scored
from test_evict_kv import MaskedForm, compiled, conversation, read
from test_kv_cache import VOCABULARY, prompt, tiny_llama
from test_onnx import GROUPS, HEADS, LAYERS, WIDTH, decoder
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

import dyncc
from dyncc.errors import BadCachePasses, BadOptionValue, BadWeightFile, BadWeights, CacheNotServed, OutputNotWritable
from dyncc.pipeline import build

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "no_grad")

C = HEADS * WIDTH


def drawn(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def gates(seed: int = 5, bias: float = 2.0) -> list[tuple[Tensor, Tensor, Tensor]]:
    made = [(drawn(6, C, seed=seed + i), drawn(GROUPS, 6, seed=seed + 9 + i)) for i in range(LAYERS)]
    return [(inner, outer, torch.full((GROUPS,), bias)) for inner, outer in made]


def attention_gates(seed: int = 5, rank: int = 6) -> list[tuple[Tensor, ...]]:
    parts = [[drawn(rank, C, seed=seed + 7 * i + j) / 4 for j in range(3)] for i in range(LAYERS)]
    return [(*qkv, drawn(GROUPS, rank, seed=seed + i), drawn(GROUPS, seed=seed + i)) for i, qkv in enumerate(parts)]


def adapters(names: list[str], seed: int = 3, size: float = 0.3) -> dict[str, tuple[Tensor, Tensor]]:
    modules = dict(tiny_llama().named_modules())
    sizes = {name: modules[name].weight.shape for name in names}
    return {name: (drawn(2, s[1], seed=seed) * size, drawn(s[0], 2, seed=seed + 1) * size) for name, s in sizes.items()}


def every_linear() -> list[str]:
    return [name for name, m in tiny_llama().named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.mark.full
def test_rows_that_are_the_prompts_own_embeddings_and_adapters_of_nothing_are_dapq(folder: Path) -> None:
    model, (ids, mask) = tiny_llama(), conversation((16,), pads=0, batch=1)[0]
    rows = model.get_input_embeddings()(ids[0, -4:])
    file = dyncc.save_lookahead(model, rows, folder / "plain", adapters(every_linear(), size=0.0), scale=4.0)
    found = scored(model, ids, mask, f"lookaheadkv{{file={file}}}")
    torch._dynamo.reset()
    for a, b in zip(found, scored(model, ids, mask, "dapq{window=4}"), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.full
def test_rows_and_adapters_are_those_of_a_model_that_holds_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Selective: the prompt's own rows go through the plain weights, keys and values stay bit by bit."""
    model, (ids, mask) = tiny_llama(), conversation((16,))[0]
    rows, low = drawn(5, C), adapters(every_linear())
    file = dyncc.save_lookahead(model, rows, folder / "whole", low, scale=2.0)
    cache, plain = dyncc.KVCache(f"lookaheadkv{{file={file}}}"), dyncc.KVCache()
    run = compiled(model)
    assert torch.equal(read(run, cache, ids, mask), read(run, plain, ids, mask))
    other, layers = tiny_llama(), list[Tensor]()
    for name, (down, up) in low.items():
        other.get_submodule(name).register_forward_hook(_on_last(5, down, up, 2.0))
    sdpa = F.scaled_dot_product_attention

    def note(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, **more: Any) -> Tensor:
        k, v = (t.repeat_interleave(HEADS // t.shape[1], 1) for t in (k, v))
        logits = (q @ k.transpose(2, 3) * WIDTH**-0.5).masked_fill(~attn_mask, -torch.inf)
        layers.append(torch.softmax(logits, -1)[:, :, -5:, :16].reshape(2, GROUPS, -1, 16).sum(2))
        return sdpa(q, k, v, attn_mask=attn_mask)

    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", note)
        embedded = torch.cat([other.get_input_embeddings()(ids), rows.expand(2, -1, -1)], 1)
        other(inputs_embeds=embedded, attention_mask=torch.cat([mask, torch.ones_like(mask[:, :5])], 1))
    for layer, then, own in zip(cache.layers, layers, plain.layers, strict=True):
        assert torch.equal(layer.keys, own.keys) and torch.equal(layer.values, own.values)
        torch.testing.assert_close(layer.scores[0, :, 3:], then[0, :, 3:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.scores[1], then[1], rtol=1e-4, atol=1e-5)
        assert (layer.scores.clamp(min=0).sum((1, 2)) < HEADS * 5).all()


def _on_last(rows: int, down: Tensor, up: Tensor, scale: float) -> Callable[..., Tensor]:
    def hook(module: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        last = scale * args[0][:, -rows:] @ down.T @ up.T
        return torch.cat([out[:, :-rows], out[:, -rows:] + last], 1)

    return hook


class FadingForm(MaskedForm):
    """The masked form by ages: what each gate says of a token is noted by hooks in the model itself."""

    def __init__(self, policy: Any, model: Any, made: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        super().__init__(policy)
        self.fresh: list[Any] = [None] * LAYERS
        for number, gate in enumerate(made):
            model.model.layers[number].self_attn.k_proj.register_forward_pre_hook(self.hook(number, *gate))

    def hook(self, number: int, inner: Tensor, outer: Tensor, bias: Tensor) -> Callable[..., None]:
        def note(module: Any, args: tuple[Tensor, ...]) -> None:
            x, (a, b, c) = args[0].numpy().astype(np.float64), (t.numpy().astype(np.float64) for t in (inner, outer, bias))
            hidden = x @ a.T
            self.fresh[number] = np.swapaxes(-np.log1p(np.exp(-(hidden / (1 + np.exp(-hidden)) @ b.T + c))), 1, 2)

        return note

    def earned(self, scores: Any, probabilities: Any, seen: Any) -> Any:
        rows = probabilities.shape[2]
        scores[..., scores.shape[2] - rows :] = self.fresh[(self.calls - 1) % LAYERS]
        return scores

    def drop(self, held: Any, scores: Any, visible: Any) -> Any:
        ages = held.shape[2] - np.arange(held.shape[2])
        return super().drop(held, ages * scores + 1e6, visible)


@pytest.mark.full
@pytest.mark.parametrize("bias", [2.0, -1.0])
def test_keys_fade_as_in_the_masked_form(folder: Path, bias: float, monkeypatch: pytest.MonkeyPatch) -> None:
    file = dyncc.save_gates(tiny_llama(), gates(bias=bias), folder / "gates")
    recipe, calls, model = f"trim-kv{{budget=8 every=3 file={file}}}", conversation((16, *[1] * 6)), tiny_llama()
    form, plain, dense, expected = FadingForm(build(recipe)[0], model, gates(bias=bias)), DynamicCache(), DynamicCache(), list[Tensor]()
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", form)
        expected += [read(model, plain, ids, mask) for ids, mask in calls]
    run, cache, apart = compiled(tiny_llama()), dyncc.KVCache(recipe), 0.0
    for (ids, mask), then in zip(calls, expected, strict=True):
        torch.testing.assert_close(read(run, cache, ids, mask)[:, -1], then[:, -1], rtol=1e-4, atol=1e-5)
        apart = max(apart, (read(model, dense, ids, mask)[:, -1] - then[:, -1]).abs().max().item())
    assert apart > 1e-3
    assert all(layer.store.length == 9 + 2 for layer in cache.layers)


class GatedForm(MaskedForm):
    """The masked form by gates that look at all the rows of a call: NumPy on what hooks note in the model itself."""

    def __init__(self, policy: Any, model: Any, made: list[tuple[Tensor, ...]], heads: int) -> None:
        super().__init__(policy)
        self.gates, self.heads, self.rows = [[t.numpy().astype(np.float64) for t in gate] for gate in made], heads, np.zeros(0)
        for layer in model.model.layers:
            layer.self_attn.k_proj.register_forward_pre_hook(self.note)

    def note(self, module: Any, args: tuple[Tensor, ...]) -> None:
        self.rows = args[0].numpy().astype(np.float64)

    def earned(self, scores: Any, probabilities: Any, seen: Any) -> Any:
        batch, rows, _ = self.rows.shape
        *qkv, outer, bias = self.gates[(self.calls - 1) % LAYERS]
        q, k, v = (np.swapaxes((self.rows @ w.T).reshape(batch, rows, self.heads, -1), 1, 2) for w in qkv)
        logits = q @ np.swapaxes(k, 2, 3) / q.shape[3] ** 0.5
        weights = np.exp(logits) * seen[:, None, -1:, seen.shape[2] - rows :]
        mixed = np.swapaxes(weights / weights.sum(3, keepdims=True) @ v, 1, 2).reshape(batch, rows, -1)
        scores[..., scores.shape[2] - rows :] = np.swapaxes(1 / (1 + np.exp(-(mixed @ outer.T + bias))), 1, 2)
        return scores


@pytest.mark.full
@pytest.mark.parametrize("chunks", [(16,), (9, 7)])
@pytest.mark.parametrize("heads", [1, 3])
def test_gates_look_at_the_whole_prompt_as_in_the_masked_form(
    folder: Path, chunks: tuple[int, ...], heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = dyncc.save_attention_gates(tiny_llama(), attention_gates(), folder / "looks", heads)
    recipe, calls, model = f"attention-gate{{budget=8 file={file}}}", conversation((*chunks, *[1] * 6)), tiny_llama()
    form, expected = GatedForm(build(recipe)[0], model, attention_gates(), heads), list[Tensor]()
    plain, dense = DynamicCache(), DynamicCache()
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", form)
        expected += [read(model, plain, ids, mask) for ids, mask in calls]
    run, cache, apart = compiled(tiny_llama()), dyncc.KVCache(recipe), 0.0
    for (ids, mask), then in zip(calls, expected, strict=True):
        torch.testing.assert_close(read(run, cache, ids, mask)[:, -1], then[:, -1], rtol=1e-4, atol=1e-5)
        apart = max(apart, (read(model, dense, ids, mask)[:, -1] - then[:, -1]).abs().max().item())
    assert apart > 1e-3
    assert all(layer.store.length == 8 + 6 for layer in cache.layers)


def test_open_gates_are_a_tie_and_the_newest_key_always_stays() -> None:
    policy = build("evict-kv{budget=4 score=gate recents=1}")[0]
    assert policy.choose(torch.ones(1, 2, 9)).tolist() == [[[0, 1, 2, 8]] * 2]
    shut = torch.tensor([[[0.1, 0.9, 0.2, 0.8, 0.7, 0.0]]])
    assert policy.choose(shut).tolist() == [[[1, 3, 4, 5]]]
    shut[:, :, 1] = -1.0  # a pad
    assert policy.choose(shut).tolist() == [[[2, 3, 4, 5]]]


def test_equal_gates_keep_the_newest_keys_and_full_ones_keep_everything_equally() -> None:
    policy = build("evict-kv{budget=5 score=fade recents=0 every=1}")[0]
    ages = torch.arange(9, 0, -1).expand(1, 2, 9)
    for fade in (0.5, 1e-6):
        assert policy.choose(torch.full((1, 2, 9), fade), ages=ages).tolist() == [[[4, 5, 6, 7, 8]] * 2]
    assert policy.choose(torch.zeros(1, 2, 9), ages=ages).tolist() == [[[0, 1, 2, 3, 4]] * 2]  # a tie: the first ones
    pads = torch.zeros(1, 2, 9)
    pads[:, :, :2] = -1.0
    assert policy.choose(pads, ages=ages).tolist() == [[[2, 3, 4, 5, 6]] * 2]


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.floats(0, 2, width=32), st.integers(1, 30)), min_size=2, max_size=2))
def test_of_two_keys_the_better_one_changes_once_at_most(keys: list[tuple[float, int]]) -> None:
    policy = build("evict-kv{budget=1 score=fade recents=0 every=1}")[0]
    fades, ages = (torch.tensor([[column]]) for column in zip(*keys, strict=True))
    kept = [policy.choose(fades, ages=ages + later).item() for later in range(40)]
    assert sum(a != b for a, b in itertools.pairwise(kept)) <= 1


@pytest.mark.full
def test_a_budget_of_all_keys_is_the_dense_model(folder: Path) -> None:
    model = tiny_llama()
    lookahead = dyncc.save_lookahead(model, drawn(3, C), folder / "rows", adapters(every_linear()))
    retention = dyncc.save_gates(model, gates(), folder / "all")
    looks = dyncc.save_attention_gates(model, attention_gates(), folder / "open")
    recipes = f"trim-kv{{budget=64 every=1 file={retention}}}", f"lookaheadkv{{budget=64 file={lookahead}}}"
    for recipe in (*recipes, f"attention-gate{{file={looks}}}"):
        torch._dynamo.reset()
        run, cache, plain = compiled(model), dyncc.KVCache(recipe), dyncc.KVCache()
        for ids, mask in conversation((14, 1, 1)):
            assert torch.equal(read(run, cache, ids, mask), read(run, plain, ids, mask))


def refused(text: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        dyncc.KVCache(text)


def test_files_that_are_not_taken(folder: Path) -> None:
    model = tiny_llama()
    file = dyncc.save_gates(model, gates(), folder / "good")
    rows = dyncc.save_lookahead(model, drawn(3, C), folder / "rows2")
    refused("trim-kv", BadOptionValue, "score=fade needs the file that dyncc.save_gates wrote")
    refused(f"trim-kv{{file={folder / 'none'}}}", BadWeightFile, "there is no such file; dyncc.save_gates writes such files")
    refused(f"trim-kv{{file={rows}}}", BadWeightFile, "it is no file of retention gates of this version")
    refused(f"lookaheadkv{{file={file}}}", BadWeightFile, "it is no file of lookahead rows of this version; dyncc.save_lookahead")
    damaged = Path(shutil.copy(file, folder / "damaged"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x07")
    refused(f"trim-kv{{file={damaged}}}", BadWeightFile, "it is damaged: its numbers do not give its checksum")
    damaged.write_bytes(file.read_bytes()[:-9])
    refused(f"trim-kv{{file={damaged}}}", BadWeightFile, "it cannot be read")
    refused(f"h2o{{file={file}}}", BadOptionValue, "score=received needs no trained weights")
    refused(f"trim-kv{{every=0 file={file}}}", BadOptionValue, "every=1 or more")
    refused("attention-gate", BadOptionValue, "score=gate needs the file that dyncc.save_attention_gates wrote")
    refused(f"attention-gate{{file={file}}}", BadWeightFile, "it is no file of attention gates of this version; dyncc.save_attention_gates")
    refused(f"attention-gate{{every=1 file={file}}}", BadOptionValue, "score=gate looks once")
    refused("dapq{every=1}", BadOptionValue, "looks once, when the prompt ends")
    refused("promptdistill{layers=1 keep=2000} dapq", BadCachePasses, "scores keys by all rows of the prompt")
    assert dyncc.KVCache(f"trim-kv{{file={file}}} quest") is not None


@pytest.mark.full
def test_files_of_another_model_are_not_taken(folder: Path) -> None:
    ids, other = conversation((12,), pads=0)[0][0], decoder(num_hidden_layers=1)
    few, own = [(a[:, :8], b, c) for a, b, c in gates()], tiny_llama()
    wrong = {
        "it belongs to another model, or to other weights": dyncc.save_gates(other, gates(), folder / "other"),
        f"it holds 1 gates, the graph has {LAYERS} attentions": dyncc.save_gates(own, gates()[:1], folder / "one"),
        f"its gates are for width 8 and {GROUPS} key heads, the graph has {C} and": dyncc.save_gates(own, few, folder / "few"),
    }
    for words, file in wrong.items():
        torch._dynamo.reset()
        with pytest.raises(BadWeightFile, match=words):
            read(compiled(tiny_llama()), dyncc.KVCache(f"trim-kv{{file={file}}}"), ids)
    less = [(*(t[:, :8] for t in gate[:3]), *gate[3:]) for gate in attention_gates()]
    file = dyncc.save_attention_gates(own, less, folder / "less")
    torch._dynamo.reset()
    with pytest.raises(BadWeightFile, match=f"its gates are for width 8 and {GROUPS} key heads.*dyncc.save_attention_gates"):
        read(compiled(tiny_llama()), dyncc.KVCache(f"attention-gate{{file={file}}}"), ids)
    narrow = dyncc.save_lookahead(tiny_llama(), drawn(3, 8), folder / "narrow")
    torch._dynamo.reset()
    with pytest.raises(CacheNotServed, match=r"the rows given are \[3, 8\]"):
        read(compiled(tiny_llama()), dyncc.KVCache(f"lookaheadkv{{file={narrow}}}"), ids)


def test_weights_that_do_not_fit_are_not_saved(folder: Path) -> None:
    model, name = tiny_llama(), "model.layers.0.mlp.up_proj"
    down, up = adapters([name])[name]
    inner, outer, bias = gates()[0]
    for words, call in {
        "embeddings .rows, width. are wanted": lambda: dyncc.save_lookahead(model, drawn(3), folder / "x"),
        "no linear layer named 'nose'": lambda: dyncc.save_lookahead(model, drawn(3, C), folder / "x", {"nose": (down, up)}),
        "does not add to its weight": lambda: dyncc.save_lookahead(model, drawn(3, C), folder / "x", {name: (up, down)}),
        "gate 0 is": lambda: dyncc.save_gates(model, [(inner, outer.T, bias)], folder / "x"),
        "no gate is given": lambda: dyncc.save_gates(model, [], folder / "x"),
        "gate 0 is .* in 4 heads": lambda: dyncc.save_attention_gates(model, attention_gates(), folder / "x", heads=4),
        "gate 1 is": lambda: dyncc.save_attention_gates(model, [attention_gates()[0], gates()[1]], folder / "x"),
        "gate 0 is  in 1 heads": lambda: dyncc.save_attention_gates(model, [()], folder / "x"),
        "no gate is giv": lambda: dyncc.save_attention_gates(model, [], folder / "x"),
    }.items():
        with pytest.raises(BadWeights, match=words):
            call()
    with pytest.raises(OutputNotWritable):
        dyncc.save_gates(model, gates(), folder / "missing" / "x")


@pytest.fixture
def recipe(request: pytest.FixtureRequest, folder: Path) -> str:
    """A recipe by name, its file made for the small decoder."""
    model, low = tiny_llama(), adapters(every_linear())
    return {
        "dapq": lambda: "dapq{budget=12 window=4}",
        "lookaheadkv": lambda: f"lookaheadkv{{budget=12 file={dyncc.save_lookahead(model, drawn(3, C), folder / 'r', low)}}}",
        "attention-gate": lambda: (
            f"attention-gate{{budget=12 file={dyncc.save_attention_gates(model, attention_gates(), folder / 'a', heads=2)}}}"
        ),
        "trim-kv": lambda: f"trim-kv{{budget=12 every=4 file={dyncc.save_gates(model, gates(), folder / 'g')}}}",
    }[request.param]()


each = pytest.mark.parametrize("recipe", ["dapq", "lookaheadkv", "trim-kv", "attention-gate"], indirect=True)


@pytest.mark.full
@each
def test_generation_holds_the_budget_with_beams_too(recipe: str) -> None:
    model, given, policy = tiny_llama(), prompt(2, 24, pads=3), build(recipe)[0]
    before = len(dyncc.reports())
    model.compile(backend="dyncc", options={"engine": "reference"})
    for beams in (1, 2):
        cache = dyncc.KVCache(recipe)
        model.generate(**given, max_new_tokens=12, do_sample=False, num_beams=beams, past_key_values=cache)
        held = policy.budget + (policy.every or 11)
        for layer in cache.layers:
            assert layer.get_seq_length() == 35 and policy.budget <= layer.store.length <= held
    reports = dyncc.reports()[before:]
    assert reports and not any(r.fallback for r in reports)


@pytest.mark.full
@each
@torch._dynamo.config.patch(recompile_limit=16)
def test_sequences_do_not_leak_copies_go_on_apart_and_a_reset_forgets(recipe: str) -> None:
    """Copies, caches after a reset and steps that drop keys are graphs of their own: together more than Dynamo's 8."""
    run, alone, a = compiled(tiny_llama()), list[Tensor](), dyncc.KVCache(recipe)
    calls = [ids.clone() for ids, _ in conversation((16, *[1] * 5), pads=0, batch=1)]
    for ids in calls:
        alone.append(read(run, a, ids)[:, -1])
    a.reset()
    b = dyncc.KVCache(recipe)
    for number, (ids, then) in enumerate(zip(calls, alone, strict=True)):
        if number == 2:
            c = copy.copy(a)
        torch.testing.assert_close(read(run, a, ids)[:, -1], then)
        read(run, b, (ids + 7) % VOCABULARY)
    for ids, then in zip(calls[2:], alone[2:], strict=True):
        torch.testing.assert_close(read(run, c, ids)[:, -1], then)


@pytest.mark.full
@each
def test_another_order_of_the_batch_takes_everything_along(recipe: str) -> None:
    """Swapped rows go on as they would have gone on unswapped."""
    run, (a, b), swap = compiled(tiny_llama()), (dyncc.KVCache(recipe) for _ in range(2)), torch.tensor([1, 0])
    calls = [ids.clone() for ids, _ in conversation((16, *[1] * 5), pads=0)]
    for number, ids in enumerate(calls):
        if number in (1, 3):
            b.reorder_cache(swap)
        swapped = number in (1, 2)
        found = read(run, b, ids[swap] if swapped else ids)[:, -1]
        torch.testing.assert_close(found[swap] if swapped else found, read(run, a, ids)[:, -1])


@pytest.mark.full
@each
def test_pads_and_other_rows_of_the_batch_do_not_change_a_row(recipe: str) -> None:
    (ids, mask), model = conversation((16,))[0], tiny_llama()
    cache = dyncc.KVCache(recipe)
    compiled(model)(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache)
    alone = [scored(model, ids[row : row + 1, pads:], text=recipe) for row, pads in ((0, 3), (1, 0))]
    for number, layer in enumerate(cache.layers):
        assert (layer.scores[0, :, :3] == -1).all()
        torch.testing.assert_close(layer.scores[:1, :, 3:], alone[0][number], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.scores[1:], alone[1][number], rtol=1e-4, atol=1e-5)
