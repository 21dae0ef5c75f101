"""The layout: rooms come from this checkout, stages import only earlier stages, no model family in the code, a whole wheel."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"dyncc": "dyncc", "dyncc.passes": "passes", "dyncc.kernels": "kernels", "dyncc.backends": "backends"}

# Stage -> what belongs to it; a stage imports its own and earlier ones. What is not listed may import everything.
STAGES = (
    ("base", ("errors", "options", "outputs", "verdicts", "evidence", "timing", "weights", "stamped_file", "pair_order", "given_weights",
              "fitted")),
    ("kernels", ("kernels",)),
    ("capture", ("ir", "capture", "canonical", "exported", "own_ops", "serialised", "pass_tensors")),
    ("analysis", ("analysis", "flops")),
    ("rewrite", ("rewrite", "refusal", "undo", "row_plan", "take_rows", "restrict", "region", "branch", "masked", "passes", "pipeline",
                 "catalogue")),
    ("backends", ("backends",)),
)
FAMILIES = {
    "bert", "roberta", "distilbert", "vit", "deit", "dinov2", "siglip", "gpt", "gpt2", "llama", "opt", "mistral",
    "mixtral", "qwen", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "gptneox", "neox", "t5", "whisper", "smollm",
    "smollm2", "minilm", "falcon", "bloom",
}
MAY_NAME_MODELS = {"dyncc/demo.py", "dyncc/models.py"}


def files() -> list[Path]:
    return sorted(path for room in ROOMS.values() for path in (ROOT / room).rglob("*.py") if "__pycache__" not in path.parts)


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize(("module", "folder"), ROOMS.items())
def test_rooms_come_from_this_checkout(module: str, folder: str) -> None:
    assert Path(importlib.import_module(module).__file__ or "").parent.resolve() == ROOT / folder


def test_no_core_file_takes_the_name_of_a_room() -> None:
    for room in ("passes", "kernels", "backends"):
        assert not list((ROOT / "dyncc").glob(f"{room}*"))


def stage(parts: tuple[str, ...]) -> int:
    """The stage of a module inside dyncc, given as its dotted parts; the last one for what is not listed."""
    for number, (_, members) in enumerate(STAGES):
        if parts and parts[0] in members:
            return number
    return len(STAGES)


def imports(path: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line and dotted parts below dyncc of everything of dyncc that a file imports, at any depth, types included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module and node.module.split(".")[0] == "dyncc":
            below = tuple(node.module.split(".")[1:])
            yield from ((node.lineno, (*below, name.name)) for name in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, tuple(a.name.split(".")[1:])) for a in node.names if a.name.split(".")[0] == "dyncc")


@pytest.mark.parametrize("path", files(), ids=label)
def test_a_stage_imports_only_earlier_stages(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    own = stage(parts[1:] if parts[0] == "dyncc" else parts)
    late = [f"line {line}: dyncc.{'.'.join(found)}" for line, found in imports(path) if stage(found) > own]
    assert not late


@pytest.mark.parametrize("path", files(), ids=label)
def test_no_relative_imports_and_no_room_by_its_bare_name(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert (node.module or "").split(".")[0] not in ("passes", "kernels", "backends")


def words(path: Path) -> Iterator[tuple[int, str]]:
    """Line and word of every name and text of a file that is neither docstring, comment nor citation."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    prose |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "citation"}
    for node in ast.walk(tree):
        texts = [value for _, value in ast.iter_fields(node) if isinstance(value, str)] if id(node) not in prose else []
        for text in texts:
            apart = re.sub(r"([a-z])([A-Z])", r"\1 \2", text).lower()
            yield from ((getattr(node, "lineno", 0), word) for word in re.findall(r"[a-z]+\d*", apart))


@pytest.mark.parametrize("path", [path for path in files() if label(path) not in MAY_NAME_MODELS], ids=label)
def test_code_names_no_model_family(path: Path) -> None:
    assert not [f"line {line}: {word}" for line, word in words(path) if word in FAMILIES]


def test_words_are_code_and_not_prose(tmp_path: Path) -> None:
    file = tmp_path / "sample.py"
    file.write_text('"""About gpt2."""\n# bert\nclass LlamaThing:\n    "vit"\n    mode = use(t5_x, "an opt", citation="whisper")\n')
    assert {word for _, word in words(file)} & FAMILIES == {"llama", "t5", "opt"}


@pytest.mark.parametrize("path", files(), ids=label)
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def test_pins_satisfy_the_open_ranges() -> None:
    import tomllib

    from packaging.requirements import Requirement

    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    for requirement in map(Requirement, wanted):
        if requirement.name in ("dyncc", "onnxruntime"):
            continue
        assert requirement.specifier.contains(pins[requirement.name]), requirement.name


def test_the_wheel_holds_the_rooms_inside_dyncc(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for folder in ROOMS.values():
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(source)], check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    inside = {room: module.replace(".", "/") for module, room in ROOMS.items()}
    wanted = {f"{inside[label(path).split('/')[0]]}/{label(path).partition('/')[2]}" for path in files()}
    assert wanted <= set(names)
    assert {"dyncc/py.typed", "dyncc/kernels/one_row/one_row.cpp", "dyncc/kernels/native/vectors.h"} <= set(names)
    assert {name.split("/")[0] for name in names} == {"dyncc", wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"}
