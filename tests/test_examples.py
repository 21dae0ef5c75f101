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
RUN_HERE = {"encoder_pruning", "generate_smollm2", "onnx_generate", "passkey", "vit_random"}


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
