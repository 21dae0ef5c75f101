"""SmolLM2, one token after many cached keys: transformers' growing and preallocated caches against `dyncc.KVCache`.

    python benchmarks/kv_cache.py --cached 8000 --pairs 20 --write

Every call reads one more token, so all caches grow alike; nothing is rewound. Outputs are compared with eager's at the end.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from record import progress, write
from torch import Tensor
from transformers import StaticCache

import dyncc
from dyncc.bench_result import environment
from dyncc.decoding import Prefill, grow_from
from dyncc.models import english_tokens, load_smollm2
from dyncc.quality import compare
from dyncc.timing import paired

BASELINE = "eager, growing cache"


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


def variants(model: Any, past: Sequence[Tensor], token: Tensor, room: int) -> dict[str, Step]:
    """The peers and ours, each with a cache of its own."""
    preallocated = StaticCache(config=model.config, max_cache_len=past[0].shape[2] + room)

    def compiled(backend: str) -> Any:
        return torch.compile(model, backend=backend)

    return {
        BASELINE: Step(model, grow_from(past), token),
        "inductor, preallocated cache": Step(compiled("inductor"), filled(preallocated, past), token),
        "eager, KVCache": Step(model, filled(dyncc.KVCache(), past), token),
        "inductor, KVCache": Step(compiled("inductor"), filled(dyncc.KVCache(), past), token),
        "dyncc, KVCache": Step(compiled("dyncc"), filled(dyncc.KVCache(), past), token),
    }


def main(argv: list[str] | None = None) -> None:
    """Time all variants in turns, print ratios to eager's growing cache, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cached", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/kv_cache.json")
    options = parser.parse_args(argv)
    model, tokenizer = load_smollm2(getattr(torch, options.dtype))
    tokens = english_tokens(tokenizer)
    with torch.no_grad():
        _, *one = Prefill(model, keys=True)(tokens[: options.cached][None])
    past = [t.repeat(options.batch, 1, 1, 1) for t in one]
    token = tokens[options.cached : options.cached + 1][None].repeat(options.batch, 1)
    known = len(dyncc.reports())
    steps = variants(model, past, token, options.pairs + 64)
    timings = paired(steps, pairs=options.pairs, warmup=3, progress=progress)
    reports = dyncc.reports()[known:]
    dense = steps[BASELINE].logits
    rows: dict[str, Any] = {}
    for name in timings.seconds:
        ratio = timings.ratio(BASELINE, name)
        found = compare(dense, steps[name].logits, model.config.vocab_size)
        rows[name] = {"ms": 1000 * timings.median(name), "ratio": ratio.to_dict(), "first_call_seconds": timings.first[name], **found}
        print(f"{name:30} {1000 * timings.median(name):7.1f} ms, {ratio} times eager, first call {timings.first[name]:.1f} s, {found}")
    for name, why in timings.failures.items():
        print(f"{name:30} failed: {why}")
    print(f"graphs that dyncc lowered: {len(reports)}, fallbacks: {[r.fallback for r in reports if r.fallback]}")
    if options.write:
        title = f"{options.batch} x {options.cached} keys, {options.dtype}"
        write("kv_cache", {title: {"variants": rows, "pairs": options.pairs, "graphs": len(reports), "environment": environment()}})


if __name__ == "__main__":
    main()
