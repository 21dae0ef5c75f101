"""The command line: `dyncc passes | explain | bench | convert | fit | kernels | demo | cache`.

Results go to stdout (with --json as JSON), messages to stderr. Exit codes: 0 done, 1 a check failed, 2 bad use or input.
Whatever takes long to import is imported inside the command that needs it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from dyncc.errors import DynccError, DynccUsageError

DONE, FAILED, BAD_USE = 0, 1, 2

app = typer.Typer(
    name="dyncc", help="Make the transformer models you already have do less work, and prove it on your inputs.", add_completion=False
)

MODEL_HELP = "module:factory, a .pt2 file, or a folder that transformers can load"
Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
Passes = Annotated[str | None, typer.Option(help="pipeline text, such as 'evit{keep=0.7}'; default: the exact passes", metavar="TEXT")]
Engine = Annotated[str, typer.Option(help="inductor, onnxruntime, openvino, reference or auto (measures once)")]
Device = Annotated[str | None, typer.Option(help="move the model and its inputs to this device first, such as cuda", metavar="NAME")]
PEERS_HELP = "what to compare with, of eager, inductor, onnxruntime, openvino and transformers-onnx"
DATA_HELP = "module:function (returns calls of one size), a .safetensors file, or text for a model folder"
Json = Annotated[bool, typer.Option("--json", help="print JSON on stdout")]


@app.callback(invoke_without_command=True)
def _options(context: typer.Context, version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        typer.echo(f"dyncc {importlib.metadata.version('dyncc')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def passes(as_json: Json = False) -> int:
    """List the passes and recipes that a pipeline may name, with their options."""
    with _quiet_stdout():
        from dyncc.catalogue import list_passes

        found = list_passes()
    if as_json:
        return _print_json([info.to_dict() for info in found])
    from dyncc.tables import passes_table

    return _print(passes_table(found))


@app.command()
def explain(
    model: Model,
    passes: Passes = None,
    evidence: Annotated[str, typer.Option(help="off, numeric or timed")] = "timed",
    engine: Engine = "inductor",
    device: Device = None,
    strict: Annotated[bool, typer.Option("--strict", help="a refusal is a failure (exit code 1)")] = False,
    dump_dir: Annotated[Path | None, typer.Option(help="write the graph before and after every stage here")] = None,
    as_json: Json = False,
) -> int:
    """Show what dyncc finds in a model, what each pass did or refused and why, and the evidence."""
    from dyncc.options import check_engine, check_evidence
    from dyncc.outputs import writable_folder

    check_engine(engine)
    check_evidence(evidence)
    _check_passes(passes)
    folder = writable_folder(dump_dir) if dump_dir else None
    with _quiet_stdout():
        import torch

        import dyncc
        from dyncc.loading import load

        loaded = load(model, device)
        with torch.no_grad():
            dump = str(folder) if folder else None
            optimized = dyncc.optimize(
                loaded.model, loaded.args, loaded.kwargs, passes=passes, engine=engine, evidence=evidence, strict=strict, dump_dir=dump
            )
            report = optimized.report
    _print_json(report.to_dict()) if as_json else _print(str(report))
    return FAILED if report.fallback else DONE


@app.command()
def bench(
    model: Model,
    passes: Passes = None,
    pairs: Annotated[int, typer.Option(min=2, help="interleaved timings per variant")] = 20,
    against: Annotated[str, typer.Option(help=PEERS_HELP, metavar="NAMES")] = "eager,inductor",
    engine: Engine = "inductor",
    device: Device = None,
    door: Annotated[int, typer.Option(min=1, max=2, help="1 compiles in place (torch.compile), 2 offline (dyncc.optimize)")] = 1,
    as_json: Json = False,
) -> int:
    """Time a model under dyncc beside eager and plain Inductor, in one run, interleaved, with the change in quality."""
    from dyncc.options import PEERS, check_engine
    from dyncc.progress import progress

    peers = tuple(check_engine(name.strip(), PEERS) for name in against.split(","))
    check_engine(engine)
    _check_passes(passes)
    with _quiet_stdout(), progress() as tell:
        from dyncc.bench import bench as measure
        from dyncc.loading import load

        settings: dict[str, Any] = {"passes": passes, "pairs": pairs, "against": peers, "engine": engine, "door": door}
        result = measure(*load(model, device), **settings, title=model, progress=tell)
    _print_json(result.to_dict()) if as_json else _print(str(result))
    return FAILED if result.fallbacks or result.timings.failures else DONE


@app.command()
def convert(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="name.onnx, name.pt2, name.aoti.pt2, or a folder for a dyncc artefact")],
    passes: Passes = None,
    verify: Annotated[bool, typer.Option(help="run the file before it takes its place")] = True,
    dynamic: Annotated[bool, typer.Option(help="let the batch, and the length of token ids and masks, vary where the model allows")] = True,
    engine: Engine = "inductor",
    device: Device = None,
    evidence: Annotated[str, typer.Option(help="off, numeric or timed")] = "numeric",
    strict: Annotated[bool, typer.Option("--strict", help="a refusal is a failure (exit code 1)")] = False,
    as_json: Json = False,
) -> int:
    """Optimize a model and write it as ONNX, as a program of torch.export, as an AOTInductor package, or as a dyncc artefact."""
    from dyncc.options import check_engine, check_evidence

    check_engine(engine)
    check_evidence(evidence)
    _check_passes(passes)
    with _quiet_stdout():
        from dyncc.convert import check_output, convert_model
        from dyncc.loading import load

        check_output(output)
        settings: dict[str, Any] = {"passes": passes, "engine": engine, "evidence": evidence, "strict": strict}
        written = convert_model(*load(model, device), output, verify=verify, dynamic=dynamic, tell=_note, **settings)
    from dyncc.tables import written_text

    return _print_json(written) if as_json else _print(written_text(written))


@app.command()
def fit(
    model: Model,
    data: Annotated[str, typer.Option(help=DATA_HELP, metavar="DATA")],
    output: Annotated[Path, typer.Option("-o", "--output", help="folder for parameters.safetensors; a fit cut off goes on from there")],
    plan: Annotated[str, typer.Option(help="what to fit, such as 'exits{layers=8,16 probe=true} units{rank=32} drops'", metavar="TEXT")],
    length: Annotated[int, typer.Option(min=1, help="tokens a row of a text file")] = 512,
    as_json: Json = False,
) -> int:
    """Fit exit maps, surrogates of layers or a ranking of layers in closed form on calibration data, read once."""
    from dyncc.progress import progress

    with _quiet_stdout(), progress() as tell:
        from dyncc.fitting.calibration import Batch, open_data
        from dyncc.fitting.parts import parts_of
        from dyncc.fitting.run import fit as fit_model
        from dyncc.loading import load

        parts_of(plan)
        loaded = load(model)
        found = open_data(data, model, Batch(loaded.args, loaded.kwargs), length)
        fitted = fit_model(loaded.model, data=found, plan=plan, output=output, progress=tell)
    return _print_json(fitted.to_dict()) if as_json else _print(str(fitted))


def _note(message: str) -> None:
    typer.echo(message, err=True)


@app.command()
def kernels(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP)] = None,
    target: Annotated[str, typer.Option(help="compile for this device, such as cuda:90, and tell what each kernel takes there")] = "",
    dump: Annotated[Path | None, typer.Option(help="write the source of each kernel into this folder")] = None,
    tune: Annotated[bool, typer.Option("--tune", help="time tile sizes on this machine's GPU, remember the fastest")] = False,
    passes: Passes = None,
    as_json: Json = False,
) -> int:
    """List the Triton kernels that dyncc generates, or those for a model and who asked for each; only --tune needs a GPU."""
    from dyncc.kernels.generator import catalogue
    from dyncc.outputs import writable_folder

    if passes is not None and model is None:
        raise DynccUsageError("--passes is about a model: give dyncc kernels MODEL --passes TEXT")
    _check_passes(passes)
    folder = writable_folder(dump) if dump else None
    with _quiet_stdout():
        asked = None if model is None else _generated(model, passes)
        rows = catalogue.rows(target, folder, asked)
        tuned = catalogue.tuned(asked) if tune else []
    if tune:
        return _print_json([found.to_dict() for found in tuned]) if as_json else _print("\n".join(map(str, tuned)) or NO_KERNELS)
    return _print_json(rows) if as_json else _print("\n".join(catalogue.line(row) for row in rows) or NO_KERNELS)


NO_KERNELS = "no kernel is generated for this model: fuse-gated-attention and fuse-linear-attention, named in --passes, ask for most"


def _generated(model: str, passes: str | None) -> list[Any]:
    import torch

    import dyncc
    from dyncc.generated import generated
    from dyncc.loading import load

    loaded = load(model)
    with torch.no_grad():
        optimized = dyncc.optimize(loaded.model, loaded.args, loaded.kwargs, passes=passes, engine="reference", evidence="numeric")
    return list(generated(optimized.program, optimized.report.difference))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="folder for the report")] = Path("dyncc-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="fewer documents and timings")] = False,
    as_json: Json = False,
) -> int:
    """Run the main job on two real models that come as packages: dense against dyncc, speed beside quality."""
    from dyncc.outputs import writable_folder
    from dyncc.progress import progress

    folder = writable_folder(output)
    with _quiet_stdout(), progress() as tell:
        from dyncc import demo as demonstration

        result = demonstration.run(folder, quick, tell)
    return _print_json(result) if as_json else _print(str(result.get("text", json.dumps(result, indent=2, default=str))))


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="remove every stored verdict")] = False,
    as_json: Json = False,
) -> int:
    """Show the verdicts stored on disk, or clear them."""
    from dyncc import verdicts

    removed = verdicts.clear() if clear else 0
    state = {"path": str(verdicts.folder()), "entries": len(verdicts.entries()), "bytes": verdicts.size(), "removed": removed}
    if as_json:
        return _print_json(state)
    words = f"{state['path']}: {state['entries']} verdicts, {state['bytes']:,} bytes"
    return _print(words + (f" ({removed} removed)" if clear else ""))


def _check_passes(text: str | None) -> None:
    from dyncc.pipeline import build

    build(text)


def _print_json(value: Any) -> int:
    typer.echo(json.dumps(value, indent=2, default=str))
    return DONE


def _print(value: Any) -> int:
    if isinstance(value, str):
        typer.echo(value)
        return DONE
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200).print(value)
    return DONE


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """What libraries and factories print goes to stderr: stdout holds results only."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _leave_checkout() -> None:
    """Started by `python -m` in a checkout of dyncc, its `kernels` would hide an installed package of that name."""
    root = Path(__file__).resolve().parents[1]
    if (root / "kernels").is_dir() and (root / "pyproject.toml").is_file():
        sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != root]


def main(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit code; every mistake becomes one `error:` line."""
    _leave_checkout()
    try:
        code = app(args=arguments, prog_name="dyncc", standalone_mode=False)
    except DynccUsageError as error:
        return _fail(str(error), BAD_USE)
    except DynccError as error:
        return _fail(str(error), FAILED)
    except Exception as error:
        if hasattr(error, "format_message"):
            return _fail(f"{error.format_message()} (dyncc --help lists the commands)", BAD_USE)
        if os.environ.get("DYNCC_DEBUG"):
            raise
        words = " ".join(str(error).split())
        return _fail(f"internal: {type(error).__name__}: {words} (DYNCC_DEBUG=1 shows the trace)", FAILED)
    return code if isinstance(code, int) else DONE


def _fail(message: str, code: int) -> int:
    typer.echo(f"error: {message}", err=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
