"""route-tokens: equal to computing everything and choosing row by row, in every form of model; and what it does not take."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fit import data
from tiny import Tiny, dynamic, inputs
from torch import Tensor, nn
from torch.nn import functional as F

import dyncc
from dyncc import cli
from dyncc.errors import BadOptionValue, BadParameterFile, LayerOutOfRange, RefusedError
from dyncc.evidence import relative_error
from dyncc.fitted import Parameters, load_fitted

QUICK = {("decoder, flag", False), ("encoder, post-norm", True)}
REFERENCE = {"engine": "reference", "evidence": "off"}
Choose = Callable[[Tensor, Tensor], Tensor]
KINDS = {
    "decoder, flag": Tiny(kind="decoder", returns="last", causal="flag", positions="rope"),
    "decoder, mask": Tiny(kind="decoder", returns="last"),
    "decoder, cache": Tiny(kind="decoder", returns="last", keys=True, fused=False),
    "encoder": Tiny(returns="all"),
    "encoder, post-norm": Tiny(norm="post", fused=False),
}


pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Tiny], Path]:
    """The surrogates of a model of this file."""
    made: dict[Tiny, Path] = {}

    def file(tiny: Tiny) -> Path:
        if tiny not in made:
            folder = tmp_path_factory.mktemp("fit")
            made[tiny] = dyncc.fit(tiny.build(), data=data(tiny, padded=False), plan="units{rank=6}", output=folder).path
        return made[tiny]

    return file


def routed(model: nn.Module, values: tuple[Any, ...], options: str, **more: Any) -> Any:
    made = dyncc.optimize(model, values, passes=f"route-tokens{{{options}}}", **{**REFERENCE, **more})
    assert made.report.rewrites[0].applied, made.report.rewrites[0].reason
    return made


class Masked:
    """Everything is computed; behind each layer rows that were not chosen take their stand-in. Bookkeeping of its own, by hooks."""

    def __init__(self, tiny: Tiny, found: Parameters, choose: Choose, fill: str = "affine", weigh: bool = False):
        self.model, self.found, self.choose, self.fill, self.weigh = tiny.build(), found, choose, fill, weigh
        self.real: Tensor | None = None
        self.share: list[float] = []

    def route(self, *layers: int) -> Masked:
        for layer in layers:
            block = self.model.blocks[layer]
            block.register_forward_hook(lambda m, a, out, layer=layer: (self.behind(layer, a[0], out[0]), *out[1:]))
        return self

    def behind(self, layer: int, x: Tensor, y: Tensor) -> Tensor:
        part = {name: self.found.take(f"unit.{layer}.{name}") for name in ("router.weight", "router.bias")}
        state = x if self.weigh else x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        score = (state @ part["router.weight"][0] + part["router.bias"]).double()
        real = torch.ones_like(score, dtype=torch.bool) if self.real is None else self.real
        runs = torch.stack([self._row(s, r) for s, r in zip(score, real, strict=True)])
        self.share.append(runs.double().mean().item())
        stand_in = x
        if self.fill == "affine":
            down, up, bias = (self.found.take(f"unit.{layer}.{name}") for name in ("down.weight", "up.weight", "bias"))
            stand_in = x + x @ down.T @ up.T + bias
        changed = x + score.float()[..., None] * (y - x) if self.weigh else y
        return torch.where(runs[..., None], changed, stand_in)

    def _row(self, score: Tensor, real: Tensor) -> Tensor:
        runs = torch.zeros_like(real)
        runs[real] = self.choose(score[real], score)
        return runs

    def __call__(self, ids: Tensor, mask: Tensor | None = None) -> Any:
        self.real = None if mask is None else mask.bool()
        return self.model(ids, *([] if mask is None else [mask]))


def best(rate: float) -> Callable[[Tensor, Tensor], Tensor]:
    """As many of a sequence's own tokens as the rate says, rounded up, ties to the earlier."""

    def choose(score: Tensor, whole: Tensor) -> Tensor:
        order = sorted(range(len(score)), key=lambda i: (-float(score[i]), i))
        runs = torch.zeros(len(score), dtype=torch.bool)
        runs[order[: math.ceil(round(rate * 10_000) * len(score) / 10_000)]] = True
        return runs

    return choose


