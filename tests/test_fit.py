"""dyncc.fit: maps, probes, surrogates and rankings in closed form against NumPy, streams that are cut off, and data that does not fit."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, Tiny, inputs
from torch import Tensor, nn

import dyncc
from dyncc import cli
from dyncc.errors import BadCalibration, BadOptionValue, BadParameterFile, BadParameters, LayerOutOfRange, NotFinite, UnknownFit
from dyncc.fitted import load_fitted
from dyncc.fitting.drops import divergence
from dyncc.fitting.moments import Moments, logistic, reduced_rank
from dyncc.kernels.route_rows import unit_scale

DECODER = Tiny(kind="decoder", returns="all", layers=3)
EVERYTHING = "exits{layers=0,1 probe=true} units{rank=5} drops"


def data(tiny: Tiny = DECODER, count: int = 4, padded: bool = True, length: int = 10) -> list[tuple[Tensor, ...]]:
    return [inputs(tiny, 2, length, padded, seed=seed) for seed in range(count)]


@torch.no_grad()
def states(model: nn.Module, calls: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """The state in front of each layer and behind the last one, real rows alone, by hooks."""
    found: list[list[Tensor]] = [[] for _ in range(len(model.blocks) + 1)]
    hooks = [block.register_forward_hook(lambda m, a, o, i=i: found[i + 1].append(o[0])) for i, block in enumerate(model.blocks)]
    hooks.append(model.blocks[0].register_forward_pre_hook(lambda m, a: found[0].append(a[0])))
    for call in calls:
        model(*call)
    for hook in hooks:
        hook.remove()
    real = [call[1].bool() if len(call) > 1 else torch.ones_like(call[0], dtype=torch.bool) for call in calls]
    return [torch.cat([x[r] for x, r in zip(rows, real, strict=True)]) for rows in found]


def numpy_ridge(x: Tensor, y: Tensor, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """The same minimum as an ordinary least-squares problem with rows for the penalty, by np.linalg.lstsq."""
    a, b = x.double().numpy(), y.double().numpy()
    a0, b0 = a - a.mean(0), b - b.mean(0)
    penalty = np.diag(np.sqrt(strength) * np.sqrt((a0**2).sum(0)))
    weight, *_ = np.linalg.lstsq(np.vstack([a0, penalty]), np.vstack([b0, np.zeros((a.shape[1], b.shape[1]))]), rcond=None)
    return weight, b.mean(0) - a.mean(0) @ weight


POST_NORM = pytest.param(Tiny(norm="post", returns="all"), False, marks=pytest.mark.full)


@pytest.mark.parametrize(("tiny", "padded"), [(DECODER, True), POST_NORM], ids=["decoder", "post-norm"])
def test_maps_and_surrogates_are_least_squares_of_the_models_own_states(tiny: Tiny, padded: bool, tmp_path: Path) -> None:
    model, calls = tiny.build(), data(tiny, padded=padded)
    dyncc.fit(model, data=calls, plan="exits{layers=0,1} units{rank=16}", output=tmp_path)
    found, rows = load_fitted(tmp_path), states(model, calls)
    for layer in (0, 1):
        weight, bias = numpy_ridge(rows[layer + 1], rows[-1], 0.001)
        np.testing.assert_allclose(found.take(f"exit.{layer}.map.weight").numpy().T, weight, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found.take(f"exit.{layer}.map.bias").numpy(), bias, rtol=1e-3, atol=1e-4)
    for layer in range(tiny.layers):
        weight, bias = numpy_ridge(rows[layer], rows[layer + 1] - rows[layer], 0.001)
        product = found.take(f"unit.{layer}.up.weight") @ found.take(f"unit.{layer}.down.weight")
        np.testing.assert_allclose(product.numpy().T, weight, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(found.take(f"unit.{layer}.bias").numpy(), bias, rtol=1e-3, atol=1e-3)


@pytest.mark.full
def test_a_routers_scores_rise_with_the_error_of_the_surrogate(tmp_path: Path) -> None:
    model, calls = DECODER.build(), data(count=12)
    dyncc.fit(model, data=calls, plan="units{rank=3 layers=1}", output=tmp_path)
    found, rows = load_fitted(tmp_path), states(model, calls)
    change = rows[2] - rows[1]
    guess = nn.functional.linear(rows[1] @ found.take("unit.1.down.weight").T, found.take("unit.1.up.weight"), found.take("unit.1.bias"))
    error = ((change - guess).norm(dim=1) / change.norm(dim=1)).log()
    weight, bias = numpy_ridge(unit_scale(rows[1]), error[:, None], 0.001)
    np.testing.assert_allclose(found.take("unit.1.router.weight").numpy(), weight.T, rtol=1e-2, atol=1e-3)
    scores = (unit_scale(rows[1]).double().numpy() @ weight + bias)[:, 0]
    assert np.corrcoef(scores, error.numpy())[0, 1] > 0.3
    quantiles = np.quantile(scores, np.linspace(0, 1, 101))
    np.testing.assert_allclose(found.take("unit.1.router.quantiles").numpy(), quantiles, rtol=1e-2, atol=1e-3)


def test_a_reduced_rank_map_is_the_best_of_its_rank_and_gets_better_with_it() -> None:
    torch.manual_seed(0)
    x = torch.randn(80, 6) @ torch.randn(6, 6)
    y = x @ torch.randn(6, 6) + torch.randn(80, 6)
    moments = Moments()
    moments.add(x[:30], y[:30])
    moments.add(x[30:], y[30:])
    weight = moments.ridge(0.0)
    kept = []
    for rank in range(1, 7):
        down, up = reduced_rank(moments, weight, rank)
        predicted = x.double() @ weight
        left, value, right = torch.linalg.svd(predicted - predicted.mean(0), full_matrices=False)
        best = left[:, :rank] * value[:rank] @ right[:rank]
        centred = x.double() - x.double().mean(0)
        torch.testing.assert_close(centred @ down @ up, best)
        kept.append(moments.explained(down @ up))
    assert kept == sorted(kept) and kept[-1] == pytest.approx(moments.explained(weight))


@pytest.mark.full
def test_a_probe_is_a_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    torch.manual_seed(1)
    x = torch.randn(300, 4) * torch.tensor([1.0, 5.0, 0.1, 2.0]) + 3
    target = torch.sigmoid(x @ torch.tensor([0.5, -0.2, 4.0, 0.0]) - 12.9) > torch.rand(300)
    weight, bias = logistic(x, target, strength=1e-3)
    spread, mean = x.double().std(0, unbiased=False), x.double().mean(0)
    known = LogisticRegression(C=1 / (1e-3 * 300), tol=1e-10, max_iter=1000).fit(((x.double() - mean) / spread).numpy(), target.numpy())
    np.testing.assert_allclose((weight * spread).numpy(), known.coef_[0], rtol=1e-3, atol=1e-4)
    assert float(weight @ mean + bias) == pytest.approx(known.intercept_[0], rel=1e-3, abs=1e-3)


@pytest.mark.full
def test_one_class_alone_gives_a_probe_that_says_so() -> None:
    weight, bias = logistic(torch.randn(20, 3), torch.ones(20))
    assert torch.isfinite(weight).all() and float(bias) > 3


@torch.no_grad()
def test_a_map_for_a_class_token_is_fitted_on_that_row_alone(tmp_path: Path) -> None:
    tiny = Tiny(kind="encoder", returns="first")
    model, calls = tiny.build(), data(tiny, count=16)
    kept: list[list[Tensor]] = [[], []]
    for layer, to in zip((1, -1), kept, strict=True):
        model.blocks[layer].register_forward_hook(lambda m, a, o, to=to: to.append(o[0][:, 0]))
    [model(*call) for call in calls]
    dyncc.fit(tiny.build(), data=calls, plan="exits{layers=1}", output=tmp_path)
    weight, bias = numpy_ridge(*(torch.cat(rows) for rows in kept), 0.001)
    found = load_fitted(tmp_path)
    np.testing.assert_allclose(found.take("exit.1.map.weight").numpy().T, weight, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.take("exit.1.map.bias").numpy(), bias, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("returns", ["last", pytest.param("picked", marks=pytest.mark.full)])
def test_a_probe_reads_the_row_that_the_head_reads(returns: str, tmp_path: Path) -> None:
    tiny = Tiny(kind="decoder", returns=returns)
    model, calls = tiny.build(), data(tiny, count=12, padded=False)
    model.tokens.weight.mul_({"last": 8, "picked": 1}[returns])  # so that answers differ from row to row
    dyncc.fit(model, data=calls, plan="exits{layers=0 probe=true}", output=tmp_path)
    found, kept = load_fitted(tmp_path), list[Tensor]()
    hooks = [model.blocks[i].register_forward_hook(lambda m, a, o: kept.append(o[0])) for i in (0, tiny.layers - 1)]
    answers = torch.cat([model(*call).argmax(-1) for call in calls])
    [hook.remove() for hook in hooks]
    ids = torch.cat([call[0] for call in calls])
    read = ids.argmax(1) if returns == "picked" else torch.full((len(ids),), -1)
    rows = torch.cat(kept[::2])[torch.arange(len(ids)), read]
    mapped = nn.functional.linear(rows, found.take("exit.0.map.weight"), found.take("exit.0.map.bias"))
    agrees = model.head(model.norm(mapped)).argmax(-1) == answers
    weight, bias = logistic(rows, agrees)
    assert 0 < int(agrees.sum()) < len(agrees)
    torch.testing.assert_close(found.take("exit.0.probe.weight")[0], weight.float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.take("exit.0.probe.bias"), bias.float()[None], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_drops_are_the_divergence_of_models_without_the_layer(tmp_path: Path) -> None:
    model, calls = DECODER.build(), data(padded=False)
    dyncc.fit(model, data=calls, plan="drops", output=tmp_path)
    found = load_fitted(tmp_path).take("drop.divergence")
    for layer in range(DECODER.layers):
        cut = DECODER.build()
        del cut.blocks[layer]
        pairs = [(model(*call).flatten(0, 1), cut(*call).flatten(0, 1)) for call in calls]
        wanted = sum(divergence(a, b, "kl") for a, b in pairs) / sum(len(a) for a, _ in pairs)
        assert float(found[layer]) == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.full
def test_the_same_data_gives_the_same_file(tmp_path: Path) -> None:
    made = [dyncc.fit(DECODER.build(), data=data(), plan=EVERYTHING, output=tmp_path / name) for name in "ab"]
    assert made[0].path.read_bytes() == made[1].path.read_bytes()
    assert load_fitted(made[0].path).plan == made[0].plan == EVERYTHING
    assert made[0].batches == 4 and made[0].rows == sum(int(call[1].sum()) for call in data())


def cut_off(calls: list[Any], after: int) -> Iterator[Any]:
    yield from calls[:after]
    raise KeyboardInterrupt


def test_a_fit_that_was_cut_off_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    whole = dyncc.fit(DECODER.build(), data=data(), plan=EVERYTHING, output=tmp_path / "whole")
    assert load_fitted(whole.path).plan == EVERYTHING
    with pytest.raises(KeyboardInterrupt):
        dyncc.fit(DECODER.build(), data=cut_off(data(), 3), plan=EVERYTHING, output=tmp_path / "cut", every=0)
    assert (tmp_path / "cut" / "state.safetensors").is_file() and not (tmp_path / "cut" / "parameters.safetensors").exists()
    seen: list[int] = []
    resumed = dyncc.fit(
        DECODER.build(), data=data(), plan=EVERYTHING, output=tmp_path / "cut", progress=lambda what, done, total: seen.append(done)
    )
    assert seen == [4], "three batches were not added up again"
    assert [p.name for p in (tmp_path / "cut").iterdir()] == ["parameters.safetensors"]
    assert resumed.path.read_bytes() == whole.path.read_bytes()


def interrupted(folder: Path, plan: str = "drops") -> Path:
    with pytest.raises(KeyboardInterrupt):
        dyncc.fit(DECODER.build(), data=cut_off(data(), 2), plan=plan, output=folder, every=0)
    return folder


@pytest.mark.full
def test_a_state_is_taken_by_its_own_fit_alone(tmp_path: Path) -> None:
    folder = interrupted(tmp_path)
    with pytest.raises(BadCalibration, match="is the state of a fit of the plan 'drops'; remove it"):
        dyncc.fit(DECODER.build(), data=data(), plan="units{rank=4}", output=folder)
    with pytest.raises(BadCalibration, match="another model, or other weights; remove it"):
        dyncc.fit(DECODER.with_(seed=5).build(), data=data(), plan="drops", output=folder)
    with pytest.raises(BadCalibration, match="the first 2 batches are not those"):
        dyncc.fit(DECODER.build(), data=data()[1:], plan="drops", output=folder)
    with pytest.raises(BadCalibration, match="the data has 1 batches, the state in .* saw 2"):
        dyncc.fit(DECODER.build(), data=data()[:1], plan="drops", output=folder)
    (folder / "state.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(BadCalibration, match="left of an interrupted fit, but it cannot be read"):
        dyncc.fit(DECODER.build(), data=data(), plan="drops", output=folder)


BAD_PLANS = {
    "exits{layers=3}": (LayerOutOfRange, "layer 3 is out of range: the model's 3 layers are numbered 0 to 2"),
    "exits{layers=2}": (BadOptionValue, "layer 2 is the last; an exit behind it skips nothing"),
    "units{rank=17}": (BadOptionValue, "the residual stream is 16 wide"),
    "units{rank=0}": (BadOptionValue, "1 is the least"),
    "units{ridge=-1.0}": (BadOptionValue, "a number of 0 or more"),
    "exit": (UnknownFit, "unknown part 'exit' of a plan to fit; did you mean 'exits'?; choose from exits, units, drops"),
    "drops drops": (BadOptionValue, "each once"),
    "": (BadOptionValue, "name one or more of"),
}


@pytest.mark.parametrize("plan", BAD_PLANS)
def test_a_plan_that_does_not_fit_is_told(plan: str, tmp_path: Path) -> None:
    kind, words = BAD_PLANS[plan]
    with pytest.raises(kind, match=words.replace("?", r"\?")):
        dyncc.fit(DECODER.build(), data=data(count=1, padded=False), plan=plan, output=tmp_path)


def test_data_that_does_not_fit_is_told(tmp_path: Path) -> None:
    model, good = DECODER.build(), data(padded=False, count=1)
    bad: dict[str, tuple[list[Any], str]] = {
        "empty": ([], "no calibration data is given"),
        "hollow": ([torch.zeros(0, 4, dtype=torch.long)], "batch 0 holds a tensor without entries"),
        "kind": ([3], "batch 0 is a int; give a tensor, a tuple of arguments or a dict of keywords"),
        "later size": ([*good, (torch.zeros(2, 7, dtype=torch.long),)], "batch 1 is not like the first one: .*is 7, captured was 10"),
        "arguments": ([*good, (good[0][0], good[0][0])], "batch 1 is not like the first one: the call's arguments are arranged in another"),
        "type": ([torch.rand(2, 5)], "the model does not take the first batch: torch.export failed"),
    }
    for items, words in bad.values():
        with pytest.raises(BadCalibration, match=words):
            dyncc.fit(model, data=items, plan="drops", output=tmp_path)
    with pytest.raises(BadCalibration, match="no layers are found in the model"):
        dyncc.fit(nn.Linear(4, 4), data=[torch.rand(2, 4)], plan="drops", output=tmp_path)


def test_nan_activations_are_told_with_their_place(tmp_path: Path) -> None:
    ids = torch.full((1, 6), 3)
    places = {"tokens.weight": ("drops", "in front of layer 0, batch 1"), "head.bias": ("drops", "at the output, batch 0")}
    places["blocks.1.up.bias"] = ("exits{layers=1}", "behind layer 1, batch 0")
    for name, (plan, words) in places.items():
        model = DECODER.build()
        with torch.no_grad():
            model.get_parameter(name)[0] = torch.nan
        with pytest.raises(NotFinite, match=f"{words} of the data gives NaN"):
            dyncc.fit(model, data=[ids, ids * 0], plan=plan, output=tmp_path)


def test_files_that_are_no_parameters_of_the_model_are_told(tmp_path: Path) -> None:
    made = dyncc.fit(DECODER.build(), data=data(count=1), plan="exits{layers=0}", output=tmp_path)
    found = load_fitted(made.path)
    found.check_model(list(DECODER.build().parameters()))
    with pytest.raises(BadParameterFile, match="it belongs to another model, or to other weights: 5[0-9] of 5[0-9] parameters differ"):
        found.check_model(list(DECODER.with_(seed=3).build().parameters()))
    with pytest.raises(BadParameterFile, match="it holds no unit.0.bias; it was fitted by the plan 'exits{layers=0}'"):
        found.take("unit.0.bias")
    with pytest.raises(BadParameterFile, match=r"exit.0.map.bias is \[16\], the residual stream is 8 wide"):
        found.check_width(8)
    with pytest.raises(BadParameterFile, match="there is no such file"):
        load_fitted(tmp_path / "nowhere")
    whole = made.path.read_bytes()
    made.path.write_bytes(whole[:-4] + b"\0\0\1\0")
    with pytest.raises(BadParameterFile, match="it is damaged"):
        load_fitted(made.path)
    save_file({"x": torch.zeros(2)}, made.path)
    with pytest.raises(BadParameterFile, match="it is no file of fitted parameters"):
        load_fitted(made.path)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "it holds no tensors"),
        ({"exit.0.head": torch.zeros(2)}, "'exit.0.head' is no name of a parameter"),
        ({"exit.0.map.weight": torch.zeros(4, 3)}, r"exit.0.map.weight is float32\[4, 3\]; floating point \[4, 4\] is wanted"),
        ({"exit.0.map.bias": torch.zeros(4), "exit.1.map.bias": torch.zeros(5)}, r"exit.1.map.bias is float32\[5\]"),
        ({"exit.0.probe.weight": torch.zeros(2, 4)}, r"exit.0.probe.weight is float32\[2, 4\]; floating point \[1, "),
        ({"unit.0.bias": torch.full((3,), torch.nan)}, "unit.0.bias holds NaN or infinite numbers"),
        ({"unit.0.bias": torch.zeros(3, dtype=torch.long)}, r"unit.0.bias is int64\[3\]"),
    ],
)
def test_parameters_of_wrong_shapes_are_not_saved(tensors: dict[str, Tensor], words: str, tmp_path: Path) -> None:
    with pytest.raises(BadParameters, match=words):
        dyncc.save_parameters(DECODER.build(), tensors, tmp_path / "given")


FACTORY = """
    import sys
    import torch
    from tiny import Tiny, inputs

    TINY = Tiny(kind="decoder", returns="all", layers=3)
    def make(): return TINY.build(), inputs(TINY, 2, 10)
    def calls(): return [inputs(TINY, 2, 10, seed=seed) for seed in range(3)]
    def none(): return []
    def number(): return 3
    def sizes(): return [torch.zeros(2, n, dtype=torch.long) for n in (10, 8)]
    def broken():
        model, values = make()
        with torch.no_grad():
            model.blocks[0].up.bias[0] = torch.nan
        return model, values
