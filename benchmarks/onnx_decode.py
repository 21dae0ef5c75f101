"""SmolLM2 in ONNX Runtime: dyncc's export, growing, in one buffer, and holding a part of the keys, against eager and the transformers
exporter's fused export.

    python benchmarks/onnx_decode.py --pairs 20 --write

Both exports are made by this script (the transformers exporter takes minutes); `--peer` and `--ours` name folders to keep them in.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import progress, write

import dyncc
from dyncc.bench_result import environment
from dyncc.decoding import Decode, EvictedDecode
from dyncc.models import load_smollm2
from dyncc.timing import Timings, paired


def example() -> Any:
    """The module of examples/onnx_generate.py."""
    path = Path(__file__).resolve().parents[1] / "examples" / "onnx_generate.py"
    spec = importlib.util.spec_from_file_location("onnx_generate", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peer_export(model: Any, tokenizer: Any, folder: Path, batch: int = 1) -> None:
    """The transformers exporter's prefill and decode graphs with its fusions for ONNX Runtime on a CPU; made of one text, they take one."""
    from transformers.exporters import OnnxConfig, OnnxExporter

    inputs = dict(tokenizer(["The quick brown fox jumps over the lazy dog"] * batch, return_tensors="pt"))
    with torch.no_grad():
        OnnxExporter().export_for_generation(model, inputs, OnnxConfig(dynamic=True, ort_fusions="cpu")).save_pretrained(folder)


def session(path: Path) -> Any:
    """A session with torch's number of threads."""
    from dyncc.backends.ort_session import open_session

    return open_session(path)


def feeds(graph: Any, past: list[np.ndarray]) -> dict[str, np.ndarray]:
    """What a decode graph is fed with: one token after `past` (k0, v0, k1, ...)."""
    batch, _, keys, _ = past[0].shape
    known = {
        "input_ids": np.full((batch, 1), 5), "position_ids": np.full((batch, 1), keys),
        "attention_mask": np.ones((batch, keys + 1), dtype=np.int64),
    }  # fmt: skip
    names = [v.name for v in graph.get_inputs()]
    cache = iter(past)
    return {name: known[name] if name in known else next(cache) for name in names}


def growing(graph: Any, past: list[np.ndarray]) -> Callable[[], Any]:
    """One step that hands the cache in and gets it back longer."""
    feed = feeds(graph, past)
    return lambda: graph.run(None, feed)[0]


def shared(graph: Any, past: list[np.ndarray], room: int, position: int | None = None) -> Callable[[], Any]:
    """One step with past and present bound to the same buffers, made once; `position` is that of the token where keys were dropped."""
    import onnxruntime as ort

    length = past[0].shape[2] + 1
    binding = graph.io_binding()
    feed = {"input_ids": np.array([[5]]), "attention_mask": np.ones((1, length), dtype=np.int64)}
    if position is not None:
        feed["position_ids"] = np.array([[position]])
    held = [ort.OrtValue.ortvalue_from_numpy(v) for v in feed.values()]
    for name, value in zip(feed, held, strict=True):
        binding.bind_ortvalue_input(name, value)
    names = [v.name for v in graph.get_outputs()]
    for name, array in zip(names[1:], past, strict=True):
        buffer = np.zeros((*array.shape[:2], room, array.shape[3]), dtype=array.dtype)
        buffer[:, :, : length - 1] = array
        value = ort.OrtValue.ortvalue_from_numpy(buffer)
        held.append(value)
        binding.bind_ortvalue_input(name.replace("present.", "past_key_values."), value)
        binding.bind_ortvalue_output(name, value)
    binding.bind_output(names[0])

    def run(held: list[Any] = held) -> Any:
        graph.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()

    return run


def export_evicted(model: Any, file: Path) -> None:
    """The step after a past from which keys were dropped."""
    config, held = model.config, torch.export.Dim("held", min=2, max=16384)
    width = config.hidden_size // config.num_attention_heads
    past = [torch.randn(1, config.num_key_value_heads, 24, width) for _ in range(2 * config.num_hidden_layers)]
    call = (torch.tensor([[5]]), torch.ones(1, 25, dtype=torch.long), torch.tensor([[40]]), *past)
    sizes = ({}, {1: held + 1}, {}, tuple({2: held} for _ in past))
    made = dyncc.optimize(EvictedDecode(model), call, dynamic_shapes=sizes, engine="reference", evidence="off")
    print(file.name, made.export_onnx(file).fused)