def leaves(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


def same(a: Any, b: Any) -> bool:
    return all(relative_error(x, y) < 2e-5 for x, y in zip(leaves(a), leaves(b), strict=True))


@pytest.mark.parametrize(
    ("name", "padded"),
    [(n, p) if (n, p) in QUICK else pytest.param(n, p, marks=pytest.mark.full) for n in KINDS for p in (False, True)],
)
def test_it_is_everything_computed_and_chosen(name: str, padded: bool, fitted: Any) -> None:
    tiny = KINDS[name]
    file, values = fitted(tiny), inputs(tiny, 3, 11, padded)
    made = routed(tiny.build(), values, f"rate=0.4 file={file}")
    masked = Masked(tiny, load_fitted(file), best(0.4)).route(0, 1, 2)
    assert same(masked(*values), made(*values))
    assert not same(tiny.build()(*values), made(*values))
    assert made.report.rewrites[0].found == 3


@pytest.mark.full
@pytest.mark.parametrize("tiny", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("options", ["rate=0.3 fill=carry layers=1", "rate=0.7 layers=0,2", "rate=0.5 layers=2 fill=carry"])
def test_fills_and_layers(tiny: Tiny, options: str, fitted: Any) -> None:
    file, values = fitted(tiny), inputs(tiny, 2, 10, padded=True)
    told = dict(pair.split("=") for pair in options.split())
    layers = [int(x) for x in told["layers"].split(",")]
    made = routed(tiny.build(), values, f"{options} file={file}")
    masked = Masked(tiny, load_fitted(file), best(float(told["rate"])), told.get("fill", "affine")).route(*layers)
    assert same(masked(*values), made(*values))


@pytest.mark.full
@pytest.mark.parametrize("tiny", [KINDS["decoder, mask"], KINDS["encoder"]], ids=["decoder", "encoder"])
def test_sizes_may_vary(tiny: Tiny, fitted: Any) -> None:
    file, values = fitted(tiny), inputs(tiny, 2, 11, padded=True)
    made = routed(tiny.build(), values, f"rate=0.6 file={file}", dynamic_shapes=dynamic(values))
    masked = Masked(tiny, load_fitted(file), best(0.6)).route(0, 1, 2)
    for batch, length in ((3, 8), (2, 17)):
        values = inputs(tiny, batch, length, padded=True, seed=5)
        assert same(masked(*values), made(*values))


def test_all_tokens_are_the_dense_model_and_fewer_cost_less(fitted: Any) -> None:
    tiny = KINDS["decoder, flag"]
    file, values = fitted(tiny), inputs(tiny, 2, 20)
    whole = routed(tiny.build(), values, f"rate=1.0 file={file}")
    assert torch.equal(whole(*values), whole.dense(*values)) and "nothing to approximate" in whole.report.rewrites[0].reason
    nearly = routed(tiny.build(), values, f"rate=0.95 layers=1 fill=carry file={file}")
    flops = [routed(tiny.build(), values, f"rate={rate} fill=carry file={file}").flops for rate in (0.25, 0.5, 0.75)]
    assert flops == sorted(set(flops)) and flops[-1] < nearly.dense_flops


def test_rows_of_the_batch_are_their_own(fitted: Any) -> None:
    tiny = KINDS["encoder, post-norm"]
    file, values, order = fitted(tiny), inputs(tiny, 4, 9, padded=True), torch.tensor([3, 1, 0, 2])
    made = routed(tiny.build(), values, f"rate=0.5 file={file}")
    assert same(made(*values)[order], made(*(v[order] for v in values)))


def test_nan_stays_in_its_own_sequence() -> None:
    tiny = KINDS["encoder"]
    model, (ids,) = tiny.build(), inputs(tiny, 3, 9)
    model.tokens.weight[30] = torch.nan
    ids = ids.clamp(max=29)
    ids[1, 4] = 30
    made = routed(model, (ids,), "rate=0.4 fill=carry score=norm")
    assert made(ids).isnan().flatten(1).any(1).tolist() == [False, True, False]


@pytest.mark.full
def test_the_cache_holds_every_token_of_every_layer(fitted: Any) -> None:
    tiny = KINDS["decoder, cache"]
    values = inputs(tiny, 2, 9)
    made = routed(tiny.build(), values, f"rate=0.3 file={fitted(tiny)}")
    assert [k.shape[2] for k in made(*values)[1:]] == [9] * 6


@pytest.mark.full
def test_routers_of_mixture_of_depths_weigh_what_a_layer_adds(tmp_path: Path) -> None:
    """x + r(x) (layer(x) - x) for the k tokens with the largest r(x), with given routers."""
    tiny, values = KINDS["encoder"], inputs(KINDS["encoder"], 3, 8)
    tensors = {f"unit.{i}.router.weight": torch.randn(1, 16, generator=torch.Generator().manual_seed(i)) for i in (0, 2)}
    tensors |= {f"unit.{i}.router.bias": torch.tensor([0.1]) for i in (0, 2)}
    file = dyncc.save_parameters(tiny.build(), tensors, tmp_path / "routers")
    made = routed(tiny.build(), values, f"rate=0.5 layers=0,2 fill=carry weigh=true file={file}")
    masked = Masked(tiny, load_fitted(file), best(0.5), fill="carry", weigh=True).route(0, 2)
    assert same(masked(*values), made(*values))
    with pytest.raises(BadParameterFile, match="it holds no unit.1.router.weight; it was fitted by the plan 'given'"):
        routed(tiny.build(), values, f"rate=0.5 layers=1 fill=carry file={file}")


EVERYWHERE = Tiny(kind="decoder", returns="all", causal="flag")


def thresholds(found: Parameters, rate: float, capacity: float) -> Callable[[int], Callable[[Tensor, Tensor], Tensor]]:
    def at(layer: int) -> Callable[[Tensor, Tensor], Tensor]:
        level = torch.quantile(found.take(f"unit.{layer}.router.quantiles"), 1 - rate)

        def choose(score: Tensor, whole: Tensor) -> Tensor:
            runs = score > level
            return runs & (runs.cumsum(0) <= math.ceil(capacity * len(whole)))

        return choose

    return at


@pytest.mark.parametrize(("rate", "capacity"), [(0.5, 0.8), pytest.param(0.6, 0.6, marks=pytest.mark.full)])
def test_a_threshold_lets_tokens_run_whatever_follows_them(rate: float, capacity: float, fitted: Any) -> None:
    file, (ids,) = fitted(EVERYWHERE), inputs(EVERYWHERE, 3, 12)
    made = routed(EVERYWHERE.build(), (ids,), f"rate={rate} capacity={capacity} rule=threshold layers=1 file={file}")
    found = load_fitted(file)
    assert same(Masked(EVERYWHERE, found, thresholds(found, rate, capacity)(1)).route(1)(ids), made(ids))
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 31
    assert torch.equal(made(ids)[:, :-1], made(other)[:, :-1])


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ("", BadOptionValue, "need what `dyncc fit`"),
        ("rate=0.0", BadOptionValue, "a share of the tokens above 0.0 up to 1.0"),
        ("capacity=0.2 file=FILE", BadOptionValue, "between rate=0.5 and 1.0"),
        ("rule=threshold score=norm file=FILE", BadOptionValue, "thresholds are known of a fitted router only"),
        ("weigh=true file=FILE", BadOptionValue, "a router's score weighs what a layer adds"),
        ("layers=8 file=FILE", LayerOutOfRange, "layer 8 is out of range"),
        ("file=nowhere", BadParameterFile, "there is no such file"),
        ("file=OTHER", BadParameterFile, "it belongs to another model, or to other weights"),
    ],
)
def test_what_does_not_fit_is_told(options: str, kind: type[Exception], words: str, fitted: Any) -> None:
    tiny = KINDS["encoder"]
    options = options.replace("FILE", str(fitted(tiny))).replace("OTHER", str(fitted(KINDS["decoder, mask"].with_(seed=3))))
    with pytest.raises(kind, match=words):
        routed(tiny.build(), inputs(tiny, 2, 9), options)


