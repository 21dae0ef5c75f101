"""Every example runs, on the reference engine, and does what it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_onnx import decoder

import dyncc
from dyncc.decoding import Prefill

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RUN_HERE = {"encoder_pruning", "exit_digits", "generate_smollm2", "onnx_generate", "passkey", "vit_random"}


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """`examples/digits` is found as it is by a script beside it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == RUN_HERE


def test_encoder_pruning() -> None:
    found = load_example("encoder_pruning").main(["--engine", "reference", "--tokens", "128"])
    assert found["flops_left"] < 0.9 and 0.5 < found["smallest_cosine"] <= found["mean_cosine"] < 1.0


@pytest.mark.full
def test_generate_smollm2() -> None:
    torch._dynamo.reset()
    found = load_example("generate_smollm2").main(["--engine", "reference", "--tokens", "8"])
    assert found["same"] and found["graphs"] in (2, 3)
    for report in found["reports"]:
        assert report.fallback is None and report.found_attention == report.expected_attention == 30


def test_vit_random() -> None:
    found = load_example("vit_random").main(["--engine", "reference"])
    assert found["flops"] < found["dense_flops"] and any(rewrite.applied for rewrite in found["report"].rewrites)
    assert found["pruned"].shape == found["dense"].shape and torch.isfinite(found["pruned"]).all()


@pytest.mark.usefixtures("digits")
def test_canvases_of_a_split_show_its_digits_and_are_the_same_for_the_same_seed() -> None:
    from digits.canvases import NEAR, splits

    drawn, again = (splits()[2].each(2) for _ in range(2))
    assert drawn.images.shape == (2 * 397, 1, 64, 64) and torch.equal(drawn.images, again.images)
    assert drawn.digits.bincount().tolist() == [2] * 397
    test = splits()[2]
    assert torch.equal(drawn.labels, test.labels[drawn.digits])
    small = drawn.images[:, 0, ::4, ::4]
    windows = small.unfold(1, 8, 2).unfold(2, 8, 2).flatten(1, 2)
    hidden = (test.images[drawn.digits][:, None] - windows).clamp(min=0).amax((2, 3)).amin(1)
    assert hidden.max() < 0.7, "somewhere the whole digit is at least as bright as it was drawn, but for noise"
    near = (test.images[drawn.digits][:, None] - windows[:, [0, 1, 5]]).clamp(min=0).amax((2, 3)).amin(1) < 0.7
    assert abs(near.float().mean() - NEAR) < 0.05, "the share that stands at the upper left"


@pytest.mark.usefixtures("digits")
def test_a_class_token_sees_the_canvas_one_patch_a_layer() -> None:
    from digits.classifier import Classifier

    torch.manual_seed(0)
    model, images = Classifier().eval(), torch.zeros(1, 1, 64, 64, requires_grad=True)
    seen = []
    for layer in range(5):
        (grad,) = torch.autograd.grad(model.states(images)[0][0, layer].square().sum(), images)
        seen.append(int((grad[0, 0].abs() > 0).sum()))
    assert seen == sorted(set(seen)) and seen[0] > 0, seen


@pytest.mark.usefixtures("digits")
def test_intervals_and_the_trial_of_a_risk() -> None:
    from digits.intervals import clustered, risk_held

    digits = torch.arange(40).repeat_interleave(25)
    alike, apart = (digits % 2 == 0).float(), (torch.arange(1000) % 2 == 0).float()
    wide, narrow = clustered(alike, digits), clustered(apart, digits)
    assert wide[0] == narrow[0] == 50 and wide[2] - wide[1] > 10 * (narrow[2] - narrow[1]), "what is alike within a digit tells less"
    torch.manual_seed(0)
    digits, full = torch.arange(400).repeat_interleave(4), torch.randn(1600, 10) * 4
    early = full + 2.0 * torch.randn(1600, 10)
    found = risk_held([early, full], digits, 0.05, 0.9, 5)
    differs = (early.argmax(-1) != full.argmax(-1)).float().mean().item()
    assert differs > 0.1 and found["broken"] <= found["bound"] and max(found["differs"]) < differs
    assert found["broken"] == sum(x > 0.05 for x in found["differs"]) and len(found["thresholds"]) == 5


