"""simplify-mask: what a mask is, found from how it is made; what depends on the inputs stays."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import node, program
from torch.nn import functional as F

from dyncc.analysis.facts import analyse
from dyncc.analysis.mask_values import CAUSAL, Causal, Const, Distance, Position, evaluate
from dyncc.ir import Program, argument, op_name
from dyncc.passes.simplify_mask import SimplifyMask
from dyncc.rewrite import Applied, Context, apply_pass, fingerprint

B, H, T, D = 2, 2, 6, 4
DYNAMIC = {2: torch.export.Dim("length", min=1, max=64)}


def attend(x: Any, mask: Any) -> Any:
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


def rows(x: Any) -> Any:
    return torch.arange(x.shape[2])


def compared(x: Any) -> Any:
    return attend(x, (rows(x)[None, :] <= rows(x)[:, None])[None, None].expand(x.shape[0], 1, x.shape[2], x.shape[2]))


def lower_triangle(x: Any) -> Any:
    return attend(x, torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).tril())


def lower_triangle_of_numbers(x: Any) -> Any:
    return attend(x, torch.tril(torch.ones(x.shape[2], x.shape[2])).bool() & torch.ones(1, 1, dtype=torch.bool))


def packed(x: Any) -> Any:
    """Sequences packed in a row are told apart by breaks in the positions; here there are none."""
    places = rows(x).unsqueeze(0).expand(x.shape[0], -1)
    sequence = (torch.diff(places, prepend=places[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    same = sequence[:, :, None] == sequence[:, None, :]
    return attend(x, (rows(x)[:, None] >= rows(x)[None, :])[None, None] & same[:, None])


def everything(x: Any) -> Any:
    return attend(x, torch.ones(x.shape[0], 1, x.shape[2], x.shape[2], dtype=torch.bool) | (rows(x) > 3))


def nothing_added(x: Any) -> Any:
    return attend(x, torch.zeros(x.shape[0], 1, 1, x.shape[2]))


def window(x: Any) -> Any:
    near = rows(x)[:, None] - rows(x)[None, :] < 3
    return attend(x, (rows(x)[None, :] <= rows(x)[:, None]) & near)


def prefix(x: Any) -> Any:
    return attend(x, (rows(x)[None, :] <= rows(x)[:, None]) | (rows(x)[None, :] < 2))


def of_the_input(x: Any) -> Any:
    return attend(x, (x[:, :1, :, 0] > -9.0).unsqueeze(1))


def shifted(x: Any) -> Any:
    return attend(x, rows(x)[None, :] <= rows(x)[:, None] + 1)


def lower_triangle_and_more(x: Any) -> Any:
    return attend(x, torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).tril(1))


def added_triangle(x: Any) -> Any:
    """1 and 0 added to the logits hide nothing, but are not the same number everywhere."""
    return attend(x, torch.ones(x.shape[2], x.shape[2]).tril())


def hides_all(x: Any) -> Any:
    return attend(x, torch.zeros(x.shape[2], x.shape[2], dtype=torch.bool))


def one_row(x: Any) -> Any:
    """Causal among the first row and key only, then broadcast."""
    first = torch.arange(1)
    return attend(x, (first[None, :] <= first[:, None]).expand(x.shape[2], x.shape[2]) & (rows(x)[None, :] <= rows(x)[:, None] + 1))


def simplified(function: Callable[..., Any], dynamic: bool = False, length: int = T) -> tuple[Program, Applied]:
    captured = program(function, torch.randn(B, H, length, D), dynamic=[DYNAMIC] if dynamic else None)
    return captured, apply_pass(captured, SimplifyMask(), Context())


def flags(captured: Program) -> tuple[Any, Any]:
    sdpa = node(captured, "scaled_dot_product_attention")
    return argument(sdpa, "attn_mask"), argument(sdpa, "is_causal")


CAUSAL_FORMS = [compared, lower_triangle, lower_triangle_of_numbers, packed]
OPEN_FORMS = [everything, nothing_added]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", [*CAUSAL_FORMS, *OPEN_FORMS])
def test_what_a_mask_is_takes_its_place(function: Callable[..., Any], dynamic: bool) -> None:
    captured, applied = simplified(function, dynamic)
    assert applied.applied and applied.modified, applied.reason
    assert (applied.result.found, applied.result.expected) == (1, 1)
    assert flags(applied.program) == (None, function in CAUSAL_FORMS)
    assert not {"tril", "le", "ge", "cumsum", "ones"} & {op_name(n) for n in applied.program.graph.nodes if n.op == "call_function"}
    for length in (1, 2, 9) if dynamic else (T,):
        x = torch.randn(B, H, length, D)
        torch.testing.assert_close(applied.program.module(x)[0], function(x))
        torch.testing.assert_close(captured.module(x)[0], function(x))


@pytest.mark.parametrize("function", CAUSAL_FORMS)
def test_one_token(function: Callable[..., Any]) -> None:
    x = torch.randn(B, H, 1, D)
    _, applied = simplified(function, length=1)
    torch.testing.assert_close(applied.program.module(x)[0], function(x))


REASON = "attention 0: its mask depends on the inputs, or hides more than later keys"


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "function", [window, prefix, of_the_input, shifted, lower_triangle_and_more, added_triangle, hides_all, one_row]
)
def test_other_masks_stay(function: Callable[..., Any], dynamic: bool) -> None:
    captured, applied = simplified(function, dynamic)
    assert (applied.applied, applied.reason) == (False, REASON)
    assert applied.program is captured
    assert fingerprint(captured.graph) == fingerprint(simplified(function, dynamic)[0].graph)


def test_no_mask_is_refused() -> None:
    assert simplified(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True))[1].reason == "no fused attention takes a mask"


def test_causal_masks_of_fewer_rows_than_keys_stay() -> None:
    """SDPA's flag counts rows from the first key: a causal mask in front of a cache is another."""

    def cached(x: Any, past: Any) -> Any:
        k = torch.cat([past, x], 2)
        key = torch.arange(k.shape[2])
        return F.scaled_dot_product_attention(x, k, k, attn_mask=key[None, :] <= key[past.shape[2] :, None])

    captured = program(cached, torch.randn(B, H, T, D), torch.randn(B, H, 3, D))
    assert apply_pass(captured, SimplifyMask(), Context()).reason == REASON


