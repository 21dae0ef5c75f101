"""route-iterations: equal to running every iteration for all tokens with the keys of absent ones hidden, and choosing row by row."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_exit_early import mostly_full
from tiny import Tiny, dynamic, inputs
from torch import Tensor, nn
from torch.nn import functional as F

import dyncc
from dyncc.errors import BadOptionValue, BadParameterFile, RefusedError
from dyncc.evidence import relative_error

LAST = Tiny(kind="decoder", returns="last", layers=3, positions="rope", causal="flag")
ALL = LAST.with_(returns="all")
ENCODER = Tiny(returns="all", layers=4)
TIMES = 3


class Recursive(nn.Module):
    """A tiny model of which the layers in the middle run `TIMES` times. `chooses(number, before)` gives the rows [B, T] that run an
    iteration and what their result is multiplied by before it is added (None: it takes their place); None: all run, and replace.
    `mixes`: later iterations start from a mixture of token embeddings, as what the head expects says; `shares` the first one's keys."""

    def __init__(self, tiny: Tiny, mixes: bool = False, shares: bool = False) -> None:
        super().__init__()
        self.model, self.mixes, self.shares = tiny.build(), mixes, shares
        self.chooses: Callable[[int, Tensor], tuple[Tensor, Tensor | None]] | None = None
        self.behind: Callable[[Tensor, Tensor], Tensor] | None = None

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        tiny, model = self.model.tiny, self.model
        positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        x, turn = model.tokens(ids), None
        if tiny.positions == "rope":
            turn = model.angles(positions, x.dtype)
        else:
            x = x + model.places(positions)
        mask = model.mask(ids, attention_mask, 0)
        first, middle, last = model.blocks[0], model.blocks[1:-1], model.blocks[-1]
        x = entry = first(x, turn, mask, None)[0]
        for number in range(TIMES):
            start = self.mixed(x) if number and self.mixes else x
            x = self.iterate(number, x, start, middle, turn, mask)
        x = x if self.behind is None else self.behind(entry, x)
        x = last(x, turn, mask, None)[0]
        x = x[:, -1] if tiny.returns == "last" else x
        return model.head(model.norm(x))

    def mixed(self, x: Tensor) -> Tensor:
        return torch.softmax(self.model.head(self.model.norm(x)), -1) @ self.model.tokens.weight

    def iterate(self, number: int, x: Tensor, start: Tensor, blocks: Any, turn: Any, mask: Tensor | None) -> Tensor:
        y = start
        if self.chooses is None:
            for block in blocks:
                y = block(y, turn, mask, None)[0]
            return y
        runs, weight = self.chooses(number, x)
        for block in blocks:
            y = block(y, turn, self.seen(mask, runs), None)[0]
        return torch.where(runs[..., None], y if weight is None else x + weight[..., None] * y, x)

    def seen(self, mask: Tensor | None, runs: Tensor) -> Tensor:
        """Keys of rows that run, and each row's own, so that no row sees nothing."""
        count = runs.shape[1]
        own = torch.eye(count, dtype=torch.bool)
        if mask is None:
            mask = torch.ones(count, count, dtype=torch.bool).tril() if self.model.tiny.kind == "decoder" else own | True
        return (mask & runs[:, None, None, :]) | own


def routers(model: nn.Module, path: Path) -> Any:
    draw = torch.Generator().manual_seed(3)
    tensors = {"iteration.levels.weight": torch.randn(TIMES, 16, generator=draw), "iteration.levels.bias": torch.zeros(TIMES)}
    for number in range(TIMES):
        tensors[f"iteration.{number}.router.weight"] = torch.randn(1, 16, generator=draw)
        tensors[f"iteration.{number}.router.bias"] = 0.1 * torch.randn(1, generator=draw)
    return dyncc.save_parameters(model, tensors, path / "routers"), tensors


def most(keep: float, count: int) -> int:
    return math.ceil(round(keep * 10_000) * count / 10_000)


