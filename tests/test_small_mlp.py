"""route-tokens with small MLPs: skip, small and big by a given router, equal to computing all three and choosing row by row."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_exit_early import mostly_full
from tiny import Tiny, inputs
from torch import Tensor, nn
from torch.nn import functional as F

import dyncc
from dyncc.errors import BadOptionValue, BadParameterFile, BadParameters, RefusedError
from dyncc.evidence import relative_error

ALL = Tiny(kind="decoder", returns="all", layers=3, positions="rope", causal="flag")
ENCODER = Tiny(returns="all")


class GateUp(nn.Module):
    """silu(gate x) * up x."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(16, 32, bias=False), nn.Linear(16, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.gate(x)) * self.up(x)


def build(tiny: Tiny, gated: bool = False) -> Any:
    model = tiny.build()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for block in model.blocks if gated else ():
            block.up = GateUp()
    return model


def given(model: Any, gated: bool, path: Path, wide: int = 6) -> tuple[Any, dict[str, Tensor]]:
    """Small MLPs and routers of every layer, at random."""
    draw, tensors = torch.Generator().manual_seed(2), {}
    for i in range(len(model.blocks)):
        sizes = {"small.up.weight": (wide, 16), "small.down.weight": (16, wide), "small.down.bias": (16,), "levels.weight": (3, 16)}
        sizes |= {"small.gate.weight": (wide, 16)} if gated else {"small.up.bias": (wide,)}
        tensors |= {f"unit.{i}.{name}": 0.5 * torch.randn(size, generator=draw) for name, size in sizes.items()}
        tensors[f"unit.{i}.levels.bias"] = torch.tensor([0.0, 0.3, 0.6])
    return dyncc.save_parameters(model, tensors, path / "small"), tensors


class ByHand(nn.Module):
    """A block whose three results are all computed; rows take their own; a `share` of a sequence may take the big one."""

    def __init__(self, block: Any, small: dict[str, Tensor], share: float) -> None:
        super().__init__()
        self.block, self.small, self.share, self.levels = block, small, share, list[Tensor]()

    def forward(self, x: Tensor, turn: Any, mask: Any, past: Any) -> tuple[Tensor, Any, Any]:
        block, small, pre = self.block, self.small, self.block.tiny.norm == "pre"
        mixed, k, v = block.attend(block.first(x) if pre else x, turn, mask, past)
        x = x + mixed if pre else block.first(x + mixed)
        inner = block.second(x) if pre else x
        up = F.linear(inner, small["small.up.weight"], small.get("small.up.bias"))
        if "small.gate.weight" in small:
            up = F.silu(F.linear(inner, small["small.gate.weight"])) * up
        changes = F.linear(F.gelu(up), small["small.down.weight"], small["small.down.bias"]), block.down(F.gelu(block.up(inner)))
        little, big = (x + change if pre else block.second(x + change) for change in changes)
        level = F.linear(x, small["levels.weight"], small["levels.bias"]).argmax(-1)
        wants = level == 2
        runs = wants & (wants.cumsum(1) <= math.ceil(self.share * x.shape[1]))
        self.levels.append(torch.where(wants & ~runs, 1, level))
        taken = torch.where(self.levels[-1][..., None] == 1, little, x)
        return torch.where(runs[..., None], big, taken), k, v


def by_hand(model: Any, tensors: dict[str, Tensor], share: float) -> Any:
    parts = [{n.removeprefix(f"unit.{i}."): t for n, t in tensors.items() if n.startswith(f"unit.{i}.")} for i in range(len(model.blocks))]
    model.blocks = nn.ModuleList(ByHand(block, part, share) for block, part in zip(model.blocks, parts, strict=True))
    return model


def routed(model: nn.Module, values: Any, options: str, **more: Any) -> Any:
    told = {"engine": "reference", "evidence": "off", "strict": True, **more}
    return dyncc.optimize(model, values, passes=f"duo-llm{{{options}}}", **told)


@pytest.mark.parametrize("gated", mostly_full([False, True], (True,)))
@pytest.mark.parametrize("tiny", mostly_full([ALL, ENCODER, ENCODER.with_(norm="post")], (ALL,)))
@pytest.mark.parametrize("rate", mostly_full([0.75, 0.25], (0.25,)))
@torch.no_grad()
def test_each_token_takes_its_level(rate: float, tiny: Tiny, gated: bool, tmp_path: Path) -> None:
    (ids,) = inputs(tiny, 3, 12)
    file, tensors = given(build(tiny, gated), gated, tmp_path)
    made = routed(build(tiny, gated), (ids,), f"rate={rate} file={file}")
    oracle = by_hand(build(tiny, gated), tensors, rate)
    assert relative_error(made(ids), oracle(ids)) < 2e-5
    assert {int(x) for block in oracle.blocks for x in block.levels[0].unique()} == {0, 1, 2}
    if tiny is ALL:
        assert made.flops < made.dense_flops
        other = ids.clone()
        other[:, -1] = (other[:, -1] + 1) % 31
        assert torch.equal(made(ids)[:, :-1], made(other)[:, :-1])