def test_one_of_two_masks() -> None:
    def two(x: Any) -> Any:
        return compared(x) + window(x)

    _, applied = simplified(two)
    assert (applied.result.found, applied.result.expected) == (1, 2)
    assert applied.result.misses == (REASON.replace("0", "1"),)
    x = torch.randn(B, H, T, D)
    torch.testing.assert_close(applied.program.module(x)[0], two(x))


def test_a_mask_with_another_user_stays_for_it() -> None:
    def both(x: Any) -> Any:
        mask = rows(x)[None, :] <= rows(x)[:, None]
        return attend(x, mask), mask.sum()

    _, applied = simplified(both)
    x = torch.randn(B, H, T, D)
    assert flags(applied.program) == (None, True)
    assert applied.program.module(x)[1] == T * (T + 1) // 2


@pytest.mark.parametrize(
    ("function", "value"),
    [
        (lambda x: x.new_ones(3, 4) , Const(True)),
        (lambda x: torch.full((3,), 5), Const(5)),
        (lambda x: torch.arange(2, 8), Position(-1, 2)),
        (lambda x: torch.arange(2, 8)[:, None], Position(-2, 2)),
        (lambda x: torch.arange(2, 8)[2:] - 1, Position(-1, 3)),
        (lambda x: torch.arange(2, 8)[2:3], Const(4)),
        (lambda x: torch.arange(2, 8, 2), None),
        (lambda x: torch.arange(8).to(torch.bfloat16), None),
        (lambda x: torch.arange(8).add(torch.ones(1, dtype=torch.long), alpha=2), None),
        (lambda x: torch.arange(1).expand(6), None),
        (lambda x: torch.arange(3).bool(), None),
        (lambda x: ~torch.ones(3, dtype=torch.long), None),
        (lambda x: ~torch.ones(3, dtype=torch.bool), Const(False)),
        (lambda x: torch.ones(3, 3).tril(), CAUSAL),
        (lambda x: torch.ones(3, 3).tril()[1:], None),
        (lambda x: torch.ones(1, 1).tril().expand(3, 3), None),
        (lambda x: torch.arange(3)[None] <= torch.arange(4)[:, None], CAUSAL),
        (lambda x: torch.arange(3)[None] <= torch.arange(4)[:, None] - 1, Causal(False, False, 1, True)),
        (lambda x: torch.arange(3)[None] <= torch.arange(4)[:, None] + 1, None),
        (lambda x: torch.arange(3)[None] > torch.arange(4)[:, None], Causal(False, True)),
        (lambda x: torch.arange(3)[None] > torch.arange(4)[:, None] - 2, Causal(True, True, 2, False)),
        (lambda x: torch.zeros(3, 3).masked_fill(torch.ones(3, 3, dtype=torch.bool).triu(1), -math.inf), Causal(0, -math.inf)),
        (lambda x: (1.0 - torch.ones(3, 3).tril()) * -2.0, Causal(0, -2.0)),
        (lambda x: torch.where(torch.ones(3, 3, dtype=torch.bool), 0.0, torch.randn(3, 3)), None),
        (lambda x: torch.full((3, 3), -math.inf).triu(1), Causal(0, -math.inf)),
        (lambda x: torch.full((3, 3), -math.inf).triu(), None),
        (lambda x: torch.arange(3)[None] <= torch.arange(1)[:, None].expand(3, 1), None),
        (lambda x: x > 0, None),
        (lambda x: torch.arange(3) < 2, Causal(False, False, prefix=2, inside=(True,) * 3)),
        (lambda x: (torch.arange(3) < 2).expand(4, 3), Causal(False, False, prefix=2, inside=(True,) * 3)),
        (lambda x: torch.arange(1, 4)[None] >= 3, Causal(True, True, prefix=2, inside=(False,) * 3)),
        (lambda x: torch.arange(3)[:, None] < 2, None),
        (lambda x: torch.arange(3).view(1, 1, -1).expand(4, 2, -1)[0], Position(-1, 0)),
        (lambda x: torch.arange(3)[:, None].expand(3, 4)[:, 1], Position(-1, 0)),
        (lambda x: torch.arange(2, 5)[2], Const(4)),
        (lambda x: torch.arange(6).view(2, 3), None),
        (lambda x: torch.arange(4).expand(3, 4).reshape(12), None),
        (lambda x: torch.arange(3) < 0, Const(False)),
        (lambda x: torch.arange(3)[None] - torch.arange(4)[:, None], Distance(1, 0)),
        (lambda x: -(torch.arange(3)[None] - torch.arange(4)[:, None] + 2), Distance(-1, -2)),
        (lambda x: torch.arange(4)[:, None] - torch.arange(3)[None] >= 0, CAUSAL),
        (lambda x: torch.arange(4)[:, None] - torch.arange(3)[None] <= 1, Causal(True, True, 2, False)),
        (lambda x: torch.arange(3)[None] >= torch.arange(4)[:, None] - 1, Causal(True, True, 2, False)),
    ],
)
def test_abstract_values(function: Callable[..., Any], value: Any) -> None:
    captured = program(lambda x: (function(x), x), torch.randn(3))
    made = captured.graph.find_nodes(op="output")[0].args[0][0]
    assert evaluate(made, {}) == value


def test_the_region_is_found_in_each_form() -> None:
    for function in (*CAUSAL_FORMS, *OPEN_FORMS, window):
        facts = analyse(simplified(function)[0])
        assert (facts.found, facts.expected) == (1, 1)
