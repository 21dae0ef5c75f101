"""select-kv by rotary pairs (FASA): what calibration finds, what the pass computes, and files that it does not take."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from test_onnx import GROUPS, HEADS, LAYERS, STEP_SIZES, WIDTH, decoder, step
from test_select_kv import MaskedForm, close, optimized
from torch import Tensor
from torch.nn import functional as F

import dyncc
from dyncc.calibrate import agreements
from dyncc.decoding import Decode
from dyncc.errors import BadCalibration, BadOptionValue, BadPairFile, OutputNotWritable
from dyncc.kernels.select_keys import key_scores, pair_channels, pair_scores
from dyncc.pair_order import PairOrder, load_pairs
from dyncc.passes.select_kv import SelectKV
from dyncc.rewrite import Context, apply_pass

pytestmark = pytest.mark.usefixtures("no_grad")

IDS = torch.randint(3, 99, (2, 48), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made for the small decoder, whose heads have 8 pairs."""
    return dyncc.calibrate_pairs(decoder(), [IDS, IDS.flip(1)], tmp_path_factory.mktemp("pairs") / "pairs.safetensors", top=8, rows=8)


def drawn(keys: int = 30) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 1, 8, generator=generator), torch.randn(2, 2, keys, 8, generator=generator)


@pytest.mark.parametrize("share", ["head", "group", "layer"])
def test_shares_of_disjoint_pairs_add_up_to_the_logits(share: str) -> None:
    q, k = drawn()
    for layout in ("half", "interleaved"):
        order = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(h)) for h in range(4)])
        channels = torch.tensor(pair_channels(8, layout, 8))[order]
        parts = [pair_scores(q, k, channels[:, some].flatten(1), share) for some in (slice(0, 1), slice(1, 4))]
        torch.testing.assert_close(sum(parts), key_scores(q, k, None, "logits", share, 1.0))
        torch.testing.assert_close(pair_scores(q, k, channels.flatten(1), share), key_scores(q, k, None, "logits", share, 1.0))


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_agreement_counts_the_best_keys_that_a_pair_finds_alone(layout: str) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, 3, 20, 8, generator=generator) for _ in range(2))
    channels = pair_channels(8, layout, 8)
    q[:, 1] = 0.0
    q[:, 1, :, channels[2]] = 1.0  # of this head one pair alone has a say
    found, at = agreements(q, k, channels, 4, 5), [10, 12, 14, 16, 19]
    for head in range(3):
        for number, pair in enumerate(channels):
            shared = 0
            for row, i in [(row, i) for row in range(2) for i in at]:
                whole, part = q[row, head, i] @ k[row, head, : i + 1].T, q[row, head, i, list(pair)] @ k[row, head, : i + 1, list(pair)].T
                shared += len(set(whole.topk(4).indices.tolist()) & set(part.topk(4).indices.tolist()))
            if head != 1 or number == 2:
                assert found[head, number].item() == pytest.approx(shared / (4 * 2 * len(at)))
    assert found[1, 2] == 1.0


