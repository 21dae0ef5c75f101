"""What the documents tell a reader to type or to open exists: commands with their options, make targets, files, pipelines."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer

from dyncc import cli, pipeline

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "dyncc|passes|kernels|backends|tests|docs|benchmarks|examples"
MADE_UP = {"passes/verb_noun.py", "backends/name.py"}
"""Names of files that a contributor is to write."""


def commands(text: str, program: str) -> list[list[str]]:
    """The words behind `program` of every command in code: in backticks, behind `$ ` or indented; comments are no part of them."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    code = [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", prose)]
    code += [line.removeprefix("$").strip() for line in text.splitlines() if line.startswith(("$ ", "    "))]
    return [shlex.split(line, comments=True)[1:] for line in code if re.match(rf"{program}\s+[a-z]", line)]


def options(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}


def missing(text: str) -> list[str]:
    """Everything that a document names and that is not there."""
    return [*missing_commands(text), *missing_scripts(text), *missing_files(text), *missing_targets(text)]


def missing_commands(text: str) -> list[str]:
    told = vars(typer.main.get_command(cli.app))["commands"]
    gone = []
    for name, *words in commands(text, "dyncc"):
        known = {opt for param in told[name].params for opt in param.opts} if name in told else None
        gone += [f"dyncc {name}"] if known is None else [f"dyncc {name} {opt}" for opt in sorted(options(words) - known)]
    return gone


def missing_scripts(text: str) -> list[str]:
    gone = []
    for script, *words in commands(text, "python"):
        if not (ROOT / script).is_file():
            gone.append(script)
            continue
        tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
        known = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        gone += [f"{script} {opt}" for opt in sorted(options(words) - known)]
    return gone


def missing_files(text: str) -> list[str]:
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    named = re.findall(rf"`((?:{FOLDERS})/[\w./*-]*)`", text)
    return [name for name in (*links, *named) if name not in MADE_UP and not list(ROOT.glob(name))]


def missing_targets(text: str) -> list[str]:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    return [f"make {words[0]}" for words in commands(text, "make") if words[0] not in known]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_what_is_named_exists(path: Path) -> None:
    assert missing(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_pipelines_can_be_built(path: Path) -> None:
    known = pipeline.default_registry().names()
    for call in re.findall(r"([a-z][a-z0-9-]*)(\{[^{}=\n]+=[^{}\n]*\})", path.read_text(encoding="utf-8")):
        if call[0] in known:
            assert pipeline.build("".join(call))


def test_what_is_not_there_is_told() -> None:
    text = """
    `dyncc explian x`, `dyncc bench x --paris 3`, `python benchmarks/gone.py`, `python benchmarks/depth.py --wrong 1`, [a](docs/gone.md),
    `passes/gone.py`, `passes/*.py`, `make nothing`, `make test`, `dyncc kernels --target cuda:90`, [a](README.md),
    `python tests/make_golden.py`
    """
    told = ["dyncc explian", "dyncc bench --paris", "benchmarks/gone.py", "benchmarks/depth.py --wrong", "docs/gone.md", "passes/gone.py"]
    assert missing(text) == [*told, "make nothing"]