@pytest.mark.full
@torch.no_grad()
def test_every_pattern_of_levels_is_that_model(tmp_path: Path) -> None:
    """27 patterns of three layers; the best for a batch is the one that brute force finds; three quarters of the tokens may be big."""
    (ids,) = inputs(ALL, 2, 8)
    target, losses, expected = ids.roll(-1, 1), {}, {}
    for pattern in itertools.product(range(3), repeat=3):
        _, tensors = given(build(ALL), False, tmp_path)
        for i, level in enumerate(pattern):
            tensors[f"unit.{i}.levels.weight"] = torch.zeros(3, 16)
            tensors[f"unit.{i}.levels.bias"] = F.one_hot(torch.tensor(level), 3).float()
        file = dyncc.save_parameters(build(ALL), tensors, tmp_path / "pattern")
        logits = routed(build(ALL), (ids,), f"rate=0.75 file={file}")(ids)
        hand = by_hand(build(ALL), tensors, 0.75)(ids)
        assert relative_error(logits, hand) < 2e-5, pattern
        losses[pattern], expected[pattern] = (F.cross_entropy(x.flatten(0, 1), target.flatten()).item() for x in (logits, hand))
    assert min(losses, key=losses.__getitem__) == min(expected, key=expected.__getitem__)


@pytest.mark.full
@torch.no_grad()
def test_the_best_tokens_take_the_big_one_and_the_others_the_small_one_or_nothing(tmp_path: Path) -> None:
    """Two ways, by count, of an encoder; and an MLP that the others skip."""
    (ids,) = inputs(ENCODER, 3, 10)
    _, tensors = given(build(ENCODER), False, tmp_path)
    routers = {f"unit.{i}.router.weight": torch.arange(16.0)[None] - 7 for i in range(3)}
    routers |= {f"unit.{i}.router.bias": torch.zeros(1) for i in range(3)}
    file = dyncc.save_parameters(build(ENCODER), {**tensors, **routers}, tmp_path / "both")
    dense = build(ENCODER)(ids)
    small = routed(build(ENCODER), (ids,), f"rate=0.4 rule=count file={file}")(ids)
    skipped = routed(build(ENCODER), (ids,), f"rate=0.4 rule=count fill=carry file={file}")(ids)
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in ((dense, small), (dense, skipped), (small, skipped)))
    for rule in ("count", "level"):
        whole = routed(build(ENCODER), (ids,), f"rate=1.0 rule={rule} file={file}", strict=False)
        assert torch.equal(whole(ids), dense), "no token can be spared, so nothing is changed"


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ("site=layer", BadOptionValue, "a small MLP stands in for an MLP"),
        ("fill=affine", BadOptionValue, "surrogates stand in for layers"),
        ("fill=carry", BadOptionValue, "levels are skip, small and big"),
        ("", BadOptionValue, "dyncc.save_parameters wrote"),
        ("layers=0 file=FILE", BadParameterFile, "it holds no unit.0.small.up.bias"),
        pytest.param("layers=0 file=OTHER", BadParameterFile, "it belongs to another model", marks=pytest.mark.full),
    ],
)
def test_what_does_not_fit_is_told(options: str, kind: type[Exception], words: str, tmp_path: Path) -> None:
    _, tensors = given(build(ALL), False, tmp_path)
    del tensors["unit.0.small.up.bias"]
    known = {"FILE": dyncc.save_parameters(build(ALL), tensors, tmp_path / "less")}
    known["OTHER"] = dyncc.save_parameters(build(ALL.with_(seed=3)), tensors, tmp_path / "other")
    for name, path in known.items():
        options = options.replace(name, str(path))
    with pytest.raises(kind, match=words), torch.no_grad():
        routed(build(ALL), inputs(ALL, 2, 9), options)


def test_sizes_that_do_not_fit_each_other_are_told(tmp_path: Path) -> None:
    tensors = {"unit.0.small.up.weight": torch.zeros(6, 16), "unit.0.small.down.weight": torch.zeros(16, 5)}
    with pytest.raises(BadParameters, match=r"unit.0.small.up.weight is float32\[6, 16\]; floating point \[5, 16\] is wanted"):
        dyncc.save_parameters(build(ALL), tensors, tmp_path / "wrong")


@pytest.mark.full
def test_an_mlp_of_other_parts_has_no_small_form(tmp_path: Path) -> None:
    model = build(ALL)
    for block in model.blocks:
        block.down = nn.Sequential(block.down, nn.Linear(16, 16))
    file, _ = given(model, False, tmp_path)
    with pytest.raises(RefusedError, match="is no two linear layers, nor three with a gate"), torch.no_grad():
        routed(model, inputs(ALL, 2, 9), f"file={file}")
