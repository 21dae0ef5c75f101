"""drop-repeat-kv: grouped keys and values are attended to as they are, in the form that is fastest here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import node, program
from torch.nn import functional as F

from dyncc.ir import Program, op_name, shape
from dyncc.passes import drop_repeat_kv, gqa_forms
from dyncc.passes.drop_repeat_kv import DropRepeatKV, fold, fold_left, fold_left_transposed
from dyncc.rewrite import Applied, Context, apply_pass, fingerprint

B, H, G, T, D = 2, 6, 2, 5, 4
Attend = Callable[..., Any]


def expanded(x: Any, heads: int = H) -> Any:
    b, g, t, d = x.shape
    return x[:, :, None].expand(b, g, heads // g, t, d).reshape(b, heads, t, d)


def interleaved(x: Any) -> Any:
    return x.repeat_interleave(H // G, dim=1)


def tiled(x: Any) -> Any:
    """The groups one after the other, again and again: head h is not of group h // (H / G)."""
    return x.repeat(1, H // G, 1, 1)


def tiled_by_expand(x: Any) -> Any:
    b, g, t, d = x.shape
    return x[:, None].expand(b, H // g, g, t, d).reshape(b, H, t, d)


def fused(repeat: Attend, **options: Any) -> Attend:
    return lambda q, k, v, *mask: F.scaled_dot_product_attention(q, repeat(k), repeat(v), *mask, **options)


def spelled(repeat: Attend) -> Attend:
    def attend(q: Any, k: Any, v: Any, *mask: Any) -> Any:
        logits = q @ repeat(k).transpose(2, 3) * D**-0.5
        return torch.softmax(logits + mask[0] if mask else logits, -1) @ repeat(v)

    return attend


def values(rows: int = T, heads: int = H, groups: int = G) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, heads, rows, D), torch.randn(B, groups, T, D), torch.randn(B, groups, T, D)]


def dropped(function: Attend, inputs: list[torch.Tensor]) -> tuple[Program, Applied]:
    captured = program(function, *inputs)
    return captured, apply_pass(captured, DropRepeatKV(), Context())


def take_form(monkeypatch: pytest.MonkeyPatch, form: str) -> list[tuple[Any, ...]]:
    """Decide the form; what was asked is collected."""
    asked: list[tuple[Any, ...]] = []

    def fastest(*question: Any) -> str:
        asked.append(question)
        return form

    monkeypatch.setattr(drop_repeat_kv, "fastest", fastest)
    return asked


MASKS: dict[str, tuple[torch.Tensor | None, bool]] = {
    "none": (None, True),
    "a row for all": (torch.arange(T) != 2, True),
    "a row each": (torch.ones(T, T, dtype=torch.bool).tril(), False),
    "a row of each sequence": ((torch.arange(T) < torch.tensor([[3], [5]]))[:, None, None], True),
}


