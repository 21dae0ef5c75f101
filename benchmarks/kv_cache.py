"""SmolLM2, one token after many cached keys: transformers' growing and preallocated caches against `dyncc.KVCache`, whole and with passes.

    python benchmarks/kv_cache.py --cached 8000 --pairs 20 --write

Every call reads one more token, so all caches grow alike; nothing is rewound. Outputs are compared with eager's at the end. With `--peer`
the transformers exporter's graph runs beside them in ONNX Runtime, and with `--ours` dyncc's, past and present in one buffer; both
read the same past and token with every call. Bounds: the bytes a step must read, at the speed of a plain sum.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from key_traffic import share_read
from onnx_decode import example, growing, peer_export, session, shared
from record import progress, write
from torch import Tensor
from transformers import StaticCache

import dyncc
from dyncc.bench_result import environment
from dyncc.decoding import Prefill, grow_from
from dyncc.models import english_tokens, load_smollm2
from dyncc.passes import EXACT as DEFAULT
from dyncc.quality import compare
from dyncc.timing import Timings, paired

BASELINE, PEER = "eager, growing cache", "onnxruntime, transformers exporter"
EXACT, APPENDED, BUFFER = "dyncc, KVCache", "dyncc, growing cache, append-in-place", "dyncc, onnxruntime, one buffer"
WEIGHTS, KEYS = "plain sum of the weights", "plain sum of keys and values"
POLICIES = [
    "snapkv{budget=1024}", "tokenselect{budget=1024 sinks=16 recents=64}", "quest{budget=1024}",
]  # fmt: skip


class Step:
    """Reads `token` once more with every call, after `past` and what was read before."""

    def __init__(self, run: Callable[..., Any], cache: Any, token: Tensor) -> None:
        self.run, self.cache, self.token = run, cache, token
        self.logits: Tensor | None = None

    def __call__(self) -> None:
        with torch.no_grad():
            self.logits = self.run(input_ids=self.token, past_key_values=self.cache, logits_to_keep=1).logits


def filled(cache: Any, past: Sequence[Tensor]) -> Any:
    """A cache with a copy of `past` (k0, v0, k1, ...) in it."""
    for layer, (key, value) in enumerate(zip(past[::2], past[1::2], strict=True)):
        cache.update(key, value, layer)
    return cache


def primed(passes: str, past: Sequence[Tensor]) -> Any:
    """A cache with passes that has read `past` and, where it evicts, has dropped keys; which ones does not matter to the clock."""
    cache = dyncc.KVCache(passes)
    for key, value in zip(past[::2], past[1::2], strict=True):
        layer = cache.layer_class_to_replicate()
        layer.lazy_initialization(key, value)
        keep = layer.policy.evict.budget if layer.policy.evict is not None else key.shape[2]
        layer.store.append(key[:, :, -keep:], value[:, :, -keep:])
        layer.seen = key.shape[2]
        cache.layers.append(layer)
    return cache


def variants(model: Any, past: Sequence[Tensor], token: Tensor, room: int, policies: Sequence[str]) -> dict[str, Callable[[], Step]]:
    """What makes the peers and ours, each with a cache of its own."""
    compiled = partial(torch.compile, model)
    static = partial(StaticCache, config=model.config, max_cache_len=past[0].shape[2] + room)
    appending = {"passes": " ".join((*DEFAULT, "append-in-place"))}
    made = {
        BASELINE: lambda: Step(model, grow_from(past), token),
        "inductor, growing cache": lambda: Step(compiled(backend="inductor"), grow_from(past), token),
        "dyncc, growing cache": lambda: Step(compiled(backend="dyncc"), grow_from(past), token),
        APPENDED: lambda: Step(compiled(backend="dyncc", options=appending), grow_from(past), token),
        "inductor, preallocated cache": lambda: Step(compiled(backend="inductor"), filled(static(), past), token),
        "eager, KVCache": lambda: Step(model, filled(dyncc.KVCache(), past), token),
        "inductor, KVCache": lambda: Step(compiled(backend="inductor"), filled(dyncc.KVCache(), past), token),
        EXACT: lambda: Step(compiled(backend="dyncc"), filled(dyncc.KVCache(), past), token),
    }
    chosen = {f"dyncc, {p}": lambda p=p: Step(compiled(backend="dyncc"), primed(p, past), token) for p in policies}
    return made | chosen


def exported(model: Any, tokenizer: Any, folder: Path, past: Sequence[Tensor]) -> Callable[[], Any]:
    """The transformers exporter's step for so many texts, made where `folder` has none."""
    batch = past[0].shape[0]
    folder = folder / f"batch-{batch}" if batch > 1 else folder
    if not (folder / "decode.onnx").is_file():
        peer_export(model, tokenizer, folder, batch)
    return growing(session(folder / "decode.onnx"), [t.numpy() for t in past])


def in_one_buffer(model: Any, folder: Path, past: Sequence[Tensor]) -> Callable[[], Any]:
    """dyncc's exported step, made where `folder` has none, with past and present bound to the same buffers."""
    if not (folder / "decode.onnx").is_file():
        example().export(model, folder)
    return shared(session(folder / "decode.onnx"), [t.numpy() for t in past], past[0].shape[2] + 64)


