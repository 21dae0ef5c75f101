"""The command line: exit codes, one-line errors, JSON on stdout and messages on stderr."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console

import dyncc
from dyncc import cli, errors
from dyncc.passes import EXACT
from dyncc.progress import progress

ROOT = Path(cli.__file__).resolve().parents[1]
FACTORY = """
    import torch

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)
            self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

        def forward(self, x):
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
            rows = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + self.out(rows.transpose(1, 2).reshape(x.shape))
            return x + self.down(torch.relu(self.up(x)))

    def make():
        print("loading")
        torch.manual_seed(0)
        return torch.nn.Sequential(Layer(), Layer()), (torch.randn(1, 6, 8),)
    def raises(): raise ValueError("no weights here")
    def wrong(): return 3
"""


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    (tmp_path / "factory_of_cli.py").write_text(textwrap.dedent(FACTORY))
    (tmp_path / "text.pt2").write_text("not a program")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DYNCC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("DYNCC_DEBUG", raising=False)

    def call(*words: str) -> Ran:
        code = cli.main(list(words))
        return Ran(code, *capsys.readouterr())

    yield call
    sys.modules.pop("factory_of_cli", None)


MODEL = "factory_of_cli:make"
BAD = {
    "unknown pass": (["explain", MODEL, "--passes", "prune-token"], "'prune-token'; did you mean 'prune-tokens' or 'route-tokens'?"),
    "unknown option": (
        ["explain", MODEL, "--passes", "prune-tokens{kep=0.5}"],
        "prune-tokens has no option 'kep'; did you mean 'keep'? (its options: ",
    ),
    "bad choice": (["bench", MODEL, "--passes", "prune-tokens{score=cls-atention}"], "did you mean 'cls-attention'"),
    "keep": (["explain", MODEL, "--passes", "prune-tokens{keep=1.5}"], "keep=1.5 is out of range: use a ratio above 0.0"),
    "layer": (
        ["explain", MODEL, "--passes", "prune-tokens{layers=7 score=hidden-norm}", "--engine", "reference", "--evidence", "off"],
        "layer 7 is out of range: the model's 2 layers are numbered 0 to 1",
    ),
    "model path": (["explain", "no/such/model"], "model 'no/such/model' not found: no such file or folder"),
    "factory raises": (["explain", "factory_of_cli:raises"], "factory 'factory_of_cli:raises' raised ValueError: no weights here"),
    "factory returns": (["explain", "factory_of_cli:wrong"], "factory 'factory_of_cli:wrong' returned a int; return (model, args)"),
    "pt2": (["bench", "text.pt2"], "text.pt2 is not a usable .pt2 program"),
    "dump folder": (["explain", MODEL, "--dump-dir", "text.pt2/dump"], "cannot write to text.pt2/dump: Not a directory"),
    "demo folder": (["demo", "--output", "text.pt2/out"], "cannot write to text.pt2/out: Not a directory"),
    "engine": (["explain", MODEL, "--engine", "inductr"], "unknown engine 'inductr'; did you mean 'inductor'?; choose one of auto"),
    "peer": (["bench", MODEL, "--against", "eagr"], "unknown engine 'eagr'; did you mean 'eager'?; choose one of eager, inductor, onnx"),
    "evidence": (["explain", MODEL, "--evidence", "full"], "unknown evidence 'full'; choose one of off, numeric, timed"),
    "no such device": (["bench", MODEL, "--device", "cpu:x"], "no device 'cpu:x' here (Invalid device string: 'cpu:x'); choose one of cpu"),
    "a device of no numbers": (["explain", MODEL, "--device", "meta"], "no device 'meta' here (its tensors hold no numbers)"),
    "command": (["explian"], "No such command 'explian'"),
    "argument": (["explain"], "Missing argument"),
    "flag": (["cache", "--wipe"], "No such option"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD)
def test_bad_use_is_one_error_line_and_exit_code_2(run: Any, words: list[str], message: str) -> None:
    code, out, err = run(*words)
    assert code == 2
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in err


def test_a_syntax_error_shows_a_caret(run: Any) -> None:
    code, out, err = run("explain", MODEL, "--passes", "prune-tokens{keep}")
    assert (code, out) == (2, "")
    first, text, caret = err.splitlines()
    assert first == "error: pipeline syntax: expected '=' after 'keep' at column 18"
    assert caret.index("^") == text.index("}")


def test_passes_lists_passes_and_recipes(run: Any) -> None:
    code, out, err = run("passes", "--json")
    found = {entry["name"]: entry for entry in json.loads(out)}
    assert (code, err) == (0, "")
    assert list(found)[:4] == ["fuse-attention", "simplify-mask", "slice-last-token", "drop-repeat-kv"]
    assert found["slice-last-token"]["exact"] and found["slice-last-token"]["default"]
    assert not found["prune-tokens"]["exact"]
    assert found["evit"]["configures"] == "prune-tokens"
    options = {option["name"]: option for option in found["evit"]["options"]}
    assert options["keep"]["default"] == "0.7"
    assert "cls-attention" in options["score"]["choices"]
    code, out, _ = run("passes")
    assert code == 0
    assert "recipe of prune-tokens" in out


def test_explain_prints_a_report(run: Any) -> None:
    words = ("explain", MODEL, "--engine", "reference", "--evidence", "numeric")
    code, out, err = run(*words, "--device", "cpu", "--json", "--dump-dir", "dump")
    report = json.loads(out)
    assert code == 0
    assert "loading" in err
    assert [rewrite["name"] for rewrite in report["rewrites"]] == list(EXACT)
    assert any(Path("dump").rglob("*"))
    code, out, _ = run(*words, "--passes", "prune-tokens{layers=0 score=hidden-norm keep=0.5},slice-last-token")
    assert code == 0
    assert "attention: 2 of 2 found" in out
    assert "regions: 2 attention, 2 layer, 2 mlp" in out
    assert "prune-tokens{keep=0.5 layers=0 score=hidden-norm}: applied 1/1" in out
    assert "cosine" in out
    assert re.search(r"graph: .*\+1 index_select", out)
    assert re.search(r"FLOPs [\d,]+ -> [\d,]+ \(\d+\.\d%\)", out)
    assert "slice-last-token: refused 0/0 - the output uses every position" in out


def test_strict_turns_a_refusal_into_exit_code_1(run: Any) -> None:
    code, out, err = run("explain", MODEL, "--engine", "reference", "--evidence", "off", "--strict", "--passes", "slice-last-token")
    assert (code, out) == (1, "")
    assert "slice-last-token" in err.splitlines()[-1]


def test_a_fallback_is_a_failed_check(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    report = types.SimpleNamespace(fallback="lowering failed", to_dict=lambda: {"fallback": "lowering failed"})
    monkeypatch.setattr(dyncc, "optimize", lambda *args, **kwargs: types.SimpleNamespace(report=report))
    code, out, _ = run("explain", MODEL, "--json")
    assert code == 1
    assert json.loads(out) == {"fallback": "lowering failed"}


@pytest.mark.parametrize(("error", "code"), [(errors.RefusedError("no"), 1), (errors.DynccUsageError("no"), 2), (ValueError("no\nway"), 1)])
def test_what_a_command_raises_sets_the_exit_code(run: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(dyncc, "optimize", fail)
    ran = run("explain", MODEL)
    assert ran.code == code
    assert len(ran.err.strip().splitlines()[-1]) > len("error: ")
    if isinstance(error, ValueError):
        assert "error: internal: ValueError: no way (DYNCC_DEBUG=1 shows the trace)" in ran.err
        monkeypatch.setenv("DYNCC_DEBUG", "1")
        with pytest.raises(ValueError, match="no"):
            run("explain", MODEL)


def test_bench_hands_over_the_settings(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def measure(model: Any, args: Any, kwargs: Any, **settings: Any) -> Any:
        seen.update(settings, model=model, args=args)
        settings["progress"]("timing", 1, 2)
        timings = types.SimpleNamespace(failures={})
        return types.SimpleNamespace(to_dict=lambda: {"pairs": settings["pairs"]}, fallbacks=[], timings=timings)

    monkeypatch.setattr("dyncc.bench.bench", measure)
    code, out, err = run("bench", MODEL, "--passes", "evit{keep=0.5}", "--pairs", "4", "--against", "eager", "--door", "2", "--json")
    assert (code, json.loads(out)) == (0, {"pairs": 4})
    assert "timing" in err
    assert isinstance(seen["model"], torch.nn.Sequential)
    assert (seen["passes"], seen["against"], seen["door"], seen["engine"]) == ("evit{keep=0.5}", ("eager",), 2, "inductor")


def test_demo_hands_over_the_folder(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dyncc.demo.run", lambda output, quick, progress: {"output": str(output), "quick": quick})
    code, out, _ = run("demo", "--output", "made/here", "--quick", "--json")
    assert (code, json.loads(out)) == (0, {"output": "made/here", "quick": True})
    assert Path("made/here").is_dir()


def test_cache_shows_and_clears(run: Any, tmp_path: Path) -> None:
    from dyncc import verdicts

    verdicts.put(verdicts.key("graph", [], ""), {"applied": True})
    state = json.loads(run("cache", "--json").out)
    assert (state["path"], state["entries"], state["removed"]) == (str(tmp_path / "cache"), 1, 0)
    assert state["bytes"] > 0
    assert "0 verdicts, 0 bytes (1 removed)" in run("cache", "--clear").out


@pytest.mark.parametrize("command", ["", "passes", "explain", "bench", "convert", "demo", "cache"])
def test_help_of_every_command(run: Any, command: str) -> None:
    code, out, _ = run(*command.split(), "--help")
    assert code == 0
    assert "Usage: dyncc" in out


def test_bare_call_and_version(run: Any) -> None:
    assert "Usage: dyncc" in run().out
    assert run("--version").out.startswith("dyncc 0.")


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_it_runs_in_the_repository_root_and_hides_no_package() -> None:
    ran = python("-m", "dyncc.cli", "passes", "--json")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert len(json.loads(ran.stdout)) >= 6
    code = "from dyncc import cli; cli._leave_checkout(); import importlib.util as u; print(u.find_spec('kernels'), u.find_spec('passes'))"
    assert python("-c", code).stdout.strip() == "None None"


def test_help_imports_nothing_heavy() -> None:
    ran = python("-X", "importtime", "-m", "dyncc.cli", "--help")
    imported = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines() if line.startswith("import time:")}
    assert ran.returncode == 0
    assert not imported & {"torch", "numpy", "transformers", "networkx", "onnx"}


def test_progress_prints_each_step_once_when_piped() -> None:
    stream = io.StringIO()
    with progress(Console(file=stream)) as tell:
        for done in range(3):
            tell("timing", done, 3)
        tell("comparing", 0, 1)
    assert stream.getvalue() == "timing\ncomparing\n"


def test_progress_is_a_bar_on_a_terminal() -> None:
    stream = io.StringIO()
    with progress(Console(file=stream, force_terminal=True, width=100)) as tell:
        tell("timing", 2, 3)
    assert "timing" in stream.getvalue()
    assert "2/3" in stream.getvalue()