@pytest.mark.parametrize("form", ["native", "folded"])
@pytest.mark.parametrize("repeat", [expanded, interleaved])
@pytest.mark.parametrize("mask", MASKS)
def test_both_forms_compute_the_same(mask: str, repeat: Attend, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, foldable = MASKS[mask]
    given = given if given is None or given.dim() > 1 else given.expand(1, T)
    asked = take_form(monkeypatch, form if foldable else "native")
    inputs = [*values(), *([] if given is None else [given])]
    _, applied = dropped(fused(repeat), inputs)
    assert applied.applied and applied.modified, applied.reason
    assert (applied.result.found, applied.result.expected) == (1, 1)
    assert asked[0][5] is foldable
    sdpa = node(applied.program, "scaled_dot_product_attention")
    folds = form == "folded" and foldable
    assert shape(sdpa) == ((B, G, H // G * T, D) if folds else (B, H, T, D))
    assert bool(sdpa.kwargs.get("enable_gqa")) is not folds
    assert not {"expand", "repeat_interleave"} & {op_name(n) for n in applied.program.graph.nodes if n.op == "call_function"}
    torch.testing.assert_close(applied.program.module(*inputs)[0], fused(repeat)(*inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"scale": 0.3}, {"is_causal": True, "scale": 2.0}])
def test_flag_and_scale_are_kept(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = take_form(monkeypatch, "native")
    inputs = values()
    _, applied = dropped(fused(expanded, **options), inputs)
    assert (asked[0][4], asked[0][5]) == ("is_causal" in options, "is_causal" not in options)
    torch.testing.assert_close(applied.program.module(*inputs)[0], fused(expanded, **options)(*inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("repeat", [expanded, interleaved])
@pytest.mark.parametrize("with_mask", [False, True])
def test_spelled_out_attention(repeat: Attend, with_mask: bool) -> None:
    inputs = [*values(), *([torch.randn(B, 1, T, T)] if with_mask else [])]
    _, applied = dropped(spelled(repeat), inputs)
    assert applied.applied and applied.modified, applied.reason
    torch.testing.assert_close(applied.program.module(*inputs)[0], spelled(repeat)(*inputs), rtol=1e-5, atol=1e-6)
    assert "expand" not in {op_name(n) for n in applied.program.graph.nodes if n.op == "call_function"}
    assert shape(node(applied.program, "matmul", 0)) == (B, G, H // G * T, T)


def test_a_cache_in_front_of_the_repetition() -> None:
    def attend(q: Any, k: Any, v: Any, past_k: Any, past_v: Any) -> Any:
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return fused(expanded)(q, k, v), k, v

    inputs = [*values(), torch.randn(B, G, 3, D), torch.randn(B, G, 3, D)]
    _, applied = dropped(attend, inputs)
    assert applied.applied, applied.reason
    for got, want in zip(applied.program.module(*inputs), attend(*inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_copy_with_another_user_stays_for_it() -> None:
    def attend(q: Any, k: Any, v: Any) -> Any:
        wide = expanded(k)
        return F.scaled_dot_product_attention(q, wide, expanded(v)), wide

    inputs = values()
    _, applied = dropped(attend, inputs)
    assert applied.applied
    assert len([n for n in applied.program.graph.nodes if op_name(n) == "expand"]) == 1
    for got, want in zip(applied.program.module(*inputs), attend(*inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


NOTHING = "no attention repeats its keys and values"
REFUSED: dict[str, tuple[Attend, list[torch.Tensor], str]] = {
    "groups one after the other": (fused(tiled), values(), NOTHING),
    "groups one after the other, by expand": (fused(tiled_by_expand), values(), NOTHING),
    "as many groups as heads": (fused(expanded), values(groups=H), NOTHING),
    "keys alone": (lambda q, k, v: F.scaled_dot_product_attention(q, expanded(k), tiled(v)), values(), NOTHING),
    "dropout": (fused(expanded, dropout_p=0.5), values(), "attention 0: dropout is active"),
    "spelled out, groups one after the other": (spelled(tiled_by_expand), values(), NOTHING),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_repetitions_stay(name: str) -> None:
    function, inputs, reason = REFUSED[name]
    captured, applied = dropped(function, inputs)
    before = fingerprint(captured.graph)
    assert (applied.applied, applied.reason) == (False, reason)
    assert applied.program is captured
    assert fingerprint(captured.graph) == before


def test_the_copy_stays_where_it_is_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    take_form(monkeypatch, "repeated")
    captured, applied = dropped(fused(expanded), values())
    assert (applied.applied, applied.reason) == (False, "attention 0: repeating is the fastest form here, by measurement")
    assert applied.program is captured


def test_folding_by_hand() -> None:
    q, k, v = values()
    want = F.scaled_dot_product_attention(q, expanded(k), expanded(v))
    torch.testing.assert_close(fold(q, k, v, None, None), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fold_left_transposed(q, k), q @ expanded(k).transpose(2, 3), rtol=1e-5, atol=1e-6)
    weights = torch.softmax(fold_left_transposed(q, k), -1)
    torch.testing.assert_close(fold_left(weights, v), weights @ expanded(v), rtol=1e-5, atol=1e-6)


BIG = ((1, 8, 1, 64), (1, 2, 4096, 64), torch.float32, None, False, True, "cpu")


def test_a_measurement_is_made_once_and_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DYNCC_CACHE_DIR", str(tmp_path))
    measured: list[tuple[Any, ...]] = []

    def measure(*question: Any) -> str:
        measured.append(question)
        return "folded"

    monkeypatch.setattr(gqa_forms, "_measure", measure)
    assert [gqa_forms.fastest(*BIG) for _ in range(3)] == ["folded"] * 3
    assert measured == [BIG[:-1]]
    assert gqa_forms.fastest(*BIG[:4], True, False, "cpu") == "folded"
    assert len(measured) == 2


@pytest.mark.parametrize("question", [((1, 8, 1, 64), (1, 2, 16, 64), *BIG[2:]), (*BIG[:-1], "cuda")])
def test_small_keys_and_other_devices_are_not_measured(question: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gqa_forms, "_measure", lambda *_: pytest.fail("measured"))
    assert gqa_forms.fastest(*question) == "native"


@pytest.mark.parametrize(("seconds", "best"), [((3.0, 1.0, 2.0), "native"), ((3.0, 2.0, 1.0), "folded"), ((1.0, 1.2, 1.3), "repeated")])
def test_the_fastest_is_taken_and_the_copy_only_where_clearly_faster(
    seconds: tuple[float, ...], best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(forms: dict[str, Callable[[], Any]]) -> dict[str, float]:
        return {name: (form(), taken)[1] for (name, form), taken in zip(forms.items(), seconds, strict=True)}

    monkeypatch.setattr(gqa_forms, "least_seconds", timed)
    assert gqa_forms._measure((1, 4, 1, 8), (1, 2, 6, 8), torch.float32, torch.bool, False, True) == best