class PairForm(MaskedForm):
    """SDPA that hides what the first pairs of a file do not choose."""

    def choose(self, q: Tensor, k: Tensor, seen: Tensor) -> Any:
        raw = load_file(str(self.passed.file))
        layer, keep = self.calls - 1, self.passed.pairs
        only = torch.zeros(HEADS, WIDTH)
        for head in range(HEADS):
            for pair in raw["pairs"][layer, head, :keep].tolist():
                only[head, [pair, pair + WIDTH // 2]] = 1.0
        self.passed_score = q * only[None, :, None]
        plain = MaskedForm(SelectKV(**{**vars(self.passed), "score": "logits", "file": None}), self.plain)
        return plain.choose(self.passed_score, k, seen)


@pytest.mark.parametrize(
    ("pairs", "share"), [(3, "head"), pytest.param(1, "group", marks=pytest.mark.full), pytest.param(8, "layer", marks=pytest.mark.full)]
)
def test_it_equals_its_masked_form(file: Path, pairs: int, share: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = step(24)
    made = optimized(call, f"select-kv{{budget=7 score=pairs share={share} sinks=1 recents=2 pairs={pairs} file={file}}}")
    rewrite = made.report.rewrites[0]
    assert rewrite.applied and (rewrite.found, rewrite.expected) == (LAYERS, LAYERS), rewrite.reason
    passed = SelectKV(budget=7, score="pairs", share=share, sinks=1, recents=2, pairs=pairs, file=str(file))  # type: ignore[arg-type]
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", PairForm(passed, F.scaled_dot_product_attention))
        expected = Decode(decoder())(*call)
    close(made(*call), expected)
    assert (made(*call)[0] - Decode(decoder())(*call)[0]).abs().max() > 1e-3


@pytest.mark.full
def test_all_pairs_are_the_exact_choice_and_all_keys_the_dense_model(file: Path) -> None:
    text = f"fasa{{budget=36 pairs=8 file={file}}}"
    made, exact = (optimized(step(60), t, STEP_SIZES) for t in (text, "select-kv{budget=36 score=logits share=head sinks=0 recents=0}"))
    for keys in (2, 20, 35, 50, 77):
        close(made(*step(keys)), (exact if keys > 35 else Decode(decoder()))(*step(keys)))


@pytest.mark.full
def test_batch_and_padding_do_not_change_a_row(file: Path) -> None:
    ids, mask, *past = step(24)
    made = optimized((ids, mask, *past), f"fasa{{budget=8 pairs=3 file={file}}}", STEP_SIZES)
    both = made(ids, mask, *past)[0]
    torch.testing.assert_close(made(ids[[1, 0]], mask[[1, 0]], *(t[[1, 0]] for t in past))[0][[1, 0]], both, rtol=1e-4, atol=1e-5)
    other = [t.clone() for t in past]
    for t in other:
        t[0, :, :3], t[1] = 50.0, -t[1]
    torch.testing.assert_close(made(ids, mask, *other)[0][:1], both[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_it_exports_to_onnx_is_saved_and_inductor_agrees(file: Path, tmp_path: Path) -> None:
    text = f"fasa{{budget=8 pairs=3 file={file}}}"
    made = optimized(step(40), text, STEP_SIZES)
    written = made.export_onnx(tmp_path / "step.onnx")
    assert len({row.sizes for row in written.parity}) == 3 and all(row.holds for row in written.parity)
    again = dyncc.load(made.save(tmp_path / "saved"))
    fast = dyncc.optimize(Decode(decoder()), step(40), passes=text, evidence="numeric", dynamic_shapes=STEP_SIZES)
    for keys in (9, 33):
        close(fast(*step(keys)), made(*step(keys)))
        close(again(*step(keys)), made(*step(keys)))


def test_cost_is_the_chosen_channels_of_all_keys_and_the_chosen_keys(file: Path) -> None:
    made = optimized(step(40), f"fasa{{budget=8 pairs=2 file={file}}}")
    product = 2 * HEADS
    saved = product * 2 * WIDTH * 41 - product * 4 * 41 - product * 2 * WIDTH * 8
    assert made.report.flops["dense"] - made.report.flops["now"] == 2 * LAYERS * saved


@pytest.mark.full
def test_generation_takes_the_file_and_not_with_other_weights(file: Path) -> None:
    torch._dynamo.reset()
    model, text = decoder(eos_token_id=None), f"fasa{{budget=100 pairs=2 file={file}}}"
    expected = model.generate(IDS, max_new_tokens=8, do_sample=False)
    model.compile(backend="dyncc", options={"engine": "reference"})
    assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False, past_key_values=dyncc.KVCache(text)), expected)
    assert dyncc.reports()[-1].rewrites[0].applied
    model.lm_head.weight.data.add_(1.0)
    torch._dynamo.reset()
    with pytest.raises(BadPairFile, match="1 of 21 parameters differ"):
        model.generate(IDS, max_new_tokens=8, do_sample=False, past_key_values=dyncc.KVCache(text))
    torch._dynamo.reset()


def refused(path: Path, words: str, model: Any = None) -> None:
    with pytest.raises(BadPairFile, match=words) as caught:
        dyncc.optimize(Decode(model or decoder()), step(24), passes=f"fasa{{budget=8 pairs=2 file={path}}}", engine="reference")
    assert str(path) in str(caught.value) and "dyncc.calibrate_pairs writes such files" in str(caught.value)


def test_files_that_do_not_fit_are_told(file: Path, tmp_path: Path) -> None:
    refused(tmp_path / "none", "there is no such file")
    damaged = Path(shutil.copy(file, tmp_path / "damaged"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x07")
    refused(damaged, "it is damaged: its numbers do not give its checksum")
    damaged.write_bytes(file.read_bytes()[:-9])
    refused(damaged, "it cannot be read")
    save_file({"pairs": torch.zeros(2), "channels": torch.zeros(2)}, tmp_path / "other")
    refused(tmp_path / "other", "it is no file of rotary pairs")
    save_file({"weights": torch.zeros(2)}, tmp_path / "other")
    refused(tmp_path / "other", "it is no file of rotary pairs of this version")
    order = load_pairs(file)
    PairOrder(order.pairs[:1], order.channels, order.parameters).save(tmp_path / "short", {})
    refused(tmp_path / "short", "it is for 1 attentions of 4 heads of width 16, the graph has 2 of 4 heads of width 16")
    refused(file, "parameters differ", decoder(initializer_range=0.5))


def test_options_that_do_not_fit_are_told(file: Path) -> None:
    with pytest.raises(BadOptionValue, match="score=pairs needs the file"):
        dyncc.optimize(Decode(decoder()), step(24), passes="fasa", engine="reference")
    with pytest.raises(BadOptionValue, match="pairs=9 is not valid: a head has 8 pairs"):
        dyncc.optimize(Decode(decoder()), step(24), passes=f"fasa{{pairs=9 file={file}}}", engine="reference")


def test_it_is_found_again_as_it_was_written(file: Path) -> None:
    order = load_pairs(file)
    assert order.sizes == (LAYERS, HEADS, WIDTH) and order.channels.tolist() == [[i, i + 8] for i in range(8)]
    assert torch.equal(order.pairs.sort(dim=2).values, torch.arange(8).expand(LAYERS, HEADS, 8))
    dense = dyncc.optimize(Decode(decoder()), step(24), passes="", engine="reference", evidence="off")._outcome.dense
    passed = SelectKV(budget=8, score="pairs", file=str(file), sinks=0, recents=0, pairs=2)
    assert apply_pass(dense, passed, Context()).applied  # nothing is known of the weights' values
    assert GROUPS < HEADS  # heads of a group have channels of their own


@pytest.mark.parametrize(
    ("kind", "changes", "channels"),
    [
        ("Cohere", {}, [(2 * i, 2 * i + 1) for i in range(8)]),
        ("GPTNeoX", {"rotary_pct": 0.25}, [(0, 2), (1, 3), *((i, i + 1) for i in range(4, 16, 2))]),
    ],
)
def test_the_layout_of_pairs_is_found_in_the_graph(kind: str, changes: dict[str, Any], channels: list[Any], tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 99}
    config = getattr(hf, f"{kind}Config")(**sizes, **changes, attn_implementation="sdpa", pad_token_id=0, bos_token_id=1, eos_token_id=2)
    path = dyncc.calibrate_pairs(getattr(hf, f"{kind}ForCausalLM")(config).eval(), [IDS], tmp_path / "file", top=8, rows=2)
    assert load_pairs(path).channels.tolist() == [list(pair) for pair in channels]


def test_models_and_texts_that_calibration_does_not_take(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(BadCalibration, match="no text is given"):
        dyncc.calibrate_pairs(decoder(), [], path)
    with pytest.raises(BadCalibration, match=r"must be \[batch, more than top=256 tokens\]"):
        dyncc.calibrate_pairs(decoder(), [IDS], path)
    with pytest.raises(BadCalibration, match="load it with attn_implementation='sdpa'"):
        dyncc.calibrate_pairs(decoder(attn_implementation="eager"), [IDS], path, top=8)
    config = hf.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=99, attn_implementation="sdpa")
    learned = hf.GPT2LMHeadModel(config).eval()
    with pytest.raises(BadCalibration, match="give layout='half' or layout='interleaved'"):
        dyncc.calibrate_pairs(learned, [IDS], path, top=8)
    with pytest.raises(OutputNotWritable):
        dyncc.calibrate_pairs(learned, [IDS], tmp_path / "no" / "file", top=8, layout="half")