@pytest.mark.full
@pytest.mark.usefixtures("digits")
def test_exit_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardly trained: compiled exits do what the eager reference does, and the second run takes the kept weights."""
    monkeypatch.setenv("DYNCC_CACHE_DIR", str(tmp_path))
    few = {"steps": 2, "times": 1, "engines": "reference", "batches": "1,4", "pairs": 1, "cuts": 4, "fitted": 128, "draws": 2}
    arguments = [f"--{name}={value}" for name, value in few.items()]
    example = load_example("exit_digits")
    first, again = example.main(arguments), example.main(arguments)
    assert len(list((tmp_path / "models").glob("digits-2-*.safetensors"))) == 1
    assert first["cuts"] == again["cuts"] and sum(first["histogram"]) == 397
    for batch, rows in ((1, 397), (4, 396)):
        found = first[f"reference, batch {batch}"]
        assert found["rows"] == rows and found["elsewhere"] == 0
    assert first["threshold"] == again["threshold"] and len(first["promise"]["differs"]) == 2


@pytest.mark.full
def test_onnx_generate_gives_the_eager_tokens_from_two_files(tmp_path: Path) -> None:
    example, model, prompt = load_example("onnx_generate"), decoder(), [5, 17, 42, 8]
    written = example.export(model, tmp_path, longest=128)
    assert written[1].fused["GroupQueryAttention"] == 2 and written[1].fused["shareable"]
    eager = model.generate(torch.tensor([prompt]), max_new_tokens=20, min_new_tokens=20, do_sample=False)[0, len(prompt) :].tolist()
    assert example.generate(tmp_path, prompt, tokens=20) == eager


@pytest.mark.full
def test_onnx_generate_on_the_real_model() -> None:
    from dyncc.models import load_smollm2

    found = load_example("onnx_generate").main(["The ocean is"])
    model, tokenizer = load_smollm2()
    prompt = tokenizer("The ocean is", return_tensors="pt")["input_ids"]
    assert found == model.generate(prompt, max_new_tokens=64, do_sample=False)[0, prompt.shape[1] :].tolist()


@pytest.mark.full
def test_a_pruned_prompt_of_the_real_model_exports_and_matches(tmp_path: Path) -> None:
    """PromptDistill: layers behind 14 read 64 of 192 rows; keys of all layers are returned."""
    from torch.export import Dim

    from dyncc.models import english_tokens, load_smollm2

    model, tokenizer = load_smollm2()
    ids = english_tokens(tokenizer)[:192][None]
    sizes = ({1: (length := Dim("length", min=2, max=8192))}, {1: length})
    passes = "simplify-mask promptdistill{layers=14 keep=64} slice-last-token drop-repeat-kv"
    call = (ids, torch.ones_like(ids))
    made = dyncc.optimize(Prefill(model, keys=True), call, passes=passes, engine="reference", dynamic_shapes=sizes)
    assert [r.applied for r in made.report.rewrites if r.name in ("prune-tokens", "slice-last-token")] == [True, True]
    written = made.export_onnx(tmp_path / "prompt.onnx")
    assert len({row.sizes for row in written.parity}) == 3 and len(written.parity) == 3 * 61
    assert all(row.holds for row in written.parity), [str(row) for row in written.parity if not row.holds]


@pytest.mark.full
def test_passkey() -> None:
    found = load_example("passkey").main(["dense", "snapkv{budget=512}", "--tokens", "256", "--trials", "2"])
    assert found == {"dense": 1.0, "snapkv{budget=512}": 1.0}  # the budget holds the whole text