def routed(model: nn.Module, values: Any, options: str, recipe: str = "route-iterations", **more: Any) -> Any:
    given = {"engine": "reference", "evidence": "off", "strict": True, **more}
    return dyncc.optimize(model, values, passes=f"{recipe}{{{options}}}", **given)


def same(a: Tensor, b: Tensor) -> bool:
    return relative_error(a, b) < 2e-5


def first_of(wanted: Tensor, count: int) -> Tensor:
    return wanted & (wanted.cumsum(1) <= count)


def by_count(given: Any, keeps: Any, alpha: float | None, real: Tensor | None = None) -> Any:
    """Of those that ran before, the best of each sequence, ties to the earlier; sequence by sequence."""
    alive: list[Tensor] = []

    def choose(number: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        score = F.linear(x, given[f"iteration.{number}.router.weight"], given[f"iteration.{number}.router.bias"])[..., 0]
        before = alive[-1] if number else (torch.ones_like(score, dtype=torch.bool) if real is None else real.bool())
        runs = torch.zeros_like(before)
        for row in range(len(score)):
            length = score.shape[1] if real is None else int(real[row].sum())
            own = [i for i in range(score.shape[1]) if before[row, i]]
            runs[row, sorted(own, key=lambda i, row=row: (-float(score[row, i]), i))[: most(keeps[number], length)]] = True
        alive.append(runs)
        return runs, None if alpha is None else alpha * torch.sigmoid(score)

    return choose


@pytest.mark.parametrize("padded", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.parametrize("tiny", mostly_full([LAST, LAST.with_(causal="mask", fused=False), ENCODER, ENCODER.with_(norm="post")], (LAST,)))
@pytest.mark.parametrize("combine", ["add", pytest.param("replace", marks=pytest.mark.full)])
@torch.no_grad()
def test_the_best_of_those_that_ran_before_run(tiny: Tiny, padded: bool, combine: str, tmp_path: Path) -> None:
    tiny = tiny.with_(positions="learned") if padded else tiny
    values = inputs(tiny, 3, 12, padded)
    file, given = routers(Recursive(tiny), tmp_path)
    made = routed(Recursive(tiny), values, f"combine={combine} alpha=0.3 file={file}", recipe="mixture-of-recursions")
    oracle = Recursive(tiny)
    real = values[1] if padded else None
    oracle.chooses = by_count(given, (1.0, 0.67, 0.34), 0.3 if combine == "add" else None, real)
    shown = real.bool() if padded and tiny.returns == "all" else torch.ones_like(values[0], dtype=torch.bool)
    found, expected = made(*values), oracle(*values)
    assert same(found[shown], expected[shown]) if tiny.returns == "all" else same(found, expected)
    assert not same(found, Recursive(tiny)(*values)) and made.report.rewrites[0].applied
    assert made.flops < made.dense_flops


@pytest.mark.parametrize("combine", mostly_full(["replace", "add"], ("add",)))
@pytest.mark.parametrize("keep", mostly_full([0.8, 0.5], (0.5,)))
@torch.no_grad()
def test_each_token_leaves_after_its_level(keep: float, combine: str, tmp_path: Path) -> None:
    """Levels are fixed in front of the block; the first tokens of a sequence that want to go on do, later tokens change nothing."""
    (ids,) = inputs(ALL, 3, 12)
    file, given = routers(Recursive(ALL), tmp_path)
    made = routed(Recursive(ALL), (ids,), f"keep={keep} combine={combine} alpha=0.8 file={file}", recipe="anira")
    level: list[Tensor] = []
    alive: list[Tensor] = []

    def choose(number: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if not number:
            level.append(torch.softmax(F.linear(x, given["iteration.levels.weight"], given["iteration.levels.bias"]), -1))
            alive.append(torch.ones(x.shape[:2], dtype=torch.bool))
        else:
            alive.append(first_of(alive[-1] & (level[0].argmax(-1) >= number), most(keep, x.shape[1])))
        return alive[-1], None

    oracle = Recursive(ALL)
    oracle.chooses = choose
    if combine == "add":
        oracle.behind = lambda entry, x: entry + 0.8 * level[0].amax(-1, keepdim=True) * x
    assert same(made(ids), oracle(ids))
    assert 0 < alive[2].sum() < alive[1].sum() < alive[0].sum()
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 31
    assert torch.equal(made(ids)[:, :-1], made(other)[:, :-1])


@pytest.mark.parametrize("tiny", mostly_full([ALL, ENCODER], (ALL,)))
@torch.no_grad()
def test_tokens_go_on_while_their_router_is_sure_and_keep_what_they_had(tiny: Tiny, tmp_path: Path) -> None:
    """Later iterations start from a mixture of embeddings; a token that stops keeps the state in front of that mixture."""
    (ids,) = inputs(tiny, 3, 12)
    file, given = routers(Recursive(tiny, mixes=True), tmp_path)
    scores: list[Tensor] = []

    def score(number: int, x: Tensor) -> Tensor:
        return torch.sigmoid(F.linear(x, given[f"iteration.{number}.router.weight"], given[f"iteration.{number}.router.bias"])[..., 0])

    looking = Recursive(tiny, mixes=True)
    looking.chooses = lambda number, x: (scores.append(score(number, x)), (torch.ones_like(ids, dtype=torch.bool), None))[1]
    looking(ids)
    threshold = float(scores[1].flatten().sort().values[17:19].mean())
    made = routed(Recursive(tiny, mixes=True), (ids,), f"keep=0.9,0.8,0.6 threshold={threshold} file={file}", recipe="think-at-hard")
    alive = [torch.ones_like(ids, dtype=torch.bool)]

    def choose(number: int, x: Tensor) -> tuple[Tensor, None]:
        sure = score(number, x) >= (threshold if number else 0.0)
        alive.append(first_of(alive[-1] & sure, most((0.9, 0.8, 0.6)[number], ids.shape[1])))
        return alive[-1], None

    oracle = Recursive(tiny, mixes=True)
    oracle.chooses = choose
    assert same(made(ids), oracle(ids)) and 0 < alive[2].sum() < alive[1].sum()


@pytest.mark.full
@torch.no_grad()
def test_where_all_run_or_none_run_again_it_is_the_model_by_hand(tmp_path: Path) -> None:
    (ids,) = inputs(ALL, 2, 9)
    file, _ = routers(Recursive(ALL), tmp_path)
    for threshold, most_of in ((0.0, 5), (1.5, 0)):
        made, by_hand = routed(Recursive(ALL), (ids,), f"rule=threshold keep=0.5 threshold={threshold} file={file}"), Recursive(ALL)
        by_hand.chooses = lambda number, x, n=most_of: ((torch.arange(9) < (n if number else 9)).expand(x.shape[:2]), None)
        assert same(made(ids), by_hand(ids))
    made = routed(Recursive(LAST), inputs(LAST), f"keep=1.0 file={file}")
    assert torch.equal(made(*inputs(LAST)), Recursive(LAST)(*inputs(LAST)))
    assert "nothing to leave out" in made.report.rewrites[0].reason


class Twice(nn.Module):
    """Two iterations of one layer, the second spelled out: it reads its own keys, the first one's, or both, and returns its own."""

    def __init__(self, keys: str) -> None:
        super().__init__()
        self.model, self.keys = LAST.with_(layers=1).build(), keys

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        model, block = self.model, self.model.blocks[0]
        turn = model.angles(torch.arange(ids.shape[1]).unsqueeze(0), torch.float32)
        x, k, v = block(model.tokens(ids), turn, None, None)
        q, own, value = (p(block.first(x)).unflatten(2, (-1, 4)).transpose(1, 2) for p in (block.q, block.k, block.v))
        choices = {"own": (own, value), "first": (k, v), "both": (torch.cat([k, own], 2), torch.cat([v, value], 2))}
        wide = [part.repeat_interleave(2, 1) for part in choices[self.keys]]
        seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril().repeat(1, 2 if self.keys == "both" else 1)
        x = x + block.o(F.scaled_dot_product_attention(q, *wide, attn_mask=seen).transpose(1, 2).flatten(2))
        x = x + block.down(F.gelu(block.up(block.second(x))))
        return model.head(model.norm(x)[:, -1]), own


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("own", "such as its keys, would hold the chosen tokens alone; ask it not to return that"),
        pytest.param("first", "no residual spine lies between the attentions", marks=pytest.mark.full),
        pytest.param("both", "no residual spine lies between the attentions", marks=pytest.mark.full),
    ],
)
def test_keys_of_other_iterations_have_no_place(keys: str, words: str, tmp_path: Path) -> None:
    given = {"iteration.1.router.weight": torch.zeros(1, 16), "iteration.1.router.bias": torch.zeros(1)}
    file = dyncc.save_parameters(Twice(keys), given, tmp_path / "routers")
    with pytest.raises(RefusedError, match=words), torch.no_grad():
        routed(Twice(keys), inputs(LAST, 3, 12), f"rule=threshold keep=0.5 file={file}")


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ("", BadOptionValue, "it takes the routers of the iterations"),
        ("threshold=-1.0 file=FILE", BadOptionValue, "above 1 no token runs again"),
        ("keep=1.0,0.5 file=FILE", RefusedError, "keep names 2 iterations, the model has 3"),
        ("keep=0.5 file=FILE", RefusedError, "covers all positions"),
        pytest.param("keep=0.5 file=OTHER", BadParameterFile, "it belongs to another model", marks=pytest.mark.full),
        pytest.param("keep=0.5 rule=level file=FEWER", BadParameterFile, "its levels are 2, the model has 3", marks=pytest.mark.full),
    ],
)
def test_what_does_not_fit_is_told(options: str, kind: type[Exception], words: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    fewer = {"iteration.levels.weight": torch.zeros(2, 16), "iteration.levels.bias": torch.zeros(2)}
    known = {
        "FILE": routers(Recursive(ALL), tmp_path)[0], "OTHER": routers(Recursive(ALL.with_(seed=4)), tmp_path / "other")[0],
        "FEWER": dyncc.save_parameters(Recursive(ALL), fewer, tmp_path / "fewer"),
    }  # fmt: skip
    for name, file in known.items():
        options = options.replace(name, str(file))
    with pytest.raises(kind, match=words), torch.no_grad():
        routed(Recursive(ALL), inputs(ALL, 2, 9), options)


def test_models_that_iterate_nothing_are_refused(tmp_path: Path) -> None:
    model = LAST.build()
    file, _ = routers(model, tmp_path)
    with pytest.raises(RefusedError, match="nothing is iterated; layers that differ are routed by route-tokens"), torch.no_grad():
        routed(model, inputs(LAST), f"keep=0.5 file={file}")
    tied = ENCODER.build()
    tied.blocks[2].up = tied.blocks[0].up
    tied.blocks[3].down = tied.blocks[0].down
    with pytest.raises(RefusedError, match="which are not one block that is run again and again"), torch.no_grad():
        routed(tied, inputs(ENCODER), f"keep=0.5 file={routers(tied, tmp_path)[0]}")


@pytest.mark.full
@pytest.mark.parametrize("engine", ["inductor", "onnxruntime"])
@torch.no_grad()
def test_engines_and_sizes_agree(engine: str, tmp_path: Path) -> None:
    file, given = routers(Recursive(LAST), tmp_path)
    values = inputs(LAST, 3, 12)
    made = routed(Recursive(LAST), values, f"keep=1.0,0.67,0.34 combine=add file={file}", engine=engine, dynamic_shapes=dynamic(values))
    assert made.report.engine == engine
    for batch, length in ((3, 12), (2, 17)):
        oracle, (ids,) = Recursive(LAST), inputs(LAST, batch, length, seed=5)
        oracle.chooses = by_count(given, (1.0, 0.67, 0.34), 1.0)
        assert same(made(ids), oracle(ids))
