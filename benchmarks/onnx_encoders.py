"""Encoders in ONNX Runtime as an engine: MiniLM at 1 and 16 x 256 tokens, and a ViT of ViT-B's shape (random weights) at 8 images.

    python benchmarks/onnx_encoders.py dense pruned --pairs 20 --write

dense   `torch.compile(model, backend="dyncc", options={"engine": "onnxruntime"})` against Inductor, and against a session made by hand on
        the file that `export_onnx` writes
pruned  half of the tokens kept from a third of the depth on, against every dense peer: once without OpenVINO, where the engine is
        ONNX Runtime, and once with it, where the engine is the fastest of all by measurement
bound   the model's matrix products alone, by PyTorch and by ONNX Runtime, against the whole model in Inductor: what an engine that
        multiplies as fast could win at most, if everything else took no time
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from products import by_onnxruntime, by_torch, products
from record import progress, write

import dyncc
from dyncc.bench import bench
from dyncc.bench_result import BenchResult, environment
from dyncc.models import load_minilm
from dyncc.sentences import passages
from dyncc.timing import paired

PEERS = ["eager", "inductor", "onnxruntime"]


@dataclass(frozen=True)
class Case:
    """A model with inputs, and the pipeline that keeps half of its tokens from a third of the depth on."""

    name: str
    model: Any
    inputs: dict[str, torch.Tensor]
    passes: str


def cases(names: list[str]) -> Iterator[Case]:
    """The chosen cases, loaded when their turn comes."""
    for batch in (1, 16):
        if f"minilm-{batch}" in names:
            model, tokenizer = load_minilm()
            inputs = passages(tokenizer, 256, batch, 1)[0]
            yield Case(f"MiniLM, {batch} x 256 tokens", model, inputs, "evit{keep=0.5 layers=1 fuse=false fill=zero}")
    if "vit" in names:
        from transformers import ViTConfig, ViTForImageClassification

        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(num_labels=1000)).eval()
        yield Case("ViT-B/16, 8 images", model, {"pixel_values": torch.randn(8, 3, 224, 224)}, "prune-tokens{keep=0.5 layers=3}")


def by_hand(case: Case) -> Callable[..., Any]:
    """The exported file in a session as its user would make it: numpy arrays in and out."""
    from dyncc.backends.ort_session import open_session

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        dyncc.optimize(case.model, (), case.inputs, passes="", evidence="off").export_onnx(path, verify=False)
        session = open_session(path)
    names = [value.name for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]

    def run(**inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        made = session.run(None, {name: inputs[name].numpy() for name in names})
        return {name: torch.from_numpy(array) for name, array in zip(outputs, made, strict=True)}

    return run


def dense(case: Case, options: argparse.Namespace) -> list[BenchResult]:
    """The engine against Inductor and a hand-made session."""
    return [_run(case, options, "dense", passes="", against=["inductor"], others={"by hand": lambda: by_hand(case)}, engine="onnxruntime")]


def pruned(case: Case, options: argparse.Namespace) -> list[BenchResult]:
    """Half of the tokens against all of them, in whatever runs all of them fastest."""
    found = [_run(case, options, "pruned", passes=case.passes, against=PEERS, engine="onnxruntime", door=2)]
    return [*found, _run(case, options, "pruned, with OpenVINO", passes=case.passes, against=[*PEERS, "openvino"], engine="auto", door=2)]


def bound(case: Case, options: argparse.Namespace) -> list[BenchResult]:
    """What products alone take of Inductor's time; printed, and written as ratios."""
    sizes = products(case.model, case.inputs)
    compiled = torch.compile(case.model, backend="inductor")
    alone = {"products, PyTorch": by_torch(sizes), "products, ONNX Runtime": by_onnxruntime(sizes)}
    with torch.no_grad():
        timings = paired(alone | {"inductor": lambda: compiled(**case.inputs)}, pairs=options.pairs, warmup=2, progress=progress)
    flops = sum(2 * math.prod(size) for size in sizes)
    rows = {}
    for name in alone:
        seconds, most = timings.median(name), timings.ratio("inductor", name)
        rows[name] = {"ms": 1e3 * seconds, "most_to_win": most.to_dict(), "flops": flops}
        took = f"{1e3 * seconds:.1f} ms ({flops / seconds / 1e9:.0f} GFLOP/s) of Inductor's {1e3 * timings.median('inductor'):.1f} ms"
        print(f"{case.name}, {name}: {took}, so that an engine wins {most} times at most", flush=True)
    if options.write:
        write("onnx_encoders", {f"{case.name}, bound": {"rows": rows, "pairs": options.pairs, "environment": environment()}})
    return []


KINDS = {"dense": dense, "pruned": pruned, "bound": bound}


def main(argv: list[str] | None = None) -> None:
    """Run the chosen comparisons, print their tables, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", default=[], metavar="|".join(KINDS), help="what to run (all by default)")
    parser.add_argument("--cases", nargs="+", default=["minilm-1", "minilm-16", "vit"])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/onnx_encoders.json")
    options = parser.parse_args(argv)
    unknown = [name for name in options.which if name not in KINDS]
    if unknown:
        parser.error(f"unknown comparison {unknown[0]!r}; choose from {', '.join(KINDS)}")
    for case in cases(options.cases):
        for kind in options.which or KINDS:
            for result in KINDS[kind](case, options):
                if options.write:
                    write("onnx_encoders", {result.title: result.to_dict()})


def _run(case: Case, options: argparse.Namespace, kind: str, **more: Any) -> BenchResult:
    result = bench(case.model, (), case.inputs, pairs=options.pairs, title=f"{case.name}, {kind}", progress=progress, **more)
    print(result, flush=True)
    if result.ratios:
        peer = min((name for name in result.ratios if name != "by hand"), key=result.timings.median)
        print(f"fastest dense peer: {peer}, {result.ratios[peer]}\n", flush=True)
    return result


if __name__ == "__main__":
    main()