def measure(model: Any, ours: Path, peer: Path, keys: int, pairs: int, room: int, held: int) -> dict[str, Any]:
    """Milliseconds a token and paired ratios at a number of cached keys; where `held` is smaller, also when so many are left of them."""
    config = model.config
    width = config.hidden_size // config.num_attention_heads
    generator = torch.Generator().manual_seed(keys)
    cache = [torch.randn(1, config.num_key_value_heads, keys, width, generator=generator) for _ in range(2 * config.num_hidden_layers)]
    arrays = [t.numpy() for t in cache]
    step, mask = Decode(model), torch.ones(1, keys + 1, dtype=torch.long)
    mine, theirs = session(ours / "decode.onnx"), session(peer / "decode.onnx")

    def eager() -> Any:
        with torch.no_grad():
            return step(torch.tensor([[5]]), mask, *cache)[0].numpy()

    runs = {"eager": eager, "transformers": growing(theirs, arrays), "dyncc": growing(mine, arrays)}
    runs["dyncc shared"] = shared(mine, arrays, room)
    wanted = dict.fromkeys(runs, eager())
    if held < keys:
        kept = [t[:, :, -held:].contiguous() for t in cache]
        with torch.no_grad():
            call = (torch.tensor([[5]]), mask[:, : held + 1], torch.tensor([[keys]]), *kept)
            wanted["dyncc evicted"] = EvictedDecode(model)(*call)[0].numpy()
        runs["dyncc evicted"] = shared(session(ours / "evicted.onnx"), [t.numpy() for t in kept], held + 256, keys)
    errors = {name: float(np.abs(run() - wanted[name]).max() / np.abs(wanted[name]).max()) for name, run in runs.items()}
    timings = paired(runs, pairs=pairs, progress=progress)
    return report(f"decode, {keys} keys", timings, errors)


def prefill(model: Any, ours: Path, peer: Path, length: int, pairs: int) -> dict[str, Any]:
    """A prompt to the logits of its last position, keys of all layers returned."""
    ids = np.random.default_rng(0).integers(3, 40000, (1, length))
    graphs = {"transformers": session(peer / "prefill.onnx"), "dyncc": session(ours / "prefill.onnx")}
    known = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(length)[None]}
    runs = {}
    for name, graph in graphs.items():
        feed = {v.name: known[v.name] for v in graph.get_inputs()}
        runs[name] = lambda graph=graph, feed=feed: graph.run(None, feed)[0]
    last = [run()[:, -1] for run in runs.values()]
    errors = {"dyncc": float(np.abs(last[0] - last[1]).max() / np.abs(last[0]).max())}
    return report(f"prefill, {length} tokens", paired(runs, pairs=pairs, warmup=1, progress=progress), errors)


def report(title: str, timings: Timings, errors: dict[str, float]) -> dict[str, Any]:
    """Print and return medians and the ratios that claims are made of."""
    found: dict[str, Any] = {"medians": {n: timings.median(n) for n in timings.seconds}, "errors": errors, **timings.to_dict()}
    pairs = [("transformers", n) for n in timings.seconds if n.startswith("dyncc")] + [("eager", "dyncc"), ("dyncc", "dyncc shared")]
    pairs += [("dyncc shared", "dyncc evicted")]
    found["ratios"] = {f"{b} / {v}": timings.ratio(b, v).to_dict() for b, v in pairs if b in timings.seconds and v in timings.seconds}
    print(title, {n: f"{1000 * v:.1f} ms" for n, v in found["medians"].items()}, {n: f"{e:.1e}" for n, e in errors.items()})
    for name, ratio in found["ratios"].items():
        print(f"  {name}: {ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]", flush=True)
    return {**found, "environment": environment()}


def main(argv: list[str] | None = None) -> None:
    """Export where needed, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--keys", type=int, nargs="*", default=[64, 8000])
    parser.add_argument("--prompt", type=int, nargs="*", default=[4096])
    parser.add_argument("--room", type=int, default=8192, help="keys that the shared buffers hold")
    parser.add_argument("--held", type=int, default=1024, help="keys left after eviction, where more were read")
    parser.add_argument("--peer", type=Path, help="folder of the transformers exporter's graphs, made when it does not exist")
    parser.add_argument("--ours", type=Path, help="folder of dyncc's graphs, made when it does not exist")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/onnx_decode.json")
    options = parser.parse_args(argv)
    model, tokenizer = load_smollm2()
    with tempfile.TemporaryDirectory() as scratch:
        ours, peer = options.ours or Path(scratch) / "ours", options.peer or Path(scratch) / "peer"
        if not (ours / "decode.onnx").is_file():
            for written in example().export(model, ours):
                print(written.path.name, written.fused)
        if not (ours / "evicted.onnx").is_file():
            export_evicted(model, ours / "evicted.onnx")
        if not (peer / "decode.onnx").is_file():
            peer_export(model, tokenizer, peer)
        at = (options.pairs, options.room, options.held)
        found = [(f"decode, {keys} keys", measure(model, ours, peer, keys, *at)) for keys in options.keys]
        found += [(f"prefill, {n} tokens", prefill(model, ours, peer, n, max(5, options.pairs // 2))) for n in options.prompt]
        if options.write:
            write("onnx_decode", dict(found))


if __name__ == "__main__":
    main()
