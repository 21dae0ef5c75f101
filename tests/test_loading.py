"""MODEL texts: every form that loads, and one clear error for every way it can fail."""

from __future__ import annotations

import os
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from dyncc import errors, loading

FACTORY = """
    import torch
    import neighbour_of_factory

    class Callable:
        def __call__(self, x): return x

    def good(): return torch.nn.Dropout(), (torch.ones(2),)
    def keywords(): return torch.nn.Linear(2, 2), {"input": torch.ones(2)}
    def both(): return torch.nn.Linear(2, 2), [torch.ones(2)], {}
    def raises(): raise ValueError("no weights\\nhere")
    def lonely(): return torch.nn.Linear(2, 2)
    def four(): return 1, 2, 3, 4
    def no_module(): return Callable(), (1,)
    def tensor(): return torch.nn.Linear(2, 2), torch.ones(2)
    def bad_kwargs(): return torch.nn.Linear(2, 2), (), 3
    constant = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "factory_of_tests.py").write_text(textwrap.dedent(FACTORY))
    (tmp_path / "neighbour_of_factory.py").write_text("")
    (tmp_path / "broken_factory.py").write_text("1 / 0")
    (tmp_path / "needy_factory.py").write_text("import no_such_package_at_all")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("factory_of_tests", "neighbour_of_factory", "broken_factory", "needy_factory"):
        sys.modules.pop(name, None)


def test_factories_are_found_in_the_current_folder(here: Path) -> None:
    before = list(sys.meta_path), list(sys.path)
    model, args, kwargs = loading.load("factory_of_tests:good")
    assert isinstance(model, torch.nn.Dropout)
    assert not model.training
    assert torch.equal(args[0], torch.ones(2))
    assert kwargs == {}
    assert (list(sys.meta_path), list(sys.path)) == before


def test_a_mapping_gives_keyword_inputs(here: Path) -> None:
    loaded = loading.load("factory_of_tests:keywords")
    assert loaded.args == ()
    assert list(loaded.kwargs) == ["input"]
    assert len(loading.load("factory_of_tests:both").args) == 1


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("factory_of_tests:raises", errors.FactoryRaised, r"raised ValueError: no weights here \(factory_of_tests.py:\d+\)$"),
        ("broken_factory:make", errors.FactoryRaised, r"module 'broken_factory' raised ZeroDivisionError: division by zero"),
        ("needy_factory:make", errors.FactoryRaised, "raised ModuleNotFoundError: No module named 'no_such_package_at_all'"),
        ("no_such_module:make", errors.ModelNotFound, "no module 'no_such_module' in this folder or environment"),
        ("factory_of_tests.deep:make", errors.ModelNotFound, "no module 'factory_of_tests.deep'"),
        ("factory_of_tests:god", errors.ModelNotFound, r"has no function 'god'; did you mean 'good'\?"),
        ("factory_of_tests:constant", errors.ModelNotFound, "has no function 'constant'"),
        ("factory_of_tests:lonely", errors.FactoryReturned, r"returned a Linear; return \(model, args\), \(model, args, kwargs\)"),
        ("factory_of_tests:four", errors.FactoryReturned, "returned a tuple of 4"),
        ("factory_of_tests:no_module", errors.FactoryReturned, "a Callable as the model, not a torch.nn.Module"),
        ("factory_of_tests:tensor", errors.FactoryReturned, "a Tensor as the inputs"),
        ("factory_of_tests:bad_kwargs", errors.FactoryReturned, "a int as the keyword inputs"),
        ("no/such/folder", errors.ModelNotFound, "no such file or folder"),
        ("missing.pt2", errors.ModelNotFound, "no such file or folder"),
        ("factory_of_tests.py", errors.ModelNotFound, "a file must be a .pt2 program"),
    ],
)
def test_every_failure_is_one_line(here: Path, name: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        loading.load(name)
    assert len(str(caught.value).splitlines()) == 1


def test_rooms_of_a_checkout_do_not_hide_installed_packages(here: Path) -> None:
    for name in ("dyncc", "kernels", "backends"):
        (here / name).mkdir()
        (here / name / "__init__.py").write_text("raise RuntimeError('shadowed')")
    (here / "factory_of_tests.py").write_text("import torch\ntry:\n    import kernels\nexcept ImportError:\n    found = False\n")
    with (here / "factory_of_tests.py").open("a") as file:
        file.write("import dyncc\ndef make(): return torch.nn.Linear(2, 2), (torch.ones(2),)\n")
    assert loading.load("factory_of_tests:make").kwargs == {}
    assert sys.modules["factory_of_tests"].found is False


def export(path: Path) -> None:
    program = torch.export.export(torch.nn.Linear(3, 2), (torch.ones(1, 3),))
    torch.export.save(program, path)


def test_a_pt2_program_brings_its_inputs(tmp_path: Path) -> None:
    export(tmp_path / "linear.pt2")
    model, args, kwargs = loading.load(str(tmp_path / "linear.pt2"))
    assert kwargs == {}
    assert model(*args).shape == (1, 2)
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_model_and_its_inputs_are_moved(here: Path) -> None:
    loaded = loading.load("factory_of_tests:keywords", "cpu")
    model, args, kwargs = loading.moved(loaded, torch.device("meta"))
    tensors = [*model.parameters(), *args, *kwargs.values()]
    assert kwargs and {x.device.type for x in tensors if isinstance(x, torch.Tensor)} == {"meta"}


class Numbered(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.arange(x.shape[1])


def test_what_a_pt2_program_makes_is_moved_too(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(Numbered(), (torch.ones(1, 3),)), tmp_path / "numbered.pt2")
    model, args, _ = loading._from_pt2(tmp_path / "numbered.pt2", torch.device("meta"))
    assert args[0].device.type == "meta" and model(*args).device.type == "meta"


@pytest.mark.parametrize("name", ["meta", "cpu:x", "cuda:99", "nowhere"])
def test_a_device_that_is_not_here(name: str) -> None:
    with pytest.raises(errors.UnknownDevice, match=f"no device '{name}' here .*choose one of cpu"):
        loading.load("factory_of_tests:good", name)


def test_a_pt2_without_inputs(tmp_path: Path) -> None:
    program = torch.export.export(torch.nn.Linear(3, 2), (torch.ones(1, 3),))
    program._example_inputs = None
    torch.export.save(program, tmp_path / "bare.pt2")
    with pytest.raises(errors.NotAPt2, match="it holds no example inputs"):
        loading.load(str(tmp_path / "bare.pt2"))


def test_files_that_are_no_pt2(tmp_path: Path) -> None:
    (tmp_path / "text.pt2").write_text("hello")
    with pytest.raises(errors.NotAPt2, match=r"text.pt2 is not a usable .pt2 program: it is not an archive"):
        loading.load(str(tmp_path / "text.pt2"))
    torch.save({"weights": torch.ones(2)}, tmp_path / "weights.pt2")
    with pytest.raises(errors.NotAPt2, match="is not a usable .pt2 program") as caught:
        loading.load(str(tmp_path / "weights.pt2"))
    assert len(str(caught.value).splitlines()) == 1


class Trap:
    def __reduce__(self):
        return os.system, ("touch trapped",)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Trap(), tmp_path / "trap.pt2")
    with pytest.raises(errors.NotAPt2):
        loading.load("trap.pt2")
    assert not (tmp_path / "trapped").exists()


def save(folder: Path, model: torch.nn.Module) -> str:
    model.save_pretrained(folder)
    return str(folder)


def test_a_folder_of_a_text_model(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=50)
    loaded = loading.load(save(tmp_path, BertModel(config)))
    assert type(loaded.model) is BertModel
    assert loaded.kwargs["input_ids"].shape == (1, 64)
    assert torch.equal(loaded.kwargs["input_ids"], loading.load(str(tmp_path)).kwargs["input_ids"])
    assert loaded.model(**loaded.kwargs)[0].shape == (1, 64, 8)


def test_a_folder_of_an_image_model(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4)
    loaded = loading.load(save(tmp_path, ViTModel(config)))
    assert loaded.kwargs["pixel_values"].shape == (1, 3, 8, 8)
    assert loaded.model(**loaded.kwargs)[0].shape == (1, 5, 8)


def test_a_folder_of_an_encoder_decoder(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=40, decoder_start_token_id=0)
    loaded = loading.load(save(tmp_path, T5ForConditionalGeneration(config)))
    assert loaded.model(**loaded.kwargs).logits.shape == (1, 1, 40)


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(errors.BadModelDirectory, match="it holds neither config.json nor a .gguf file"):
        loading.load(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(errors.BadModelDirectory, match="cannot load a model from folder") as caught:
        loading.load(str(tmp_path))
    assert len(str(caught.value).splitlines()) == 1
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(errors.BadModelDirectory, match=r"it holds 2 \.gguf files; keep one"):
        loading.load(str(tmp_path))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=50)
    model = BertModel(config)
    config.architectures = ["BertModel"]
    config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(errors.BadModelDirectory):
        loading.load(str(tmp_path))