def plain_sums(model: Any, past: Sequence[Tensor]) -> dict[str, Callable[[], Any]]:
    """What reading each weight and each cached number once takes; numbers are added as fp32 whatever they are."""
    read = {WEIGHTS: [p.detach() for p in model.parameters()], KEYS: [t.contiguous() for t in past]}
    return {name: lambda parts=parts: [t.view(torch.float32).sum() for t in parts] for name, parts in read.items()}


def cached(model: Any, tokenizer: Any, count: int, batch: int) -> tuple[list[Tensor], Tensor]:
    """Keys and values of `count` tokens of English (k0, v0, k1, ...) and the token behind them, `batch` times each."""
    tokens = english_tokens(tokenizer)
    with torch.no_grad():
        _, *one = Prefill(model, keys=True)(tokens[:count][None])
    return [t.repeat(batch, 1, 1, 1) for t in one], tokens[count : count + 1][None].repeat(batch, 1)


def told(timings: Timings, steps: Mapping[str, Step], passes: Sequence[str], config: Any, keys: int) -> dict[str, Any]:
    """A row for each variant, printed: ratios to eager, to the whole cache and to the fastest peer, errors, and the bound."""
    fastest = min((n for n in timings.seconds if not n.startswith(("dyncc", "plain sum"))), key=timings.median)
    read = [1000 * timings.median(name) for name in (WEIGHTS, KEYS)]
    rows: dict[str, Any] = {}
    for name in timings.seconds:
        policy = name.removeprefix("dyncc, ") if name.removeprefix("dyncc, ") in passes else ""
        held = getattr(steps[name].cache, "bytes", None) if name in steps else None
        row: dict[str, Any] = {"ms": 1000 * timings.median(name), "first_call_seconds": timings.first[name], "bytes": held}
        row["ratio"] = timings.ratio(BASELINE, name).to_dict()
        words = f"{row['ms']:7.1f} ms, {timings.ratio(BASELINE, name)} times eager"
        if policy:  # chosen keys were not the text's own: its logits say nothing
            words += f", {(held or 0) / 1e6:.0f} MB held"
            if EXACT in timings.seconds:
                row["ratio_to_exact"] = timings.ratio(EXACT, name).to_dict()
                words += f", {timings.ratio(EXACT, name)} times the whole cache"
        elif name in steps:
            row |= compare(steps[BASELINE].logits, steps[name].logits, config.vocab_size)
            words += f", error {row['max_rel_error']:.1e}"
        if name.startswith("dyncc"):
            row["bound_ms"] = read[0] + read[1] * share_read(policy, keys, config.num_hidden_layers)
            row["ratio_to_fastest_peer"] = {"peer": fastest, **timings.ratio(fastest, name).to_dict()}
            words += f", bound {row['bound_ms']:.1f} ms, {timings.ratio(fastest, name)} times {fastest}"
        rows[name] = row
        print(f"{name:50} {words}, first call {row['first_call_seconds']:.0f} s")
    return rows


def main(argv: list[str] | None = None) -> None:
    """Time all variants in turns, print ratios to eager's growing cache, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("passes", nargs="*", default=POLICIES, help="caches with passes to time too")
    parser.add_argument("--cached", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--only", nargs="+", help="names of variants to time beside the baseline; all without it")
    parser.add_argument("--layers", type=int, help="the model's first layers alone, for a quick look")
    parser.add_argument("--peer", type=Path, help="folder of the transformers exporter's graphs (fp32), made when it does not exist")
    parser.add_argument("--ours", type=Path, help="folder of dyncc's graphs (fp32, batch 1), made when it does not exist")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/kv_cache.json")
    options = parser.parse_args(argv)
    torch._dynamo.config.recompile_limit = 64  # all variants compile one forward
    model, tokenizer = load_smollm2(getattr(torch, options.dtype))
    if options.layers:
        model.model.layers, model.config.num_hidden_layers = model.model.layers[: options.layers], options.layers
    past, token = cached(model, tokenizer, options.cached, options.batch)
    known = len(dyncc.reports())
    made = variants(model, past, token, options.pairs + 64, options.passes)
    steps = {name: make() for name, make in made.items() if not options.only or name in (BASELINE, *options.only)}
    others = plain_sums(model, past)
    if options.peer:
        others[PEER] = exported(model, tokenizer, options.peer, past)
    if options.ours:
        others[BUFFER] = in_one_buffer(model, options.ours, past)
    timings = paired(steps | others, pairs=options.pairs, warmup=3, progress=progress)
    reports = dyncc.reports()[known:]
    rows = told(timings, steps, options.passes, model.config, options.cached)
    for name, why in timings.failures.items():
        print(f"{name:30} failed: {why}")
    print(f"graphs that dyncc lowered: {len(reports)}, fallbacks: {[r.fallback for r in reports if r.fallback]}")
    if options.write:
        title = f"{options.batch} x {options.cached} keys, {options.dtype}"
        write("kv_cache", {title: {"variants": rows, "pairs": options.pairs, "graphs": len(reports), "environment": environment()}})


if __name__ == "__main__":
    main()
