"""slice-last-token: only the rows whose results are used are computed, and only what nobody else reads is cut down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import program
from torch import nn
from torch.nn import functional as F

from dyncc.flops import count_flops
from dyncc.ir import Program, is_tensor, op_name, shape
from dyncc.passes.slice_last_token import SliceLastToken
from dyncc.rewrite import Applied, Context, apply_pass, fingerprint

B, T, H, D, VOCABULARY = 2, 7, 2, 4, 11
C = H * D
DYNAMIC = [{1: torch.export.Dim("length", min=2, max=64)}]


class Layer(nn.Module):
    """Pre-norm layer; `attend(q, k, v)` is the attention."""

    def __init__(self, attend: Callable[..., Any]):
        super().__init__()
        self.attend = attend
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.up, self.down = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
        self.first, self.second = nn.LayerNorm(C), nn.LayerNorm(C)

    def forward(self, x: Any) -> Any:
        q, k, v = (part.view(*x.shape[:2], H, D).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, -1))
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.second(x)))), k, v


class Model(nn.Module):
    """Two layers, a final norm, a head; `read(head, x)` says which rows of the output come back."""

    def __init__(self, read: Callable[..., Any], attend: Callable[..., Any], keys: bool = False):
        super().__init__()
        self.read, self.keys = read, keys
        self.layers = nn.ModuleList(Layer(attend) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, VOCABULARY)

    def forward(self, x: Any) -> Any:
        cache = []
        for layer in self.layers:
            x, k, v = layer(x)
            cache += [k, v]
        result = self.read(self.head, self.norm(x))
        return (result, *cache) if self.keys else result


def flag(q: Any, k: Any, v: Any) -> Any:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def mask(q: Any, k: Any, v: Any) -> Any:
    places = torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(places[None, :] <= places[:, None])[None, None])


def rows_apart(q: Any, k: Any, v: Any) -> Any:
    """A mask whose row numbers nobody else reads: they are made, not computed from anything that could be sliced."""
    rows, keys = torch.arange(0, q.shape[2]), torch.arange(k.shape[2])
    seen = (keys[None, :] < rows[:, None]) | (keys[None, :] == rows[:, None])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[None, None])


def full(q: Any, k: Any, v: Any) -> Any:
    return F.scaled_dot_product_attention(q, k, v)


def spelled(q: Any, k: Any, v: Any) -> Any:
    places = torch.arange(q.shape[2])
    logits = (q @ k.transpose(-1, -2) * D**-0.5).masked_fill(places[None, :] > places[:, None], -1e9)
    return torch.softmax(logits, -1) @ v


READS: dict[str, tuple[Callable[..., Any], int]] = {
    "last logits": (lambda head, x: head(x)[:, -1, :], 1),
    "logits to keep": (lambda head, x: head(x[:, slice(-1, None), :]), 1),
    "three to keep": (lambda head, x: head(x[:, -3:, :]), 3),
    "class token": (lambda head, x: head(x[:, 0]), 1),
    "class token of the logits": (lambda head, x: head(x)[:, 0], 1),
    "first two": (lambda head, x: head(x)[:, :2], 2),
}
HEAD_FIRST = {"last logits", "class token of the logits", "first two"}
"""Reads behind the head: it runs on fewer rows too."""


def build(read: Callable[..., Any], attend: Callable[..., Any], keys: bool = False) -> Model:
    torch.manual_seed(0)
    return Model(read, attend, keys).eval()


def sliced(model: Model, dynamic: bool = False) -> tuple[Program, Applied]:
    captured = program(model, torch.randn(B, T, C), dynamic=DYNAMIC if dynamic else None)
    return captured, apply_pass(captured, SliceLastToken(), Context())


def rows_of(applied: Program, name: str) -> list[Any]:
    """Second-to-last sizes of the results of an op, in order."""
    return [shape(n)[-2] for n in applied.graph.nodes if n.op == "call_function" and op_name(n) == name and is_tensor(n)]


@pytest.mark.parametrize("attend", [flag, mask, rows_apart, full, spelled])
@pytest.mark.parametrize("name", READS)
@torch.no_grad()
def test_the_last_layer_runs_on_the_rows_that_are_read(name: str, attend: Callable[..., Any]) -> None:
    read, count = READS[name]
    model = build(read, attend)
    captured, applied = sliced(model)
    assert applied.applied and applied.modified, applied.reason
    assert (applied.result.found, applied.result.expected) == (1, 1)
    x = torch.randn(B, T, C)
    torch.testing.assert_close(applied.program.module(*_flat(captured, model, x))[0], model(x), rtol=1e-5, atol=1e-5)
    head = 2 * C * VOCABULARY if name in HEAD_FIRST else 0
    a_row = 4 * T * C + 2 * C * C + 8 * C * C + head
    assert count_flops(captured.graph) - count_flops(applied.program.graph) == B * (T - count) * a_row
    if attend is not spelled:
        assert rows_of(applied.program, "scaled_dot_product_attention") == [T, count]


def _flat(captured: Program, model: Model, x: torch.Tensor) -> list[torch.Tensor]:
    """The program's inputs: its weights by name, then x."""
    state = dict(model.state_dict())
    return [x if given.kind == "input" else state[given.name.removeprefix("function.")] for given in captured.inputs]