"""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    (tmp_path / "factory_of_fit.py").write_text(textwrap.dedent(FACTORY))
    save_file({"ids": torch.randint(0, VOCABULARY, (7, 10))}, tmp_path / "ids.safetensors")
    save_file({"ids": torch.randint(0, VOCABULARY, (1, 10))}, tmp_path / "few.safetensors")
    save_file({"ids": torch.zeros(4, 10), "mask": torch.zeros(3, 10)}, tmp_path / "uneven.safetensors")
    (tmp_path / "words.txt").write_text("some words")
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        code = cli.main(["fit", *words])
        return (code, *capsys.readouterr())

    yield call
    sys.modules.pop("factory_of_fit", None)


def test_the_command_writes_what_the_function_writes(command: Any, tmp_path: Path) -> None:
    code, out, err = command("factory_of_fit:make", "--data", "factory_of_fit:calls", "--plan", "exits{layers=1}", "-o", "params")
    assert code == 0 and "exit 1: explained" in out and "calibration batches" in err
    calls = [inputs(DECODER, 2, 10, seed=seed) for seed in range(3)]
    made = dyncc.fit(DECODER.build(), data=calls, plan="exits{layers=1}", output=tmp_path / "other")
    assert load_file(tmp_path / "params/parameters.safetensors").keys() == load_file(made.path).keys()
    assert (tmp_path / "params/parameters.safetensors").read_bytes() == made.path.read_bytes()
    code, out, _ = command("factory_of_fit:make", "--data", "ids.safetensors", "--plan", "drops", "-o", "params", "--json")
    assert code == 0 and '"batches": 3' in out


BAD_COMMANDS = {
    "empty data": (["make", "factory_of_fit:none", "drops"], "cannot calibrate: no calibration data is given"),
    "data of another kind": (["make", "factory_of_fit:number", "drops"], "returned a int; return an iterable of calls"),
    "data of two sizes": (["make", "factory_of_fit:sizes", "drops"], "batch 1 is not like the first one"),
    "no data": (["make", "nowhere.safetensors", "drops"], "data 'nowhere.safetensors': no such file (DATA is module:function"),
    "no function": (["make", "factory_of_fit:cals", "drops"], "has no function 'cals'; did you mean 'calls'"),
    "too few rows": (["make", "few.safetensors", "drops"], "fewer rows than a batch of the model's example, which has 2"),
    "uneven rows": (["make", "uneven.safetensors", "drops"], "every tensor needs as many rows as the others"),
    "text without a tokenizer": (["make", "words.txt", "drops"], "is text, which the tokenizer of a model folder reads"),
    "layer": (["make", "factory_of_fit:calls", "exits{layers=9}"], "layer 9 is out of range"),
    "part": (["make", "factory_of_fit:calls", "exitz"], "unknown part 'exitz' of a plan to fit; did you mean 'exits'?"),
    "nan": (["broken", "factory_of_fit:calls", "exits{layers=0}"], "behind layer 0, batch 0 of the data gives NaN"),
}


@pytest.mark.parametrize(("words", "message"), BAD_COMMANDS.values(), ids=BAD_COMMANDS)
def test_bad_use_of_the_command_is_one_line_and_exit_code_2(command: Any, words: list[str], message: str) -> None:
    model, calls, plan = words
    code, out, err = command(f"factory_of_fit:{model}", "--data", calls, "--plan", plan, "-o", "params")
    assert (code, out) == (2, "")
    assert err.strip().splitlines()[-1].startswith("error: ") and message in err.strip().splitlines()[-1]


@pytest.mark.full
def test_text_is_read_by_the_tokenizer_of_a_model_folder(command: Any, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "some", "words"]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words) + 1, **sizes, use_cache=False)).save_pretrained(tmp_path / "folder")
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]").save_pretrained(tmp_path / "folder")
    (tmp_path / "long.txt").write_text("one two three four five six seven eight nine ten " * 20)
    code, out, err = command("folder", "--data", "long.txt", "--plan", "exits{layers=0}", "-o", "params", "--length", "32", "--json")
    assert code == 0, err
    assert '"batches": 6' in out and '"rows": 192' in out
    code, _, err = command("folder", "--data", "words.txt", "--plan", "drops", "-o", "params")
    assert code == 2 and "holds 2 tokens, fewer than a row of 512" in err