def test_a_choice_that_looks_ahead_is_refused(fitted: Any) -> None:
    (ids,) = inputs(EVERYWHERE, 2, 9)
    with pytest.raises(RefusedError, match="covers all positions, and which tokens stay depends on later ones"):
        dyncc.optimize(EVERYWHERE.build(), (ids,), passes=f"route-tokens{{file={fitted(EVERYWHERE)}}}", strict=True, **REFERENCE)
    model, step = KINDS["decoder, cache"].build(), inputs(KINDS["decoder, cache"], 2, 6)
    _, *past = model(*step)
    text = f"route-tokens{{file={fitted(KINDS['decoder, cache'])}}}"
    with pytest.raises(RefusedError, match="a step of one token has no tokens to choose from"):
        dyncc.optimize(model, (step[0][:, :1], None, *past), passes=text, strict=True, **REFERENCE)


def test_the_command_line_tells_of_wrong_files(fitted: Any, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["from tiny import Tiny, inputs", "TINY = Tiny(returns='all')", "def make(): return TINY.build(), inputs(TINY, 2, 9)"]
    (tmp_path / "factory_of_routes.py").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    wide = {"unit.0.bias": torch.zeros(5), "unit.0.down.weight": torch.zeros(2, 5), "unit.0.up.weight": torch.zeros(5, 2)}
    dyncc.save_parameters(KINDS["encoder"].build(), wide, tmp_path / "wide")
    bad = {
        f"file={fitted(KINDS['decoder, flag'].with_(seed=2))}": "it belongs to another model, or to other weights",
        "file=wide layers=0 score=norm": "unit.0.bias is [5], the residual stream is 16 wide",
        "file=nowhere": "there is no such file",
    }
    for options, words in bad.items():
        code = cli.main(["explain", "factory_of_routes:make", "--passes", f"route-tokens{{{options}}}", "--engine", "reference"])
        out, err = capsys.readouterr()
        assert (code, out) == (2, "")
        assert err.strip().splitlines()[-1].startswith("error: ") and words in err.strip().splitlines()[-1]


@pytest.mark.full
@pytest.mark.parametrize("engine", ["inductor", "onnxruntime"])
def test_engines_agree(engine: str, fitted: Any) -> None:
    tiny = KINDS["decoder, mask"]
    file, values = fitted(tiny), inputs(tiny, 3, 11, padded=True)
    made = routed(tiny.build(), values, f"rate=0.4 file={file}", engine=engine)
    assert made.report.engine == engine
    assert same(made.reference(*values), made(*values))


@pytest.mark.full
def test_it_is_compiled_in_place_exported_saved_and_loaded(fitted: Any, tmp_path: Path) -> None:
    tiny = KINDS["decoder, mask"]
    file, values = fitted(tiny), inputs(tiny, 3, 11)
    made = routed(tiny.build(), values, f"rate=0.4 file={file}", dynamic_shapes=dynamic(values))
    written = made.export_onnx(tmp_path / "routed.onnx")
    assert all(row.error <= row.limit for row in written.parity) and len(written.inputs) == 1
    made.save(tmp_path / "saved")
    assert torch.equal(dyncc.load(tmp_path / "saved")(*values), made(*values))
    for engine in ("reference", "inductor"):
        torch._dynamo.reset()
        options = {"passes": f"route-tokens{{rate=0.4 file={file}}}", "engine": engine, "strict": True}
        fast = torch.compile(tiny.build(), backend="dyncc", options=options)
        assert same(made(*values), fast(*values))


@pytest.mark.full
def test_a_surrogate_of_full_rank_of_an_affine_layer_is_exact(tmp_path: Path) -> None:
    """A layer that is affine gives the dense result at any rate."""
    tiny = KINDS["encoder"]
    model, values = tiny.build(), inputs(tiny, 2, 9)
    block = model.blocks[1]
    for linear in (block.o, block.down):
        linear.weight.zero_()
    file = dyncc.fit(model, data=data(tiny, padded=False, count=8), plan="units{layers=1 rank=16 ridge=0.0}", output=tmp_path).path
    made = routed(model, values, f"rate=0.2 layers=1 file={file}")
    assert relative_error(model(*values), made(*values)) < 1e-4
    assert F.cosine_similarity(model(*values), made(*values), dim=-1).min() > 0.9999
