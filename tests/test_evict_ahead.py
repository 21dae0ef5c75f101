"""evict-kv by rows behind the prompt (DapQ): their queries are those of the plain model on a longer text, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from test_evict_kv import MaskedForm, compiled, conversation, read
from test_kv_cache import prompt, tiny_llama
from test_onnx import GROUPS, HEADS, LAYERS, WIDTH
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

import dyncc
from dyncc.analysis.facts import analyse
from dyncc.capture import from_model
from dyncc.decoding import Prefill
from dyncc.passes.token_inputs import says_what
from dyncc.pipeline import build
from dyncc.restrict import Refusal

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "no_grad")

DAPQ = "dapq{budget=12 window=4 pool=3}"


def asked(model: Any, ids: Tensor, mask: Tensor, rows: int, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the prompt's keys receive in each layer, [B, G, N], from the prompt's last `rows` tokens read once more behind it."""
    plain, found = F.scaled_dot_product_attention, []

    def note(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, is_causal: bool = False, **more: Any) -> Tensor:
        k, v = (t.repeat_interleave(HEADS // t.shape[1], 1) for t in (k, v))
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril() if attn_mask is None else attn_mask
        logits = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).masked_fill(~seen, -torch.inf)
        received = torch.softmax(logits, -1).nan_to_num()[:, :, -rows:, : ids.shape[1]]
        found.append(received.view(len(q), GROUPS, -1, rows, ids.shape[1]).sum((2, 3)).numpy())
        return plain(q, k, v, attn_mask=seen)

    longer = torch.cat([ids, ids[:, -rows:]], 1), torch.cat([mask, torch.ones_like(mask[:, :rows])], 1)
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", note)
        model(input_ids=longer[0], attention_mask=longer[1])
    return found


class AheadForm(MaskedForm):
    """The masked form whose prompt was scored by a run of its own."""

    def __init__(self, policy: Any, scores: list[Any]) -> None:
        super().__init__(policy)
        self.given = scores

    def earned(self, scores: Any, probabilities: Any, seen: Any) -> Any:
        batch, groups, rows, keys = probabilities.shape
        return self.given[(self.calls - 1) % LAYERS] if rows > 1 else np.zeros((batch, groups, keys))


def masked(policy: str, model: Any, calls: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    passed = build(policy)[0]
    form, cache = AheadForm(passed, asked(model, *calls[0], passed.window, monkeypatch)), DynamicCache()
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", form)
        return [read(model, cache, ids, mask) for ids, mask in calls]


@pytest.mark.full
def test_it_equals_its_masked_form(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, model = conversation((30, *[1] * 5)), tiny_llama()
    expected, run, cache, dense, apart = masked(DAPQ, model, calls, monkeypatch), compiled(model), dyncc.KVCache(DAPQ), DynamicCache(), 0.0
    for (ids, mask), then in zip(calls, expected, strict=True):
        torch.testing.assert_close(read(run, cache, ids, mask)[:, -1], then[:, -1], rtol=1e-4, atol=1e-5)
        apart = max(apart, (read(model, dense, ids, mask)[:, -1] - then[:, -1]).abs().max().item())
    assert apart > 1e-3  # keys were missed
    assert all(layer.store.length == 17 for layer in cache.layers)


@pytest.mark.full
def test_a_budget_of_all_keys_is_the_dense_model_bit_by_bit_and_no_row_ahead_is_kept() -> None:
    run, cache, plain = compiled(tiny_llama()), dyncc.KVCache("dapq{budget=64 window=4}"), dyncc.KVCache()
    for ids, mask in conversation((20, 1, 1)):
        assert torch.equal(read(run, cache, ids, mask), read(run, plain, ids, mask))
    for layer, other in zip(cache.layers, plain.layers, strict=True):
        assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)


def scored(model: Any, ids: Tensor, mask: Tensor | None = None, text: str = DAPQ) -> list[Tensor]:
    cache = dyncc.KVCache(text)
    read(compiled(model), cache, ids, mask)
    return [layer.scores for layer in cache.layers]


@pytest.mark.full
@pytest.mark.parametrize("rows", [1, 8, 40])
def test_any_number_of_rows_ahead(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the prompt has, too: its first token is repeated then."""
    ids, _ = conversation((9,), pads=0)[0]
    found = scored(tiny_llama(), ids, text=f"dapq{{window={rows}}}")
    wide = torch.cat([ids[:, :1].expand(-1, max(0, rows - 9)), ids[:, max(0, 9 - rows) :]], 1)
    longer = torch.cat([ids, wide], 1)
    plain, layers = F.scaled_dot_product_attention, []

    def note(q: Tensor, k: Tensor, v: Tensor, *args: Any, **more: Any) -> Tensor:
        logits = q @ k.repeat_interleave(HEADS // k.shape[1], 1).transpose(2, 3) * q.shape[3] ** -0.5
        logits = logits.masked_fill(~torch.ones(9 + rows, 9 + rows, dtype=torch.bool).tril(), -torch.inf)
        layers.append(torch.softmax(logits, -1)[:, :, 9:, :9].reshape(2, GROUPS, -1, 9).sum(2))
        return plain(q, k, v, *args, **more)

    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", note)
        tiny_llama()(input_ids=longer)
    for a, b in zip(found, layers, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert (a.sum((1, 2)) < HEADS * rows).all()  # the rest went to the rows ahead themselves


def prefilled(model: Any, passes: str) -> tuple[Any, Any, Any]:
    """A prompt whose keys are returned: optimized, plain, and its call."""
    given, module = prompt(2, 20, pads=3), Prefill(model, keys=True)
    call = (given["input_ids"], given["attention_mask"])
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=2)
    sizes = {"input_ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: length}}
    return dyncc.optimize(module, call, passes=passes, engine="reference", dynamic_shapes=sizes), module, call


def test_a_prompts_returned_keys_are_those_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any length, also one shorter than the budget."""
    made, plain, call = prefilled(tiny_llama(), DAPQ)
    rewrite = made.report.rewrites[0]
    assert rewrite.applied and (rewrite.found, rewrite.expected) == (LAYERS, LAYERS), rewrite.reason
    found, dense, policy = made(*call), plain(*call), build(DAPQ)[0]
    assert torch.equal(found[0], dense[0])
    scores = asked(tiny_llama(), *call, 4, monkeypatch)
    for layer in range(LAYERS):
        score = torch.from_numpy(scores[layer]).masked_fill(call[1][:, None] == 0, -1.0)
        kept = policy.choose(score)[..., None].expand(-1, -1, -1, WIDTH)
        for which in (1, 2):
            torch.testing.assert_close(found[2 * layer + which], dense[2 * layer + which].gather(2, kept))
    for a, b in zip(made(*(x[:, -9:] for x in call)), plain(*(x[:, -9:] for x in call)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.full
def test_refusals_say_why() -> None:
    model = tiny_llama()
    model.set_attn_implementation("eager")
    made, _, _ = prefilled(model, DAPQ)
    assert "load the model with attn_implementation='sdpa'" in made.report.rewrites[0].reason
    made, _, _ = prefilled(tiny_llama(), "lookaheadkv{file=rows}")
    assert "trained weights come with dyncc.KVCache" in made.report.rewrites[0].reason


@pytest.mark.full
def test_a_prompt_that_looks_ahead_exports_to_onnx(tmp_path: Path) -> None:
    made, _, _ = prefilled(tiny_llama(), f"{DAPQ} drop-repeat-kv")
    written = made.export_onnx(tmp_path / "prompt.onnx")
    assert len({row.sizes for row in written.parity}) == 3 and all(row.holds for row in written.parity)


@pytest.mark.full
def test_learned_positions_count_on_and_stop_at_their_last() -> None:
    """GPT-2: positions from a table of 24, a prompt of 20 and 8 rows ahead."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        config = hf.GPT2Config(n_embd=32, n_head=2, n_layer=2, n_positions=24, vocab_size=99, attn_implementation="sdpa")
        model = hf.GPT2LMHeadModel(config).eval()
    ids = prompt(2, 20)["input_ids"]
    seen: list[Tensor] = []
    plain = F.scaled_dot_product_attention

    def note(q: Tensor, k: Tensor, v: Tensor, *args: Any, **more: Any) -> Tensor:
        logits = (q @ k.transpose(2, 3) * 16**-0.5).masked_fill(~torch.ones(28, 28, dtype=torch.bool).tril(), -torch.inf)
        seen.append(torch.softmax(logits, -1)[:, :, 20:, :20].sum(2))
        return plain(q, k, v, *args, **more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", note)
        model(input_ids=torch.cat([ids, ids[:, -8:]], 1), position_ids=torch.arange(28).clamp(max=23)[None])
    for given in ({}, {"position_ids": torch.arange(20)[None]}):
        torch._dynamo.reset()
        cache = dyncc.KVCache("dapq{window=8}")
        compiled(model)(input_ids=ids, past_key_values=cache, **given)
        for layer, then in zip(cache.layers, seen, strict=True):
            torch.testing.assert_close(layer.scores, then, rtol=1e-4, atol=1e-5)


class Reader(torch.nn.Module):
    """Words, positions and segments from inputs, with a head of its own, a tied one, or none."""

    def __init__(self, head: str, words: int = 30, places: int = 24) -> None:
        super().__init__()
        self.words, self.places, self.segments = (torch.nn.Embedding(rows, 8) for rows in (words, places, 2))
        self.head = None if head == "none" else torch.nn.Linear(8, words, bias=False)
        if head == "tied":
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor, at: Tensor, kinds: Tensor) -> Tensor:
        x = self.words(ids) + self.places(at.to(torch.int64).view(at.shape)) + self.segments(kinds)
        return x if self.head is None else 30 * torch.tanh(self.head(x[:, -1:]).float() / 30)


def told(model: Reader) -> list[bool]:
    ids = torch.arange(9)[None]
    program, _ = from_model(model.eval(), (ids, ids.clone(), torch.zeros_like(ids)))
    analyse(program)  # says which placeholders are inputs
    return [says_what(n, 1) for n in program.graph.nodes if n.op == "placeholder" and n.meta["role"] == "input"]


@pytest.mark.parametrize("head", ["own", "tied"])
def test_what_an_input_says_is_found_by_its_table(head: str) -> None:
    assert told(Reader(head)) == [True, False, True]


def test_a_tied_head_tells_tables_of_equal_sizes_apart() -> None:
    assert told(Reader("tied", places=30)) == [True, False, True]


def test_beside_embeddings_a_table_that_is_no_vocabulary_holds_positions() -> None:
    class Embedded(Reader):
        def forward(self, x: Tensor, at: Tensor) -> Tensor:
            return self.head(x + self.places(at))

    for places, found in ((24, False), (30, True)):
        program, _ = from_model(Embedded("own", places=places).eval(), (torch.ones(1, 9, 8), torch.arange(9)[None]))
        analyse(program)
        *_, at = (n for n in program.graph.nodes if n.op == "placeholder")
        assert says_what(at, 1) is found


@pytest.mark.parametrize("reader", [Reader("none"), Reader("own", places=30)])
def test_tables_that_nothing_tells_apart_are_refused(reader: Reader) -> None:
    with pytest.raises(Refusal, match="a table of words or of positions, and nothing says which; capture the model with its language head"):
        told(reader)