@pytest.mark.parametrize("attend", [flag, mask, rows_apart, spelled])
@torch.no_grad()
def test_dynamic_lengths(attend: Callable[..., Any]) -> None:
    model = build(READS["logits to keep"][0], attend)
    captured, applied = sliced(model, dynamic=True)
    assert applied.applied, applied.reason
    for length in (2, T, 13):
        x = torch.randn(B, length, C)
        torch.testing.assert_close(applied.program.module(*_flat(captured, model, x))[0], model(x), rtol=1e-5, atol=1e-5)


def test_the_flag_goes_for_the_last_row_and_becomes_a_mask_for_others() -> None:
    for name, mask_rows in (("last logits", []), ("three to keep", [3]), ("class token", [1])):
        _, applied = sliced(build(READS[name][0], flag))
        calls = [n for n in applied.program.graph.nodes if op_name(n) == "scaled_dot_product_attention"]
        assert [bool(n.args[5]) if len(n.args) > 5 else bool(n.kwargs.get("is_causal")) for n in calls] == [True, False]
        assert rows_of(applied.program, "le") == mask_rows


@torch.no_grad()
def test_keys_and_values_stay_whole() -> None:
    model = build(READS["logits to keep"][0], flag, keys=True)
    captured, applied = sliced(model)
    assert applied.applied, applied.reason
    x = torch.randn(B, T, C)
    results = applied.program.module(*_flat(captured, model, x))
    for got, want in zip(results, model(x), strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_only_what_is_private_is_sliced() -> None:
    """The hidden state behind the last layer is returned as a whole too: its norm and the head alone get short."""

    def read(head: Any, x: Any) -> Any:
        return head(F.relu(x))[:, -1], x

    model = build(read, flag)
    captured, applied = sliced(model)
    assert applied.applied, applied.reason
    x = torch.randn(B, T, C)
    logits, hidden = applied.program.module(*_flat(captured, model, x))
    torch.testing.assert_close(logits, model(x)[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden, model(x)[1])
    assert rows_of(applied.program, "scaled_dot_product_attention") == [T, T]
    assert count_flops(applied.program.graph) == count_flops(captured.graph) - 2 * B * (T - 1) * C * VOCABULARY


@torch.no_grad()
def test_two_reads_share_what_stands_in_front_of_both() -> None:
    def read(head: Any, x: Any) -> Any:
        return head(x)[:, -1], (x * 2)[:, 0]

    model = build(read, flag)
    captured, applied = sliced(model)
    x = torch.randn(B, T, C)
    for got, want in zip(applied.program.module(*_flat(captured, model, x)), model(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (applied.result.found, applied.result.expected) == (1, 2)
    assert applied.result.misses[0].endswith("nothing row-wise stands in front of it")


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "all rows": (
        lambda head, x: head(x),
        "the output uses every position (ask the model for its last position only, such as logits_to_keep=1)",
    ),
    "the mean": (lambda head, x: head(x.mean(1)), "no slice or select of fixed rows stands behind the layers"),
    "every second": (lambda head, x: head(x[:, ::2]).sum(1), "no slice or select of fixed rows stands behind the layers"),
    "a slice and all": (lambda head, x: (x[:, -1], x), "nothing row-wise stands in front of it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_leave_the_graph(name: str) -> None:
    read, words = REFUSED[name]
    captured, applied = sliced(build(read, flag))
    before = fingerprint(captured.graph)
    assert not applied.applied
    assert applied.reason.endswith(words)
    assert applied.program is captured
    assert fingerprint(captured.graph) == before


@torch.no_grad()
def test_a_flag_over_other_rows_than_keys_stays() -> None:
    """SDPA counts the flag's rows from the first key, so that the last of fewer rows does not see every key."""

    def longer(q: Any, k: Any, v: Any) -> Any:
        return F.scaled_dot_product_attention(q, torch.cat([k, k], 2), torch.cat([v, v], 2), is_causal=True)

    model = build(READS["logits to keep"][0], longer)
    captured, applied = sliced(model)
    x = torch.randn(B, T, C)
    torch.testing.assert_close(applied.program.module(*_flat(captured, model, x))[0], model(x), rtol=1e-5, atol=1e-5)
    assert rows_of(applied.program, "scaled_dot_product_attention") == [T, T]


def test_one_query_row_has_no_other_row_to_leave_out() -> None:
    captured = program(build(READS["logits to keep"][0], full), torch.randn(B, 1, C))
    assert not apply_pass(captured, SliceLastToken(), Context()).applied


def test_no_layers_are_named() -> None:
    captured = program(lambda x: (x * 2)[:, -1], torch.randn(B, T, C))
    assert apply_pass(captured, SliceLastToken(), Context()).reason == "no attention layers were found"
